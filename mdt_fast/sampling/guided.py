"""The model's pass in one sampling step, for both halves of a guided batch, and the step that follows it.

n images of C channels, O output channels, B rows: n, or 2n with guidance (classes, then null classes); T
steps, K coefficients.
"""

import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..config import ModelConfig, SampleConfig, SampleSwitches
from ..cuda_graphs import Graphed
from ..diffusion import GaussianDiffusion, channels_to_guide, guide, power_cosine_scale
from ..errors import UserError
from ..kernels import cfg_step, ddim_coefficients, ddpm_coefficients
from ..kernels.registry import PLAIN
from ..masking import MaskPlan
from ..models.base import Transformer
from ..models.own import is_ours
from ..models.sampling import (
    CastWeights,
    StepModulations,
    conditions_plainly,
    guided_pass,
    is_open,
    may_share_patches,
)


@dataclass(frozen=True)
class Timesteps:
    """What a pass must know of a process that is not ours: each step index's original timestep, ascending
    towards noise (a fraction if a scheduler asks for one), and the number of original steps."""

    timestep_map: Sequence[float]
    original_num_steps: int


def as_published(config: SampleConfig, model: ModelConfig) -> SampleConfig:
    """``config`` with the guidance of the model's family where ``scale_pow`` is "auto"."""
    if config.scale_pow != "auto":
        return config
    family = getattr(model, "family", None)  # a module of the user's own may have another config
    return replace(config, scale_pow=None if family == "dit" else 4.0)


def guidance_weights(diffusion: GaussianDiffusion | Timesteps, config: SampleConfig) -> Tensor:
    """The guidance weight of each step, float32 [T] on the CPU: 1 outside of ``cfg_interval``, and where it
    differs from 1 by less than ``skip_below``. ``config``: from :func:`as_published`."""
    assert config.scale_pow != "auto"
    times, steps = torch.tensor(diffusion.timestep_map, device="cpu"), diffusion.original_num_steps
    weights = power_cosine_scale(times, config.cfg_scale, steps, config.scale_pow)
    if config.cfg_interval is not None:
        low, high = config.cfg_interval
        if high <= 1:
            low, high = low * steps, high * steps
        weights = weights.where((times >= low) & (times <= high), 1.0)
    return weights.where((weights - 1).abs() >= config.skip_below, 1.0)


def _addresses(tensors: Iterable[Tensor]) -> Iterator[int]:
    """Memory addresses of the values; for a tensor made of others (quantised weights), of those."""
    for tensor in tensors:
        if type(tensor) not in PLAIN and is_traceable_wrapper_subclass(tensor):
            names, _ = tensor.__tensor_flatten__()
            yield from _addresses(getattr(tensor, name) for name in names)
        else:
            yield tensor.data_ptr()


def _around(module: nn.Module) -> tuple[Any, ...]:
    """Everything that decides how ``module`` is run, other than its weights."""
    own = vars(module)
    hooks = *module._forward_hooks.values(), *module._forward_pre_hooks.values()
    methods = tuple(value for value in own.values() if callable(value))
    return type(module), hooks, methods, own.get("switches"), own.get("attention_backend")


def _channels_of(model: Any) -> int:
    """The number of channels to guide of a model, which may be a user's own module."""
    if isinstance(model, Transformer):
        return channels_to_guide(model.in_channels, model.out_channels, model.learn_sigma)
    return channels_to_guide(int(model.in_channels))


def check_own_guidance(model: nn.Module, config: SampleConfig) -> None:
    """Raise ``UserError`` for a subclass with a guidance of its own, which a sampler's steps do not call."""
    if config.cfg_scale != 1 and isinstance(model, Transformer) and not is_ours(type(model).forward_with_cfg):
        raise UserError(
            f"model: got {type(model).__name__} with its own forward_with_cfg, which is not called here; "
            "expected a loop over it, create_diffusion(...).p_sample_loop(model.forward_with_cfg, ...), or "
            "its guidance in a forward of its own and cfg_scale=1"
        )


class FusedStep:
    """Guidance and a ``ddpm`` or ``ddim`` step in one kernel, applied to the model's output."""

    def __init__(
        self,
        diffusion: GaussianDiffusion,
        config: SampleConfig,
        channels: int,
        clip: bool,
        device: torch.device,
    ):
        a = diffusion.alphas_cumprod
        self.kind: Literal["ddpm", "ddim"] = "ddpm" if config.sampler == "ddpm" else "ddim"
        table = (
            ddpm_coefficients(a, diffusion.var_type)
            if self.kind == "ddpm"
            else ddim_coefficients(a, config.eta)
        )
        self.table_TK = table.to(device)
        self.predicts, self.channels, self.clip = diffusion.mean_type, channels, clip

    def __call__(
        self, output: Tensor, x: Tensor, noise: Tensor | None, row: Tensor, weight: Tensor | None
    ) -> Tensor:
        """The next x for x [n, C, S, S], from ``output`` [B, O, S, S], the guidance ``weight`` [n] or None,
        and ``row`` [K], the step's row of ``table_TK``."""
        return cfg_step(
            output, x, noise, row, scale=weight, guided_channels=self.channels, kind=self.kind,
            predicts=self.predicts, clip_denoised=self.clip,
        )[0]  # fmt: skip


class GuidedModel:
    """The model as a sampling step calls it. ``fused``: the sampler's step, if it is part of the pass.

    ``device``: where passes run, if weights are kept elsewhere between them. ``plan``: which tokens of the n
    images the encoder sees in the next passes; None: all.
    """

    def __init__(
        self,
        model: nn.Module,
        diffusion: GaussianDiffusion | Timesteps,
        config: SampleConfig,
        clip_denoised: bool,
        switches: SampleSwitches,
        *,
        device: torch.device | None = None,
    ):
        self.model, self.diffusion, self.config = model, diffusion, config
        self.switches = switches
        weight = next(model.parameters())
        self.device, self.dtype = device or weight.device, weight.dtype
        self.num_classes = int(model.num_classes)  # type: ignore[arg-type]
        check_own_guidance(model, config)
        self.channels = config.guided_channels or _channels_of(model)
        self.weights = guidance_weights(diffusion, config)
        self.weights_T = self.weights.to(self.device)
        self.times_T = torch.tensor(diffusion.timestep_map, device=self.device)
        self.parts = model if is_open(model) else None
        self.casts: CastWeights | None = None
        if self.parts is not None and config.dtype != "float32" and switches.cast_once:
            self.casts = CastWeights(self.parts, getattr(torch, config.dtype))
        self.fused: FusedStep | None = None
        fusable = switches.fused_step and config.sampler in ("ddpm", "ddim")
        if fusable and type(diffusion) is GaussianDiffusion:  # a user's subclass may step differently
            self.fused = FusedStep(diffusion, config, self.channels, clip_denoised, self.device)
        self.graphed = switches.cuda_graph and self.parts is not None and self.device.type == "cuda"
        self.graphs: Graphed | None = None
        self.captured_of: list[Any] = []
        # Casts cached by autocast would be gone when the graph is replayed.
        self.autocast = {
            "device_type": self.device.type,
            "dtype": getattr(torch, config.dtype),
            "enabled": config.dtype != "float32",
            "cache_enabled": not self.graphed,
        }
        self.labels = self.rows = torch.empty(0)
        self.modulations: StepModulations | None = None
        self.shared = False
        self.plan: MaskPlan | None = None

    def begin(self, labels: Sequence[int]) -> None:
        """Start a batch of these n classes, with the weights as they are now."""
        moved = self.casts is not None and self.casts.refresh()
        if self.graphed:
            self._look_for_graphs(moved)
        null = [self.num_classes] * len(labels)
        self.labels = torch.tensor([*labels, *null], device=self.device)
        self.modulations, parts = None, self.parts
        self.shared = self.switches.shared_embedding and parts is not None and may_share_patches(parts)
        if self.switches.batched_modulations and parts is not None and conditions_plainly(parts):
            any_guided = any(self.guided(index) for index in range(len(self.weights)))
            unique = sorted({*labels, *(null if any_guided else ())})
            place = {label: i for i, label in enumerate(unique)}
            self.rows = torch.tensor([place.get(label, 0) for label in [*labels, *null]], device=self.device)
            self.modulations = StepModulations(
                parts, self.diffusion.timestep_map, torch.tensor(unique, device=self.device)
            )

    def guided(self, index: int) -> bool:
        """Whether the step needs the unconditional half."""
        if self.config.cfg_scale == 1:
            return False
        exact = not self.switches.skip_unit and self.config.skip_below == 0 and not self.config.cfg_interval
        return exact or float(self.weights[index]) != 1

    def outputs(self, x: Tensor, index: int) -> Tensor:
        """The model's output [B, O, S, S] for x [n, C, S, S] at a step."""
        return self._call(x, index, None, None)

    def step(self, x: Tensor, index: int, noise: Tensor | None) -> Tensor:
        """The next x, for a sampler with a ``fused`` step."""
        assert self.fused is not None
        return self._call(x, index, noise, self.fused.table_TK[index])

    def prediction(self, x: Tensor, index: int) -> Tensor:
        """The guided output [n, O, S, S] for x [n, C, S, S]."""
        output, n = self.outputs(x, index), len(x)
        if not self.guided(index):
            return output
        weight = self.weights_T[index].expand(n)
        return guide(output[:n], output[n:], weight, channels=self.channels)[:n]

    def _call(self, x: Tensor, index: int, noise: Tensor | None, row: Tensor | None) -> Tensor:
        n, guided = len(x), self.guided(index)
        B = 2 * n if guided else n
        weight = self.weights_T[index].expand(n) if guided else None
        with torch.autocast(**self.autocast), self.casts.within() if self.casts else nullcontext():
            # A graph takes no plan, and the side-interpolater is not among the modulations.
            compute = self._compute if self.graphs is None or self.plan is not None else self.graphs
            if self.modulations is not None and self.plan is None:
                modulations = self.modulations(index, self.rows[:B])
                return compute(x, None, None, modulations, weight, noise, row)
            return compute(x, self.times_T[index].expand(B), self.labels[:B], None, weight, noise, row)

    def _look_for_graphs(self, moved: bool) -> None:
        """Replace the graphs if they read other memory than the weights are in now, or if the model's parts
        now have other hooks, methods, switches or backends."""
        cast = set() if self.casts is None else {id(weight) for weight in self.casts.whole}
        numbers = chain(self.model.parameters(), self.model.buffers())
        before, self.captured_of = self.captured_of, [
            *_addresses(x for x in numbers if id(x) not in cast), *map(_around, self.model.modules())
        ]  # fmt: skip
        if self.graphs is None or moved or self.captured_of != before:
            # If graphs held this object, which holds them, memory would stay until garbage collection.
            itself = weakref.proxy(self)
            self.graphs = Graphed(lambda *args: itself._compute(*args), self.device)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "graphs": None}  # a copy captures its own graphs

    def _compute(
        self,
        x: Tensor,
        t: Tensor | None,
        y: Tensor | None,
        modulations: Tensor | None,
        weight: Tensor | None,
        noise: Tensor | None,
        row: Tensor | None,
    ) -> Tensor:
        """A pass and, with ``row``, a step; takes only tensors, as a graph needs."""
        guided, images, plan = weight is not None, x.to(self.dtype), self.plan
        if self.parts is None:
            hidden = {} if plan is None else {"mask_plan": plan.twice() if guided else plan}
            output = self.model(torch.cat([images, images]) if guided else images, t, y, **hidden)
        else:
            if self.modulations is not None and modulations is not None:
                c = self.modulations.conditioning(modulations)
            else:
                c = self.parts.condition(t, y)  # type: ignore[arg-type]
            output = guided_pass(self.parts, images, c, plan, guided=guided, shared=self.shared)
        output = output.to(x.dtype)
        return output if self.fused is None or row is None else self.fused(output, x, noise, row, weight)
