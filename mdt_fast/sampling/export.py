"""A sampler's step as a file, exported or compiled, with everything that a loop around it needs to know.

n images of C channels and side S, O output channels, K coefficients.
"""

import io
import json
import logging
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..config import DiffusionConfig, ModelConfig, SampleConfig, from_dict, to_dict
from ..diffusion import GaussianDiffusion, channels_to_guide, make_betas
from ..errors import UserError, one_line
from ..files import aside, remove_leftovers
from ..kernels import ddim_coefficients, ddpm_coefficients
from ..models.attention import Attention
from ..models.base import Transformer
from ..models.convert import full_disk_named
from ..models.own import is_wrapped, keeps
from ..models.sampling import is_open
from .generate import (
    DEFAULT,
    PerImageNoise,
    check_first_index,
    check_sampling,
    checked_labels,
    sampling_diffusion,
)
from .guided import as_published, check_own_guidance, guidance_weights
from .images import check_name, check_writable

DESCRIPTION = "mdt_fast.json"
FORMAT = 1
KINDS = ("ddpm", "ddim")
MOST_IMAGES = 65536
"""For a fixed batch."""
COLUMNS = (
    "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "x_0", "x_t", "eps", "min_log_variance",
    "max_log_variance", "learned_noise", "noise",
)  # fmt: skip
"""The columns in a row of coefficients; see ``Step``."""


class Step(nn.Module):
    """A pass for both halves of a guided batch, and a ``ddpm`` or ``ddim`` step, chosen by the coefficients.

    With r, m, a, b, c, low, high, s and f, a row's ``COLUMNS``, and the guided output eps, v (0 with a fixed
    variance): x_0 = r x - m eps (or what the model predicts), clamped if ``clip``; then eps = (r x - x_0) /
    m, and the next x is a x_0 + b x + c eps + (s exp((w high + (1 - w) low) / 2) + f) noise with w = (v + 1)
    / 2.
    """

    def __init__(
        self, model: nn.Module, diffusion: DiffusionConfig, channels: int | None, *, clip: bool, guided: bool
    ):
        super().__init__()
        self.model, self.clip, self.guided = model, clip, guided
        self.start_x = diffusion.predict_xstart
        about: Any = model
        self.null, self.channels = about.num_classes, channels or channels_to_guide(about.in_channels)

    def forward(self, x: Tensor, t: Tensor, y: Tensor, noise: Tensor, row: Tensor, scale: Tensor) -> Tensor:
        """From x and noise float32 [n, C, S, S], t int64 [1] (an original timestep), y int64 [n], row float32
        [K] and scale float32 [1] to the next x."""
        n, C = x.shape[0], x.shape[1]
        images = x.to(next(self.model.parameters()).dtype)
        if self.guided:
            images, y = torch.cat([images, images]), torch.cat([y, torch.full_like(y, self.null)])
        output = self.model(images, t.expand(images.shape[0]), y).to(x.dtype)
        value, v = output[:n, :C], output[:n, C:]
        if self.guided:
            uncond, some = output[n:, : self.channels], value[:, : self.channels]
            value = torch.cat([uncond + scale * (some - uncond), value[:, self.channels :]], dim=1)
        recip, recipm1, to_start, to_x, to_eps, low, high, learned, fixed = row.unbind()
        start = value if self.start_x else recip * x - recipm1 * value
        if self.clip:
            start = start.clamp(-1, 1)
        eps = (recip * x - start) / recipm1  # from the clipped x_0
        fraction = (v + 1) / 2 if output.shape[1] > C else torch.zeros_like(x)
        sigma = learned * (0.5 * (fraction * high + (1 - fraction) * low)).exp() + fixed
        return to_start * start + to_x * x + to_eps * eps + sigma * noise


def step_coefficients(diffusion: GaussianDiffusion, config: SampleConfig) -> Tensor:
    """Coefficients, float32 [T, K] on the CPU: a row for each step, the last row for the first step taken."""
    a, zero = diffusion.alphas_cumprod, torch.zeros(diffusion.num_timesteps, dtype=torch.float32)
    if config.sampler == "ddpm":
        recip, recipm1, coef1, coef2, low, high, move = ddpm_coefficients(a, diffusion.var_type).unbind(1)
        columns = [recip, recipm1, coef1, coef2, zero, low, high, move, zero]
    else:
        recip, recipm1, signal_prev, direction, sigma = ddim_coefficients(a, config.eta).unbind(1)
        columns = [recip, recipm1, signal_prev, zero, direction, zero, zero, zero, sigma]
    return torch.stack(columns, dim=1)


def export_step(
    model: nn.Module,
    diffusion: DiffusionConfig,
    path: str | Path,
    config: SampleConfig = DEFAULT,
    *,
    clip_denoised: bool | None = None,
    batch: int | None = None,
    aoti: bool = False,
    classes: Sequence[str] | None = None,
) -> Path:
    """Write the sampler's step of ``model`` to ``path``, a .pt2: an ``ExportedProgram`` or, with ``aoti``, a
    package compiled by AOTInductor for this machine and the model's device.

    The program contains none of this package's ops: plain PyTorch is traced. Inputs and outputs are those of
    ``Step``; it supports ``ddpm`` and ``ddim`` with any number of steps. ``diffusion``: the process the model
    was trained with. ``config``: default settings for sampling; with ``cfg_scale`` 1 (needed for a model
    without label dropout), the unconditional half is left out for good. ``batch``: fixes n; None: any n. The
    file includes a description (``read_description``): configurations, ``alphas_cumprod``, and the times,
    guidance and coefficients of ``config``'s steps. ``clip_denoised`` as in ``sample``; ``classes``: names to
    store. The model is put in eval mode. Leftovers of a killed export to ``path`` are removed. Raises
    ``UserError`` for settings that do not fit, a path that cannot be written, a model on the meta device, and
    if AOTInductor finds no compiler.
    """
    path = Path(path)
    if path.suffix != ".pt2":
        raise UserError(f"path: got {path.name!r}, expected a name that ends in .pt2")
    check_writable(path)
    check_name(path, "path")
    if not isinstance(diffusion, DiffusionConfig):
        raise UserError(
            f"diffusion: got {type(diffusion).__name__}, expected the DiffusionConfig of the training "
            "(DiffusionConfig() is create_diffusion's default)"
        )
    if batch is not None and (type(batch) is not int or not 1 <= batch <= MOST_IMAGES):
        raise UserError(f"batch: got {batch!r}, expected None or 1 to {MOST_IMAGES}")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise UserError("model: it is on the meta device, and has no weights to export")
    if not is_open(model):
        raise UserError(f"model: {_why_closed(model)}")
    about: Any = model
    model_config = replace(about.config, num_classes=about.num_classes)
    _check(model_config, config)
    check_own_guidance(model, config)
    config = as_published(config, model_config)
    clip = model_config.in_channels in (1, 3) if clip_denoised is None else clip_denoised
    guided = config.cfg_scale != 1
    description = _describe(model_config, diffusion, config, clip=clip, batch=batch, classes=classes)
    step = Step(model.eval(), diffusion, config.guided_channels, clip=clip, guided=guided)
    n, device = batch or 2, next(model.parameters()).device
    C, S = model_config.in_channels, model_config.input_size
    # Whatever torch's default dtype and the caller's autocast are.
    x = torch.zeros(n, C, S, S, device=device, dtype=torch.float32)
    one, row = x.new_ones(1), x.new_ones(len(COLUMNS))
    y = torch.zeros(n, dtype=torch.int64, device=device)
    any_n = {0: torch.export.Dim("n", min=1)} if batch is None else None
    chosen = [(m, m.attention_backend) for m in model.modules() if isinstance(m, Attention)]
    try:
        for attention, _ in chosen:
            attention.attention_backend = "auto"  # a library chosen by the user may not be traceable
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            program = torch.export.export(
                step,
                (x, one.long(), y, x.clone(), row, one),
                dynamic_shapes=(any_n, None, any_n, any_n, None, None),
            )
    finally:
        for attention, name in chosen:
            attention.attention_backend = name
    text = json.dumps(description)
    archive = io.BytesIO()  # PyTorch's own writer aborts the process if a disk is full
    if aoti:
        _compile(program, archive, text)
    else:
        torch.export.save(program, archive, extra_files={DESCRIPTION: text})
    remove_leftovers(path.parent, [path.name])
    with full_disk_named(path), aside(path) as file:
        file.write_bytes(archive.getbuffer())
    return path


def _why_closed(model: nn.Module) -> str:
    """Why ``is_open`` is False."""
    if not isinstance(model, Transformer) or is_wrapped(model):
        return "has hooks, FSDP or torch.compile around it; export the model without them"
    if not keeps(model, "forward"):
        return f"got {type(model).__name__} with its own forward, expected this package's"
    return f"got {type(model).__name__} with its own adaLN_modulation, expected SiLU and a linear layer"


def read_description(path: str | Path) -> dict[str, Any]:
    """Read what ``export_step`` wrote beside the program. ``UserError`` for another or a damaged file."""
    return _opened(Path(path))[0]


@torch.no_grad()
def run_exported(
    path: str | Path,
    labels: Sequence[int],
    config: SampleConfig | None = None,
    *,
    first_index: int = 0,
) -> Tensor:
    """``sample`` from only a file that ``export_step`` wrote: [N, C, S, S] on the CPU.

    ``config``: None for the exported settings; only ``ddpm`` and ``ddim``, in the model's dtype. The images
    are those of ``sample`` up to rounding. An AOTInductor package runs compiled code as it is: open only
    those you trust. Raises ``UserError`` for a file or settings that do not fit.
    """
    check_first_index(first_index)
    described, package = _opened(Path(path))
    model = from_dict(ModelConfig, described["model"], "model")
    if config is None:
        config = from_dict(SampleConfig, described["sample"], "sample")
    _check(model, config)
    config = as_published(config, model)
    if config.cfg_scale != 1 and not described["guided"]:
        raise UserError(f"cfg_scale: the step was exported without guidance; use 1, got {config.cfg_scale:g}")
    channels = described["sample"].get("guided_channels") or channels_to_guide(model.in_channels)
    if (config.guided_channels or channels_to_guide(model.in_channels)) != channels:
        raise UserError(
            f"guided_channels: the step was exported with {channels}, got {config.guided_channels}"
        )
    labels = checked_labels(labels, model.num_classes)
    trained = from_dict(DiffusionConfig, described["diffusion"], "diffusion")
    diffusion = sampling_diffusion(model, trained, config)
    call, device = _called(Path(path), package)
    table = step_coefficients(diffusion, config).to(device)
    weights = guidance_weights(diffusion, config)
    noisy, fixed = config.sampler == "ddpm" or config.eta > 0, described["batch"]
    images, size = [], fixed or config.batch_size
    shape = model.in_channels, model.input_size, model.input_size
    for start in range(0, len(labels), size):
        some = list(labels[start : start + size])
        n = len(some)
        some += some[-1:] * ((fixed or n) - n)  # pad to the fixed batch
        noise = PerImageNoise(config.seed, first_index + start, len(some))
        y = torch.tensor(some, device=device)
        x = noise(torch.empty(len(some), *shape, device=device, dtype=torch.float32))
        for index in range(diffusion.num_timesteps - 1, -1, -1):
            t = torch.tensor([diffusion.timestep_map[index]], device=device)
            added = noise(x) if noisy else torch.zeros_like(x)
            with torch.autocast(device.type, enabled=False):
                x = call(x, t, y, added, table[index], weights[index : index + 1].to(device))
        images.append(x[:n].cpu())
    return torch.cat(images) if images else torch.empty(0, *shape, dtype=torch.float32)


def _check(model: ModelConfig, config: SampleConfig) -> None:
    check_sampling(model, config)
    if config.sampler not in KINDS:
        raise UserError(f"sampler: a step of {' or '.join(KINDS)} can be exported, got {config.sampler!r}")
    if config.dtype != "float32":
        raise UserError(
            f"dtype: an exported step computes in the dtype of its weights; use float32, got {config.dtype}"
        )


def _describe(
    model: ModelConfig,
    trained: DiffusionConfig,
    config: SampleConfig,
    *,
    clip: bool,
    batch: int | None,
    classes: Sequence[str] | None,
) -> dict[str, Any]:
    """JSON-ready; coefficients and guidance go from the first step, the noisiest, to the last."""
    diffusion = sampling_diffusion(model, trained, config)
    betas = make_betas(trained.noise_schedule, trained.diffusion_steps)
    return {
        "format": FORMAT,
        "model": to_dict(model),
        "diffusion": to_dict(trained),
        "sample": to_dict(config),
        "guided": config.cfg_scale != 1,
        "null_class": model.num_classes,
        "clip": clip,
        "batch": batch,
        "classes": None if classes is None else list(classes),
        "inputs": ["x", "t", "y", "noise", "row", "scale"],
        "columns": COLUMNS,
        "variance": diffusion.var_type,
        "predicts": diffusion.mean_type,
        "alphas_cumprod": np.cumprod(1 - betas).tolist(),
        "steps": {
            "t": diffusion.timestep_map[::-1],
            "scale": guidance_weights(diffusion, config).flip(0).tolist(),
            "row": step_coefficients(diffusion, config).flip(0).tolist(),
        },
    }


def _compile(program: torch.export.ExportedProgram, archive: io.BytesIO, description: str) -> None:
    from torch._inductor import aoti_compile_and_package
    from torch._inductor.exc import CppCompileError, InductorError

    configs = {"aot_inductor.metadata": {DESCRIPTION: description}}
    try:
        aoti_compile_and_package(program, package_path=archive, inductor_configs=configs)
    except (InductorError, CppCompileError) as error:  # such as no compiler
        reason = one_line(error)
        raise UserError(f"aoti: AOTInductor cannot compile the step here ({reason})") from None


def load_step(path: Path) -> tuple[Any, torch.device]:
    """A callable like ``Step``, and the device it is for. ``UserError`` for another or a damaged file."""
    return _called(path, _opened(path)[1])


def _called(path: Path, package: Any) -> tuple[Any, torch.device]:
    try:
        if package is not None:
            return package, torch.device(package.get_metadata()["AOTI_DEVICE_KEY"])
        with _quiet(logging.getLogger("torch.export")):  # it prints a traceback of what it raises
            program = torch.export.load(path)
        return program.module(), next(iter(program.state_dict.values())).device
    except Exception as error:  # torch raises a different error for each missing part of an archive
        reason = one_line(error)
        raise UserError(f"{str(path)!r}: the step in it cannot be loaded: {reason}") from None


@contextmanager
def _quiet(logger: logging.Logger) -> Iterator[None]:
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _package(path: Path) -> Any:
    from torch._inductor import aoti_load_package

    return aoti_load_package(str(path))


def _opened(path: Path) -> tuple[dict[str, Any], Any]:
    """The description, and the package if it is compiled; checks that every part is intact."""
    try:
        with zipfile.ZipFile(path) as archive:
            inside = archive.namelist()
            if (damaged := archive.testzip()) is not None:
                raise UserError(f"{str(path)!r}: damaged: {damaged} in it is not as it was written")
            written = [name for name in inside if name.endswith(f"/extra/{DESCRIPTION}")]
            text = archive.read(written[0]) if written else b""
    except UserError:
        raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"cannot read the exported step {str(path)!r}: {reason}") from None
    except Exception as error:  # zipfile and zlib raise many kinds of errors for a damaged archive
        reason = f"it is no zip archive, or damaged ({one_line(error)})"
        raise UserError(f"cannot read the exported step {str(path)!r}: {reason}") from None
    package = None
    try:
        if any("/data/aotinductor/" in name for name in inside):
            package = _package(path)
            text = package.get_metadata()[DESCRIPTION]
        described = json.loads(text)
        known = described["format"]
    except (RuntimeError, ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{str(path)!r} was not written by export_step, or is for another machine") from None
    if known != FORMAT:
        raise UserError(f"{str(path)!r}: has format {known}, this version reads {FORMAT}")
    _check_description(described, str(path))
    return described, package


def _check_description(described: dict[str, Any], path: str) -> None:
    for name, cls in (("model", ModelConfig), ("diffusion", DiffusionConfig), ("sample", SampleConfig)):
        try:
            from_dict(cls, described.get(name), name)
        except UserError as error:
            raise UserError(f"{path!r}: its description is damaged: {error}") from None
    guided, batch = described.get("guided"), described.get("batch", 0)
    if not isinstance(guided, bool):
        raise UserError(
            f"{path!r}: its description is damaged: guided: got {guided!r}, expected true or false"
        )
    if batch is not None and (type(batch) is not int or batch < 1):
        raise UserError(
            f"{path!r}: its description is damaged: batch: got {batch!r}, expected null or 1 or more"
        )
