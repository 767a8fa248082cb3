"""Samples out: the guided sampler and the files it fills."""

from .folder import SampleFolder
from .generate import Sampler, check_sampling, sample, sampling_diffusion
from .images import (
    check_writable,
    grid,
    save_npz,
    save_picture,
    save_pngs,
    shown,
    stream_npz,
    to_uint8,
)

__all__ = [
    "SampleFolder",
    "Sampler",
    "check_sampling",
    "check_writable",
    "grid",
    "sample",
    "sampling_diffusion",
    "save_npz",
    "save_picture",
    "save_pngs",
    "shown",
    "stream_npz",
    "to_uint8",
]
