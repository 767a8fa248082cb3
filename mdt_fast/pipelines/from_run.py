"""A pipeline's components from a run of ``mdt-fast train``."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from ..data import Latents, described_stage
from ..errors import UserError
from ..training.from_weights import open_for_drawing
from ..training.states import model_of
from .schedulers import published_scheduler


def components_of_run(run: Path, weights: str, vae: str | None = None) -> dict[str, Any]:
    """``MDTPipeline``'s arguments; ``UserError`` if the run, or the autoencoder it names, cannot be read."""
    if weights not in ("ema", "model"):
        raise UserError(f"weights: got {weights!r}, expected ema or model")
    opened = open_for_drawing(run, weights, "{}")
    config = opened.config
    data = config.data if vae is None else replace(config.data, vae=vae)
    stage = described_stage(opened.state.get("latents"), data)
    autoencoder = None
    if isinstance(stage, Latents):
        if stage.vae is not None:
            autoencoder = stage.opened().model
            own = autoencoder.config.scaling_factor, autoencoder.config.shift_factor or 0.0
            if own != (stage.scale, stage.shift):  # the pipeline decodes with its autoencoder's values
                autoencoder.register_to_config(scaling_factor=stage.scale, shift_factor=stage.shift)
    elif vae is not None:
        raise UserError("vae: the run was trained on pixels and needs none")
    scheduler = published_scheduler(
        config.diffusion,
        learn_sigma=config.model.learn_sigma,
        clip=stage.clip,
        sampler=config.sample.sampler,
    )
    return {
        "transformer": model_of(opened, weights),
        "scheduler": scheduler,
        "vae": autoencoder,
        "id2label": dict(enumerate(opened.classes)),
    }
