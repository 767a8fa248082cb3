"""``docs/cluster.md`` and the installed torch: options exist, scripts parse, signals act as described."""

import os
import re
import shlex
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from itertools import takewhile
from operator import methodcaller
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from mdt_fast.training.distributed import warnings_of_launch

TEXT = (Path(__file__).parents[2] / "docs/cluster.md").read_text()
FENCED = re.findall(r"^```(\w+)\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
SHELL = [block for language, block in FENCED if language == "sh"]


def embedded(block: str) -> Iterator[str]:
    """The scripts in a YAML file: the indented text below each line that ends with ``|``."""
    lines = block.splitlines()
    for i, line in enumerate(lines):
        if line.endswith("|"):
            margin = re.match(" *", lines[i + 1])[0]
            inside = takewhile(methodcaller("startswith", margin), lines[i + 1 :])
            yield textwrap.dedent("\n".join(inside)) + "\n"


SCRIPTS = [
    *SHELL,
    *(script for language, block in FENCED if language == "yaml" for script in embedded(block)),
]
COMMANDS = [
    line.partition("torchrun ")[2].rstrip(" &")
    for script in SCRIPTS
    for line in script.replace("\\\n", " ").splitlines()
    if "torchrun " in line and " mdt_fast train " in line
]
FORWARD = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"


def test_all_of_them_are_found() -> None:
    assert len(SCRIPTS) == 4 + 3
    assert len(COMMANDS) == 2 + 1 + 3


@pytest.mark.parametrize("script", SCRIPTS, ids=range(len(SCRIPTS)))
def test_scripts_parse(script: str) -> None:
    done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_machines_do_not_meet_in_torchruns_store() -> None:
    """With several machines, that store would count restarts per machine."""
    several = [
        script for script in SCRIPTS if re.search(r"--rdzv-backend|^\s*torchrun -m", script, re.MULTILINE)
    ]
    assert len(several) == 1 + 1 + 3
    assert all("export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1\n" in script for script in several)


@pytest.mark.parametrize(
    ("machines", "shared", "warns"), [("2", "True", True), ("2", "False", False), ("1", "True", False)]
)
def test_the_trainer_warns_where_they_would(
    machines: str, shared: str, warns: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GROUP_WORLD_SIZE", machines)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", shared)
    said = warnings_of_launch()
    assert len(said) == warns
    assert all("TORCH_DISABLE_SHARE_RDZV_TCP_STORE" in line for line in said)


@pytest.mark.parametrize("command", COMMANDS, ids=range(len(COMMANDS)))
def test_torchrun_takes_the_options(command: str) -> None:
    numbers = command.replace('"$NODES"', "2").replace('"$SLURM_NNODES"', "2")
    parsed = get_args_parser().parse_args(shlex.split(numbers))
    assert (parsed.module, parsed.training_script) == (True, "mdt_fast")
    rest = parsed.training_script_args
    assert rest[:3] == ["train", "--preset", "mdtv2-xl2"]
    assert rest[rest.index("--resume") + 1] == "auto"


def test_other_options_that_are_named_exist() -> None:
    known = {option for action in get_args_parser()._actions for option in action.option_strings}
    named = set(
        re.findall(r"`(--(?:rdzv|numa|max-restarts|nproc|nnodes|signals|shutdown|node-rank)[a-z-]*)", TEXT)
    )
    assert len(named) >= 8
    missing = named - known
    assert missing <= {"--shutdown-timeout"}, missing  # newer than torch 2.11, as the text says


WORKER = """
import os, signal, sys, time
caught = []
for name in ("SIGTERM", "SIGUSR1"):
    signal.signal(getattr(signal, name), lambda number, frame: caught.append(number))
open(f"ready{os.environ['RANK']}", "w").close()
end = time.monotonic() + 60
while not caught and time.monotonic() < end:
    time.sleep(0.02)
open(f"saved{os.environ['RANK']}", "w").write(str(caught))
"""


@pytest.mark.parametrize(
    ("name", "options", "passed_on"),
    [
        ("SIGTERM", [], True),
        ("SIGUSR1", ["--signals-to-handle", FORWARD], True),
        ("SIGUSR1", [], False),  # though the variable that should help is set below
    ],
    ids=["SIGTERM", "SIGUSR1-asked-for", "SIGUSR1"],
)
def test_what_torchrun_does_with_a_signal(
    name: str, options: list[str], passed_on: bool, tmp_path: Path
) -> None:
    (tmp_path / "worker.py").write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *options, "worker.py"]
    variables = {"OMP_NUM_THREADS": "1", "TORCHELASTIC_SIGNALS_TO_HANDLE": FORWARD}
    running = subprocess.Popen(
        command, cwd=tmp_path, env={**os.environ, **variables}, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    waited = time.monotonic() + 60
    while len(list(tmp_path.glob("ready*"))) < 2 and time.monotonic() < waited:
        time.sleep(0.05)
    number = getattr(signal, name)
    running.send_signal(number)
    running.wait(60)
    if passed_on:
        assert running.returncode == 1
        assert "SignalException" in running.stderr.read()
        assert [(tmp_path / f"saved{rank}").read_text() for rank in (0, 1)] == [f"[{number.value}]"] * 2
    else:
        assert running.returncode == -number
        assert not list(tmp_path.glob("saved*"))
        for process in workers_left(tmp_path):
            os.kill(process, signal.SIGTERM)


def workers_left(folder: Path) -> list[int]:
    """The processes that run in ``folder``."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if (entry / "cwd").resolve() == folder.resolve():
                found.append(int(entry.name))
        except OSError:
            continue
    return found
