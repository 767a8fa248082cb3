"""The files of the official training loop: their names and labels, and writing a checkpoint as such files.

The loop writes ``model010000.pt``, ``ema_0.9999_010000.pt`` (one per rate) and ``opt010000.pt``: state dicts
saved by ``torch.save``, the models' with their buffers. It counts steps from 0 and saves *after* a step's
update, so files labelled s hold s + 1 updates: a checkpoint of our step n gets the label n - 1. With that
label, ``--resume_checkpoint`` behaves as with the loop's own files of this step. (On resume the loop repeats
step number s instead of s + 1, so its labels and its annealed learning rate are one update late from then on:
files of a run that was resumed r times hold s + 1 + r updates. The optimiser has counted them.)

``opt010000.pt`` is the ``state_dict`` of an optimiser over *all* parameters, in the order of
``named_parameters`` (under ZeRO, gathered on one rank): entry i of ``state`` belongs to parameter i. For
MDT v1 and DiT it is that of ``torch.optim.AdamW``. For MDTv2 it is that of Adan as published by its authors
(sail-sg/Adan, ``adan.py``): for each parameter ``exp_avg``, ``exp_avg_sq``, ``exp_avg_diff`` and
``neg_pre_grad`` (the negated last clipped gradient), and in the group ``step`` (an integer) besides ``lr``,
``betas``, ``eps``, ``weight_decay``, ``max_grad_norm``, ``no_prox``, ``foreach``, ``fused``. timm's Adan can
load it too.
"""

import re
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import ModelConfig, TrainConfig
from ..errors import UserError
from ..files import aside
from ..models.convert import full_disk_named
from ..models.zoo import build_model
from .checkpoint import EMA, METRICS, MODEL, OPTIMIZER, Checkpoint
from .optim import learning_rate
from .states import whole_state

MODEL_NAME = re.compile(r"model(\d{6,})\.pt")
EMA_NAME = re.compile(r"ema_(\d+(?:\.\d+)?(?:e-?\d+)?)_(\d{6,})\.pt")


@dataclass(frozen=True)
class OfficialFiles:
    """Files that belong together. ``label`` None: ``model`` is a plain weights file.

    ``averages``: the EMA files by rate. ``notes``: notes for the user about which files were chosen.
    """

    model: Path
    label: int | None = None
    averages: dict[float, Path] = field(default_factory=dict)
    optimizer: Path | None = None
    notes: tuple[str, ...] = ()

    @property
    def step(self) -> int:
        """Number of updates the weights have had, by the label; 0 without a label."""
        return 0 if self.label is None else self.label + 1


def find_files(source: Path) -> OfficialFiles:
    """Find the newest files in a folder, those beside a given ``modelNNNNNN.pt``, or a single weights file.

    ``UserError`` for a folder without a ``modelNNNNNN.pt``.
    """
    notes: list[str] = []
    if source.is_dir():
        labels = _labels(source)
        if not labels:
            raise UserError(f"{str(source)!r}: contains no modelNNNNNN.pt of the official training loop")
        folder, label = source, max(labels)
        if len(labels) > 1:
            notes.append(f"{len(labels)} steps in {folder}; using the newest: {labels[label].name}")
        model = labels[label]
    elif match := MODEL_NAME.fullmatch(source.name):
        model, folder, label = source, source.parent, int(match[1])
    else:
        return OfficialFiles(source)
    averages = {
        float(match[1]): path
        for path in sorted(folder.iterdir())
        if (match := EMA_NAME.fullmatch(path.name)) and int(match[2]) == label
    }
    optimizer = folder / f"opt{label:06d}.pt"
    return OfficialFiles(model, label, averages, optimizer if optimizer.is_file() else None, tuple(notes))


def write_official(opened: Checkpoint, folder: Path) -> OfficialFiles:
    """Write a checkpoint to ``folder`` as the files that the official loop would have saved at this step.

    All are written under temporary names and renamed once all are complete, the model's last. ``UserError``
    if one already exists, for step 0, which the loop does not save, and for a full disk.
    """
    if opened.step == 0:
        raise UserError(
            f"{opened.path}: is at step 0, and the official loop saves only after an update; "
            "mdt-fast convert RUN FILE.pt writes just the weights"
        )
    config, label = opened.config, opened.step - 1
    rate = config.train.ema_decay
    model, average = folder / f"model{label:06d}.pt", folder / f"ema_{rate}_{label:06d}.pt"
    optimizer = folder / f"opt{label:06d}.pt"
    for path in (model, average, optimizer):
        if path.exists():
            raise UserError(f"{str(path)!r} already exists; nothing is overwritten")
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as renamed_last_to_first:
        for path, make in (
            (model, lambda: whole_state(opened, MODEL)),
            (average, lambda: whole_state(opened, EMA)),
            (optimizer, lambda: packed_optimizer(opened)),
        ):
            file = renamed_last_to_first.enter_context(aside(path))
            with full_disk_named(path), open(file, "wb") as target:
                torch.save(make(), target)
    notes = []
    if label == 0:
        notes.append("the official loop takes label 0 as a fresh start: it will load only the weights")
    clipped = 1.0 if config.train.optimizer == "adan" else 0.0
    if config.train.max_grad_norm != clipped:
        notes.append(
            f"the official loop clips to {clipped:g} with {config.train.optimizer} (0: no clipping), this "
            f"run to {config.train.max_grad_norm:g}; the loop's code decides that, not its files"
        )
    return OfficialFiles(model, label, {rate: average}, optimizer, tuple(notes))


def packed_optimizer(opened: Checkpoint) -> dict[str, Any]:
    """The ``state_dict`` of the official optimiser: AdamW's, or Adan's, as described above."""
    config = opened.config
    index = {name: i for i, (name, _) in enumerate(parameters_of(config.model))}
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in opened.tensors(OPTIMIZER).items():
        name, _, entry = key.rpartition("/")
        if name not in ("counters", METRICS):
            state.setdefault(index[name], {})[entry] = tensor.float()  # like the official optimiser's
    (group,) = opened.state["optimizer_groups"]
    group = {**group, "betas": tuple(group["betas"]), "lr": next_rate(config.train, opened.step)}
    if config.train.optimizer == "adan":
        # What the official loop sets; the loaded group replaces the one that the loop has made.
        group |= {"max_grad_norm": config.train.max_grad_norm, "foreach": True, "fused": True}
    group["params"] = list(range(len(index)))
    return {"state": dict(sorted(state.items())), "param_groups": [group]}


def next_rate(config: TrainConfig, step: int) -> float:
    """The learning rate that the official loop has set when it saves after ``step`` updates: the next step's.

    The loop has no warm-up, and would keep one of our warm-up rates for ever.
    """
    return learning_rate(replace(config, warmup_steps=0), step)


def parameters_of(config: ModelConfig) -> list[tuple[str, Tensor]]:
    """All parameters of a model of ``config`` by name, on the meta device."""
    with torch.device("meta"):
        return list(build_model(config).named_parameters())


def _labels(folder: Path) -> dict[int, Path]:
    """The model files in a folder by label."""
    matches = ((MODEL_NAME.fullmatch(path.name), path) for path in folder.iterdir() if path.is_file())
    return {int(match[1]): path for match, path in matches if match}
