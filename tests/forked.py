"""Processes forked from one that has already imported what they need, which takes longer than the work."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import ClassVar

PRELOADED = [
    "mdt_fast.commands.train", "mdt_fast.commands.sample", "mdt_fast.data.latents", "torch._dynamo",
    "torch.distributed.fsdp", "torch.utils.tensorboard", "sklearn.datasets", "matplotlib.figure",
    "matplotlib.backends.backend_agg", "diffusers.models.autoencoders.autoencoder_kl", "pytest",
]  # fmt: skip
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(PRELOADED)


class Forked:
    """``mdt-fast ARGUMENTS`` on one thread; used like a ``Popen``. ``out`` and ``err``: files for what it
    prints; ``environment``: on top of this process's."""

    running: ClassVar[list["Forked"]] = []

    def __init__(
        self, arguments: Sequence[str], out: Path, err: Path, environment: Mapping[str, str] | None = None
    ):
        self.out, self.err = out, err
        given = [*arguments], out, err, {**os.environ, **(environment or {})}
        self.process = CONTEXT.Process(target=_command, args=given)
        self.process.start()
        self.pid, self.kill = self.process.pid, self.process.kill
        self.running.append(self)

    def poll(self) -> int | None:
        return self.process.exitcode

    def send_signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            if self.poll() is None and self.pid is not None:
                os.kill(self.pid, number)

    def wait(self, seconds: float | None = None) -> int:
        """The exit code; ``TimeoutError`` if it does not end in time."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            raise TimeoutError(f"a process did not end within {seconds} s")
        return self.process.exitcode

    def printed(self) -> tuple[str, str]:
        """What it has printed so far."""
        return self.out.read_text(), self.err.read_text()


def end_all() -> None:
    """Kill what a test has left running."""
    while Forked.running:
        process = Forked.running.pop()
        process.kill()
        process.wait(60)


def _command(arguments: list[str], out: Path, err: Path, environment: dict[str, str]) -> None:
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), number)
    # In tests run in the background, Ctrl-C is ignored, and children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()  # the forking process was started in another
    os.environ |= environment
    import torch

    from mdt_fast.cli import main

    torch.set_num_threads(1)
    sys.exit(main(arguments))
