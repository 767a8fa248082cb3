"""Checks of a run's data: that it fits the model, and on resume that it is what the run was trained on."""

import hashlib
import json

import numpy as np

from ..config import RunConfig
from ..data import FirstStage, ImageSet, Latents, check_classes
from ..data.first_stage import load_autoencoder
from ..errors import UserError
from .checkpoint import Checkpoint
from .distributed import World
from .states import contents_of


def check_data(config: RunConfig, images: ImageSet, first_stage: FirstStage, world: World) -> None:
    """``UserError`` unless the data fits the model and the processes."""
    check_classes(images.classes, config.model.num_classes)
    for name, wanted, found in (
        ("input_size", config.model.input_size, first_stage.size),
        ("in_channels", config.model.in_channels, first_stage.channels),
    ):
        if wanted != found:
            raise UserError(f"model.{name}: {wanted}, but the data has {found} (data.source, data.vae)")
    if len(images.labels) < world.size:
        raise UserError(
            f"data.source: {len(images.labels)} images for {world.size} processes; each needs at least one"
        )
    ours = _digest(images)
    for rank, theirs in enumerate(world.all_gather_object(ours)):
        if theirs != ours:
            raise UserError(
                f"data.source: process {rank} found other images than process {world.rank} (by class); "
                "all processes need the same"
            )


def _digest(images: ImageSet) -> str:
    """Of the classes' names and every image's class."""
    digest = hashlib.sha256(json.dumps(list(images.classes)).encode())
    digest.update(np.asarray(images.labels, np.int64).tobytes())
    return digest.hexdigest()


def check_same_data(
    start: Checkpoint, config: RunConfig, images: ImageSet, first_stage: FirstStage
) -> list[str]:
    """``UserError`` if the run cannot resume with these images; a warning if its batches will differ."""
    if start.classes != tuple(images.classes):
        more, gone = (
            {*a} - {*b} for a, b in ((images.classes, start.classes), (start.classes, images.classes))
        )
        differing = [
            f"{len(some)} {word} ({min(some)})" for word, some in (("new", more), ("gone", gone)) if some
        ]
        why = f": {', '.join(differing)}" if differing else ""
        raise UserError(f"data.source: its classes differ from those of the run in {str(start.run)!r}{why}")
    _check_same_latents(start, config, first_stage)
    if start.state["num_images"] != len(images.labels):
        return [
            f"warning: the data had {start.state['num_images']} images and now has {len(images.labels)}: "
            "batches will differ from those of an uninterrupted run"
        ]
    if start.state.get("data") not in (None, contents_of(images), getattr(images, "digest", None)):
        return ["warning: the encoded data has changed since the run began: batches will differ"]
    return []


def _check_same_latents(start: Checkpoint, config: RunConfig, first_stage: FirstStage) -> None:
    """``UserError`` unless the model sees the same latents as before, or pixels as before.

    The autoencoder may have another name, but its weights must be the same; if the run began with a decoder
    of the user's own choice, that may be exchanged. They are read here if their fingerprint is not known.
    """
    if "latents" not in start.state:  # of an early version
        if start.config.data.vae != config.data.vae:
            raise UserError(
                f"data.vae: got {config.data.vae!r}, expected {start.config.data.vae!r}: the checkpoint has "
                "no fingerprint of its weights"
            )
        return
    before = start.state["latents"]
    if before is None or not isinstance(first_stage, Latents):
        if before is not None:
            raise UserError(
                f"data.vae: got None, expected the autoencoder of the run's latents, {before['vae']!r}"
            )
        if isinstance(first_stage, Latents):
            raise UserError(f"data.vae: got {first_stage.vae!r}, expected None: the run is trained on pixels")
        return
    vae, weights = first_stage.vae, before["fingerprint"]
    others = UserError(f"data.vae: got {vae!r}, expected the weights that encoded the run's latents")
    if first_stage.encoder != (start.state.get("encoder") or weights or first_stage.encoder):
        raise others
    if weights is None and first_stage.encodes and "encoder" not in start.state:
        raise UserError(
            f"data.source: got images, expected encoded latents: the checkpoint does not say whether {vae!r} "
            "encoded its latents"
        )
    for name in ("scale", "shift"):
        ours = getattr(first_stage, name)
        if before[name] != ours:
            raise UserError(
                f"data.vae: the run's latents have {name} {before[name]:g}, but now it is {ours:g}"
            )
    if weights is None or first_stage.fingerprint is not None:
        return
    if vae is not None and vae != before["vae"] and load_autoencoder(vae, "cpu").fingerprint != weights:
        raise others
    first_stage.fingerprint = weights
