"""Converts a run to the tensors of a checkpoint, by name, and back."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..config import RunConfig, to_dict
from ..data import FirstStage, ImageSet, Latents
from ..errors import UserError, one_line
from ..models import Transformer, build_model
from ..models.attention import share_index
from ..models.convert import check_weights
from ..optim import FusedAdamW, FusedAdan
from ..optim.shards import local
from ..reference.layers import relative_position_index
from .checkpoint import EMA, METRICS, MODEL, OPTIMIZER, Checkpoint, SavedModel
from .distributed import World
from .metrics import Metrics
from .optim import LossScale

if TYPE_CHECKING:
    from .run import Run

MASTER = "master"
SKIPPED, SCALE = "counters/skipped_steps", "counters/loss_scale"


def training_state(run: "Run", metrics: Metrics) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """The parts of a checkpoint, and the contents of its ``state.json``. All processes must call this.

    ``UserError`` if a weight is not finite: then nothing must be saved.
    """
    weights = run.masters or {name: p.detach() for name, p in run.model.named_parameters()}
    parts = {MODEL: weights, EMA: dict(run.ema.tensors)}
    for part, tensors in parts.items():
        if not all(run.world.all_gather_object(all_finite(tensors))):
            raise UserError(f"the {part}'s weights are not finite after step {run.step}; nothing was saved")
    packed = run.optimizer.state_dict()
    names = trained_names(run.model)
    entries = {
        f"{names[index]}/{entry}": tensor
        for index, state in packed["state"].items()
        for entry, tensor in state.items()
        if entry != MASTER  # saved with the weights
    }
    entries[SKIPPED] = run.optimizer.skipped_steps
    if run.loss_scale is not None:
        entries[SCALE] = torch.stack([run.loss_scale.scale, run.loss_scale.good])
    for name, values in metrics.pending(run.step).items():
        entries[f"{METRICS}/{name}"] = values
    state = {
        **described(run.config, run.images, run.first_stage),
        "processes": run.world.size,
        "streak": metrics.streak,
        "skipped": metrics.skipped,
        "optimizer_groups": packed["param_groups"],
    }
    return {**parts, OPTIMIZER: entries}, state


def described(config: RunConfig, images: ImageSet, first_stage: FirstStage) -> dict[str, Any]:
    """The entries of a checkpoint's ``state.json`` on settings and data."""
    return {
        "config": to_dict(config),
        "classes": list(images.classes),
        "num_images": len(images.labels),
        "data": contents_of(images),
        "latents": first_stage.described(),
        "encoder": first_stage.encoder if isinstance(first_stage, Latents) else None,
    }


def contents_of(images: ImageSet) -> str | None:
    """The digest of an encoded set without the name of its autoencoder; None for images."""
    return getattr(images, "contents", getattr(images, "digest", None))


def restore_optimizer(
    start: Checkpoint,
    optimizer: FusedAdan | FusedAdamW,
    loss_scale: LossScale | None,
    weights: Mapping[str, Tensor],
    world: World,
) -> None:
    """Load the saved state into ``optimizer``, which is over those of ``weights`` that are trained."""
    names = [name for name, p in weights.items() if p.requires_grad]
    tensors: dict[str, Tensor] = {}
    for key, (shape, dtype) in start.shapes(OPTIMIZER).items():
        owner, _, entry = key.rpartition("/")
        if owner in (METRICS, "counters"):
            continue
        if owner not in names:
            raise UserError(
                f"{start.path / OPTIMIZER}: has state of {owner!r}, which the model does not train"
            )
        parameter = weights[owner]
        alone = shape != parameter.shape  # a count of steps
        tensors[key] = torch.zeros(shape, dtype=dtype) if alone else torch.zeros_like(parameter, dtype=dtype)
    start.fill(OPTIMIZER, tensors, world)
    index = {name: i for i, name in enumerate(names)}
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        owner, _, entry = key.rpartition("/")
        state.setdefault(index[owner], {})[entry] = tensor
    counters = start.tensors(OPTIMIZER, "counters/")
    try:
        optimizer.load_state_dict({"state": state, "param_groups": start.state["optimizer_groups"]})
        for group in optimizer.param_groups:
            optimizer._check_group(group)
        optimizer.skipped_steps.copy_(counters[SKIPPED])
        if loss_scale is not None and SCALE in counters:  # a run that convert made has none yet
            scale, good = counters[SCALE].to(loss_scale.scale.device).unbind()
            loss_scale.scale, loss_scale.good = scale.clone(), good.clone()
    except (UserError, KeyError, ValueError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        reason = one_line(error)
        raise UserError(
            f"{start.path}: holds no state for this optimiser ({type(error).__name__}: {reason})"
        ) from error


def whole_state(opened: SavedModel, part: str) -> dict[str, Tensor]:
    """The ``state_dict`` of a checkpoint's ``model`` or ``ema``, including its constant buffers."""
    tensors, config = opened.tensors(part), opened.config.model
    index = relative_position_index(config.grid_size, config.grid_size)
    with torch.device("meta"):
        keys = build_model(config).state_dict().keys()
    return {key: tensors[key] if key in tensors else index.clone() for key in keys}


def model_of(opened: SavedModel, part: str) -> Transformer:
    """Load a checkpoint's model, with its ``model`` or ``ema`` weights, on the CPU and in eval mode."""
    with torch.device("meta"):  # without drawing initial weights
        model: Any = build_model(opened.config.model)
    state = whole_state(opened, part)
    check_weights(model.state_dict(), state, str(opened.path))
    model.load_state_dict(state, strict=True, assign=True)
    share_index(model)
    loaded: Transformer = model.eval()
    return loaded


def all_finite(tensors: Mapping[str, Tensor]) -> bool:
    """Whether this process's part of every tensor is finite."""
    # aminmax returns a NaN as both; it takes a tenth of the time of a norm or isfinite on a CPU.
    extremes = [value for t in tensors.values() if (part := local(t)).numel() for value in part.aminmax()]
    return not extremes or bool(torch.stack([value.float() for value in extremes]).isfinite().all())


def trained_names(model: Any) -> list[str]:
    """Names of the trained parameters, in the optimiser's order."""
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]
