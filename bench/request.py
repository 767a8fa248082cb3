"""Parse and check the command line of ``throughput.py``, so that errors are found before measuring starts."""

import argparse
import dataclasses
from pathlib import Path

import command
import inputs
import providers
from command import DTYPES
from inputs import PERIOD
from mdt_fast.config import Switches
from mdt_fast.errors import UserError

MODES = ("train", "sample")
AUTOCAST = ("float32", "bfloat16")
SWITCHES = [field.name for field in dataclasses.fields(Switches)]


def parser() -> argparse.ArgumentParser:
    p = command.Parser(prog="throughput", description="Throughput of training and sampling.")
    p.add_argument(
        "--mode",
        help="train, sample or train,sample (default: both; with --account or --breakdown: train)",
    )
    p.add_argument(
        "--model",
        help="factory (MDTv2_XL_2, DiT_B_4, ...), preset (digits) or narrow (XL/2's host time only)",
    )
    p.add_argument("--batch", help="images per step; separate several values with commas")
    p.add_argument(
        "--dtype",
        help="float32, bfloat16 (autocast) or both, comma-separated (default: float32; on a GPU bfloat16)",
    )
    p.add_argument("--providers", help=f"comma-separated, from {', '.join(providers.NAMES)}")
    p.add_argument("--official", type=Path, metavar="PATH", help="checkout of the official code")
    p.add_argument("--repeats", type=int, help="interleaved rounds; every provider is timed once in each")
    p.add_argument(
        "--steps", type=int, help="steps per timing (default: 1; on a GPU as many as fit into 0.1 s)"
    )
    p.add_argument(
        "--lengths",
        type=int,
        help=f"how many kept-token counts to cycle through, one CUDA graph each (default: {PERIOD})",
    )
    p.add_argument(
        "--time-limit",
        type=float,
        metavar="SECONDS",
        help="start no new round after this time (default: 180; with --repeats no limit)",
    )
    p.add_argument(
        "--apart",
        action="store_true",
        help="measure providers one after another when memory is short; gives no ratios",
    )
    p.add_argument("--threads", type=int, help="CPU threads")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    p.add_argument("--data", default="digits", help="digits, synthetic or an image folder (default: digits)")
    p.add_argument(
        "--account",
        action="store_true",
        help="instead, report bytes, ops and more by switch, for a training step (own rounds) or sampling",
    )
    p.add_argument(
        "--breakdown",
        action="store_true",
        help="instead, report where a step's time goes, by class of kernel (own rounds)",
    )
    p.add_argument(
        "--turn",
        metavar="SWITCHES",
        help="switches of the fast model (mdt_fast.Switches) to flip, comma-separated",
    )
    p.add_argument("--sampler", default="ddpm", help="ddpm (ancestral) or ddim")
    command.add_output_options(p)
    p.formatter_class = argparse.RawDescriptionHelpFormatter
    p.epilog = (providers.__doc__ or "").replace("``", "")
    return p


class Request:
    """The checked command line. Every user error is found here, before anything is measured."""

    def __init__(self, args: argparse.Namespace):
        if args.account and args.breakdown:
            raise UserError("--breakdown: not together with --account")
        for option in ("apart", "plot"):
            if getattr(args, option) and (args.account or args.breakdown):
                raise UserError(f"--{option}: not together with --account or --breakdown")
        default = "train" if args.account or args.breakdown else "train,sample"
        self.modes = command.names("--mode", args.mode or default, MODES)
        self.device = command.device(args.device)
        for option, value in (
            ("--repeats", args.repeats),
            ("--lengths", args.lengths),
            ("--steps", args.steps),
        ):
            command.at_least_one(option, value)
        command.positive_seconds("--time-limit", args.time_limit)
        command.set_threads(args.threads)
        default_dtype = "bfloat16" if self.device.type == "cuda" else "float32"
        dtypes = command.names("--dtype", args.dtype or default_dtype, AUTOCAST)
        self.dtypes = [DTYPES[name] for name in dtypes]
        if args.turn is not None and args.account:
            raise UserError("--turn: not together with --account, which flips each switch")
        self.turned = tuple(command.names("--turn", args.turn, SWITCHES)) if args.turn is not None else ()
        self.sampler = args.sampler
        if self.sampler not in ("ddpm", "ddim"):
            raise UserError(f"--sampler: got {self.sampler!r}, expected ddpm or ddim")
        self.checkout = providers.load_checkout(args.official)
        self.providers = None
        if args.providers is not None:
            asked = command.listed("--providers", args.providers)
            providers.check_names(asked)
            self.providers = [name for name in providers.NAMES if name in asked]
            if args.account and "sample" not in self.modes:
                raise UserError("--providers: not together with --account of training, which has its own")
        if self.turned and not any(name.startswith("fast") for name in self.providers or ["fast"]):
            raise UserError("--turn: applies to the fast model, which --providers lacks")
        self.models = None
        if args.model is not None:
            models = command.listed("--model", args.model)
            self.models = {name: providers.model_config(name) for name in models}
        self.batches = None
        if args.batch is not None:
            self.batches = [command.whole("--batch", text) for text in command.listed("--batch", args.batch)]
        self.repeats, self.inner, self.time_limit = args.repeats, args.steps, args.time_limit
        self.lengths = args.lengths or PERIOD
        self.account, self.breakdown, self.apart = args.account, args.breakdown, args.apart
        self.data = args.data
        if self.data not in ("digits", "synthetic"):
            config = next(iter((self.models or {"": providers.model_config("MDTv2_S_2")}).values()))
            inputs.load(self.data, config, max(self.batches or [1]))
