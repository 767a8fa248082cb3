"""The features of a set of images, computed batch by batch."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from feature_networks import CLASSES, DIM, WithLogits
from mdt_fast.evaluation import extract, open_source
from mdt_fast.evaluation.extractors import Extractor
from mdt_fast.sampling import save_npz


class Reusing(nn.Module):
    """Writes into the same memory at every call, as a program with fixed buffers does."""

    def __init__(self) -> None:
        super().__init__()
        self.network = WithLogits()
        self.outputs = {"pooled": torch.empty(4, DIM), "probabilities": torch.empty(4, CLASSES)}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        found = self.network(images)
        self.outputs["pooled"].copy_(found["pooled"])
        self.outputs["probabilities"].copy_(found["logits"].softmax(1))
        return self.outputs


def test_a_network_may_reuse_its_memory(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (10, 8, 8, 3), dtype=np.uint8)
    save_npz(tmp_path / "a.npz", images, [0] * 10)
    source = open_source(tmp_path / "a.npz", "SAMPLES").images
    assert source is not None
    reused, expected = (
        extract(source, Extractor(type(network).__name__, network, ""), batch_size=4)
        for network in (Reusing(), WithLogits())
    )
    assert torch.equal(reused.pooled, expected.pooled)
    torch.testing.assert_close(reused.probabilities, expected.probabilities)
    assert torch.equal(reused.moments.covariance, expected.moments.covariance)
