"""Adan and AdamW whose whole step is one sweep over memory: clipping, update, master weights, EMA.

Gradients are read twice (once for their norm), everything else once. Nothing waits for the device, except in
the step that first sees a parameter, so a step can be captured in a CUDA graph after a few ordinary ones. A
step with a gradient that is not finite changes nothing, and is counted in ``skipped_steps``.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any, ClassVar, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..errors import UserError
from ..kernels.optim import grad_sumsq
from ..kernels.optim.op import MOST_AVERAGES, NATIVE, is_dense, run
from . import loading
from .shards import laid_out, local, split
from .tracing import untraced

OWN = ("max_grad_norm", "clip_norm", "moments_dtype", "process_group", "grad_norm", "skipped_steps",
       "_averages", "_decays", "_masters")  # fmt: skip


class Item(NamedTuple):
    """A parameter with a gradient: its index among all parameters, and the parts of both on this rank."""

    place: int
    param: Tensor
    local: Tensor
    grad: Tensor


class FusedOptimizer(torch.optim.Optimizer):
    """Base class of both optimisers, not to be instantiated. Their keyword-only arguments:

    - ``max_grad_norm``: the gradients of all groups together are scaled to at most this norm; 0 disables
      this. ``.grad`` is never written.
    - ``clip_norm``: ``"global"`` clips by the norm over all ranks, ``"rank"`` by the norm of this rank's
      gradients, as the official Adan does under ZeroRedundancyOptimizer.
    - ``moments_dtype``: ``torch.bfloat16`` halves the memory of the moments (rounded stochastically by the
      native op, to nearest by PyTorch). Default: float32, or float64 for float64 parameters.
    - ``process_group``: the ranks that share out whole parameters; the squares of their gradients are summed
      for the norm. DTensor shards are known from their placements and do not need it.

    Parameters are float32, bfloat16 (with a float32 ``master`` in the state, made in the first step or given
    to :meth:`set_masters`; write new values under ``torch.no_grad()``, as those written through ``p.data`` go
    unnoticed and are lost in the next step) or float64 (plain PyTorch). ``lr`` is a number, or a 0-dim tensor
    that is read on the device. After a step, ``grad_norm`` is the norm before clipping (0-dim float64) and
    ``skipped_steps`` (0-dim int64) the number of steps skipped so far; both are on the device.
    """

    op: str  # of kernels.optim
    betas: int  # their number
    moments: tuple[str, ...]
    counted: tuple[str, ...] = ()  # other entries that a parameter's state must have
    fixed: ClassVar[dict[str, Any]]  # further entries in the plain optimiser's groups
    refused: tuple[str, ...]  # keys of ``fixed`` for which another value would change the result

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        max_grad_norm: float,
        clip_norm: str,
        moments_dtype: torch.dtype | None,
        process_group: dist.ProcessGroup | None,
    ):
        loading.at_least_0("max_grad_norm", max_grad_norm)
        if clip_norm not in ("global", "rank"):
            raise UserError(f"clip_norm: got {clip_norm!r}, expected global, rank")
        if moments_dtype not in (None, torch.float32, torch.bfloat16):
            raise UserError(f"moments_dtype: got {moments_dtype}, expected None, float32, bfloat16")
        self.max_grad_norm, self.clip_norm = float(max_grad_norm), clip_norm
        self.moments_dtype, self.process_group = moments_dtype, process_group
        self.grad_norm = torch.full((), math.nan, dtype=torch.float64, device="cpu")
        self.skipped_steps = torch.zeros((), dtype=torch.int64, device="cpu")
        self._averages: list[list[Tensor]] = []
        self._decays: list[float] = []
        self._masters: list[Tensor] = []
        self._rates: dict[tuple[int, torch.dtype], tuple[float, Tensor]] = {}
        self._versions: dict[int, int] = {}  # of bfloat16 parameters, by index, after the last step
        super().__init__(params, {**self.fixed, **defaults})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch. Raises ``UserError`` for unsupported values and dtypes, and after ``add_ema`` or
        ``set_masters``."""
        if self._averages or self._masters:
            given = "averages of add_ema" if self._averages else "masters of set_masters"
            raise UserError(f"add_param_group: the {given} would lack its parameters; add the group first")
        super().add_param_group(param_group)
        try:
            self._check_group(self.param_groups[-1])
        except Exception:
            self.param_groups.pop()
            raise

    def add_ema(self, params: Iterable[Tensor] | Iterable[tuple[str, Tensor]], decay: float) -> None:
        """Update an EMA in every step: ``ema = decay * ema + (1 - decay) * parameter``, in the same sweep.

        ``params``: one float32 tensor (or float64, for a float64 parameter) for each parameter, with its
        shape and device, in the optimiser's order (one group after the other). They may come in any order
        with names (``named_parameters()``), if the optimiser was made with names. All of them move, with or
        without a gradient and at any learning rate. They also move in the step by which
        ``torch.distributed.checkpoint`` creates an optimiser's state, so load that state before the EMA.
        """
        average, own = loading.in_order("params", params, self.param_groups), list(self._all())
        if len(self._averages) == MOST_AVERAGES:
            raise UserError(f"add_ema: there are {MOST_AVERAGES} averages, no more are allowed")
        if not loading.is_number(decay) or not 0 <= decay < 1:
            raise UserError(f"decay: got {decay!r}, expected [0, 1)")
        loading.check_copies(
            "params", average, own, loading.labels_of("params", self.param_groups), self._copies()
        )
        # Leaves as they are: a deep copy of the optimiser and these moves the copies.
        self._averages.append([ema if ema.is_leaf else ema.detach() for ema in average])
        self._decays.append(float(decay))

    def set_masters(self, masters: Iterable[Tensor] | Iterable[tuple[str, Tensor]]) -> None:
        """Use ``masters`` as the float32 weights behind bfloat16 parameters, and update them in every step.

        ``masters``: one float32 tensor for each parameter, in the optimiser's order or by name (see
        :meth:`add_ema`), with its shape and device. Each must round to its parameter, and all parameters must
        be bfloat16. Without this call, a master starts from its already rounded parameter. Loading a state
        writes its masters into these tensors; without masters in it, a parameter whose weights have been
        replaced overwrites its master. Raises ``UserError`` for tensors that do not fit, and if there are
        masters already.
        """
        given, own = loading.in_order("masters", masters, self.param_groups), list(self._all())
        for label, p in zip(labels := loading.labels_of("masters", self.param_groups), own):
            if p.dtype != torch.bfloat16:
                raise UserError(f"{label}: of a parameter in {p.dtype}; only bfloat16 ones have masters")
            if self._masters or "master" in self.state.get(p, {}):
                raise UserError("set_masters: there are masters already; call it once, before the first step")
        loading.check_copies("masters", given, own, labels, self._copies())
        for label, master, p in zip(labels, given, own):
            if p.device.type != "meta" and not torch.equal(local(p), local(master).to(p.dtype)):
                raise UserError(f"{label}: does not round to its parameter in bfloat16")
        self._masters = [master.detach() for master in given]

    @untraced
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step. Raises ``UserError`` if no gradients exist, and for sparse or partial ones."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            loading.check_before_step(group, self.fixed, self.refused)
        groups, squares = self._gather()
        loading.check_kept(self._averages, self._masters, self.param_groups)
        self._follow_writes()
        self.grad_norm = norm = self._norm(squares)
        finite = norm.isfinite()
        self.skipped_steps = self.skipped_steps.to(norm.device)
        self.skipped_steps += ~finite
        for index, (group, items) in enumerate(zip(self.param_groups, groups)):
            served = self._begin(group, items, norm) if items else []
            steps = self._steps(group, served)
            batches = self._batches(served)
            for number, ((dtype, _, native), batch) in enumerate(batches.items()):
                last = number == len(batches) - 1
                self._update(index, dtype, native, batch, self._of(steps, batch, last), norm)
        self._average_others({item.place for items in groups for item in items}, finite)
        self._versions = {i: p._version for i, p in enumerate(self._all()) if p.dtype == torch.bfloat16}
        return loss

    def state_dict(self) -> dict[str, Any]:
        """A state that the plain optimiser can load; bfloat16 parameters also have a ``master``."""
        packed = super().state_dict()
        for group in packed["param_groups"]:
            if "step" in group:
                group["step"] = int(group["step"])
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this class or of the plain optimiser; moments and masters keep their own dtype.

        Raises ``UserError`` for unsupported options, and for states that are incomplete or do not fit.
        """
        given: dict[str, Any] = {}

        def before(_: torch.optim.Optimizer, loaded: dict[str, Any]) -> None:
            loading.check_state(loaded, list(self._all()), self.moments, self.counted)
            for group in loaded["param_groups"]:
                loading.check_numbers({**self.defaults, **group}, self.betas, self.fixed, self.refused)
                loading.check_clipping(group, self.max_grad_norm)
            given.update(loaded)

        def after(_: torch.optim.Optimizer) -> None:
            own = list(self._all())
            loading.restore(given, own, self.state, self.moments, self.moments_dtype)
            loading.tie_masters(self._masters, own, self.state)

        hooks = [
            self.register_load_state_dict_pre_hook(before),
            self.register_load_state_dict_post_hook(after, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **{name: getattr(self, name) for name in OWN}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._rates, self._versions = {}, {}
        if state.get("_masters"):  # unpickled: masters of parameters with a state are also in that state
            self._masters = [
                self.state.get(p, {}).get("master", m) for m, p in zip(self._masters, self._all())
            ]
        for group in self.param_groups:
            for key, value in self.fixed.items():
                group.setdefault(key, value)

    # Where the two optimisers differ

    def _steps(self, group: dict[str, Any], items: list[Item]) -> list[Tensor]:
        """The step counts: one for the group, or one for each item."""
        raise NotImplementedError

    def _of(self, steps: list[Tensor], batch: list[tuple[int, Item]], last: bool) -> list[Tensor]:
        """The step counts that the op may increment for ``batch``; ``last``: it is the group's last batch."""
        raise NotImplementedError

    def _options(self, group: dict[str, Any]) -> tuple[Any, ...]:
        """Arguments of the op that only one of the optimisers has."""
        return ()

    def _clip_eps(self, group: dict[str, Any]) -> float:
        raise NotImplementedError

    def _start(self, group: dict[str, Any], item: Item, norm: Tensor) -> bool:
        """Fill the new state of ``item``, whose moments are zero; False if it cannot start in this step."""
        raise NotImplementedError

    # The parts of a step

    def _all(self) -> Iterator[Tensor]:
        return (p for group in self.param_groups for p in group["params"])

    def _copies(self) -> Iterator[Tensor]:
        """All copies of parameters given so far: masters and EMAs."""
        return chain(self._masters, *self._averages)

    def _gather(self) -> tuple[list[list[Item]], dict[Any, list[Tensor]]]:
        """Parameters and gradients of each group; the gradients also by the ranks that hold other parts."""
        groups: list[list[Item]] = []
        squares: dict[Any, list[Tensor]] = {}
        index = -1
        for group in self.param_groups:
            groups.append([])
            for p in group["params"]:
                index += 1
                if p.grad is None:
                    continue
                grad, own, where = p.grad, p, None
                if isinstance(p, DTensor):
                    where = split(index, p, grad)
                    grad, own = local(grad), local(p)
                if grad.layout != torch.strided:
                    raise UserError(f"parameter {index}: a sparse gradient; this optimiser needs dense ones")
                if grad.dtype not in NATIVE and own.dtype in NATIVE:
                    grad = grad.float()
                grad = laid_out(grad, own)
                groups[-1].append(Item(index, p, own, grad))
                squares.setdefault(where, []).append(grad)
        if not squares and self.process_group is None:
            raise UserError("optimizer.step(): no parameter has a gradient; call backward() first")
        devices = {item.local.device for items in groups for item in items}
        if len(devices) > 1:
            raise UserError(
                f"optimizer.step(): parameters on {', '.join(sorted(map(str, devices)))}; one device needed"
            )
        return groups, squares

    def _follow_writes(self) -> None:
        """Take over bfloat16 weights written since the last step, with or without a gradient now."""
        for i, p in enumerate(self._all()):
            written = p.dtype == torch.bfloat16 and self._versions.get(i) != p._version
            if written and (master := self._master(i, p)) is not p:
                loading.follow(master, p)

    def _norm(self, squares: dict[Any, list[Tensor]]) -> Tensor:
        """The norm to clip by. If it is not finite on one rank, it is so on all, and all skip the step."""
        total = torch.zeros((), dtype=torch.float64, device=local(next(self._all())).device)
        own = total.clone()
        for where, grads in squares.items():
            part = grad_sumsq(grads)
            own += part
            if where is not None:
                mesh, dims = where
                for dim in dims:
                    dist.all_reduce(part, group=mesh.get_group(dim))
            total += part
        if self.process_group is not None:
            dist.all_reduce(total, group=self.process_group)
        if self.clip_norm == "rank":
            total = torch.where(total.isfinite(), own, total)
        return total.sqrt()

    def _begin(self, group: dict[str, Any], items: list[Item], norm: Tensor) -> list[Item]:
        """The items that have a state, including new ones."""
        served = []
        for item in items:
            p = item.param
            if not self.state.get(p):
                dtype = self._moments_dtype(p)
                self.state[p] = {name: torch.zeros_like(p, dtype=dtype) for name in self.moments}
                if not self._start(group, item, norm):
                    del self.state[p]
                    continue
            if p.dtype != torch.bfloat16:
                self.state[p].pop("master", None)  # left behind by Module.float(); it would go stale
            elif "master" not in self.state[p]:
                self.state[p]["master"] = self._master(item.place, p).detach().float()
            served.append(item)
        return served

    def _batches(self, items: list[Item]) -> dict[tuple, list[tuple[int, Item]]]:
        """Batches for one call of the op each: equal dtypes, and all or none in the native op's layout."""
        batches: dict[tuple, list[tuple[int, Item]]] = {}
        for number, item in enumerate(items):
            strides, state = item.local.stride(), self.state[item.param]
            parts = [value for name, value in state.items() if name != "step"]
            parts += [average[item.place] for average in self._averages]
            native = is_dense(item.local) and all(local(part).stride() == strides for part in parts)
            batches.setdefault((item.local.dtype, item.grad.dtype, native), []).append((number, item))
        return batches

    def _update(
        self,
        index: int,
        dtype: torch.dtype,
        native: bool,
        batch: list[tuple[int, Item]],
        steps: list[Tensor],
        norm: Tensor,
    ) -> None:
        group, items = self.param_groups[index], [item for _, item in batch]
        states = [self.state[item.param] for item in items]
        moments = [[local(state[name]) for state in states] for name in self.moments]
        masters = [local(state["master"]) for state in states] if dtype == torch.bfloat16 else []
        emas = [local(average[item.place]) for average in self._averages for item in items]
        rate = self._rate(index, torch.float64 if dtype == torch.float64 else torch.float32, norm.device)
        run(self.op, native, [item.local for item in items], [item.grad for item in items], *moments, masters,
            emas, steps, rate, norm, *group["betas"], group["eps"], group["weight_decay"],
            *self._options(group), self.max_grad_norm, self._clip_eps(group), self._decays)  # fmt: skip

    def _rate(self, index: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The group's learning rate on the device; a number is written there only when it changes."""
        lr = self.param_groups[index]["lr"]
        if isinstance(lr, Tensor):
            return lr.detach().to(device, dtype, non_blocking=True).reshape(())
        was, rate = self._rates.get((index, dtype), (None, None))
        if rate is None or rate.device != device:
            rate = torch.full((), lr, dtype=dtype, device=device)
        elif was != lr:
            rate.fill_(lr)
        self._rates[index, dtype] = lr, rate
        return rate

    def _average_others(self, moved: set[int], finite: Tensor) -> None:
        """Update the EMAs of parameters without a gradient; unchanged if the step is skipped."""
        others = [(i, p) for i, p in enumerate(self._all()) if i not in moved] if self._averages else []
        if not others:
            return
        whole = [self._master(i, p) for i, p in others]
        for average, decay in zip(self._averages, self._decays):
            emas = [local(average[i]) for i, _ in others]
            values = [local(value).to(e.dtype) for value, e in zip(whole, emas)]
            # Not a product with ``finite``: infinity times 0 is not a number.
            change = [torch.where(finite, c, 0) for c in torch._foreach_sub(values, emas)]
            torch._foreach_mul_(change, 1 - decay)
            torch._foreach_add_(emas, change)

    def _master(self, place: int, p: Tensor) -> Tensor:
        """A bfloat16 parameter's float32 master if it has one yet, otherwise the parameter."""
        if p.dtype != torch.bfloat16:
            return p
        return self._masters[place] if self._masters else self.state.get(p, {}).get("master", p)

    def _moments_dtype(self, p: Tensor) -> torch.dtype:
        return self.moments_dtype or (torch.float64 if p.dtype == torch.float64 else torch.float32)

    # Checks, and loading of states

    def _check_group(self, group: dict[str, Any]) -> None:
        loading.check_numbers(group, self.betas, self.fixed, self.refused)
        for i, p in enumerate(group["params"]):
            if p.dtype not in (torch.float32, torch.bfloat16, torch.float64):
                raise UserError(f"params[{i}]: {p.dtype}, expected float32, bfloat16, float64")
