"""``mdt-fast sample``."""

import argparse
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from functools import partial

import numpy as np
from rich.console import Console

from ..data import Latents
from ..data.progress import ImageProgress
from ..errors import UserError
from ..files import remove_leftovers
from ..models.float8 import use_float8
from ..processes import Ranks
from ..sampling import (
    Inpainter,
    SampleFolder,
    Sampler,
    grid,
    save_npz,
    save_picture,
    save_pngs,
    shown,
    to_uint8,
)
from ..training.states import model_of
from .known import Known
from .sample_request import Request, requested
from .shared import set_threads

Draw = Callable[[Sequence[range]], Generator[np.ndarray, None, None]]


def sample(args: argparse.Namespace) -> int:
    set_threads(args.threads)
    ranks, console = Ranks.from_environment(), Console(highlight=False, soft_wrap=True)
    request = requested(args, ranks)
    opened, folder = request.opened, request.folder
    if ranks.rank == 0:
        if (note := opened.note(request.weights)) is not None:
            console.print(note, markup=False)
        if folder is not None and (there := folder.drawn()):
            console.print(f"{there} of {len(request.labels)} images already exist")
    draw = partial(drawn, request, ranks, console)
    if folder is None:
        made = _to_files(request, draw)
    else:
        count = _to_folder(folder, draw, ranks)
        made = _finish(folder, request) if folder.complete else []
    if made:
        console.print(f"{len(request.labels)} images from {opened.path} in {', '.join(made)}", markup=False)
    elif ranks.rank == 0:
        console.print(
            f"{count} images drawn; other processes do the rest; if none is running, use the same command",
            markup=False,
        )
    return 0


def drawn(
    request: Request, ranks: Ranks, console: Console, spans: Sequence[range]
) -> Generator[np.ndarray, None, None]:
    """Draw and yield the images of each span, uint8 [n, H, W, C]. No batch crosses spans, so images do not
    depend on which other spans this process draws."""
    stage, known, config = request.stage, request.known, request.config
    if isinstance(stage, Latents):
        stage.opened()  # report a missing autoencoder before sampling
    sampler = _sampler(request)
    total, before = sum(map(len, spans)), 0
    with ImageProgress(total, ranks.world, console if ranks.rank == 0 else None, "sampling") as bar:
        for span in spans:
            pictures = []
            for first in range(span.start, span.stop, config.batch_size):
                batch = request.labels[first : min(first + config.batch_size, span.stop)]

                def on_step(step: int, of: int, before: int = before, n: int = len(batch)) -> None:
                    bar.update(before + n * step / of)

                images = to_uint8(stage.decode(sampler(batch, first, on_step)))
                pictures.append(images if known is None else known.paste(images))
                before += len(batch)
            yield np.concatenate(pictures)


def _sampler(request: Request) -> Sampler:
    model = model_of(request.opened, request.weights).to(request.device)
    if request.float8:
        use_float8(model)
    how, known, clip = (model, request.diffusion, request.config), request.known, request.stage.clip
    if known is None:
        return Sampler(*how, clip_denoised=clip)
    return Inpainter(*how, known.image, known.unknown, clip_denoised=clip, **request.inpainting)


def _to_files(request: Request, draw: Draw) -> list[str]:
    """Draw all images and write the outputs; for an .npz alone batch by batch, none of which is kept."""
    targets, labels, known = request.targets, request.labels, request.known
    if targets.keys() == {"npz"}:
        size, count = request.config.batch_size, len(labels)
        remove_leftovers(targets["npz"].parent, [targets["npz"].name])
        with closing(
            draw([range(first, min(first + size, count)) for first in range(0, count, size)])
        ) as batches:
            _write_npz(request, batches)
        return [str(targets["npz"])]
    (images,) = draw([range(len(labels))])
    if "npz" in targets:
        _write_npz(request, images)
    if "grid" in targets:
        save_picture(targets["grid"], grid(images, labels, request.opened.classes, _before(known)))
    if "png" in targets:
        save_pngs(targets["png"], images, labels, request.opened.classes)
    return list(map(str, targets.values()))


def _write_npz(request: Request, images: np.ndarray | Iterator[np.ndarray]) -> None:
    path = request.targets["npz"]
    try:
        save_npz(path, images, request.labels)
    except OSError as error:
        raise UserError(f"--npz: cannot write {str(path)!r}: {error.strerror or error}") from None


def _to_folder(folder: SampleFolder, draw: Draw, ranks: Ranks) -> int:
    """Draw and write this process's missing shards; returns the number of images drawn."""
    missing = folder.missing(ranks.rank, ranks.world)
    spans = [folder.span(shard) for shard in missing]
    for shard, images in zip(missing, draw(spans) if missing else ()):
        folder.write(shard, images)
    return sum(map(len, spans))


def _finish(folder: SampleFolder, request: Request) -> list[str]:
    """Write the outputs made from all shards, once these are complete."""
    made, targets, classes = [str(folder.assemble())], request.targets, request.opened.classes
    if "grid" in targets:
        indices = shown(folder.labels)
        picked = [folder.labels[i] for i in indices]
        save_picture(targets["grid"], grid(folder.pick(indices), picked, classes, _before(request.known)))
        made.append(str(targets["grid"]))
    if "png" in targets:
        for shard, images in enumerate(folder.images()):
            span = folder.span(shard)
            part = folder.labels[span.start : span.stop]
            save_pngs(targets["png"], images, part, classes, first_index=span.start)
        made.append(str(targets["png"]))
    return made


def _before(known: Known | None) -> list[np.ndarray]:
    return [] if known is None else known.shown()
