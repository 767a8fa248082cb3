"""Read and write weights: official ``.pt`` files, safetensors, and models that already hold them.

No pickled code is ever executed: ``.pt`` files are read with ``weights_only=True``.
"""

import argparse
import json
import os
import pickle
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..config import Family, ModelConfig
from ..errors import UserError
from ..files import aside
from .attention import share_index
from .base import Transformer
from .entries import ENTRIES, prefix_hint, without_wrappers
from .own_parts import differing_parts, hooked_parts, lost_in_conversion
from .zoo import CLASSES

SUFFIXES = (".pt", ".pth", ".ckpt", ".safetensors")
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
"""The dtypes allowed for weights."""


def read_weights(path: str | os.PathLike[str], *, mmap: bool = False) -> dict[str, Tensor]:
    """Read the state_dict in a ``.pt`` (``.pth``, ``.ckpt``) or ``.safetensors`` file, on the CPU.

    If the file is a training's, as ``{"model": ..., "ema": ..., ...}``, this is its ``ema`` or
    ``model_ema``, else its ``model`` or ``state_dict``. A prefix that a wrapper
    (``DistributedDataParallel``, ``torch.compile``, ``AveragedModel``, a Lightning module) put before all
    names is removed. ``mmap``: the tensors of a ``.pt`` file are read when
    they are used, and take no memory of their own. Raises ``UserError`` naming the file if it is missing,
    truncated or of another kind, if it holds anything but tensors under names, or if reading it would
    execute code from the file.
    """
    path = Path(path)
    state = read_saved(path, mmap=mmap)
    if isinstance(state, dict):
        state = next((state[name] for name in ENTRIES if _is_state(state.get(name))), state)
    if not _is_state(state):
        held = f", but {', '.join(map(repr, list(state)[:6]))}" if isinstance(state, dict) and state else ""
        raise UserError(f"{path}: holds no state_dict (a table of ordinary tensors by name){held}")
    return without_wrappers(state)


def _is_state(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(map(_is_weight, value, value.values()))


def read_saved(path: Path, *, mmap: bool = False) -> Any:
    """Whatever a file with one of these endings (``SUFFIXES``) holds; errors as above."""
    _check_suffix(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        return load_file(path) if path.suffix == ".safetensors" else _read_pt(path, mmap)
    except UserError:
        raise
    except Exception as error:  # what the readers raise for a damaged file is not documented
        reason = f"{type(error).__name__}: {error}".strip().split("\n")[0][:160]
        raise UserError(
            f"{path}: not a readable {path.suffix} file (truncated or damaged?): {reason}"
        ) from error


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a ``.safetensors`` file that :func:`read_weights` reads, without the ``format``."""
    with safe_open(path, framework="pt") as opened:
        metadata: dict[str, str] = opened.metadata() or {}
    return {key: value for key, value in metadata.items() if key != "format"}


def write_weights(path: str | os.PathLike[str], state: Mapping[str, Tensor], **metadata: Any) -> None:
    """Write a state_dict as ``.pt`` or ``.safetensors``, by its name (``metadata``: only the latter).

    The file is written under a temporary name, flushed to disk and renamed: a file of that name is complete,
    old or new, at every moment. Raises ``UserError`` for another ending, a folder that does not exist, what
    is no tensor, a full disk or a missing permission; an existing file is then kept.
    """
    path = Path(path)
    _check_suffix(path)
    if not path.parent.is_dir():
        raise UserError(f"{path}: folder {path.parent} does not exist")
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise UserError(f"state: got {type(value).__name__} for {key!r}, expected tensors")
    tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    with full_disk_named(path), aside(path) as file:
        if path.suffix == ".safetensors":
            # safetensors refuses tensors that share memory (views of one tensor do).
            separate = {key: value.clone() for key, value in tensors.items()}
            texts = {key: json.dumps(value) for key, value in metadata.items()}
            save_file(separate, file, metadata={**texts, "format": "pt"})  # accelerate refuses others
            _sort_metadata(file)
        else:
            with open(file, "wb") as opened:
                torch.save(tensors, opened)


def _sort_metadata(file: Path) -> None:
    """Sort the metadata of a newly written ``.safetensors`` file, whose order is arbitrary, so that equal
    weights give equal bytes."""
    with open(file, "r+b") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header: dict[str, Any] = json.loads(opened.read(size))
        ordered = {"__metadata__": dict(sorted(header.pop("__metadata__", {}).items())), **header}
        text = json.dumps(ordered, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= size:
            opened.seek(8)
            opened.write(text.ljust(size))


@contextmanager
def full_disk_named(path: Path) -> Iterator[None]:
    """Turn what is raised when a disk is full into a ``UserError`` that names ``path``."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error
    except (SafetensorError, RuntimeError) as error:
        raise UserError(f"{path}: cannot be written: {str(error).splitlines()[0][:160]}") from error


def load_weights(model: nn.Module, state: Mapping[str, Tensor], source: str = "state_dict") -> None:
    """``model.load_state_dict(state, strict=True)``, with a one-line error that names what differs.

    The model may be wrapped (``DistributedDataParallel``, ``torch.compile``). It is left unchanged if any key
    or shape differs. Raises ``UserError``, also for a model on the meta device or one that FSDP2 shards.
    """
    inner = model
    while state.keys() != inner.state_dict().keys() and (wrapped := _wrapped(inner)) is not None:
        inner = wrapped
    model = inner if state.keys() == inner.state_dict().keys() else model
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise UserError(
            "model: is sharded by FSDP2; load its weights before, or by "
            "torch.distributed.checkpoint.state_dict.set_model_state_dict"
        )
    own = model.state_dict()
    check_weights(own, state, source)
    if any(value.is_meta for value in own.values()):
        raise UserError(
            "model: got weights on the meta device, expected memory to load into; "
            "call model.to_empty(device=...) first"
        )
    model.load_state_dict(dict(state), strict=True)


def _wrapped(model: nn.Module) -> nn.Module | None:
    """The module inside torch.compile's or a parallel wrapper."""
    parallel = isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel)
    return model._modules.get("module" if parallel else "_orig_mod")


def check_weights(own: Mapping[str, Tensor], state: Mapping[str, Tensor], source: str) -> None:
    """Raise a one-line ``UserError`` unless ``state`` has the keys, shapes and kinds of dtype of ``own``."""
    differences = [
        *_listed("missing", own.keys() - state.keys()),
        *_listed("unexpected", state.keys() - own.keys()),
        *_listed(
            "other shape",
            (
                f"{key} {list(state[key].shape)} instead of {list(own[key].shape)}"
                for key in own.keys() & state.keys()
                if own[key].shape != state[key].shape
            ),
        ),
        *_listed(
            "of another dtype",
            (
                f"{key} {str(state[key].dtype).removeprefix('torch.')}"
                for key in own.keys() & state.keys()
                if own[key].dtype in FLOATS and state[key].dtype not in FLOATS
            ),
        ),
    ]
    if differences:
        if _of_another_size(own, state):
            differences.append("resize_weights converts them to another image size")
        if (hint := prefix_hint(own, state)) is not None:
            differences.append(hint)
        raise UserError(f"{source}: weights of another model: {'; '.join(differences)}")


def _of_another_size(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> bool:
    """Whether the weights differ only in those that are stored per grid position."""
    other = {key for key in own if key not in state or own[key].shape != state[key].shape}
    ends = ("pos_embed", "relative_position_bias_table", "relative_position_index")
    same_width = (
        "pos_embed" in other & state.keys() and own["pos_embed"].shape[2:] == state["pos_embed"].shape[2:]
    )
    return same_width and own.keys() == state.keys() and all(key.endswith(ends) for key in other)


def check_sizes(config: ModelConfig, state: Mapping[str, Tensor], source: str) -> None:
    """Raise ``UserError`` if ``state`` has other sizes than ``config``, before a model is built from it.

    The memory and time to build a model grow with these sizes; :func:`check_weights` then compares the built
    model's weights.
    """
    try:
        found = shape_of(state)
    except KeyError as error:
        raise UserError(f"{source}: weights of another model: no {error.args[0]}") from None
    except (ValueError, IndexError, ZeroDivisionError):
        raise UserError(f"{source}: weights of another model: shapes of no MDTv2, MDT or DiT") from None
    lost = (config.depth - config.decode_layer) % 2 if config.family == "mdtv2" else 0
    wanted = {
        name: getattr(config, name)
        for name in ("family", "hidden_size", "input_size", "patch_size", "in_channels")
    } | {"depth": config.depth - lost}
    other = [
        f"{name} {found[name]} instead of {wanted[name]}" for name in wanted if found[name] != wanted[name]
    ]
    if other:
        raise UserError(f"{source}: weights of another model: {', '.join(other)}")


def check_finite(state: Mapping[str, Tensor], source: str) -> None:
    """Raise ``UserError`` naming the weights that hold NaN or infinities."""
    broken = [key for key, value in state.items() if value.is_floating_point() and not value.isfinite().all()]
    if broken:
        raise UserError(f"{source}: weights that are not finite: {_listed('tensors', broken)[0]}")


def config_of(module: Any) -> ModelConfig:
    """The configuration of a reference, official or fast model, read from its parameters and attributes."""
    if isinstance(config := getattr(module, "config", None), ModelConfig):
        return config
    state = module.state_dict()
    try:
        shape = shape_of(state)
        family = shape["family"]
        has_mask = family != "dit" and module.mask_ratio is not None
        dropout = float(module.y_embedder.dropout_prob)
        return ModelConfig.of(
            **{
                "num_heads": getattr(module, "num_heads", None),
                **shape,
                "class_dropout_prob": dropout,
                "num_classes": label_rows(state) - (dropout > 0),
                "mask_ratio": module.mask_ratio if has_mask else None,
                "decode_layer": None if family == "dit" else module.decode_layer,
            },
        )
    except (KeyError, AttributeError, ValueError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"module: {type(module).__name__} is no MDT, MDTv2 or DiT (lacks {error})") from error


def shape_of(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The part of a ``ModelConfig`` that weights alone determine.

    Missing are ``mask_ratio``, ``class_dropout_prob`` and with it ``num_classes`` (:func:`label_rows`), MDT
    v1's ``decode_layer`` and DiT's ``num_heads``. For an MDTv2 whose ``depth - decode_layer`` was odd, the
    depth lacks the block that was lost. Raises ``KeyError``, ``ValueError`` or ``IndexError`` for weights of
    anything else.
    """
    hidden_size, in_channels, patch_size, _ = state["x_embedder.proj.weight"].shape
    prefix, family = _family(state)
    outputs = state["final_layer.linear.weight"].shape[0] // patch_size**2
    shape = {
        "family": family,
        "input_size": int(state["pos_embed"].shape[1] ** 0.5) * patch_size,
        "patch_size": patch_size,
        "in_channels": in_channels,
        "hidden_size": hidden_size,
        "depth": _depth(state, family),
        "mlp_ratio": state[f"{prefix}.mlp.fc1.weight"].shape[0] / hidden_size,
        "learn_sigma": outputs == 2 * in_channels,
    }
    table = state.get(f"{prefix}.attn.rel_pos_bias.relative_position_bias_table")
    if table is not None:
        shape["num_heads"] = table.shape[1]
    if family == "mdtv2":
        shape["decode_layer"] = _blocks(state, "de_blocks")
    return shape


def label_rows(state: Mapping[str, Tensor]) -> int:
    """The number of classes in the label table, plus the null class if labels are dropped."""
    return state["y_embedder.embedding_table.weight"].shape[0]


def from_reference(module: nn.Module) -> Transformer:
    """The fast model with the weights of a reference or official one, sharing their storage.

    The parameters are the same objects: an optimiser or a checkpoint made for one model serves the other.
    Raises ``UserError`` for a module that is not an MDT, MDTv2 or DiT, or that computes something else than
    they do (see :func:`~mdt_fast.models.own_parts.lost_in_conversion`).
    """
    module = getattr(module, "_orig_mod", module)  # the model that torch.compile wraps
    config = config_of(module)
    with torch.device("meta"):
        fast: Any = CLASSES["fast"][config.family](**config.kwargs())
    state = module.state_dict(keep_vars=True)
    trained = {key: parameter.requires_grad for key, parameter in module.named_parameters()}
    if differing := fast.state_dict().keys() ^ state.keys():
        raise UserError(
            f"module: {type(module).__name__} has other weights: {'; '.join(_listed('differ', differing))}"
        )
    if isinstance(module, Transformer):
        differ = hooked_parts(module) + differing_parts(module, fast)
    else:
        differ = lost_in_conversion(module)
    if differ:
        more = ", ..." if differ[2:] else ""
        raise UserError(
            f"module: got one that computes more than its weights say ({'; '.join(differ[:2])}{more}), "
            "expected the published layers alone"
        )
    fast.load_state_dict(state, strict=True, assign=True)
    for key, parameter in fast.named_parameters():
        # Assigning gave the given module's own parameters the fast model's requires_grad.
        parameter.requires_grad_(trained[key])
    share_index(fast)
    return fast.train(module.training)


def _read_pt(path: Path, mmap: bool) -> Any:
    mmap = mmap and zipfile.is_zipfile(path)  # files of torch before 1.6 cannot be mapped
    try:
        known = {argparse.Namespace} - set(torch.serialization.get_safe_globals())
        with torch.serialization.safe_globals([*known]):  # DiT's training saves its options as a Namespace
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path}: needs code from the file to be executed, or is damaged; only plain tensors are read"
        ) from error


def _is_weight(name: Any, value: Any) -> bool:
    """Whether this can be an entry of a state_dict: a name, and a dense tensor with its values in memory."""
    if not isinstance(name, str) or name == "__metadata__" or not isinstance(value, Tensor):
        return False
    return (
        value.layout == torch.strided and not value.is_nested and not value.is_quantized and not value.is_meta
    )


def _check_suffix(path: Path) -> None:
    if path.is_dir():
        raise UserError(
            f"{path}: is a folder, a file is needed ({', '.join(SUFFIXES)}); mdt-fast convert makes one of a "
            "run, and MDTPipeline.from_run reads the run itself"
        )
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path}: ends in {path.suffix!r}, expected {', '.join(SUFFIXES)}")


def _listed(what: str, names: Iterable[str], most: int = 4) -> list[str]:
    """At most one phrase: how many names there are, and the first few."""
    ordered = sorted(names)
    if not ordered:
        return []
    more = f", and {len(ordered) - most} more" if len(ordered) > most else ""
    return [f"{len(ordered)} {what} ({', '.join(ordered[:most])}{more})"]


def _family(state: Mapping[str, Tensor]) -> tuple[str, Family]:
    """The prefix of a block's keys, and the family that uses such keys."""
    if "blocks.0.attn.qkv.weight" not in state:
        return "sideblocks.0", "mdtv2"
    return "blocks.0", "mdt" if "sideblocks.0.attn.qkv.weight" in state else "dit"


def _depth(state: Mapping[str, Tensor], family: Family) -> int:
    lists = ("en_inblocks", "en_outblocks", "de_blocks") if family == "mdtv2" else ("blocks",)
    return sum(_blocks(state, name) for name in lists)


def _blocks(state: Mapping[str, Tensor], name: str) -> int:
    return sum(key.startswith(f"{name}.") and key.endswith("attn.qkv.weight") for key in state)
