"""What every test shares: one thread, seeded draws, and a closing list of the golden tests."""

import gc
import sys
import textwrap
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from PIL import Image

from autoencoders import tiny_vae  # noqa: F401 (a fixture for all of them)
from forked import end_all
from golden_files import frequencies
from mdt_fast.reference import embed

WRAP = {"break_on_hyphens": False, "break_long_words": False}

torch.set_num_threads(1)  # the tensors are tiny: more threads only wait for each other


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _nothing_left_running() -> Iterator[None]:
    yield
    end_all()


@pytest.fixture(autouse=True, scope="module")
def _compiled_for_these_alone() -> Iterator[None]:
    """What one file compiles does not count towards another's recompile limit, whatever their order."""
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture(autouse=True)
def _on_the_recording_machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Golden tests do not depend on how this machine's processor rounds."""
    if "golden" in request.node.name:
        monkeypatch.setattr(embed, "frequencies", frequencies)


@pytest.fixture
def rendered() -> None:
    """For tests of the loss curve itself (:func:`_loss_curves_are_blank`)."""


@pytest.fixture(autouse=True)
def _loss_curves_are_blank(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the rendering of ``loss.png`` is done, which takes 40% of a tiny training."""
    figure = sys.modules.get("matplotlib.figure")  # not imported for this: a first curve may be rendered
    if figure is None or "rendered" in request.fixturenames:
        return
    render = figure.Figure.savefig

    def savefig(self: Any, file: Any, **how: Any) -> None:
        if "loss.png" in getattr(file, "name", ""):
            Image.new("RGB", (64, 64)).save(file, format="png")
        else:
            render(self, file, **how)

    monkeypatch.setattr(figure.Figure, "savefig", savefig)


@pytest.fixture
def full_float32() -> Iterator[None]:
    """Float32 products in float32. (``monkeypatch`` would delete attributes that these objects compute.)"""
    where = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [flags.allow_tf32 for flags in where]
    for flags in where:
        flags.allow_tf32 = False
    yield
    for flags, allowed in zip(where, before, strict=True):
        flags.allow_tf32 = allowed


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with many slow tests go first, so that parallel processes end at about the same time."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish() -> None:
    """Thousands of collected tests and modules are not garbage; scanning them took a second each time."""
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """List every golden test (against the official implementation's numbers) with its outcome."""
    golden: dict[tuple[str, str], list[str]] = defaultdict(list)
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.getreports(outcome):
            if "golden" not in report.nodeid.partition("::")[2] or (
                outcome == "passed" and report.when != "call"
            ):
                continue
            name, _, case = report.nodeid.partition("[")
            golden[name, outcome].append(case.removesuffix("]"))
    if not golden:
        return
    terminalreporter.section("golden: numbers of the official implementation")
    for (name, outcome), cases in sorted(golden.items()):
        terminalreporter.line(f"{name}: {len(cases)} {outcome}")
        if any(cases):
            terminalreporter.line(textwrap.indent(textwrap.fill(", ".join(cases), 106, **WRAP), "    "))
