"""An AutoencoderKL small enough for a test: factor 2, 4 latent channels, seeded weights."""

from pathlib import Path
from typing import Any

import pytest
import torch


def save_tiny_vae(folder: Path, seed: int = 0, **config: Any) -> Path:
    """Save one with diffusers' own ``save_pretrained``; ``config`` overrides its settings."""
    from diffusers import AutoencoderKL

    settings = {
        "block_out_channels": (8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "norm_num_groups": 4,
        "latent_channels": 4,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        AutoencoderKL(**{**settings, **config}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny autoencoder for RGB images."""
    return save_tiny_vae(tmp_path_factory.mktemp("autoencoder") / "vae")
