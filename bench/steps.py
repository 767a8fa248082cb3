"""The timed steps: one training step or one guided denoising step, with any provider's model.

Everything around the model is this package's own code and the same for all providers: the diffusion process,
the optimiser, the moving average and the drawing of masks, noise and timesteps. Drawing is part of the timed
step; its seeds depend only on the step's number.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from inputs import Inputs
from mdt_fast.config import ModelConfig, Switches, TrainConfig
from mdt_fast.diffusion import create_diffusion
from mdt_fast.diffusion.loss import losses_from_output
from mdt_fast.kernels.backends import tf32
from mdt_fast.masking import MaskPlan
from mdt_fast.models import GraphedModel
from mdt_fast.training.objective import Draws
from mdt_fast.training.optim import optimize
from mdt_fast.training.passes import GraphedPasses, Passes
from measure import module_tensors, pool_bytes, storage_bytes
from providers import Provider, Skip, implementation

TRAIN_STEP = {
    "mdtv2": "unmasked + masked pass (min-SNR 5), one backward, Adan step with gradient clipping, EMA",
    "mdt": "unmasked + masked pass, one backward, AdamW step with gradient clipping, EMA",
    "dit": "one pass, backward, AdamW step with gradient clipping, EMA",
}
SAMPLING_STEPS = 250
CFG_SCALE = 3.8
SAMPLE_STEP = (
    "forward_with_cfg on 2 x batch rows (scale 3.8, power-cosine) and one {} update; "
    "img/s is for 250 of them, extrapolated"
)

COMPARED = 32
"""Images whose losses and gradients are compared with the reference, which may not fit with more."""

TOLERANCE = {
    # dtype: (losses or guided output, gradient norm), relative; bfloat16 has 8 bits.
    torch.float32: (1e-4, 1e-3),
    torch.bfloat16: (3e-2, 1e-1),
}
TF32_TOLERANCE = 3e-3, 1e-2
"""For float32 with TF32 products. All tolerances apply to the reference in the same dtype."""


@dataclass(frozen=True)
class Case:
    """What is run and on which device; each case has its own table."""

    model: str
    config: ModelConfig
    mode: str
    batch: int
    dtype: torch.dtype
    device: torch.device
    sampler: str = "ddpm"
    turned: tuple[str, ...] = ()

    @property
    def switches(self) -> Switches:
        """The switches of the fast model: the defaults, with those in ``turned`` flipped."""
        return replace(Switches(), **{name: not getattr(Switches(), name) for name in self.turned})

    @property
    def turns(self) -> str:
        """`` with A without B``: the switches of the fast model that differ from the defaults."""
        return "".join(
            f" {'with' if getattr(self.switches, name) else 'without'} {name}" for name in self.turned
        )

    def label(self, provider: str) -> str:
        """A provider's name in the rows; with other switches it counts as another provider."""
        return provider + self.turns * (implementation(provider) == "fast")

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def title(self) -> str:
        half = " (autocast)" if self.dtype == torch.bfloat16 else ""
        turned = f" · fast{self.turns}" if self.turned else ""
        return f"{self.mode} · {self.model} · batch {self.batch} · {self.dtype_name}{half}{turned}"

    @property
    def step(self) -> str:
        if self.mode == "train":
            return TRAIN_STEP[self.config.family]
        return SAMPLE_STEP.format(self.sampler.upper())


class Step:
    """A provider's step, called with the step's number. ``outcome`` is what all providers must agree on."""

    def __init__(self, case: Case, provider: Provider, inputs: Inputs):
        self.case, self.provider = case, provider
        self.x = inputs.x_BCSS.to(case.device)
        self.y = inputs.labels_B.to(case.device)

    def model(self, call: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Call the model, under autocast if the case is in bfloat16, and return float32."""
        return self.autocast(call, *args, **kwargs).float()

    def autocast(self, call: Any, *args: Any, **kwargs: Any) -> Any:
        case = self.case
        with torch.autocast(case.device.type, dtype=torch.bfloat16, enabled=case.dtype == torch.bfloat16):
            return call(*args, **kwargs)

    def __call__(self, index: int) -> object:
        raise NotImplementedError

    def outcome(self) -> tuple[Tensor, ...]:
        """Results of step 0, without changing any weight; each is compared with its own tolerance."""
        raise NotImplementedError

    def own_bytes(self) -> int:
        """Bytes of the weights and of whatever else this provider keeps between steps."""
        raise NotImplementedError

    def forget(self) -> None:
        """Release what the last call left behind and the next one would release."""


class TrainStep(Step):
    """A training step: the objective, its gradients, the optimiser step and the moving average."""

    def __init__(
        self,
        case: Case,
        provider: Provider,
        inputs: Inputs,
        len_keeps: Sequence[int | None],
        share: "TrainStep | None",
    ):
        super().__init__(case, provider, inputs)
        self.len_keeps = len_keeps
        self.module = provider.module.train()
        family = case.config.family
        self.diffusion = create_diffusion(
            learn_sigma=case.config.learn_sigma, min_snr_gamma=5.0 if family == "mdtv2" else None
        )
        if share is not None:
            self.optimizer, self.ema = share.optimizer, share.ema
            return
        lean = "lean" in provider.precision
        kept: dict[str, Any] = {"weights": "bfloat16", "moments": "bfloat16"} if lean else {}
        recipe = TrainConfig(optimizer="adan" if family == "mdtv2" else "adamw", lr=1e-5, **kept)
        self.optimizer, self.ema, _ = optimize(self.module, recipe)

    def __call__(self, index: int) -> None:
        self.gradients(index, self.y)
        self.optimizer.step()

    def losses(self, index: int, y: Tensor) -> Iterator[list[Tensor]]:
        """Yield the losses per image [B] of the passes; those yielded together share one backward pass, which
        comes before the next are computed. Both passes use the same timesteps, each with fresh noise."""
        t = self.times(index)
        len_keep = self.len_keeps[index % len(self.len_keeps)]
        if len_keep is not None and self.provider.both is not None:
            yield self.both_passes(index, t, y, len_keep, self.provider.both)
            return
        passes = [self.one_pass(2 * index, t, y, None)]
        if self.provider.in_turn:
            yield passes
            passes = []
        if len_keep is not None:
            passes.append(self.one_pass(2 * index + 1, t, y, len_keep))
        if passes:
            yield passes

    def times(self, index: int) -> Tensor:
        generator = torch.Generator().manual_seed(index)
        t = torch.randint(self.diffusion.num_timesteps, (len(self.x),), generator=generator)
        return t.to(self.x.device)

    def one_pass(self, seed: int, t: Tensor, y: Tensor, len_keep: int | None) -> Tensor:
        noise, plan = self.draws(seed, len_keep)
        kwargs: dict[str, Any] = {"y": y}
        if plan is not None:
            kwargs |= {"enable_mask": True, "mask_plan": plan}
        call = self.provider.forward
        model = lambda x, t, **kw: self.model(call, x, t, **kw)  # noqa: E731
        return self.diffusion.training_losses(model, self.x, t, model_kwargs=kwargs, noise=noise)["loss"]

    def both_passes(self, index: int, t: Tensor, y: Tensor, len_keep: int, call: Any) -> list[Tensor]:
        """Both passes in one batch, with the same draws."""
        noise, _ = self.draws(2 * index, None)
        y_full = self.module.drop_labels(y)
        noise_masked, plan = self.draws(2 * index + 1, len_keep)
        y_masked = self.module.drop_labels(y)
        noises = noise, noise_masked
        noisy = [self.diffusion.q_sample(self.x, t, n) for n in noises]
        times = self.diffusion.original_timesteps(t)
        outputs = self.autocast(call, *noisy, times, y_full, y_masked, plan)
        return [
            losses_from_output(self.diffusion, out.float(), self.x, x_t, t, n)["loss"]
            for out, x_t, n in zip(outputs, noisy, noises, strict=True)
        ]

    def draws(self, seed: int, len_keep: int | None) -> tuple[Tensor, MaskPlan | None]:
        """The noise and mask of one pass. Label drops are drawn next, from the same generator."""
        torch.manual_seed(seed)
        noise = torch.randn_like(self.x)
        if len_keep is None:
            return noise, None
        tokens = torch.rand(len(self.x), self.case.config.grid_size**2, device=self.x.device)
        return noise, self.plan(tokens, len_keep)

    def plan(self, noise_BL: Tensor, len_keep: int) -> MaskPlan:
        plan = MaskPlan.from_noise(noise_BL, len_keep, ascending=self.provider.implementation == "fast")
        if self.provider.compiled:  # one compiled graph for all lengths, from the first call on
            for ids in (plan.ids_keep, plan.ids_mask):
                torch._dynamo.maybe_mark_dynamic(ids, 1)
        return plan

    def outcome(self) -> tuple[Tensor, ...]:
        whole, self.x = self.x, self.x[:COMPARED]
        # Compiled code and GPUs draw label drops from their own generators; the null class is unaffected.
        null = torch.full_like(self.y[:COMPARED], self.case.config.num_classes)
        losses = self.gradients(0, null)
        self.x = whole
        return self.found(torch.stack(losses))

    def gradients(self, index: int, y: Tensor) -> list[Tensor]:
        """Compute gradients, left in the parameters. Returns the loss per image [B] of each pass."""
        self.optimizer.zero_grad(set_to_none=True)
        found: list[Tensor] = []
        for losses in self.losses(index, y):
            torch.stack(losses).mean(1).sum().backward()
            found += (loss.detach() for loss in losses)
        return found

    def found(self, losses: Tensor) -> tuple[Tensor, ...]:
        """The losses [passes, B], flattened, and the norm of the gradients."""
        grads = [p.grad for p in self.module.parameters() if p.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
        return losses.detach().flatten().cpu(), norm.cpu()[None]

    def forget(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def own_bytes(self) -> int:
        state = [v for s in self.optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
        return storage_bytes([*module_tensors(self.module), *self.ema.tensors.values(), *state])


class GraphedTrainStep(TrainStep):
    """A training step whose passes are one CUDA graph for each number of kept tokens."""

    def __init__(self, case: Case, provider: Provider, *args: Any):
        super().__init__(case, provider, *args)
        settings = TrainConfig(dtype=case.dtype_name, passes="in_turn" if provider.in_turn else "together")
        module: Any = self.module
        self.passes = GraphedPasses(Passes(module, self.diffusion, settings, False, case.device))

    def gradients(self, index: int, y: Tensor) -> list[Tensor]:
        self.passes.zero_grad()
        terms = self.passes(self.x, y, self.drawn(index, y), None)
        return [terms[name] for name in ("loss", "m_loss") if name in terms]

    def drawn(self, index: int, y: Tensor) -> Draws:
        """The same draws as in :meth:`losses`."""
        t, len_keep = self.times(index), self.len_keeps[index % len(self.len_keeps)]
        noise, _ = self.draws(2 * index, None)
        drops = self.module.drop_labels(y) != y
        if len_keep is None:
            return Draws(t, noise, drops)
        noise_masked, plan = self.draws(2 * index + 1, len_keep)
        return Draws(t, noise, drops, noise_masked, self.module.drop_labels(y) != y, plan)

    def own_bytes(self) -> int:
        return super().own_bytes() + pool_bytes(self.passes.graphed.pool)


class SampleStep(Step):
    """One denoising step under classifier-free guidance."""

    def __init__(self, case: Case, provider: Provider, inputs: Inputs):
        super().__init__(case, provider, inputs)
        self.module: nn.Module = provider.module.eval()
        self.diffusion = create_diffusion(str(SAMPLING_STEPS), learn_sigma=case.config.learn_sigma)
        noise = torch.randn(self.x.shape, generator=torch.Generator().manual_seed(0)).to(case.device)
        self.z = torch.cat([noise, noise])
        self.classes = torch.cat([self.y, torch.full_like(self.y, case.config.num_classes)])
        self.update = self.diffusion.p_sample if case.sampler == "ddpm" else self.diffusion.ddim_sample

    @torch.no_grad()
    def __call__(self, index: int) -> Tensor:
        torch.manual_seed(index)
        t = torch.full((len(self.z),), index * 37 % SAMPLING_STEPS, device=self.z.device)
        call = self.provider.forward_with_cfg
        model = lambda x, t, **kw: self.model(call, x, t, **kw)  # noqa: E731
        kwargs = {"y": self.classes, "cfg_scale": CFG_SCALE}
        return self.update(model, self.z, t, clip_denoised=False, model_kwargs=kwargs)["sample"]

    @torch.no_grad()
    def outcome(self) -> tuple[Tensor, ...]:
        """The guided output at a timestep with a guidance weight of about 2. (A sample is mostly input.)"""
        t = torch.full((len(self.z),), 200, device=self.z.device)
        kwargs = {"cfg_scale": CFG_SCALE}
        guided = self.model(self.provider.forward_with_cfg, self.z, t, self.classes, **kwargs)
        return (guided[: len(self.x)].flatten().cpu(),)

    def own_bytes(self) -> int:
        return storage_bytes(module_tensors(self.module))


class GraphedSampleStep(SampleStep):
    """A sampling step whose guided pass is one CUDA graph."""

    def __init__(self, case: Case, provider: Provider, inputs: Inputs):
        self.quick = GraphedModel(provider.module)
        super().__init__(case, replace(provider, forward_with_cfg=self.quick.forward_with_cfg), inputs)

    def own_bytes(self) -> int:
        return super().own_bytes() + sum(
            map(pool_bytes, {graph.pool for graph in self.quick.graphs.values()})
        )


def step_of(
    case: Case,
    provider: Provider,
    inputs: Inputs,
    len_keeps: Sequence[int | None],
    share: TrainStep | None = None,
) -> Step:
    """The step for a case. It takes over the optimiser and moving average of ``share``. Raises ``Skip``."""
    if provider.precision and case.dtype != torch.bfloat16:
        raise Skip("only for bfloat16: use --dtype bfloat16")
    if case.mode == "sample":
        if provider.in_turn or "torchao" in provider.precision:
            raise Skip("only for training: use --mode train")
        return (GraphedSampleStep if provider.graphed else SampleStep)(case, provider, inputs)
    kind = GraphedTrainStep if provider.graphed else TrainStep
    return kind(case, provider, inputs, len_keeps, share)


def disagreement(step: Step, expected: Sequence[Tensor]) -> tuple[float, str | None]:
    """The largest relative difference from the reference's ``outcome``, and the reason if it is too large.

    Each is the norm of the difference over the norm of the reference's result.
    """
    worst, problem = 0.0, None
    limits = TOLERANCE[step.case.dtype]
    if step.case.dtype == torch.float32 and step.case.device.type == "cuda" and tf32():
        limits = TF32_TOLERANCE
    names = ("losses", "gradient norm") if step.case.mode == "train" else ("guided output",)
    for name, limit, got, want in zip(names, limits, step.outcome(), expected):
        relative = float((got - want).norm() / want.norm())
        worst = max(worst, relative)
        if not relative <= limit and problem is None:
            problem = (
                f"disagrees with the reference: {name} off by {relative:.1e} relative, allowed {limit:.0e}"
            )
    return worst, problem
