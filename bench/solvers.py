"""Draw digits with every solver in 5 to 250 steps: one picture of all, and the share a classifier recognises.

``python bench/solvers.py runs/digits --picture solvers.png``, for a run of the ``digits`` preset. All solvers
draw from the same noise. It also reports what ``skip_below`` changes, as the distance to the exact pictures.
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

import command
import plots
from digits import pixels_of_digits
from mdt_fast.config import SAMPLERS, SampleConfig
from mdt_fast.errors import UserError
from mdt_fast.models.convert import load_weights
from mdt_fast.models.zoo import build_model
from mdt_fast.sampling import sample, save_picture, to_uint8
from mdt_fast.training.checkpoint import EMA
from mdt_fast.training.run import open_or_advise
from mdt_fast.training.states import whole_state

STEPS = (5, 10, 20, 50, 250)
BOUNDS = (1e-3, 1e-2, 3e-2, 1e-1)
CELL, GAP = 32, 4


class Digits:
    """A run's averaged weights, and a judge of the digits they draw."""

    def __init__(self, run: Path, count: int):
        from sklearn.svm import SVC

        opened = open_or_advise(run, [EMA])
        if opened.config.data.source != "digits":
            raise UserError(f"RUN: {str(run)!r} was not trained on the digits")
        self.model: Any = build_model(opened.config.model)
        load_weights(self.model, whole_state(opened, EMA), str(run))
        self.trained = opened.config.diffusion
        self.labels = [i % 10 for i in range(count)]
        pixels, labels = pixels_of_digits()
        self.judge = SVC(gamma=0.02).fit(pixels[:, 0].flatten(1).numpy(), labels)

    def draw(self, config: SampleConfig) -> Tensor:
        return sample(self.model, self.trained, self.labels, config)

    def recognised(self, images: Tensor) -> float:
        found = self.judge.predict(images.mean(1).flatten(1).numpy())
        return float((found == np.asarray(self.labels)).mean())


def compare(digits: Digits, config: SampleConfig) -> Image.Image:
    """Print the table of solvers. Returns the picture, with a row for each solver and number of steps."""
    rows: list[tuple[str, Tensor]] = []
    print("recognised, of", len(digits.labels), "(RMS distance to the same sampler's 250 steps)")
    print("steps ", *(f"{name:>16}" for name in SAMPLERS))
    drawn = {
        name: {s: digits.draw(replace(config, sampler=name, steps=s)) for s in STEPS} for name in SAMPLERS
    }
    for steps in STEPS:
        cells = []
        for name in SAMPLERS:
            images = drawn[name][steps]
            rms = (images - drawn[name][max(STEPS)]).square().mean().sqrt()
            cells.append(f"{100 * digits.recognised(images):6.1f}% ({rms:.3f})")
        print(f"{steps:5} ", *(f"{cell:>16}" for cell in cells), flush=True)
    rows = [(f"{name} {s}", drawn[name][s][:10]) for name in SAMPLERS for s in STEPS]
    font = ImageFont.load_default(size=16)
    margin = 110
    sheet = Image.new("L", (margin + 10 * (CELL + GAP), len(rows) * (CELL + GAP) + GAP), 255)
    pen = ImageDraw.Draw(sheet)
    for i, (name, images) in enumerate(rows):
        top = GAP + i * (CELL + GAP)
        pen.text((margin - 2 * GAP, top + CELL // 2), name, fill=20, font=font, anchor="rm")
        for j, pixels in enumerate(to_uint8(images)[..., 0]):
            cell = Image.fromarray(pixels).resize((CELL, CELL), Image.Resampling.BICUBIC)
            sheet.paste(cell, (margin + j * (CELL + GAP), top))
    return sheet


def skipping(digits: Digits, config: SampleConfig, steps: int = 250) -> None:
    """Print the time with ``skip_below`` and what it changes, at the published guidance (3.8, power 4)."""
    config = replace(config, sampler="ddpm", steps=steps, cfg_scale=3.8, scale_pow=4.0)
    began = time.perf_counter()
    exact = digits.draw(config)
    seconds = time.perf_counter() - began
    print(f"skip_below 0: {seconds:.1f} s, recognised {100 * digits.recognised(exact):.1f}%")
    for bound in BOUNDS:
        began = time.perf_counter()
        images = digits.draw(replace(config, skip_below=bound))
        seconds = time.perf_counter() - began
        change = images - exact
        print(
            f"skip_below {bound:g}: {seconds:.1f} s, recognised {100 * digits.recognised(images):.1f}%, RMS "
            f"{change.square().mean().sqrt():.1e}, largest {change.abs().max():.1e} of a range of 2, "
            f"{(to_uint8(images) != to_uint8(exact)).mean():.1%} of the bytes differ"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark. Returns 0; 2 after a user error; 130 after Ctrl-C."""
    return command.guarded("solvers", lambda kept: _main(argv))


def _main(argv: Sequence[str] | None) -> int:
    args = _parser().parse_args(argv)
    command.at_least_one("--samples", args.samples)
    command.set_threads(args.threads)
    if args.picture is not None:
        plots.check_target(Path(args.picture), "--picture")
    digits = Digits(Path(args.run), args.samples)
    config = SampleConfig(cfg_scale=2.0, scale_pow=None, batch_size=args.samples)
    picture = compare(digits, config)
    if args.picture is not None:
        save_picture(Path(args.picture), picture)
    skipping(digits, config)
    return 0


def _parser() -> command.Parser:
    parser = command.Parser(prog="solvers", description=__doc__)
    parser.add_argument("run", metavar="RUN", help="a run of the digits preset")
    parser.add_argument("--picture", metavar="FILE", help="write the picture here")
    parser.add_argument("--samples", type=int, default=200, metavar="N", help="images to draw (default: 200)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="CPU threads (default: 1)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
