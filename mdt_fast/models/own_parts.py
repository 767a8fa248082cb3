"""What a model computes beyond its weights: where it differs from the one that its configuration builds.

Files of weights hold none of that, so saving or converting such a model would silently lose it.
"""

from collections.abc import Iterator
from typing import Any

from torch import nn

from .ops import Float8Linear
from .own import OURS, home

SETTINGS = frozenset({"training", "checkpointing", "attention_backend", "dropout_prob", "inplace"})
"""Plain attributes of parts that change nothing of what a model in eval mode computes."""
OFFLOADING = frozenset({"_old_forward", "_original_forward"})
"""Where accelerate keeps a part's ``forward`` while another, which moves weights or casts, is in place."""


def differing_parts(model: nn.Module, plain: nn.Module) -> list[str]:
    """How the parts of ``model`` differ from those of ``plain``, in words: shapes, classes, settings and
    replaced ``forward`` methods. Hooks do not count: they often only watch, and no file ever holds them.
    """
    own = dict(plain.state_dict())
    found = [
        f"{name} of shape {list(value.shape)} instead of {list(own[name].shape)}"
        for name, value in model.state_dict().items()
        if name in own and value.shape != own[name].shape
    ]
    others = dict(plain.named_modules())
    for name, part in model.named_modules():
        if name not in others:
            found.append(f"{name}, an additional {type(part).__name__}")
        elif not _is_kind(part, type(others[name])):
            found.append(f"{name or 'the model'}, a {_kind(part)} instead of {_kind(others[name])}")
        elif "forward" in vars(part) and not OFFLOADING & vars(part).keys():
            found.append(f"{name or 'the model'} with a forward of its own")
        else:
            found += _settings(name, part, others[name])
    return found + [f"no {name}" for name in others.keys() - dict(model.named_modules()).keys()]


def hooked_parts(module: nn.Module) -> list[str]:
    """The parts of ``module`` with hooks, in words."""
    return [
        f"{name or type(part).__name__} has hooks"
        for name, part in module.named_modules()
        if part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks
    ]


def _is_kind(part: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether ``part`` is of this class, or a linear layer that multiplies the same weight in float8."""
    float8 = type(part) is Float8Linear or home(type(part)) == "torchao"
    return type(part) is kind or (kind is nn.Linear and float8)


def _kind(part: nn.Module) -> str:
    """The class of a part; with its module if that is not this package's or torch's."""
    kind = type(part)
    return kind.__name__ if home(kind) in (OURS, "torch") else f"{kind.__module__}.{kind.__qualname__}"


def _settings(name: str, part: nn.Module, plain: nn.Module) -> Iterator[str]:
    for key, value in vars(plain).items():
        if key.startswith("_") or key in SETTINGS or not isinstance(value, bool | int | float | str | tuple):
            continue
        if vars(part).get(key, value) != value:
            path = f"{name}.{key}" if name else key
            yield f"{path} {vars(part)[key]!r} instead of {value!r}"


def lost_in_conversion(module: nn.Module) -> list[str]:
    """What an official or reference model computes beyond its weights that the fast one would not, in words:
    hooks, a ``forward`` of one's own, other activations, norms and dropout."""
    found = hooked_parts(module)
    for name, part in module.named_modules():
        where = name or type(part).__name__
        if "forward" in vars(part) and not OFFLOADING & vars(part).keys():
            found.append(f"{where} has a forward of its own")
        elif _overrides(part):
            found.append(f"{where} has the forward of a derived class, {type(part).__name__}")
        elif (unknown := _unlike_published(name, part)) is not None:
            found.append(f"{where} is {part}, expected {unknown}")
    return found


def _overrides(part: nn.Module) -> bool:
    """Whether a class outside torch overrides the ``forward`` of the class that it derives from."""
    kind: Any = type(part)
    if kind is Float8Linear or home(kind) in ("torch", "torchao", "timm"):
        return False
    return sum("forward" in vars(base) for base in kind.__mro__ if base is not nn.Module) > 1


def _unlike_published(name: str, part: nn.Module) -> str | None:
    """What the published models have in the place of ``part``, which has no weights, if it computes anything
    else; else None."""
    if isinstance(part, nn.LayerNorm):
        plain = part.eps == 1e-6 and not part.elementwise_affine
        norm = name.rpartition(".")[2] in ("norm1", "norm2", "norm_final")
        return "LayerNorm with eps=1e-06 and no weights" if norm and not plain else None
    if next(part.children(), None) is not None or next(part.parameters(), None) is not None:
        return None
    if name.endswith("mlp.act"):
        plain = isinstance(part, nn.GELU) and part.approximate == "tanh"
        return None if plain or type(part).__name__ == "GELUTanh" else "GELU(approximate='tanh')"
    if name.rpartition(".")[0].endswith(("adaLN_modulation", "t_embedder.mlp")):
        return None if isinstance(part, nn.SiLU) else "SiLU"
    if isinstance(part, nn.Identity | nn.ModuleList | nn.ModuleDict | nn.Sequential):
        return None
    chance = getattr(part, "drop_prob", getattr(part, "p", None))  # of dropout and of timm's DropPath
    if type(part).__module__.startswith("torch.nn") or chance is not None:
        return None if chance in (0, 0.0) else "nothing in its place"
    return None
