"""For benches on a busy machine: short probes, and threads as they were (``bench/`` is on pytest's path)."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _short_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("measure.PROBE_SECONDS", 0.05)


@pytest.fixture(autouse=True)
def _same_threads_after() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
