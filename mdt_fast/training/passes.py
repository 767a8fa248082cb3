"""The forward and backward passes of a training step over rows of a batch; on a GPU also as CUDA graphs.

b rows, [C, S, S] each. Gradients accumulate in the parameters after ``zero_grad``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from ..config import TrainConfig
from ..cuda_graphs import Graphed, Key, key_of, lent
from ..diffusion import GaussianDiffusion
from ..errors import UserError
from ..masking import TENSORS, MaskPlan
from ..models.base import Transformer
from .objective import Draws, losses_by_pass, losses_of, total_loss
from .parallelize import autocasting, set_gradient_sync

DRAWN = tuple(field.name for field in fields(Draws) if field.name != "plan")


@dataclass(frozen=True)
class Passes:
    """Runs the passes without graphs. ``sharded``: by FSDP. ``replicas``: number of processes whose gradients
    will be summed, so the loss is divided by it."""

    model: Transformer
    diffusion: GaussianDiffusion
    settings: TrainConfig
    sharded: bool
    device: torch.device
    replicas: int = 1

    def __post_init__(self) -> None:
        """FSDP2 can leave out the reduction after a backward pass only for blocks it has gathered once, which
        the side blocks are not in a pass over all tokens."""
        for block in self.model.every_block() if self.sharded else ():
            if isinstance(block, FSDPModule):
                block.unshard()
                block.reshard()

    def zero_grad(self) -> None:
        self.model.zero_grad()

    def __call__(
        self, x: Tensor, y: Tensor, draws: Draws, scale: Tensor | None, last: bool = True
    ) -> dict[str, Tensor]:
        """The loss terms [b] of model inputs x [b, C, S, S] with labels y [b]. Gradients are those of these
        rows' share of the step's loss, times ``scale`` (for float16). ``last`` False: more rows follow."""
        terms: dict[str, Tensor] = {}
        calls = self.forward_passes(x, y, draws)
        for number, call in enumerate(calls, 1):
            set_gradient_sync(self.model, self.sharded, on=last and number == len(calls))
            with autocasting(self.settings, self.sharded, self.device):
                found = call()
                loss = total_loss(found) / (self.settings.accumulate * self.replicas)
            (loss if scale is None else loss * scale).backward()
            terms |= {name: values.detach() for name, values in found.items()}
        return dict(sorted(terms.items(), key=lambda term: term[0].startswith("m_")))  # in one order always

    def forward_passes(self, x: Tensor, y: Tensor, draws: Draws) -> list[Callable[[], dict[str, Tensor]]]:
        """The forward passes to run, each followed by a backward pass."""
        if self.settings.passes == "in_turn":
            calls = losses_by_pass(self.model, self.diffusion, x, y, draws)
            # Under FSDP2 all gradients of a group have one dtype: with the masked pass first, all come in it.
            return calls[::-1] if self.sharded else calls
        return [lambda: losses_of(self.model, self.diffusion, x, y, draws)]


class GraphedPasses:
    """The same passes as one CUDA graph launch, for batches so small that launches take longer than compute.

    A graph is captured at the first step with each number of kept tokens; all graphs share memory. If a step
    has one micro-batch, its gradients are in the graph's memory, and the optimiser must read them before the
    next step. With several, they accumulate in permanent memory: 16 more bytes to read and write per
    parameter.
    """

    def __init__(self, passes: Passes):
        self.passes, self.parameters = passes, list(passes.model.parameters())
        self.adding = passes.settings.accumulate > 1
        self.begun = False
        self.gradients: list[Tensor | None] = [None] * len(self.parameters)
        self.written: dict[Key, list[Tensor | None]] = {}
        self.names: list[str] = []
        self.ascending = False
        self.graphed = Graphed(self._stacked, passes.device, self._warmed_up, self._captured)

    def zero_grad(self) -> None:
        self.begun = False
        self._let(self.gradients)
        known = [gradient for gradient in self.gradients if gradient is not None]
        if known:
            torch._foreach_zero_(known)

    def __call__(
        self, x: Tensor, y: Tensor, draws: Draws, scale: Tensor | None, last: bool = True
    ) -> dict[str, Tensor]:
        plan = draws.plan
        self.ascending = plan is not None and plan.ascending
        masked = [None if plan is None else getattr(plan, name) for name in TENSORS]
        args = x, y, scale, *(getattr(draws, name) for name in DRAWN), *masked
        before = self._so_far() if self.begun and key_of(args) not in self.graphed.captured else []
        terms = self.graphed(*args)
        for gradient, part in before:
            gradient.add_(part)
        if not self.adding:
            self._let(self.written[key_of(args)])
        self.begun = True
        return dict(zip(self.names, terms.clone().unbind(), strict=True))

    def _stacked(self, x: Tensor, y: Tensor, scale: Tensor | None, *drawn: Any) -> Tensor:
        values, masked = drawn[: len(DRAWN)], drawn[len(DRAWN) :]
        named = dict(zip(TENSORS, masked, strict=True))
        plan = None if masked[0] is None else MaskPlan(**named, ascending=self.ascending)
        terms = self.passes(x, y, Draws(**dict(zip(DRAWN, values, strict=True)), plan=plan), scale)
        self.names = list(terms)
        return torch.stack(list(terms.values()))

    def _so_far(self) -> list[tuple[Tensor, Tensor]]:
        """The gradients accumulated by a step's earlier micro-batches, with copies: a capture resets them."""
        known = [gradient for gradient in self.gradients if gradient is not None] if self.adding else []
        return [(gradient, gradient.clone()) for gradient in known]

    def _warmed_up(self) -> None:
        if self.adding:
            self.gradients = [parameter.grad for parameter in self.parameters]
        self.zero_grad()

    def _captured(self, key: Key) -> None:
        if not self.adding:
            graph, *_ = self.graphed.captured[key]
            gradients = (parameter.grad for parameter in self.parameters)
            self.written[key] = [
                None if gradient is None else lent(gradient, graph) for gradient in gradients
            ]
            self.zero_grad()

    def _let(self, gradients: Sequence[Tensor | None]) -> None:
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient


def hints(passes: Passes) -> list[str]:
    """Hints on settings that would make the passes faster here."""
    if passes.device.type != "cuda" or passes.sharded or passes.settings.cuda_graphs:
        return []
    return [
        "hint: launching a step's kernels one by one may take longer than running them; --set "
        "train.cuda_graphs=true launches them at once (an H200 at batch 32: 12% of S/2's time, 73% of XL/2's)"
    ]


def passes_of(passes: Passes) -> Passes | GraphedPasses:
    """``passes``, or graphed ones if ``train.cuda_graphs`` is set; ``UserError`` where that is impossible."""
    if not passes.settings.cuda_graphs:
        return passes
    if passes.device.type != "cuda":
        raise UserError(f"train.cuda_graphs: needs a CUDA device, got {str(passes.device)!r}")
    if passes.sharded:
        raise UserError(
            "train.cuda_graphs: needs one process, or train.parallel ddp: the host controls FSDP's gathers"
        )
    return GraphedPasses(passes)
