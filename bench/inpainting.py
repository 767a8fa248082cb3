"""Complete digits, with the hole hidden from the encoder or not, and with every sampler.

``python bench/inpainting.py runs/digits --picture inpainting.png``, for a run of the ``digits`` preset. A
part of the true digit is removed and redrawn, with the right label. The measures are the RMS distance to the
truth inside the hole (of the first fill, and of the best of ``--fills``), the share that a classifier of the
real digits recognises, and the Fréchet distance between the pixels of completed and original pictures.
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

import command
import plots
from digits import pixels_of_digits
from mdt_fast.config import SAMPLERS, SampleConfig
from mdt_fast.evaluation.frechet import frechet_distance
from mdt_fast.evaluation.moments import moments
from mdt_fast.sampling import inpaint, save_picture, to_uint8
from solvers import Digits

HIDE = (0.0, 0.5, 1.0)
CELL, GAP, MARGIN = 32, 4, 130


def masks() -> dict[str, Tensor]:
    """The parts to remove, by name, bool [8, 8]."""
    right, centre, corner = (torch.zeros(8, 8, dtype=torch.bool) for _ in range(3))
    right[:, 4:] = True
    centre[2:6, 2:6] = True
    corner[:] = True
    corner[:4, :4] = False
    return {"right half": right, "centre (1/4)": centre, "all but a corner (3/4)": corner}


class Completion:
    """Digits with a part removed, and several fills of each."""

    def __init__(self, run: Path, count: int, fills: int):
        self.digits, self.count, self.fills = Digits(run, count * fills), count, fills
        pixels, labels = pixels_of_digits()
        chosen = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:count]
        self.truth = pixels[chosen, :1]
        self.digits.labels = labels[chosen].tolist() * fills

    def fill(self, unknown: Tensor, config: SampleConfig, **how: Any) -> Tensor:
        """Completed digits [fills, N, 1, 8, 8]."""
        image = self.truth.repeat(self.fills, 1, 1, 1)
        digits = self.digits
        drawn = inpaint(digits.model, digits.trained, digits.labels, image, unknown, config, **how)
        return drawn.unflatten(0, (self.fills, self.count))

    def judge(self, drawn: Tensor, unknown: Tensor) -> list[str]:
        """RMS of the first and of the best fill, share recognised and Fréchet distance, as text."""
        squares = ((drawn - self.truth) * unknown).square().flatten(2).sum(2) / unknown.sum()
        first, best = squares[0].mean().sqrt(), squares.min(0).values.mean().sqrt()
        apart = frechet_distance(moments(drawn.flatten(0, 1).flatten(1)), moments(self.truth.flatten(1)))
        recognised = self.digits.recognised(drawn.flatten(0, 1))
        return [f"{first:.3f}", f"{best:.3f}", f"{100 * recognised:.1f}%", f"{apart:.2f}"]

    def row(self, name: str, unknown: Tensor, config: SampleConfig, **how: Any) -> None:
        began = time.perf_counter()
        drawn = self.fill(unknown, config, **how)
        seconds = time.perf_counter() - began
        print("|", " | ".join([name, *self.judge(drawn, unknown), f"{seconds:.0f} s"]), "|", flush=True)


def compare(completion: Completion, config: SampleConfig) -> None:
    """Print the tables."""
    header = (
        f"| | RMS | best of {completion.fills} | recognised | Fréchet | time |\n|---|---|---|---|---|---|"
    )
    every = masks()
    for name, unknown in every.items():
        print(f"\n{name}\n{header}")
        for hide in HIDE:
            completion.row(f"hide {hide:g}", unknown, config, hide=hide)
    unknown = every["right half"]
    print(f"\nright half, nothing hidden\n{header}")
    for sampler in SAMPLERS:
        steps = 20 if sampler in ("dpm++", "unipc") else config.steps
        completion.row(f"{sampler}, {steps} steps", unknown, replace(config, sampler=sampler, steps=steps))
    for resample in (2, 5):
        name = f"ddpm, each of {config.steps} steps {resample} times"
        completion.row(name, unknown, replace(config, sampler="ddpm"), resample=resample)


def picture(completion: Completion, config: SampleConfig) -> Image.Image:
    """A digit of each class there is: truth, known part, and fills with nothing and with the hole hidden."""
    rows: list[tuple[str, Tensor]] = []
    for unknown in list(masks().values())[::2]:
        rows += [("true", completion.truth), ("known", completion.truth.masked_fill(unknown, 0.0))]
        for hide in (0.0, 1.0):
            drawn = completion.fill(unknown, config, hide=hide)
            rows += [(f"fill, hide {hide:g}", fill) for fill in drawn[:2]]
    labels = completion.digits.labels
    columns = [labels.index(label) for label in sorted(set(labels))]
    font = ImageFont.load_default(size=16)
    sheet = Image.new("L", (MARGIN + len(columns) * (CELL + GAP), len(rows) * (CELL + GAP) + GAP), 255)
    pen = ImageDraw.Draw(sheet)
    for i, (name, images) in enumerate(rows):
        top = GAP + i * (CELL + GAP)
        pen.text((MARGIN - 2 * GAP, top + CELL // 2), name, fill=20, font=font, anchor="rm")
        for j, pixels in enumerate(to_uint8(images[columns])[..., 0]):
            cell = Image.fromarray(pixels).resize((CELL, CELL), Image.Resampling.BICUBIC)
            sheet.paste(cell, (MARGIN + j * (CELL + GAP), top))
    return sheet


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark. Returns 0; 2 after a user error; 130 after Ctrl-C."""
    return command.guarded("inpainting", lambda kept: _main(argv))


def _main(argv: Sequence[str] | None) -> int:
    args = _parser().parse_args(argv)
    for option in ("digits", "fills"):
        command.at_least_one(f"--{option}", getattr(args, option))
    command.set_threads(args.threads)
    if args.picture is not None:
        plots.check_target(Path(args.picture), "--picture")
    completion = Completion(Path(args.run), args.digits, args.fills)
    config = SampleConfig(cfg_scale=2.0, scale_pow=None, batch_size=args.digits * args.fills)
    compare(completion, config)
    if args.picture is not None:
        save_picture(Path(args.picture), picture(completion, config))
    return 0


def _parser() -> command.Parser:
    parser = command.Parser(prog="inpainting", description=__doc__)
    parser.add_argument("run", metavar="RUN", help="a run of the digits preset")
    parser.add_argument("--picture", metavar="FILE", help="write the picture here")
    parser.add_argument("--digits", type=int, default=100, metavar="N", help="test digits (default: 100)")
    parser.add_argument("--fills", type=int, default=4, metavar="N", help="fills per digit (default: 4)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="CPU threads (default: 1)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
