"""Samples out: the guided sampler and the files it fills."""

from .generate import check_sampling, sample, sampling_diffusion
from .images import check_writable, grid, save_picture, save_pngs, to_uint8
from .npz import adm_name, save_npz

__all__ = [
    "adm_name",
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
