"""The two-pass objective of MDT and its random draws, made for the whole batch on every process.

B samples in the whole batch, [C, S, S] each, L tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial, reduce
from operator import add
from typing import Any

import torch
from torch import Tensor

from ..diffusion import GaussianDiffusion
from ..masking import MaskPlan


@dataclass(frozen=True, eq=False)
class Draws:
    """The random draws of a step. Timesteps ``t`` [B] int64; for the pass over all tokens the noise
    [B, C, S, S] and which labels to drop [B] bool (None: labels are never dropped); for the masked pass its
    own noise and drops, and the mask (None without a masked pass). ``given`` [B, ...], ``given_masked``: the
    conditioning passed instead of labels, if it is not labels, with the embedder's own drops applied."""

    t: Tensor
    noise: Tensor
    dropped: Tensor | None = None
    noise_masked: Tensor | None = None
    dropped_masked: Tensor | None = None
    plan: MaskPlan | None = None
    given: Tensor | None = None
    given_masked: Tensor | None = None

    def rows(self, rows: slice) -> "Draws":
        """The draws of the samples in ``rows``."""
        plan = None if self.plan is None else self.plan.rows(rows)
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return Draws(**{name: value[rows] for name, value in tensors.items()}, plan=plan)


def draw(model: Any, diffusion: GaussianDiffusion, batch: int, device: torch.device) -> Draws:
    """Draw from torch's default generators, in the order of two consecutive passes.

    Every process draws the whole batch, which is faster than sending it.
    """
    shape = (batch, model.in_channels, model.input_size, model.input_size)

    def one_pass() -> tuple[Tensor, Tensor | None]:
        noise = torch.randn(shape, dtype=torch.float32, device=device)
        return noise, _drops(model, batch, device)

    t = torch.randint(diffusion.num_timesteps, (batch,), device=device)
    first = one_pass()
    if getattr(model, "mask_ratio", None) is None:
        return Draws(t, *first)
    second = one_pass()
    return Draws(t, *first, *second, model.draw_plan(batch, device))


def _drops(model: Any, batch: int, device: torch.device) -> Tensor | None:
    if not getattr(model, "takes_labels", True) or not model.y_embedder.dropout_prob:
        return None
    probability = model.y_embedder.dropout_prob
    # With the CPU generator on any device, as in the models themselves.
    return (torch.rand(batch, dtype=torch.float32) < probability).to(device, non_blocking=True)


def drop(y: Tensor, dropped: Tensor | None, null: int) -> Tensor:
    """Labels y [B] with the ``dropped`` ones replaced by the ``null`` class."""
    return y if dropped is None else torch.where(dropped, null, y)


def losses_of(
    model: Any, diffusion: GaussianDiffusion, x: Tensor, y: Tensor, draws: Draws
) -> dict[str, Tensor]:
    """Loss terms [B] of images x [B, C, S, S] with labels y [B]: ``loss``, ``mse``, ``vb`` over all tokens,
    and with a masked pass also ``m_loss``, ``m_mse``, ``m_vb``. Both passes run as one batch."""
    labels = drop(y, draws.dropped, model.num_classes) if draws.given is None else draws.given
    if draws.plan is None:
        kwargs = {"y": labels, "drop_labels": False}
        return diffusion.training_losses(model, x, draws.t, kwargs, draws.noise)
    return diffusion.two_pass_losses(
        model, x, draws.t, labels, _labels_masked(model, y, draws),
        noise=draws.noise, noise_masked=draws.noise_masked, mask_plan=draws.plan,
    )  # fmt: skip


def _labels_masked(model: Any, y: Tensor, draws: Draws) -> Tensor:
    if draws.given_masked is not None:
        return draws.given_masked
    return drop(y, draws.dropped_masked, model.num_classes)


def losses_by_pass(
    model: Any, diffusion: GaussianDiffusion, x: Tensor, y: Tensor, draws: Draws
) -> list[Callable[[], dict[str, Tensor]]]:
    """One callable per pass; together they return the terms of :func:`losses_of`. A backward pass can run
    between them."""
    full = partial(losses_of, model, diffusion, x, y, replace(draws, plan=None))
    if draws.plan is None:
        return [full]
    labels = _labels_masked(model, y, draws)
    kwargs = {"y": labels, "drop_labels": False, "enable_mask": True, "mask_plan": draws.plan}
    masked = partial(diffusion.training_losses, model, x, draws.t, kwargs, draws.noise_masked)
    return [full, lambda: _as_masked(masked())]


def _as_masked(terms: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"m_{name}": values for name, values in terms.items()}


def total_loss(terms: dict[str, Tensor]) -> Tensor:
    """The sum, not the average, of the mean losses of the passes in ``terms``."""
    return reduce(add, (terms[name].mean() for name in ("loss", "m_loss") if name in terms))
