"""``mdt-fast``: encode, train, sample, convert, doctor.

A user's mistake ends in one line on stderr and exit code 2; ``MDT_FAST_TRACEBACK=1`` shows the traceback.
Torch is imported only by the commands that compute, so that ``--help`` is quick.
"""

import argparse
import importlib.metadata
import io
import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from .errors import UserError, nearest

TRAIN_HELP = """\
Train a model and leave everything in RUN: config.json, metrics.jsonl, loss.png, samples.png and checkpoints/.

  mdt-fast train --preset digits --out runs/digits          minutes on two CPU cores, no download
  mdt-fast train --data photos --image-size 32 --out runs/photos
  mdt-fast train --out runs/photos --resume auto            go on where it stopped

Images are class folders (photos/cat/1.jpg) or files named ClassID_ImgID.jpg. Ctrl-C, SIGTERM or SIGHUP saves
a checkpoint first; the exit code is then 128 + the signal's number."""
SAMPLE_HELP = """\
Draw images from a run's EMA weights. Labels go round all classes unless --labels names some.

  mdt-fast sample runs/digits --num-samples 200 --steps 50 --cfg-scale 2 --npz samples.npz
  mdt-fast sample runs/digits --labels 3,7 --num-samples 20 --grid threes-and-sevens.png"""
ENCODE_HELP = """\
Make latents of images once, before a model is trained on them: the autoencoder's mean and log variance of
every image and of its mirror, with the labels, in checksummed .safetensors shards. Training draws from them.

  mdt-fast encode imagenet/train --vae stabilityai/sd-vae-ft-ema --image-size 256 --out latents
  torchrun --nproc-per-node 8 -m mdt_fast encode imagenet/train --vae vae --image-size 256 --out latents
  mdt-fast encode --out latents --verify                    read every byte again
  mdt-fast encode imagenet/train --out latents --verify     and see whether the images are still the same

SOURCE is a folder of class folders (SOURCE/cat/1.jpg), of files named ClassID_ImgID.jpg, or of webdataset
shards (.tar), or the word digits. What was stopped or killed goes on with the same command, with any number
of processes; Ctrl-C and SIGTERM exit with 128 + the signal's number."""
CONVERT_HELP = """\
Write a run's weights as one file, or change the format of a weights file (official .pt files are read without
executing anything in them).

  mdt-fast convert runs/digits digits.safetensors
  mdt-fast convert mdt_xl2_v2_ckpt.pt mdt_xl2_v2.safetensors"""


THREADS_HELP = "CPU threads (default: all cores); on a shared machine 1 is often the fastest"


class Parser(argparse.ArgumentParser):
    """argparse with whole option names only, one-line errors, and a hint for a mistyped word."""

    def __init__(self, **kwargs: object):
        kwargs.setdefault("allow_abbrev", False)
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(**kwargs)  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")

    def _check_value(self, action: argparse.Action, value: object) -> None:
        if action.choices is not None and value not in action.choices:
            name = "command" if action.dest == "command" else "/".join(action.option_strings)
            allowed = [str(choice) for choice in action.choices]
            self.error(
                f"{name}: {value!r} is not known{nearest(str(value), allowed)}; known: {', '.join(allowed)}"
            )

    def option_names(self) -> list[str]:
        return list(self._option_string_actions)


def build_parser() -> tuple[Parser, dict[str, Parser]]:
    """The parser and those of the commands by name."""
    parser = Parser(prog="mdt-fast", description="Masked Diffusion Transformers, exact and fast.")
    parser.add_argument(
        "--version", action="version", version=f"mdt-fast {importlib.metadata.version('mdt-fast')}"
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    encode = commands.add_parser("encode", help="images to latents, once", description=ENCODE_HELP)
    add_encode_arguments(encode)

    train = commands.add_parser(
        "train", help="train a model on digits or a folder of images", description=TRAIN_HELP
    )
    train.add_argument("--out", required=True, metavar="RUN", help="the run's folder")
    train.add_argument("--preset", metavar="NAME", help="digits or images (the default with --data)")
    train.add_argument("--data", metavar="DIR", help="a folder of images; sets the number of classes")
    train.add_argument(
        "--image-size", type=int, metavar="N", help="side in pixels that images are cropped to"
    )
    train.add_argument("--model", metavar="FACTORY", help="a published shape, such as MDTv2_S_2 or DiT_B_4")
    train.add_argument(
        "--steps", type=int, metavar="N", help="updates in all, those before a resume included"
    )
    train.add_argument("--batch-size", type=int, metavar="N")
    train.add_argument("--lr", type=float, metavar="X", help="learning rate")
    train.add_argument("--save-every", type=int, metavar="N", help="steps between checkpoints")
    train.add_argument(
        "--seed", type=int, metavar="N", help="decides weights, order, noise: the same seed, the same run"
    )
    train.add_argument("--device", metavar="NAME", help="auto (default), cpu, cuda or cuda:N")
    train.add_argument("--threads", type=int, metavar="N", help=THREADS_HELP)
    train.add_argument(
        "--resume", metavar="auto|PATH", help="go on from the newest checkpoint, or from this one"
    )
    train.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="any other setting, such as model.depth=8 (repeatable)",
    )
    train.add_argument(
        "--dry-run", action="store_true", help="check everything, print the plan, write nothing"
    )

    sample = commands.add_parser("sample", help="draw images from a trained run", description=SAMPLE_HELP)
    sample.add_argument("run", metavar="RUN", help="a run's folder, or one of its checkpoints")
    sample.add_argument("--num-samples", type=int, metavar="N")
    sample.add_argument("--steps", type=int, metavar="N", help="sampling steps")
    sample.add_argument("--cfg-scale", type=float, metavar="X", help="classifier-free guidance; 1 is none")
    sample.add_argument(
        "--scale-pow", metavar="P|none", help="power of the guidance's cosine schedule; none: constant"
    )
    sample.add_argument("--sampler", choices=("ddim", "ddpm"))
    sample.add_argument(
        "--labels", metavar="I,J,...", help="class indices, repeated in turn up to --num-samples"
    )
    sample.add_argument("--seed", type=int, metavar="N", help="image i depends on the seed and i alone")
    sample.add_argument("--batch-size", type=int, metavar="N", help="images drawn at once")
    sample.add_argument(
        "--device", default="auto", metavar="NAME", help="auto (default), cpu, cuda or cuda:N"
    )
    sample.add_argument("--threads", type=int, metavar="N", help=THREADS_HELP)
    sample.add_argument("--npz", metavar="FILE", help="arr_0 uint8 [N, S, S, C] and arr_1 labels")
    sample.add_argument("--grid", metavar="FILE", help="one PNG, a row per class (default: RUN/grid.png)")
    sample.add_argument("--png", metavar="DIR", help="one PNG per image")

    convert = commands.add_parser("convert", help="weights to .safetensors or .pt", description=CONVERT_HELP)
    convert.add_argument(
        "source", metavar="RUN|FILE", help="a run, a checkpoint, or a .pt or .safetensors file"
    )
    convert.add_argument("target", metavar="FILE", help="a name that ends in .safetensors or .pt")
    convert.add_argument(
        "--weights", choices=("ema", "model"), default="ema", help="which of a run's (default: ema)"
    )

    doctor = commands.add_parser("doctor", help="versions, devices, which backend serves each op and why")
    doctor.add_argument("--json", action="store_true", help="as JSON")
    return parser, {"encode": encode, "train": train, "sample": sample, "convert": convert, "doctor": doctor}


def add_encode_arguments(encode: Parser) -> None:
    encode.add_argument("source", nargs="?", metavar="SOURCE", help="a folder of images or of .tar shards")
    encode.add_argument("--vae", metavar="PATH|NAME", help="a folder or a hub name of an AutoencoderKL")
    encode.add_argument("--out", required=True, metavar="DIR", help="the folder of the latents")
    encode.add_argument(
        "--image-size", type=int, metavar="N", help="side in pixels that images are cropped to"
    )
    encode.add_argument(
        "--batch-size", type=int, default=32, metavar="N", help="images encoded at once (default: 32)"
    )
    encode.add_argument(
        "--shard-size", type=int, default=4096, metavar="N", help="images in a shard (default: 4096)"
    )
    encode.add_argument(
        "--dtype",
        choices=("float32", "float16"),
        default="float32",
        help="of what is kept (default: float32)",
    )
    encode.add_argument(
        "--vae-dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of the autoencoder's arithmetic (default: float32; bfloat16 is faster and less exact)",
    )
    encode.add_argument("--crop", choices=("center",), default="center")
    encode.add_argument(
        "--no-mirror", action="store_true", help="leave the mirrors out: half the time and space"
    )
    encode.add_argument(
        "--on-unreadable",
        choices=("stop", "skip"),
        default="stop",
        help="at an image that cannot be read: stop (default), or leave it out and list it in index.json",
    )
    encode.add_argument(
        "--device", default="auto", metavar="NAME", help="auto (default), cpu, cuda or cuda:N"
    )
    encode.add_argument(
        "--workers", type=int, default=4, metavar="N", help="threads that decode (default: 4)"
    )
    encode.add_argument("--threads", type=int, metavar="N", help=THREADS_HELP)
    encode.add_argument("--verify", action="store_true", help="encode nothing, check what is in DIR")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments; ``UserError`` for a usage mistake."""
    parser, commands = build_parser()
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        command = commands[args.command]
        option = unknown[0].split("=")[0]
        command.error(f"unknown argument {option!r}{nearest(option, command.option_names())}")
    return args


def run(argv: Sequence[str]) -> int:
    """Do what ``argv`` asks for; returns the exit code."""
    args = parse(argv)
    if args.command == "doctor":
        from .doctor import main as doctor

        return doctor(json=args.json)
    if args.command == "encode":
        from .commands_encode import encode

        return encode(args)
    from . import commands

    return {"train": commands.train, "sample": commands.sample, "convert": commands.convert}[args.command](
        args
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command's entry point; returns the exit code: 0, 2 for a user's mistake, 128 + n for signal n."""
    for stream in (sys.stdout, sys.stderr):  # a name that the terminal cannot show must not end a run
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        return run(sys.argv[1:] if argv is None else argv)
    except (UserError, OSError) as error:
        if os.environ.get("MDT_FAST_TRACEBACK"):
            raise
        return _refuse(str(error))
    except (MemoryError, RuntimeError) as error:
        if os.environ.get("MDT_FAST_TRACEBACK") or not _out_of_memory(error):
            raise
        return _refuse(f"out of memory; a smaller model or batch needs less ({error})")
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _refuse(message: str) -> int:
    print(f"mdt-fast: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _out_of_memory(error: Exception) -> bool:
    """Python's, torch's on a GPU, and torch's two on a CPU, which have no class of their own."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or any(
            words in str(error) for words in ("can't allocate memory", "Storage size calculation overflowed")
        )
    )
