"""``mdt-fast``: encode, train, sample, evaluate, convert, export, doctor.

A user error prints one line on stderr and exits with code 2; ``MDT_FAST_TRACEBACK=1`` shows the traceback.
Torch is imported only by the commands that compute, so that ``--help`` is quick.
"""

import argparse
import importlib.metadata
import io
import os
import re
import select
import signal
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from .errors import UserError, nearest
from .options import THREADS_HELP, add_export, add_sample

TRAIN_HELP = """\
Train a model and write everything to RUN: config.json, metrics.jsonl, loss.png, samples.png and checkpoints/.

  mdt-fast train --preset digits --out runs/digits          minutes on two CPU cores, no download
  mdt-fast train --data photos --image-size 32 --out runs/photos
  mdt-fast train --out runs/photos --resume auto            resume where it stopped

  torchrun --nproc-per-node 8 -m mdt_fast train --preset mdtv2-xl2 --data latents --out runs/xl2 --resume auto

Images are class folders (photos/cat/1.jpg), files named ClassID_ImgID.jpg, or webdataset shards; mdt-fast
encode turns them into latents. Settings not given come from the preset, or with --resume from the run. On
SIGTERM or SIGUSR1 training saves a checkpoint and exits with 0; on Ctrl-C or SIGHUP it also saves one, and
exits with 128 + the signal number."""
ENCODE_HELP = """\
Encode images to latents once, before training on them: the autoencoder's mean and log variance of every image
and its mirror image, with labels, in checksummed .safetensors shards. Training samples latents from them.

  mdt-fast encode imagenet/train --vae stabilityai/sd-vae-ft-mse --image-size 256 --out latents
  torchrun --nproc-per-node 8 -m mdt_fast encode imagenet/train --vae vae --image-size 256 --out latents
  mdt-fast encode --out latents --verify                    check every byte
  mdt-fast encode imagenet/train --out latents --verify     also check that the images are unchanged

SOURCE is a folder of class folders (SOURCE/cat/1.jpg), of files named ClassID_ImgID.jpg, or of webdataset
shards (.tar), or the word digits. After a stop or kill, run the same command again, with any number of
processes, to resume; Ctrl-C and SIGTERM exit with 128 + the signal number."""
ENCODE_USAGE = """\
mdt-fast encode SOURCE --vae PATH|NAME --image-size N --out DIR [OPTION ...]
       mdt-fast encode [SOURCE] --out DIR --verify"""
CONVERT_HELP = """\
Write a run's weights to one file, change the format of a weights file, or convert a run to and from the files
of the official training code (.pt files are read without executing code in them).

  mdt-fast convert runs/digits digits.safetensors
  mdt-fast convert mdt_xl2_v2_ckpt.pt mdt_xl2_v2.safetensors

  mdt-fast convert runs/xl2 official --official         modelNNNNNN.pt, ema_RATE_NNNNNN.pt and optNNNNNN.pt
  mdt-fast convert official runs/xl2 --data latents     a run that resumes from the newest of these files
  mdt-fast convert mdt_xl2_v2_ckpt.pt runs/fine --data latents          a run that starts from these weights

  mdt-fast convert runs/xl2 pipeline --diffusers        a folder for MDTPipeline.from_pretrained
  mdt-fast convert pipeline weights.safetensors         and back, from a pipeline's or a model's folder

When it makes a run, convert picks the preset by the shape of the weights (or takes --preset) and reads the
rest from the files; --config and --set override any setting, as in train."""

DOCTOR_HELP = """\
Report what this machine has: versions, devices, which backend runs each op and why, and which optional
packages are missing, what they are for and how to get them. Changes nothing."""

EVALUATE_HELP = """\
Evaluate images by FID, sFID, Inception Score, precision and recall against a reference.

  mdt-fast evaluate samples.npz --reference VIRTUAL_imagenet256_labeled.npz
  mdt-fast evaluate photos --image-size 256 --save-features photos.safetensors
  mdt-fast evaluate samples.npz --reference photos.safetensors --metrics fid,recall --json fid.json
  mdt-fast evaluate samples.npz --reference photos --features my_network:features

SAMPLES and REF are each a .npz (arr_0 uint8 [N, H, W, C], as mdt-fast sample --npz writes it; or mu, sigma,
mu_s, sigma_s), a folder of images, a folder from mdt-fast sample --out, a file from --save-features, or the
word digits. Nothing is downloaded."""


class Parser(argparse.ArgumentParser):
    """argparse with full option names only, one-line errors, and a hint for a mistyped word."""

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
            self.error(f"{name}: got {value!r}{nearest(str(value), allowed)}, expected {', '.join(allowed)}")

    def option_names(self) -> list[str]:
        return list(self._option_string_actions)


def build_parser() -> tuple[Parser, dict[str, Parser]]:
    """The parser, and the command parsers by name."""
    parser = Parser(prog="mdt-fast", description="Masked Diffusion Transformers, exact and fast.")
    parser.add_argument(
        "--version", action="version", version=f"mdt-fast {importlib.metadata.version('mdt-fast')}"
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    _add_encode(commands)
    _add_train(commands)
    add_sample(commands)
    _add_evaluate(commands)
    _add_convert(commands)
    add_export(commands)
    doctor = commands.add_parser(
        "doctor", help="versions, devices, which backend runs each op and why", description=DOCTOR_HELP
    )
    doctor.add_argument("--json", action="store_true", help="print JSON")
    return parser, commands.choices


def _add_encode(commands: Any) -> None:
    encode: Parser = commands.add_parser(
        "encode", help="encode images to latents, once", description=ENCODE_HELP, usage=ENCODE_USAGE
    )
    add = encode.add_argument
    add("source", nargs="?", metavar="SOURCE", help="a folder of images or of .tar shards, or: digits")
    add("--vae", metavar="PATH|NAME", help="folder or hub name of an AutoencoderKL (required to encode)")
    add("--out", required=True, metavar="DIR", help="the latents folder")
    add(
        "--image-size",
        type=int,
        metavar="N",
        help="side of the square crop in pixels (required to encode)",
    )
    add("--batch-size", type=int, default=32, metavar="N", help="images per batch (default: 32)")
    add("--shard-size", type=int, default=4096, metavar="N", help="images per shard (default: 4096)")
    add(
        "--dtype",
        choices=("float32", "float16"),
        default="float32",
        help="dtype of the stored latents (default: float32)",
    )
    add(
        "--vae-dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="compute dtype of the autoencoder (default: float32; bfloat16 is faster and less exact)",
    )
    add("--crop", choices=("center",), default="center", help="centre square, as for the published models")
    add("--no-mirror", action="store_true", help="do not encode mirror images: half the time and space")
    add(
        "--on-unreadable",
        choices=("stop", "skip"),
        default="stop",
        help="at an unreadable image: stop (default), or skip it and list it in index.json",
    )
    add("--device", default="auto", metavar="NAME", help="auto (default), cpu, cuda or cuda:N")
    add("--workers", type=int, default=4, metavar="N", help="image decoding threads (default: 4)")
    add("--threads", type=int, metavar="N", help=THREADS_HELP)
    add("--verify", action="store_true", help="encode nothing; check the contents of DIR")


def _add_evaluate(commands: Any) -> None:
    evaluate: Parser = commands.add_parser(
        "evaluate", help="FID, sFID, Inception Score, precision, recall", description=EVALUATE_HELP
    )
    add = evaluate.add_argument
    add("samples", metavar="SAMPLES", help="a .npz, a folder of images, or a file of features")
    add("--reference", metavar="REF", help="what to compare with: as for SAMPLES, or statistics")
    add(
        "--features",
        metavar="NAME|FILE|MODULE:NAME",
        help="feature network: inception-v3-compat (default, from torch-fidelity), a TorchScript or "
        "torch.export file, or an importable Python function or module",
    )
    add("--weights", metavar="FILE", help="weights of inception-v3-compat (default: in torch hub's folder)")
    add("--trust-features", action="store_true", help="allow the program in --features FILE to run")
    add(
        "--metrics", metavar="A,B,...", help="fid, sfid, is, precision, recall (default: all computable ones)"
    )
    add("--image-size", type=int, metavar="N", help="scale and crop the images of a folder, as for training")
    add("--batch-size", type=int, default=64, metavar="N", help="images per batch (default: 64)")
    add(
        "--save-features",
        metavar="FILE",
        help="save the features of SAMPLES (.safetensors), for instance of a reference",
    )
    add("--json", metavar="FILE", help="write values, their inputs and notes as JSON")
    add("--device", default="auto", metavar="NAME", help="auto (default), cpu, cuda or cuda:N")
    add("--threads", type=int, metavar="N", help=THREADS_HELP)


def _add_convert(commands: Any) -> None:
    convert: Parser = commands.add_parser(
        "convert",
        help="weights to .safetensors or .pt; official files; diffusers pipelines",
        description=CONVERT_HELP,
    )
    add = convert.add_argument
    add(
        "source",
        metavar="RUN|FILE|DIR",
        help="a run, a checkpoint, a .pt or .safetensors file, a folder of official files, or a folder "
        "written by save_pretrained (diffusers' DiT too)",
    )
    add(
        "target",
        metavar="FILE|DIR|RUN",
        help="a .safetensors or .pt file, or a folder for official files, a run or a pipeline",
    )
    add("--weights", choices=("ema", "model"), default="ema", help="which weights of a run (default: ema)")
    add("--official", action="store_true", help="to modelNNNNNN.pt, ema_RATE_NNNNNN.pt and optNNNNNN.pt")
    add("--diffusers", action="store_true", help="to a folder for MDTPipeline, with the run's autoencoder")
    _add_recipe(
        add,
        preset="for a new run (default: the published model with this shape of weights)",
        data="for a new run: images, webdataset shards or encoded latents",
    )


def _add_recipe(add: Any, preset: str, data: str) -> None:
    """Add the options that set a run's configuration; ``preset`` and ``data`` are two of their help texts."""
    add("--preset", metavar="NAME", help=preset)
    add("--config", metavar="FILE", help="YAML settings, as printed by --dry-run; override the preset")
    add("--data", metavar="DIR", help=data)
    add("--image-size", type=int, metavar="N", help="side of the square crop in pixels")
    add("--vae", metavar="PATH|NAME", help="autoencoder: train on latents of the images, encoded on the fly")
    add("--unconditional", action="store_true", help="train without classes; labels are ignored")
    add("--model", metavar="FACTORY", help="a published model shape, such as MDTv2_S_2 or DiT_B_4")
    add(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="any other setting, such as model.depth=8 (repeatable)",
    )


def _add_train(commands: Any) -> None:
    train: Parser = commands.add_parser(
        "train", help="train a model on images or encoded latents", description=TRAIN_HELP
    )
    add = train.add_argument
    add("--out", required=True, metavar="RUN", help="the run's folder")
    _add_recipe(
        add,
        preset="digits, images (the default with --data), mdtv2-xl2, dit-s4, ...",
        data="images, webdataset shards or encoded latents; sets the number of classes",
    )
    add("--steps", type=int, metavar="N", help="total updates, including those before a resume")
    add("--batch-size", type=int, metavar="N", help="images per update, over all processes")
    add("--accumulate", type=int, metavar="N", help="micro-batches per update and process, to save memory")
    add("--lr", type=float, metavar="X", help="learning rate")
    add("--dtype", metavar="TYPE", help="compute dtype: float32, bfloat16 or float16")
    add("--save-every", type=int, metavar="N", help="steps between checkpoints")
    add("--seed", type=int, metavar="N", help="seeds weights, data order and noise: same seed, same run")
    add("--device", metavar="NAME", help="auto (default), cpu, cuda or cuda:N")
    add("--threads", type=int, metavar="N", help=THREADS_HELP)
    add("--resume", metavar="auto|PATH", help="resume from the newest checkpoint, or from this one")
    add("--dry-run", action="store_true", help="check everything, print all settings as YAML, write nothing")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse ``argv``; ``UserError`` for a usage error."""
    parser, commands = build_parser()
    if not argv:
        parser.print_help()
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        command = commands[args.command]
        option = unknown[0].split("=")[0]
        command.error(f"unknown argument {option!r}{nearest(option, command.option_names())}")
    return args


def run(argv: Sequence[str]) -> int:
    """Run the command in ``argv``; returns the exit code."""
    args = parse(argv)
    if args.command == "doctor":
        from .doctor import main as doctor

        return doctor(json=args.json)
    from . import commands

    return getattr(commands, args.command)(args)


def main(argv: Sequence[str] | None = None) -> int:
    """The command's entry point; returns the exit code: 0, 2 for a user error, 128 + n for signal n."""
    for stream in (sys.stdout, sys.stderr):  # a name that the terminal cannot display must not end a run
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        return run(sys.argv[1:] if argv is None else argv)
    except (UserError, OSError) as error:
        if isinstance(error, BrokenPipeError) and _unread():
            return 141  # a shell's exit code for SIGPIPE
        if os.environ.get("MDT_FAST_TRACEBACK"):
            raise
        return _refuse(_by_option(str(error), sys.argv[1:] if argv is None else argv))
    except (MemoryError, RuntimeError) as error:
        if os.environ.get("MDT_FAST_TRACEBACK") or not _out_of_memory(error):
            raise
        return _refuse(f"out of memory; use a smaller model or batch ({error})")
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _unread() -> bool:
    """Whether the reader of stdout has gone (a closed pipe); if so, redirect stdout to the null device."""
    try:
        printed = sys.stdout.fileno()
    except (AttributeError, OSError, ValueError):  # stdout is not a file
        return False
    poll = select.poll()
    poll.register(printed, 0)
    gone = any(event & select.POLLERR for _, event in poll.poll(0))
    if gone:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, printed)
        os.close(nowhere)
    return gone


def _by_option(message: str, argv: Sequence[str]) -> str:
    """``message`` with the Python argument it begins with (``eta: ...``) replaced by its option's name.

    In commands with ``--set``, ``train.lr`` keeps its name unless ``--lr`` was used, and ``data`` and
    ``model`` keep theirs, because they are sections of settings.
    """
    command = build_parser()[1].get(argv[0]) if argv else None
    found = re.match(r"(\w+\.)?(\w+)(?=: )", message)
    if command is None or found is None:
        return message
    options = command.option_names()
    for setting, name in _settings().items():
        used = any(word.partition("=")[0] == name for word in argv)
        if used and message.startswith(f"{setting}: "):
            return message.replace(setting, name, 1)
    option = f"--{found[2].replace('_', '-')}"
    if option not in options or ("--set" in options and (found[1] or found[2] in ("data", "model"))):
        return message
    return option + message[found.end() :]


def _settings() -> dict[str, str]:
    """Settings that have their own option, with its name: ``train.lr`` to ``--lr``."""
    from .commands.train import OPTIONS

    return {".".join(path): f"--{name.replace('_', '-')}" for name, path in OPTIONS.items()}


def _refuse(message: str) -> int:
    if "RANK" not in os.environ:
        return _say(message)
    # With several processes only the first to fail reports; threads may still be waiting for lost processes.
    from .training.distributed import first_to_report, leave

    return leave(_say(message) if first_to_report() else 2)


def _say(message: str) -> int:
    print(f"mdt-fast: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _out_of_memory(error: Exception) -> bool:
    """Python's error, torch's on a GPU, or one of torch's two on a CPU, which have no class of their own."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or any(
            words in str(error) for words in ("can't allocate memory", "Storage size calculation overflowed")
        )
    )
