"""Train the digits in two ways: on pixels, and on latents of a small autoencoder made for them.

``python bench/digits.py --out runs/both`` trains the autoencoder, encodes the digits with it, trains the
``digits`` preset in both ways with the package's own commands and samples from both. A classifier trained on
the real digits then counts the samples it recognises. This takes minutes on two CPU cores.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import command
from mdt_fast.cli import main as mdt_fast
from mdt_fast.errors import UserError

CHANNELS, FACTOR = 4, 2
KL_WEIGHT = 1e-6  # keeps latents bounded; if larger, half of each is noise and little is left to learn
LATENT_OPTIONS = ["--set=model.patch_size=1"]  # the same number of tokens as with pixels


def pixels_of_digits() -> tuple[Tensor, np.ndarray]:
    """All digits as [N, 3, 8, 8] in [-1, 1], grey repeated in three channels, and their labels."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return torch.from_numpy(digits.images[:, None] / 8 - 1).float().repeat(1, 3, 1, 1), digits.target


def train_autoencoder(folder: Path, steps: int) -> float:
    """Train an ``AutoencoderKL`` on the digits and save it with its scaling factor. Returns its RMS error."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    model: Any = AutoencoderKL(
        block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=8, latent_channels=CHANNELS,
    )  # fmt: skip
    pixels, _ = pixels_of_digits()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        x = pixels[torch.randint(len(pixels), (64,))]
        posterior = model.encode(x).latent_dist
        loss = F.mse_loss(model.decode(posterior.sample()).sample, x) + KL_WEIGHT * posterior.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        model.eval()
        posterior = model.encode(pixels).latent_dist
        error = (model.decode(posterior.mode()).sample - pixels).square().mean().sqrt().item()
        spread = posterior.sample().std().item()
    model.register_to_config(scaling_factor=1 / spread)
    model.save_pretrained(folder)
    return error


def recognised(npz: Path) -> float:
    """The share of the samples that a classifier of the real digits recognises as their labels."""
    from sklearn.svm import SVC

    pixels, labels = pixels_of_digits()
    classifier = SVC(gamma=0.02).fit(pixels[:, 0].flatten(1).numpy(), labels)
    with np.load(npz) as saved:
        images = saved["arr_0"].mean(-1).reshape(len(saved["arr_0"]), -1) / 127.5 - 1
        return float((classifier.predict(images) == saved["arr_1"]).mean())


def call(*arguments: str) -> None:
    print("mdt-fast", *arguments, flush=True)
    if mdt_fast(arguments) != 0:
        raise UserError(f"digits: 'mdt-fast {arguments[0]}' failed")


def run(args: argparse.Namespace) -> None:
    out, results = Path(args.out), []
    command.make_folder("--out", out, new=True)
    began = time.perf_counter()
    error = train_autoencoder(out / "vae", args.vae_steps)
    print(f"autoencoder: RMS error {error:.3f} of a range of 2, {time.perf_counter() - began:.0f} s")
    source = ["--image-size=8", f"--threads={args.threads}", "--device=cpu"]
    call("encode", "digits", f"--vae={out / 'vae'}", f"--out={out / 'latents'}", "--no-mirror", *source)
    ways = {"pixels": [], "latents": [f"--data={out / 'latents'}", *LATENT_OPTIONS]}
    for way, options in ways.items():
        if way not in args.ways:
            continue
        began, folder, npz = time.perf_counter(), out / way, out / f"{way}.npz"
        steps = [f"--steps={args.steps}", f"--threads={args.threads}", "--device=cpu"]
        call("train", "--preset=digits", f"--out={folder}", *steps, *options)
        seconds = time.perf_counter() - began
        sample = [f"--num-samples={args.samples}", f"--npz={npz}", f"--grid={out / f'{way}.png'}"]
        call("sample", str(folder), *sample, "--device=cpu")
        results.append(f"{way:8} {100 * recognised(npz):6.1f}% of {args.samples} recognised, {seconds:.0f} s")
    print(*results, sep="\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark. Returns 0; 2 after a user error; 130 after Ctrl-C."""
    return command.guarded("digits", lambda kept: _main(argv))


def _main(argv: Sequence[str] | None) -> int:
    args = _parser().parse_args(argv)
    for option in ("steps", "vae-steps", "samples"):
        command.at_least_one(f"--{option}", getattr(args, option.replace("-", "_")))
    command.set_threads(args.threads)
    args.ways = command.names("--ways", args.ways, ("pixels", "latents"))
    run(args)
    return 0


def _parser() -> command.Parser:
    parser = command.Parser(prog="digits", description=__doc__)
    parser.add_argument("--out", required=True, metavar="DIR", help="a new folder for everything")
    parser.add_argument(
        "--steps", type=int, default=1000, metavar="N", help="updates per model (default: 1000)"
    )
    parser.add_argument(
        "--vae-steps", type=int, default=1500, metavar="N", help="updates for the autoencoder (default: 1500)"
    )
    parser.add_argument("--samples", type=int, default=200, metavar="N", help="images to draw (default: 200)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="CPU threads (default: 1)")
    parser.add_argument("--ways", default="pixels,latents", metavar="A,B", help="ways to run (default: both)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
