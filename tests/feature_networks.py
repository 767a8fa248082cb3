"""Small networks for the tests of evaluation, as a user would write them."""

import sys

import torch
from torch import Tensor, nn

DIM, CLASSES = 6, 5


class Small(nn.Module):
    """Fixed random weights: pooled [B, 6], spatial [B, 9, S, S], logits [B, 5] of uint8 [B, C, S, S]."""

    def __init__(self, channels: int = 3):
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.mix = nn.Parameter(torch.randn(9, channels, generator=generator), requires_grad=False)
        self.out = nn.Parameter(torch.randn(9, DIM, generator=generator), requires_grad=False)
        self.classes = nn.Parameter(torch.randn(DIM, CLASSES, generator=generator), requires_grad=False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        spatial = torch.einsum("kc,bchw->bkhw", self.mix, images.float() / 255 - 0.5)
        return spatial.abs().mean((2, 3)) @ self.out, spatial


class WithLogits(Small):
    def forward(self, images: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        pooled, spatial = super().forward(images)
        return {"pooled": pooled, "spatial": spatial, "logits": pooled @ self.classes}


class NvidiaStyle(Small):
    """The signature of ``inception-2015-12-05.pt``."""

    def forward(
        self, img: Tensor, return_features: bool = False, use_fp16: bool = False, no_output_bias: bool = False
    ) -> Tensor:
        spatial = torch.einsum("kc,bchw->bkhw", self.mix, img.float() / 255 - 0.5)
        pooled = spatial.abs().mean((2, 3)) @ self.out
        if return_features:
            return pooled
        logits = pooled @ self.classes
        return (logits if no_output_bias else logits + 1).softmax(1)


MODULE = """
import torch
from feature_networks import Small as Class, WithLogits
module = WithLogits()
def mean(images):
    return images.float().mean((2, 3))
def nothing(images):
    return None
def not_finite(images):
    return mean(images) / (images[:, :1].float().amax((2, 3)) - 77)
def breaks(images):
    raise RuntimeError("three\\nlines\\nof it")
def no_pooled(images):
    return {"pooled": None}
def no_features(images):
    return mean(images)[:, :0]
def transposed(images):
    return mean(images).T
number = 3
"""


def forget(*names: str) -> None:
    """Let the next test import its own modules with these names."""
    for name in list(sys.modules):
        if name.partition(".")[0] in names:
            del sys.modules[name]
