"""Sampling: the guided sampler and the files it writes."""

from .export import export_step, read_description, run_exported
from .folder import SampleFolder, assembled_in
from .generate import Sampler, check_sampling, sample, sampling_diffusion
from .images import (
    check_alone,
    check_name,
    check_writable,
    grid,
    png_names,
    save_picture,
    save_pngs,
    shown,
    to_uint8,
)
from .inpainting import Inpainter, check_inpainting, inpaint
from .npz import adm_name, save_npz

__all__ = [
    "Inpainter",
    "SampleFolder",
    "Sampler",
    "adm_name",
    "assembled_in",
    "check_alone",
    "check_inpainting",
    "check_name",
    "check_sampling",
    "check_writable",
    "export_step",
    "grid",
    "inpaint",
    "png_names",
    "read_description",
    "run_exported",
    "sample",
    "sampling_diffusion",
    "save_npz",
    "save_picture",
    "save_pngs",
    "shown",
    "to_uint8",
]
