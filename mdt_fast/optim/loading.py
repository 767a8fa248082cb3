"""Checks of an optimiser's numbers, of copies of parameters and of loaded states; loading of states."""

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from numbers import Real
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..errors import UserError
from ..kernels.checks import readable
from ..kernels.optim.op import is_dense
from .shards import laid_out, local

NUMBERS = {2: "two", 3: "three"}
LARGEST_RATE = torch.finfo(torch.float32).max
UNUSED = ("prev_grad", "master")  # entries of a loaded state; a master that is needed is put back


def in_order(what: str, given: Iterable[Any], groups: Sequence[dict[str, Any]]) -> list[Any]:
    """``given``, with or without names, in the order of an optimiser's ``groups``. Raises ``UserError`` for
    other names."""
    items = list(given)
    if not items or not all(isinstance(item, tuple) and len(item) == 2 for item in items):
        return items
    names = names_of(groups)
    if not names:
        raise UserError(
            f"{what}: has names, the optimiser's parameters have none; give it named_parameters(), too"
        )
    tensors = dict(items)
    if odd := sorted(tensors.keys() ^ set(names)):
        where = "the optimiser" if odd[0] in tensors else what
        raise UserError(f"{what}: {odd[0]!r} is not in {where}")
    return [tensors[name] for name in names]


def names_of(groups: Sequence[dict[str, Any]]) -> list[str]:
    """Names of the parameters in an optimiser's ``groups``, in order; none if it was made without names."""
    return [name for group in groups for name in group.get("param_names", ())]


def labels_of(what: str, groups: Sequence[dict[str, Any]]) -> list[str]:
    """What messages call the argument ``what``'s tensors, one per parameter: by name if they have names."""
    names: Sequence[Any] = names_of(groups) or range(sum(len(group["params"]) for group in groups))
    return [f"{what}[{name!r}]" for name in names]


def check_copies(
    name: str,
    copies: Sequence[Tensor],
    params: Sequence[Tensor],
    labels: Sequence[str],
    others: Iterable[Tensor],
) -> None:
    """Raise ``UserError`` unless there is a float32 copy (float64 is allowed for a float64 parameter) for
    each, which shares memory neither with it nor with another copy or ``others``. ``labels``: their names."""
    ranges = [(*_range(x), "") for x in (*others, *params)]
    if len(copies) != len(params):
        raise UserError(f"{name}: {len(copies)} tensors for {len(params)} parameters")
    for label, copy, p in zip(labels, copies, params, strict=True):
        if not isinstance(copy, Tensor) or copy.layout != torch.strided:
            what = f"a {copy.layout} tensor" if isinstance(copy, Tensor) else f"a {type(copy).__name__}"
            raise UserError(f"{label}: {what}, expected a dense tensor")
        allowed = _dtypes_beside(p)
        if copy.shape != p.shape or copy.device != p.device or copy.dtype not in allowed:
            raise UserError(
                f"{label}: {copy.dtype} {list(copy.shape)} on {copy.device}, "
                f"expected {allowed[0]} {list(p.shape)} on {p.device}, as its parameter"
            )
        if local(p).numel() and _memory(copy) == _memory(p):
            raise UserError(f"{label}: is the parameter itself or shares its memory; make a copy")
        if local(copy).shape != local(p).shape:
            raise UserError(f"{label}: is not sharded as its parameter is")
        if local(p).numel() and local(p).device.type != "meta":
            if any(n > 1 and not stride for n, stride in zip(copy.shape, copy.stride())):
                raise UserError(f"{label}: is expanded, its elements share memory; make a copy")
            ranges.append((*_range(copy), label))
    shared: dict[str, str] = {}
    reached, start_of, owner = 0, 0, ""
    for start, end, label in sorted(ranges, key=itemgetter(0)):
        if start < min(reached, end):
            shared[label or owner] = "is" if start == start_of else "shares memory with"
        if end > reached:
            reached, start_of, owner = end, start, label
    if found := next((label for label in labels if label in shared), None):
        raise UserError(f"{found}: {shared[found]} a tensor that the optimiser already has; make a copy")


def check_kept(
    averages: Sequence[Sequence[Tensor]], masters: Sequence[Tensor], groups: Sequence[dict[str, Any]]
) -> None:
    """Raise ``UserError`` if parameters were put into or taken out of ``groups`` since averages or masters of
    them were given, or if an average was cast or moved to another device."""
    params = [p for group in groups for p in group["params"]]
    for given, copies in (*(("averages", average) for average in averages), ("masters", masters or params)):
        if len(copies) != len(params):
            raise UserError(
                f"param_groups: got {len(params)} parameters, expected those {len(copies)} that {given} were "
                "given for; freeze parameters by requires_grad, or make a new optimiser"
            )
    for average in averages:
        for i, (ema, p) in enumerate(zip(average, params)):
            if (ema.dtype is torch.float32 or ema.dtype in _dtypes_beside(p)) and ema.device == p.device:
                continue
            raise UserError(
                f"{labels_of('params', groups)[i]} of add_ema: got {ema.dtype} on {ema.device}, "
                f"expected {_dtypes_beside(p)[0]} on {p.device}, as when it was given"
            )


def _dtypes_beside(p: Tensor) -> tuple[torch.dtype, ...]:
    return (torch.float32, torch.float64) if p.dtype == torch.float64 else (torch.float32,)


def _range(tensor: Tensor) -> tuple[int, int]:
    """Its first address and the one after its last, or if it has gaps, which others may fill, its first."""
    own = local(tensor)
    if own.device.type == "meta" or not own.numel():
        return 0, 0
    start = own.data_ptr()
    return start, start + own.element_size() * (own.numel() if is_dense(own) else 1)


def _memory(tensor: Tensor) -> int:
    return local(tensor).untyped_storage().data_ptr()


def check_state(
    loaded: dict[str, Any], params: list[Tensor], moments: Sequence[str], counted: Sequence[str]
) -> None:
    """Raise ``UserError`` if an entry of the state is missing or does not fit its parameter."""
    for i, p, entries in _entries(loaded, params):
        for name in counted:
            if name not in entries:
                raise UserError(f"state of parameter {i}: no {name!r}; it has {', '.join(map(str, entries))}")
        for name in (*moments, "master"):
            value = _moment(entries, name)
            if value is None:
                if name == "master":
                    continue
                raise UserError(f"state of parameter {i}: no {name!r}; it has {', '.join(map(str, entries))}")
            if value.shape != p.shape or local(value).shape != local(p).shape:
                raise UserError(
                    f"state of parameter {i}: {name} of shape {list(value.shape)}, "
                    f"or sharded otherwise, for a parameter of {list(p.shape)}"
                )


def restore(
    loaded: dict[str, Any],
    params: list[Tensor],
    state: dict[Tensor, dict[str, Any]],
    moments: Sequence[str],
    moments_dtype: torch.dtype | None,
) -> None:
    """Put the entries of ``loaded`` back into ``state``, in the dtypes and layouts that the step needs.

    ``Optimizer.load_state_dict`` has converted them to the parameter's dtype, which would round a float32
    master weight to bfloat16.
    """
    for _, p, entries in _entries(loaded, params):
        wide = torch.float64 if p.dtype == torch.float64 else torch.float32
        kept = {name: _fit(_moment(entries, name), p, moments_dtype or wide) for name in moments}
        if "step" in entries:
            kept["step"] = torch.tensor(float(entries["step"]), dtype=torch.float32, device=local(p).device)
        master = entries.get("master")
        if p.dtype == torch.bfloat16 and master is not None and master.dtype != torch.bfloat16:
            # (A plain optimiser has kept a bfloat16 master without updating it.)
            kept["master"] = _fit(master, p, torch.float32)
        state[p] = {**{name: state[p][name] for name in entries if name not in UNUSED}, **kept}


def tie_masters(
    masters: Sequence[Tensor], params: Sequence[Tensor], state: dict[Tensor, dict[str, Any]]
) -> None:
    """Write loaded masters into ``masters``, which the state then refers to. If none was loaded and a
    parameter is no longer the rounding of its master, its weights were replaced and overwrite the master."""
    for master, p in zip(masters, params):
        loaded = state.get(p, {}).get("master")
        if loaded is not None:
            state[p]["master"] = master.copy_(loaded)
        elif not torch.equal(local(p), local(master).to(p.dtype)):
            master.copy_(p)


def follow(master: Tensor, p: Tensor) -> None:
    """Overwrite the master where ``p`` is no longer its rounding, as its weights were replaced."""
    own, whole = local(p).detach(), local(master)
    whole.copy_(torch.where(own == whole.to(own.dtype), whole, own.to(whole.dtype)))


def check_clipping(group: dict[str, Any], own: float) -> None:
    """Raise ``UserError`` for a group of the official Adan, which clips by itself, with another bound."""
    bound = group.get("max_grad_norm")
    if bound not in (None, own):
        raise UserError(
            f"max_grad_norm: {bound:g} in the loaded state, {own:g} in this optimizer; make it with "
            f"max_grad_norm={bound:g}, or take the key out of the state's param_groups"
        )


def check_numbers(
    group: dict[str, Any], betas: int, fixed: Mapping[str, Any], refused: Sequence[str]
) -> None:
    """Raise ``UserError`` for values of a group that are not allowed, including a number of betas other than
    ``betas``, and another value than in ``fixed`` for a name in ``refused``."""
    for name in ("eps", "weight_decay"):
        at_least_0(name, group[name])
    lr = group["lr"]
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise UserError(f"lr: a tensor of shape {list(lr.shape)}, expected a single number")
        if readable(lr):
            at_least_0("lr", float(lr), LARGEST_RATE)
    check_before_step(group, fixed, refused)
    given = group["betas"]
    several = isinstance(given, Sequence | Tensor) and not isinstance(given, str) and len(given) == betas
    if not several or not all(is_number(beta) and 0 <= beta < 1 for beta in given):
        raise UserError(f"betas: got {given!r}, expected {NUMBERS[betas]} values in [0, 1)")


def check_before_step(group: dict[str, Any], fixed: Mapping[str, Any], refused: Sequence[str]) -> None:
    """Raise ``UserError`` for what may have been written into a group since it was made: a rate that is not
    allowed, and another value than in ``fixed`` for a name in ``refused``."""
    if not isinstance(group["lr"], Tensor):
        at_least_0("lr", group["lr"], LARGEST_RATE)
    for name in refused:
        if group.get(name, fixed[name]) != fixed[name]:
            raise UserError(f"{name}: {group[name]} is not supported, only {fixed[name]}")


def at_least_0(name: str, value: Any, largest: float = sys.float_info.max) -> None:
    """Raise ``UserError`` unless ``value`` is a number (or a tensor of one, but no bool) from 0 to
    ``largest``, which stands for infinity."""
    if not is_number(value) or not 0 <= value <= largest:
        raise UserError(f"{name}: got {value!r}, expected a finite number of 0 or more")


def is_number(value: Any) -> bool:
    """Whether ``value`` is a number, but no bool, or a tensor of one."""
    if isinstance(value, Tensor):
        return value.numel() == 1
    return isinstance(value, Real) and not isinstance(value, bool)


def _entries(loaded: dict[str, Any], params: list[Tensor]) -> Iterator[tuple[int, Tensor, dict[str, Any]]]:
    ids = [i for group in loaded["param_groups"] for i in group["params"]]
    if len(ids) == len(params):  # if not, load_state_dict itself says so
        for i, (key, p) in enumerate(zip(ids, params)):
            if loaded["state"].get(key):
                yield i, p, loaded["state"][key]


def _moment(entries: dict[str, Any], name: str) -> Any:
    """An entry of a state; Adan's last gradient was once saved without negating it."""
    if name == "neg_pre_grad" and name not in entries and "prev_grad" in entries:
        return -entries["prev_grad"]
    return entries.get(name)


def _fit(value: Tensor, p: Tensor, dtype: torch.dtype) -> Tensor:
    value = value.detach().to(p.device, dtype)
    return value if isinstance(value, DTensor) else laid_out(value, local(p))
