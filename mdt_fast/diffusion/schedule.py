"""The noise schedule: betas, the choice of timesteps, and the float64 arrays computed from them.

``beta_t`` is the variance added at step t, ``alphas_cumprod`` the share of signal variance left after it. A
respaced process walks through a subset of the original timesteps: its step i is ``timestep_map[i]``.
Source: Ho et al. 2020 (DDPM) equations 4 to 7; Nichol and Dhariwal 2021, section 3.2 (cosine) and 4
(respacing).
"""

import math
import operator
from collections.abc import Sequence
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import UserError, nearest
from .checks import readable

Respacing = str | int | Sequence[int] | None
Array = NDArray[np.float64]
NOISE_SCHEDULES = ("linear", "squaredcos_cap_v2")


def make_betas(noise_schedule: str, steps: int) -> Array:
    """Betas for ``steps`` steps, float64 [steps]: ``linear`` or ``squaredcos_cap_v2`` (cosine, capped at
    0.999).

    Raises ``UserError`` for an unknown name, for no steps, and for fewer than 21 linear steps: the linear
    schedule runs from 1e-4 to 0.02, times 1000 / steps, and must stay below 1.
    """
    try:
        steps = operator.index(steps)
    except TypeError:
        raise UserError(f"diffusion_steps: got {steps!r}, expected an integer") from None
    if steps < 1:
        raise UserError(f"diffusion_steps: got {steps}, expected 1 or more")
    if noise_schedule == "linear":
        if steps <= 20:
            raise UserError(f"diffusion_steps: the linear schedule needs at least 21, got {steps}")
        scale = 1000 / steps
        return np.linspace(scale * 1e-4, scale * 0.02, steps, dtype=np.float64)
    if noise_schedule == "squaredcos_cap_v2":

        def signal(time: float) -> float:
            return math.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2

        betas = [1 - signal((i + 1) / steps) / signal(i / steps) for i in range(steps)]
        return np.minimum(np.array(betas, dtype=np.float64), 0.999)
    hint = nearest(noise_schedule, NOISE_SCHEDULES)
    raise UserError(f"noise_schedule: got {noise_schedule!r}{hint}, expected {', '.join(NOISE_SCHEDULES)}")


def space_timesteps(num_timesteps: int, respacing: Respacing) -> list[int]:
    """The original timesteps in 0..``num_timesteps``-1 that a respaced process uses, ascending.

    ``respacing``: None or "" for all of them; "250" (or 250) for 250 spread from the first to the last;
    "10,15,20" (or [10, 15, 20]) for that many in each of three equal sections (if they cannot be equal, the
    first ones are one longer); "ddim50" for the first integer stride that gives exactly 50, starting at 0.
    Raises ``UserError`` if ``respacing`` cannot be read, if a section is too short, or if no stride fits.
    """
    if respacing is None or respacing == "":
        return list(range(num_timesteps))
    if isinstance(respacing, str) and respacing.startswith("ddim"):
        return _whole_stride(num_timesteps, respacing)
    counts = _section_counts(respacing)
    short, longer = divmod(num_timesteps, len(counts))
    used: list[int] = []
    start = 0
    for i, count in enumerate(counts):
        size = short + (i < longer)
        if not 0 <= count <= size:
            raise UserError(
                f"timestep_respacing: {respacing!r} asks for {count} timesteps in section {i + 1} of "
                f"{len(counts)}, expected 0 to {size} ({num_timesteps} in all)"
            )
        stride = (size - 1) / (count - 1) if count > 1 else 1.0
        position = 0.0
        for _ in range(count):
            used.append(start + round(position))  # half to even; the stride is accumulated, not multiplied
            position += stride
        start += size
    if not used:
        raise UserError(f"timestep_respacing: got {respacing!r}, expected to keep at least 1 timestep")
    return used


def _section_counts(respacing: str | int | Sequence[int]) -> list[int]:
    parts = respacing.split(",") if isinstance(respacing, str) else respacing
    try:
        if isinstance(parts, bool):
            raise TypeError
        if isinstance(parts, int):
            parts = [parts]
        counts = [int(part) if isinstance(part, str) else operator.index(part) for part in parts]
    except (TypeError, ValueError):
        counts = []
    if not counts:
        raise UserError(f"timestep_respacing: got {respacing!r}, expected '250', '10,15,20', 'ddim50' or ''")
    return counts


def _whole_stride(num_timesteps: int, respacing: str) -> list[int]:
    wanted = respacing.removeprefix("ddim")
    for stride in range(1, num_timesteps + 1):
        used = range(0, num_timesteps, stride)
        if str(len(used)) == wanted:
            return list(used)
    close = ""
    if wanted.isdecimal():
        possible = {len(range(0, num_timesteps, stride)) for stride in range(1, num_timesteps + 1)}
        close = f"; the nearest is 'ddim{min(possible, key=lambda count: abs(count - int(wanted)))}'"
    raise UserError(
        f"timestep_respacing: no whole stride through {num_timesteps} timesteps gives {respacing!r}{close}"
    )


class Schedule:
    """The arrays of a (respaced) process, float64 NumPy [num_timesteps] each, with look-up by timestep.

    The argument ``betas`` is for the original process; step i of this one is the original timestep
    ``timestep_map[i]``. The posterior's variance is 0 at t = 0, so its logarithm there is replaced by the one
    at t = 1 (``posterior_log_variance_clipped``). A process with a single step has no t = 1, and uses
    log(beta), its upper bound.
    """

    def __init__(self, betas: Array, use_timesteps: Sequence[int]) -> None:
        self.timestep_map = list(use_timesteps)
        self.num_timesteps = len(self.timestep_map)
        self.original_num_steps = len(betas)

        kept_signal = np.cumprod(1.0 - betas)[self.timestep_map]
        self.betas = 1 - kept_signal / np.append(1.0, kept_signal[:-1])
        alphas = 1.0 - self.betas
        self.alphas_cumprod = np.cumprod(alphas)
        self.alphas_cumprod_prev = np.append(1.0, self.alphas_cumprod[:-1])
        self.alphas_cumprod_next = np.append(self.alphas_cumprod[1:], 0.0)

        # q(x_t | x_0) = N(sqrt(alphas_cumprod) x_0, 1 - alphas_cumprod), and x_0 from x_t and the noise.
        self.sqrt_alphas_cumprod = np.sqrt(self.alphas_cumprod)
        self.sqrt_one_minus_alphas_cumprod = np.sqrt(1.0 - self.alphas_cumprod)
        self.one_minus_alphas_cumprod = 1.0 - self.alphas_cumprod
        self.log_one_minus_alphas_cumprod = np.log(1.0 - self.alphas_cumprod)
        self.sqrt_recip_alphas_cumprod = np.sqrt(1.0 / self.alphas_cumprod)
        self.sqrt_recipm1_alphas_cumprod = np.sqrt(1.0 / self.alphas_cumprod - 1)

        # q(x_{t-1} | x_t, x_0) = N(coef1 x_0 + coef2 x_t, posterior_variance).
        total, prev = 1.0 - self.alphas_cumprod, 1.0 - self.alphas_cumprod_prev
        self.posterior_variance = self.betas * prev / total
        first = self.posterior_variance[1:2] if self.num_timesteps > 1 else self.betas
        clipped = np.append(first, self.posterior_variance[1:])
        self.posterior_log_variance_clipped = np.log(clipped)
        self.posterior_mean_coef1 = self.betas * np.sqrt(self.alphas_cumprod_prev) / total
        self.posterior_mean_coef2 = prev * np.sqrt(alphas) / total

        # The two ends of the range of variances for the model: clipped posterior variance and beta.
        self.log_betas = np.log(self.betas)
        self.fixed_large_variance = np.append(first, self.betas[1:])
        self.fixed_large_log_variance = np.log(self.fixed_large_variance)
        self._on_device: dict[tuple[str, torch.device], Tensor] = {}

    def to(self, device: torch.device | str) -> Self:
        """Copy the arrays to ``device`` now rather than at their first use; returns the object itself.

        Useful before ``torch.compile`` with CUDA graphs: a table made inside would be in the graphs' memory.
        """
        exact = torch.empty(0, device=device).device  # "cuda" becomes "cuda:0", as tensors report it
        for name, value in list(vars(self).items()):
            if isinstance(value, np.ndarray) or name == "timestep_map":
                self._table(name, exact)
        return self

    def lookup(self, array: str, t: Tensor, x: Tensor) -> Tensor:
        """``array`` (one of the names above) at ``t`` [B], float32, expanded to ``x``'s shape [B, ...]."""
        self.check_timesteps(t, x)
        values_B = self._table(array, t.device)[t]
        return values_B.view(-1, *[1] * (x.ndim - 1)).expand(x.shape)

    def original_timesteps(self, t: Tensor) -> Tensor:
        """``timestep_map`` at ``t`` [B]: the timesteps that the model was trained with, in ``t``'s dtype."""
        return self._table("timestep_map", t.device)[t].to(t.dtype)

    def check_timesteps(self, t: Tensor, x: Tensor) -> None:
        """Raise ``UserError`` unless ``t`` has one integer in range per row of ``x``, on the same device.

        The range is checked on the CPU only: reading values from a GPU would wait for it.
        """
        if not isinstance(t, Tensor) or t.dtype not in (torch.int64, torch.int32):
            got = t.dtype if isinstance(t, Tensor) else type(t).__name__
            raise UserError(f"t: got {got}, expected an int64 tensor of timesteps")
        if t.ndim != 1 or t.shape != x.shape[:1]:
            raise UserError(
                f"t: got shape {list(t.shape)}, expected one timestep per row of x {list(x.shape)}"
            )
        if t.device != x.device:
            raise UserError(f"t: got one on {t.device}, expected one on {x.device}, where x is")
        if readable(t) and t.numel():
            low, high = (int(bound) for bound in t.aminmax())
            if low < 0 or high >= self.num_timesteps:
                raise UserError(f"t: got values from {low} to {high}, expected 0 to {self.num_timesteps - 1}")

    def _table(self, array: str, device: torch.device) -> Tensor:
        """An array as a tensor on ``device``, copied there only once, as a copy waits for the GPU."""
        table = self._on_device.get((array, device))
        if table is None:
            values = torch.as_tensor(getattr(self, array), device="cpu")
            with torch.inference_mode(False):  # a table first used in sampling must also work in training
                table = values.to(device, torch.float32 if values.is_floating_point() else torch.int64)
            if type(table) is Tensor:  # not while torch.export traces, with tensors that have no values
                self._on_device[array, device] = table
        return table
