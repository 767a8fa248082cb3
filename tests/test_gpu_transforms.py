"""The tests of ``transforms.py`` on a GPU, whose kernels torch.func's transforms cannot see into."""

from collections.abc import Iterator

import pytest
import torch

from transforms import *  # noqa: F403

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("full_float32", "_on_a_gpu")]


@pytest.fixture
def _on_a_gpu() -> Iterator[None]:
    with torch.device("cuda"):
        yield
