"""Image output: uint8 arrays, a grid by class, single files."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..errors import UserError
from ..files import aside, dead_link, resolved

CELL = 56  # small images are enlarged to at least this many pixels
MAX_ROWS, MAX_COLUMNS = 24, 20
BACKGROUND, INK = (255, 255, 255), (20, 20, 20)


def to_uint8(images: Tensor) -> np.ndarray:
    """[N, C, S, S] in [-1, 1] to uint8 [N, S, S, C]: ``((x + 1) * 127.5).clamp(0, 255)``, truncated."""
    pixels = ((images + 1) * 127.5).clamp(0, 255)
    return pixels.permute(0, 2, 3, 1).byte().cpu().numpy()


def grid(
    images_NHWC: np.ndarray,
    labels: Sequence[int],
    classes: Sequence[str],
    before: Sequence[np.ndarray] = (),
) -> Image.Image:
    """One row per class, with its name in front; small images are enlarged (bicubic, as squares are harder to
    read).

    Shows the first 24 classes that occur, with the first 20 images of each. Each row starts with the images
    in ``before``, uint8 [H, W, C].
    """
    rows = {
        label: [*before, *images_NHWC[np.asarray(labels) == label][:MAX_COLUMNS]]
        for label in sorted(set(labels))[:MAX_ROWS]
    }
    side = images_NHWC.shape[1]
    cell = side * max(1, -(-CELL // side))
    gap = max(2, cell // 14)
    columns = max(len(row) for row in rows.values())
    font = ImageFont.load_default(size=max(14, min(cell // 2, 28)))
    names = {label: _short(classes[label] if label < len(classes) else str(label)) for label in rows}
    margin = 2 * gap + round(max(font.getlength(name) for name in names.values()))
    sheet = Image.new(
        "RGB", (margin + columns * (cell + gap) + gap, len(rows) * (cell + gap) + gap), BACKGROUND
    )
    draw = ImageDraw.Draw(sheet)
    for i, (label, row) in enumerate(rows.items()):
        top = gap + i * (cell + gap)
        draw.text((margin - gap, top + cell // 2), names[label], fill=INK, font=font, anchor="rm")
        for j, pixels in enumerate(row):
            enlarged = _picture(pixels).resize((cell, cell), Image.Resampling.BICUBIC)
            sheet.paste(enlarged.convert("RGB"), (margin + gap + j * (cell + gap), top))
    return sheet


def shown(labels: Sequence[int]) -> list[int]:
    """Indices of the images that :func:`grid` shows, in order; these images alone give the same grid."""
    counts = dict.fromkeys(sorted(set(labels))[:MAX_ROWS], 0)
    chosen = []
    for i, label in enumerate(labels):
        if counts.get(label, MAX_COLUMNS) < MAX_COLUMNS:
            counts[label] += 1
            chosen.append(i)
    return chosen


def save_picture(path: Path, picture: Image.Image) -> None:
    """Write a PNG under a temporary name, then rename it into place."""
    with aside(path) as file:
        picture.save(file, format="PNG")


def save_pngs(
    folder: Path,
    images_NHWC: np.ndarray,
    labels: Sequence[int],
    classes: Sequence[str],
    first_index: int = 0,
) -> None:
    """Write one file per image, ``CLASS_000012.png``: a folder that ``mdt-fast train --data`` can read."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, pixels in zip(png_names(labels, classes, first_index), images_NHWC):
        save_picture(folder / name, _picture(pixels))


def png_names(labels: Sequence[int], classes: Sequence[str], first_index: int = 0) -> list[str]:
    """The file names used by :func:`save_pngs`."""
    names = [classes[label] if label < len(classes) else str(label) for label in labels]
    plain = (name.replace("_", "-").replace("/", "-") for name in names)
    return [f"{name}_{i:06d}.png" for i, name in enumerate(plain, first_index)]


def check_alone(folder: Path, names: Sequence[str]) -> None:
    """Raise ``UserError`` if ``folder`` holds images that these would not replace: together they would be
    taken for one set."""
    others = sorted({path.name for path in folder.glob("*.png") if path.is_file()} - {*names})
    if others:
        raise UserError(
            f"png: {str(folder)!r} holds {len(others)} other pictures, such as {others[0]!r}; choose "
            "another folder, or remove them"
        )


RUNS = ("config.json", "metrics.jsonl", ".lock")
"""A run's files next to its checkpoints."""


def check_writable(path: Path, *, folder: bool = False) -> None:
    """Raise ``UserError`` now, not after sampling, if ``path`` cannot or must not be written.

    ``folder``: ``path`` is a folder, which need not exist yet. Nothing may be written among a run's
    checkpoints, or over files that a run needs to resume.
    """
    if (link := dead_link(path if folder else path.parent)) is not None:
        raise UserError(f"cannot write {str(path)!r}: {str(link)!r} is a link to nothing")
    if folder:
        parent = next(p for p in (path, *path.absolute().parents) if p.exists())
        if not parent.is_dir():
            raise UserError(f"cannot write {str(path)!r}: {str(parent)!r} is a file; a folder is needed")
    else:
        parent = path.parent
        if path.is_dir():
            raise UserError(f"{str(path)!r} is a folder; a file name is needed")
        if not parent.is_dir():
            raise UserError(f"cannot write {str(path)!r}: no folder {str(parent)!r}")
    place = resolved(parent)
    if path.name in RUNS and (place / "checkpoints").is_dir():
        raise UserError(f"cannot write {str(path)!r}: it belongs to the run; choose another name")
    if (place / "state.json").exists() or any(
        above.name == "checkpoints" and any(above.glob("step_*")) for above in (place, *place.parents)
    ):
        raise UserError(
            f"cannot write {str(path)!r}: checkpoints are in {str(parent)!r}; choose another place"
        )
    if not os.access(parent, os.W_OK):
        raise UserError(f"cannot write {str(path)!r}: no permission to write in {str(parent)!r}")


def check_name(path: Path, what: str) -> None:
    """``UserError``, which begins with ``what``, unless the name is valid UTF-8: safetensors and torch cannot
    open other files again."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise UserError(f"{what}: got {str(path)!r}, expected a name in UTF-8") from None


def _picture(pixels_HWC: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels_HWC[:, :, 0] if pixels_HWC.shape[2] == 1 else pixels_HWC)


def _short(name: str, length: int = 16) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"
