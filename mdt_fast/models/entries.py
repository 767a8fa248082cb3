"""Where the files of other trainings keep a model's weights, and what they put before the weights' names."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

WRAPPERS = ("module.", "_orig_mod.", "model.")
"""Prefixes that DistributedDataParallel, torch.compile and Lightning put before a model's weight names."""
ENTRIES = ("ema", "model_ema", "model", "state_dict")
"""The entries of a training file that hold weights. As in DiT's code, the EMA comes first."""
COUNT = "n_averaged"
"""The number that ``torch.optim.swa_utils.AveragedModel`` keeps beside its ``module.``."""


def without_wrappers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``state`` without what wrappers put before all its names, and without an averaged model's count."""
    found = dict(state)
    if COUNT in found and all(key.startswith("module.") for key in found if key != COUNT):
        del found[COUNT]
    while wrapper := wrapper_of(found):
        found = {key.removeprefix(wrapper): value for key, value in found.items()}
    return found


def wrapper_of(state: Mapping[str, Any]) -> str | None:
    """The wrapper's prefix before all names, if there is one."""
    return next((p for p in WRAPPERS if state and all(key.startswith(p) for key in state)), None)


def prefix_hint(own: Mapping[str, Any], state: Mapping[str, Any]) -> str | None:
    """What to do about weights that are those of ``own`` but for what stands before their names."""
    wrapper = wrapper_of(state)
    if wrapper is not None:
        return f"all names begin with {wrapper!r}, which a wrapper put there: take it off"
    last = next(iter(own), "")
    starts = {key.removesuffix(last) for key in state if key.endswith(f".{last}")}
    parts = sorted(start for start in starts if all(start + key in state for key in own))
    if not parts:
        return None
    names = " and ".join(map(repr, parts))
    return (
        f"it holds several parts, and the names that begin with {names} are this model's: load one of them, "
        f"{{k.removeprefix({parts[0]!r}): v for k, v in state.items() if k.startswith({parts[0]!r})}}"
    )
