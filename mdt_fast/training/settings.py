"""Checks of the settings: which contradict each other, and which may change on resume."""

from typing import Any

from ..config import RunConfig, check_types, to_dict
from ..diffusion import create_diffusion
from ..errors import UserError
from ..sampling import check_sampling, sampling_diffusion
from .optim import check_decay
from .sinks import imported_wandb

MAY_CHANGE = (
    "train.steps", "train.log_every", "train.save_every", "train.keep", "train.keep_every", "train.device",
    "train.accumulate", "train.passes", "train.weights", "train.moments", "train.parallel", "train.compile",
    "train.cuda_graphs", "train.checkpointing", "train.max_skips", "train.async_save", "train.tensorboard",
    "train.wandb", "data.source", "data.vae", "data.workers", "data.on_unreadable",
)  # fmt: skip
"""Settings that may change on resume, besides all of ``sample``. They affect rounding at most (``data.vae``
must have the same weights); all others affect the results."""
RATES = "train.lr", "train.lr_anneal_steps"
"""Settings that affect the results but may still change on resume; the change is reported."""


MOST_DIFFUSION_STEPS = 100_000


def check_resumable(saved: RunConfig, wanted: RunConfig) -> list[str]:
    """Notes on learning-rate settings that change from here on. ``UserError`` if any other setting that
    affects the results differs from the checkpoint's."""
    before, after = _flat(to_dict(saved)), _flat(to_dict(wanted))
    for key, value in after.items():
        if before[key] != value and key not in (*RATES, *MAY_CHANGE) and not key.startswith("sample."):
            raise UserError(
                f"{key}: cannot be changed on resume: the checkpoint has {before[key]!r}, got {value!r}"
            )
    changed = [key for key in RATES if before[key] != after[key]]
    return [f"{key}: {after[key]} from here on, {before[key]} before" for key in changed]


def check_settings(config: RunConfig) -> None:
    """``UserError`` for settings of a wrong type, out of range, or that contradict each other."""
    settings = config.train
    for section in ("model", "data", "diffusion", "train"):  # sample's: check_sampling
        check_types(getattr(config, section), f"{section}.")
    for name, lowest in (
        ("steps", 1), ("batch_size", 1), ("accumulate", 1), ("log_every", 1), ("save_every", 1), ("keep", 1),
        ("keep_every", 0), ("warmup_steps", 0), ("lr_anneal_steps", 0), ("seed", 0), ("max_grad_norm", 0),
        ("max_skips", 0),
    ):  # fmt: skip
        if not getattr(settings, name) >= lowest:
            raise UserError(f"train.{name}: got {getattr(settings, name)}, expected {lowest} or more")
    for name in ("steps", "batch_size", "seed"):
        if getattr(settings, name) >= 2**63:
            raise UserError(f"train.{name}: got {getattr(settings, name)}, expected below 2^63")
    if settings.lr_anneal_steps and settings.steps > settings.lr_anneal_steps:
        raise UserError(
            f"train.steps: {settings.steps} exceeds lr_anneal_steps {settings.lr_anneal_steps}, "
            "where the published run ends"
        )
    if not 1 <= config.diffusion.diffusion_steps <= MOST_DIFFUSION_STEPS:
        raise UserError(
            f"diffusion.diffusion_steps: got {config.diffusion.diffusion_steps}, "
            f"expected 1 to {MOST_DIFFUSION_STEPS}"
        )
    check_decay(settings.ema_decay)
    try:
        create_diffusion(learn_sigma=config.model.learn_sigma, **to_dict(config.diffusion))
    except UserError as error:
        raise UserError(f"diffusion.{error}") from None
    if settings.wandb is not None:
        imported_wandb()
    if settings.weights == "bfloat16" and settings.dtype != "bfloat16":
        raise UserError(f"train.weights: bfloat16 needs train.dtype bfloat16, got {settings.dtype}")
    if settings.float8_by != "kernels" and not settings.float8:
        raise UserError(f"train.float8_by: {settings.float8_by} needs train.float8=true")
    if settings.float8 and settings.dtype != "bfloat16":
        raise UserError(f"train.float8: needs train.dtype bfloat16, got {settings.dtype}")
    if not config.data.conditional and config.model.num_classes != 1:
        raise UserError(
            f"model.num_classes: {config.model.num_classes}, but without labels (data.conditional=false) "
            "it must be 1; --unconditional sets it"
        )
    try:
        sampling_diffusion(config.model, config.diffusion, config.sample)
        check_sampling(config.model, config.sample)
    except UserError as error:
        raise UserError(f"sample.{error}") from None


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat
