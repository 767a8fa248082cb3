"""The command line of ``throughput.py``, checked: mistakes are found before anything is measured."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import torch

import inputs
import providers
from mdt_fast.errors import UserError, nearest

MODES = ("train", "sample")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="throughput", description="Throughput of training and sampling.", allow_abbrev=False)
    p.add_argument("--mode", default="train,sample", help="train, sample or both, by comma (default: both)")
    p.add_argument("--model", help="factory (MDTv2_XL_2, DiT_B_4, ...) or preset (digits); several by comma")
    p.add_argument("--batch", help="images per step; several by comma")
    p.add_argument(
        "--dtype", help="float32, bfloat16 (autocast) or both, by comma (default: float32; on a GPU bfloat16)"
    )
    p.add_argument("--providers", help=f"some of {', '.join(providers.NAMES)}, by comma")
    p.add_argument("--official", type=Path, metavar="PATH", help="checkout of the official code")
    p.add_argument("--repeats", type=int, help="rounds in which each provider takes a turn")
    p.add_argument("--steps", type=int, help="steps per turn (default: 1; on a GPU as many as last 0.1 s)")
    p.add_argument(
        "--time-limit",
        type=float,
        metavar="SECONDS",
        help="begin no new round after this time (default: 180, or none with --repeats)",
    )
    p.add_argument("--threads", type=int, help="CPU threads")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    p.add_argument(
        "--data", default="digits", help="digits, synthetic or a folder of images (default: digits)"
    )
    p.add_argument("--sampler", default="ddpm", help="ddpm (ancestral) or ddim")
    p.add_argument("--json", type=Path, metavar="FILE", help="append the rows to this file, as they are made")
    p.add_argument("--plot", type=Path, metavar="FILE", help="draw the result into this PNG")
    return p


class Request:
    """The command line, checked; every mistake is found here, before anything is measured."""

    def __init__(self, args: argparse.Namespace):
        self.modes = _names("--mode", args.mode, MODES)
        self.device = _device(args.device)
        for option, value in (
            ("--threads", args.threads),
            ("--repeats", args.repeats),
            ("--steps", args.steps),
        ):
            if value is not None and value < 1:
                raise UserError(f"{option}: got {value}, allowed is 1 or more")
        if args.time_limit is not None and not args.time_limit > 0:
            raise UserError(f"--time-limit: got {args.time_limit}, allowed is a positive number of seconds")
        if args.threads is not None:
            torch.set_num_threads(args.threads)
        default_dtype = "bfloat16" if self.device.type == "cuda" else "float32"
        self.dtypes = [DTYPES[name] for name in _names("--dtype", args.dtype or default_dtype, tuple(DTYPES))]
        self.sampler = _names("--sampler", args.sampler, ("ddpm", "ddim"))[0]
        self.checkout = providers.load_checkout(args.official)
        self.providers = None
        if args.providers is not None:
            asked = _list("--providers", args.providers)
            providers.check_names(asked)
            self.providers = [name for name in providers.NAMES if name in asked]
        self.models = None
        if args.model is not None:
            self.models = {name: providers.model_config(name) for name in _list("--model", args.model)}
        self.batches = None if args.batch is None else [_batch(text) for text in _list("--batch", args.batch)]
        self.repeats, self.inner, self.time_limit = args.repeats, args.steps, args.time_limit
        self.data = args.data
        if self.data not in ("digits", "synthetic"):
            config = next(iter((self.models or {"": providers.model_config("MDTv2_S_2")}).values()))
            inputs.load(self.data, config, max(self.batches or [1]))


def _list(option: str, text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise UserError(f"{option}: got {text!r}, expected one or more names, by comma")
    return list(dict.fromkeys(names))


def _names(option: str, text: str, allowed: Sequence[str]) -> list[str]:
    names = _list(option, text)
    for name in names:
        if name not in allowed:
            raise UserError(
                f"{option}: got {name!r}{nearest(name, allowed)}, allowed are {', '.join(allowed)}"
            )
    return names


def _batch(text: str) -> int:
    try:
        batch = int(text)
    except ValueError:
        batch = 0
    if batch < 1:
        raise UserError(f"--batch: got {text!r}, allowed is a whole number, 1 or more")
    return batch


def _device(text: str) -> torch.device:
    if text == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(text)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"--device: got {text!r}, allowed are auto, cpu, cuda and cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device: {text!r} asked for, but torch finds no CUDA device here")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"--device: got {text!r}, this machine has cuda:0 to cuda:{torch.cuda.device_count() - 1}"
        )
    return device
