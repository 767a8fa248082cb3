"""Makes a run that resumes from files of the official training loop, or starts from published weights."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import ModelConfig, RunConfig, to_dict
from ..data import Latents, open_first_stage, open_images
from ..errors import UserError
from ..files import aside
from ..models.convert import check_weights, read_saved, read_weights, shape_of
from ..models.resize import resize_weights
from ..models.zoo import build_model
from ..optim.loading import check_state
from . import checkpoint
from .checkpoint import EMA, MODEL, OPTIMIZER
from .data import check_data
from .distributed import World
from .official_files import OfficialFiles, parameters_of
from .optim import build_optimizer
from .saving import Saver
from .settings import check_settings
from .states import SKIPPED, all_finite, described

TABLE, INITIAL_SPREAD = "y_embedder.embedding_table.weight", 0.02
OPTIONS = ("betas", "eps", "no_prox", "step", "caution", "amsgrad", "maximize", "decoupled_weight_decay")
"""Options taken from the optimiser's group; learning rate and weight decay come from the configuration."""


@dataclass(frozen=True)
class PackedOptimizer:
    """An official optimiser's ``state_dict`` as read; ``state`` is keyed by ids in ``group["params"]``."""

    path: Path
    state: dict[int, dict[str, Any]]
    group: dict[str, Any]

    @property
    def kind(self) -> str:
        """``adan`` has three betas, ``adamw`` two."""
        return "adan" if len(self.group["betas"]) == 3 else "adamw"

    @property
    def updates(self) -> int:
        """Number of updates the optimiser has counted."""
        steps = [self.group.get("step", 0), *(entries.get("step", 0) for entries in self.state.values())]
        return max(int(step) for step in steps)


def read_optimizer(path: Path) -> PackedOptimizer:
    """Read an optimiser file. ``UserError`` if it is damaged, or holds no state of an optimiser with one
    parameter group."""
    packed = read_saved(path, mmap=True)
    try:
        state, (group,) = dict(packed["state"]), packed["param_groups"]
        group = {**group, "betas": [float(beta) for beta in group["betas"]]}
        group |= {key: float(group[key]) for key in ("lr", "eps", "weight_decay")}
        found = PackedOptimizer(path, state, group)
        fits = len(group["betas"]) in (2, 3) and len(set(group["params"])) == len(group["params"])
        for entries in state.values():
            fits &= all(isinstance(value, Tensor) for key, value in entries.items() if key != "step")
        if fits and found.updates >= 0:
            return found
    except (TypeError, KeyError, ValueError, AttributeError, IndexError, RuntimeError):
        pass  # whatever else the file holds
    raise UserError(f"{path}: holds no state of AdamW or Adan with one parameter group")


def make_run(
    run: Path,
    config: RunConfig,
    files: OfficialFiles,
    weights: Mapping[str, Tensor],
    packed: PackedOptimizer | None,
) -> list[str]:
    """Make the folder ``run`` with a checkpoint of step ``files.step`` that holds what the files hold.

    ``weights``: those of ``files.model``; the EMA is the file of rate ``config.train.ema_decay``, or a copy
    of the weights. Without ``packed`` the moments start at zero. Returns notes to print. ``UserError``,
    before anything is written, if files, settings and data are inconsistent.
    """
    check_settings(config)
    average = files.averages.get(config.train.ema_decay)
    parts = {MODEL: _parameters(config.model, weights, files.model)}
    parts[EMA] = parts[MODEL]
    if average is not None:
        parts[EMA] = _parameters(config.model, read_weights(average, mmap=True), average)
    parts[OPTIMIZER], groups = _optimizer(config, packed)
    images = open_images(config.data)
    first_stage = open_first_stage(config.data, images)
    if packed is None and first_stage.size != config.model.input_size:
        on_pixels = not isinstance(first_stage, Latents) and config.data.source != "digits"
        same = f"--image-size {config.model.input_size} fits the images to it, " if on_pixels else ""
        raise UserError(
            f"model.input_size: {config.model.input_size}, but the data has {first_stage.size}; {same}"
            f"--set model.input_size={first_stage.size} resizes position embeddings and bias tables"
        )
    check_data(config, images, first_stage, World())
    state = {
        **described(config, images, first_stage),
        "processes": 1, "streak": 0, "skipped": 0, "optimizer_groups": groups,
    }  # fmt: skip
    with checkpoint.locked(run):
        refuse_used(run)
        saver = Saver(run, World(), keep=1, asynchronous=False)
        try:
            saver.save(files.step, parts, state)
        except UserError:
            with suppress(OSError):
                (run / "checkpoints").rmdir()  # if it exists and is empty: the folder was not a run before
            raise
        finally:
            saver.close()
        with aside(run / "config.json") as file:
            file.write_text(json.dumps(to_dict(config), indent=1) + "\n")
    return list(_remarks(config, files, packed, images.classes))


def refuse_used(run: Path) -> None:
    """``UserError`` if the folder already holds a run."""
    if checkpoint.latest(run) or any((run / name).exists() for name in ("metrics.jsonl", "config.json")):
        raise UserError(f"{str(run)!r} already holds a run; choose another folder")


def _remarks(
    config: RunConfig, files: OfficialFiles, packed: PackedOptimizer | None, classes: Sequence[str]
) -> Any:
    if files.label is not None:
        if config.train.ema_decay not in files.averages:
            yield (
                f"warning: no ema_{config.train.ema_decay}_{files.label:06d}.pt beside {files.model.name}: "
                "the EMA starts as a copy of the weights"
            )
        if packed is None:
            yield (
                f"warning: no opt{files.label:06d}.pt beside {files.model.name}: the optimiser's moments "
                "start at zero"
            )
    if packed is not None and packed.updates != files.step:
        yield (
            f"{packed.path.name} has counted {packed.updates} updates, but the label says {files.step}: the "
            "official loop's label falls behind by one each time it is resumed"
        )
    if len(classes) < config.model.num_classes:
        anew = "" if packed else f"; --set model.num_classes={len(classes)} makes a new table"
        yield (
            f"the data has {len(classes)} classes, the weights {config.model.num_classes}: the data uses the "
            f"first rows of the label table{anew}"
        )
    if files.step >= config.train.steps:
        yield f"train.steps is {config.train.steps}: pass --steps N with a larger number to continue training"


def _parameters(config: ModelConfig, state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The parameters in float32, without buffers. ``UserError`` unless they fit a model of ``config``."""
    with torch.device("meta"):
        model = build_model(config)
    state = _of_classes(config, _of_size(config, state))
    check_weights(model.state_dict(), state, str(path))
    found = {name: state[name].float().contiguous() for name, _ in model.named_parameters()}
    if not all_finite(found):
        raise UserError(f"{path}: has weights that are not finite")
    return found


def _of_size(config: ModelConfig, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Resize to the configuration's input size, if these are weights of the same model for another size."""
    with suppress(KeyError, ValueError, IndexError, ZeroDivisionError):  # later checks report bad weights
        found = shape_of(state)
        if found["family"] == config.family and found["patch_size"] == config.patch_size:
            return resize_weights(state, config.input_size)
    return state


def _of_classes(config: ModelConfig, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Make a new label table if the number of classes differs; only the null class keeps its row."""
    table, null = state.get(TABLE), config.class_dropout_prob > 0
    rows = config.num_classes + null
    if table is None or table.ndim != 2 or len(table) == rows:
        return state
    fresh = INITIAL_SPREAD * torch.randn(rows, table.shape[1], generator=torch.Generator().manual_seed(0))
    if null:
        fresh[-1] = table[-1]
    return {**state, TABLE: fresh}


def _optimizer(
    config: RunConfig, packed: PackedOptimizer | None
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """The optimiser part of a checkpoint, by name, and its parameter groups."""
    parameters = parameters_of(config.model)
    trained = [(name, p) for name, p in parameters if p.requires_grad]
    optimizer = build_optimizer([p for _, p in trained], config.train)
    tensors: dict[str, Tensor] = {SKIPPED: torch.zeros((), dtype=torch.int64)}
    (group,) = optimizer.state_dict()["param_groups"]
    if packed is None:
        return tensors, [group]
    path, ids = packed.path, packed.group["params"]
    if packed.kind != config.train.optimizer:
        raise UserError(f"train.optimizer: {config.train.optimizer!r}, but {path} is from {packed.kind}")
    if len(ids) not in (len(parameters), len(trained)):
        raise UserError(f"{path}: has state of {len(ids)} parameters, but the model has {len(parameters)}")
    owners = parameters if len(ids) == len(parameters) else trained
    own = {number: owner for number, owner in zip(ids, owners) if owner[1].requires_grad}
    state = {number: entries for number, entries in packed.state.items() if number in own and entries}
    known = {key: packed.group[key] for key in OPTIONS if key in packed.group and key in group}
    if "step" in known:
        known["step"] = int(known["step"])
    try:
        check_state(
            {"state": state, "param_groups": [{"params": list(own)}]},
            [p for _, p in own.values()],
            optimizer.moments,
            optimizer.counted,
        )
        optimizer.load_state_dict({"state": {}, "param_groups": [{**group, **known}]})
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    for number, entries in state.items():
        name = own[number][0]
        for moment in optimizer.moments:
            value = entries[moment] if moment in entries else -entries["prev_grad"]
            tensors[f"{name}/{moment}"] = value.float().contiguous()
        if packed.kind == "adamw":
            tensors[f"{name}/step"] = torch.tensor(float(entries["step"]), dtype=torch.float32)
    return tensors, optimizer.state_dict()["param_groups"]
