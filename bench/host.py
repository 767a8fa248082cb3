"""Time the host's part of a step on a GPU that does nothing: the Python and the launches of all kernels.

``python tests/emulated/run.py --idle bench/host.py`` needs no GPU but PyTorch's CUDA build (CONTRIBUTING.md,
"The tests"): kernels are launched and do nothing, so what remains is the time that a GPU would wait for. On a
GPU itself, ``throughput.py --model narrow`` measures the same with a driver's launches in it. Prints
milliseconds per guided pass under one autocast, or per training step, forward and backward, and the ratio to
the reference in the same round.
"""

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

import command
from mdt_fast import create_diffusion
from mdt_fast.errors import UserError
from mdt_fast.models import zoo
from measure import ratios, spread
from providers import NARROW, model_config

DEVICE = "cuda"
MODES = "sample", "train"
PROVIDERS = "reference", "fast", "fast-by-triton"
"""``fast-by-triton`` launches its kernels by Triton's own Python, as before ``kernels/launcher.py``."""


def steps(name: str, batch: int, mode: str) -> dict[str, Callable[[], Any]]:
    """One step of each provider."""
    config = model_config(name)
    x = torch.zeros(batch, config.in_channels, config.input_size, config.input_size, device=DEVICE)
    t = torch.zeros(batch, dtype=torch.long, device=DEVICE)
    made: dict[str, Callable[[], Any]] = {}
    for provider in PROVIDERS[:2]:
        model: Any = zoo.build_model(config, implementation=provider).to(DEVICE).train(mode == "train")
        made[provider] = sampling(model, x, t) if mode == "sample" else training(model, x, t)
    made[PROVIDERS[2]] = by_triton(made["fast"])
    return made


def sampling(model: Any, x: torch.Tensor, t: torch.Tensor) -> Callable[[], Any]:
    both, times = torch.cat([x, x]), torch.cat([t, t])
    return torch.no_grad()(lambda: model.forward_with_cfg(both, times, times, cfg_scale=3.8))


def training(model: Any, x: torch.Tensor, t: torch.Tensor) -> Callable[[], Any]:
    diffusion, together = create_diffusion(""), hasattr(model, "training_step_outputs")
    passes = [{"y": t}, {"y": t, "enable_mask": True}] if hasattr(model, "mask_token") else [{"y": t}]

    def step() -> None:
        with torch.autocast(DEVICE, torch.bfloat16):
            if together:
                terms = diffusion.two_pass_losses(model, x, t, t)
                loss = (terms["loss"] + terms["m_loss"]).mean()
            else:
                losses = (diffusion.training_losses(model, x, t, options)["loss"] for options in passes)
                loss = sum(each.mean() for each in losses)
        loss.backward()
        model.zero_grad(set_to_none=True)

    return step


def by_triton(step: Callable[[], Any]) -> Callable[[], Any]:
    from mdt_fast.kernels import launcher

    def slower() -> Any:
        launcher.KNOWN, before = False, launcher.KNOWN
        try:
            return step()
        finally:
            launcher.KNOWN = before

    return slower


def compare(name: str, batch: int, mode: str, rounds: int) -> None:
    calls = steps(name, batch, mode)
    seconds: dict[str, list[float]] = {provider: [] for provider in calls}
    with torch.autocast(DEVICE, torch.bfloat16, enabled=mode == "sample"):
        for _ in range(rounds + 1):
            for provider, call in calls.items():
                began = time.perf_counter()
                call()
                seconds[provider].append(time.perf_counter() - began)
    for provider, values in seconds.items():
        low, middle, high = spread([1e3 * second for second in values[1:]])  # the first compiles
        slow, speed, quick = ratios(seconds["reference"][1:], values[1:])
        least = 1e3 * min(values)
        print(
            f"{mode:7} {provider:15} {middle:7.1f} ms ({low:.1f} to {high:.1f}, least {least:.1f})",
            f"{speed:.2f}x the reference ({slow:.2f}-{quick:.2f})",
            sep=", ",
            flush=True,
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark. Returns 0; 2 after a user error; 130 after Ctrl-C."""
    return command.guarded("host", lambda kept: _main(argv))


def _main(argv: Sequence[str] | None) -> int:
    args = _parser().parse_args(argv)
    model_config(args.model)
    command.at_least_one("--batch", args.batch)
    if args.rounds < 2:
        raise UserError(f"--rounds: got {args.rounds}, expected 2 or more")
    if DEVICE == "cuda" and not torch.cuda.is_available():
        raise UserError("no CUDA device; tests/emulated/run.py --idle makes one up")
    for mode in MODES if args.mode is None else [args.mode]:
        compare(args.model, args.batch, mode, args.rounds)
    return 0


def _parser() -> command.Parser:
    parser = command.Parser(prog="host", description=__doc__)
    parser.add_argument("--model", default=NARROW, help=f"a factory, a preset or narrow (default: {NARROW})")
    parser.add_argument("--mode", choices=MODES, help="sample or train (default: both)")
    parser.add_argument("--batch", type=int, default=2, metavar="N", help="images (default: 2)")
    parser.add_argument("--rounds", type=int, default=25, metavar="N", help="timed rounds (default: 25)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
