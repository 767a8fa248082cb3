"""Samples out: the guided sampler and the files it fills."""

from .generate import check_sampling, sample, sampling_diffusion
from .images import check_writable, grid, save_npz, save_picture, save_pngs, to_uint8

__all__ = [
    "check_sampling",
    "check_writable",
    "grid",
    "sample",
    "sampling_diffusion",
    "save_npz",
    "save_picture",
    "save_pngs",
    "to_uint8",
]
