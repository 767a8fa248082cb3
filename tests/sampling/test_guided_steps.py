"""What makes sampling fast gives the same pictures; guidance is left out where it is configured to be."""

import copy
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mdt_fast.config import DiffusionConfig, Family, SampleConfig, SampleSwitches, Switches
from mdt_fast.diffusion import GaussianDiffusion
from mdt_fast.diffusion.schedule import make_betas
from mdt_fast.models import sampling
from mdt_fast.models.float8 import use_float8
from mdt_fast.models.sampling import StepModulations, is_open
from mdt_fast.sampling import Sampler, sample, sampling_diffusion
from mdt_fast.sampling.generate import steps_of
from mdt_fast.sampling.guided import as_published, guidance_weights
from small_models import made
from tolerances import FLOAT32, FLOAT64, relative_error

CONFIG = SampleConfig(steps=5, batch_size=3, cfg_scale=3.8)
LABELS = [3, 1, 3, 5]
SWITCHES = [field.name for field in fields(SampleSwitches)]


def draw(model: nn.Module, config: SampleConfig, switches: SampleSwitches, **how: Any) -> Tensor:
    diffusion = sampling_diffusion(model.config, how.pop("trained", DiffusionConfig()), config)
    return sample(model, diffusion, LABELS, config, switches=switches, **how)


def published(model: nn.Module, config: SampleConfig, diffusion: GaussianDiffusion) -> Tensor:
    """The same noise through ``forward_with_cfg`` and the sampling loop, image by image."""
    from mdt_fast.sampling.generate import PerImageNoise

    images = []
    for i, label in enumerate(LABELS):
        one = PerImageNoise(config.seed, i, 1)
        both = lambda like, one=one: torch.cat([one(like[:1])] * 2)  # noqa: E731
        loop = diffusion.p_sample_loop if config.sampler == "ddpm" else diffusion.ddim_sample_loop
        y = torch.tensor([label, 10])
        kwargs = {"y": y, "cfg_scale": config.cfg_scale}
        kwargs |= {} if config.scale_pow == "auto" else {"scale_pow": config.scale_pow}
        z = both(torch.empty(2, 4, 8, 8, dtype=torch.float64))
        with torch.no_grad():
            images.append(
                loop(model.forward_with_cfg, z.shape, z, False, model_kwargs=kwargs, generator=both)[:1]
            )
    return torch.cat(images)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++"])
@pytest.mark.parametrize("family", ["mdtv2", "mdt", "dit"])
def test_every_switch_gives_the_same_pictures(family: Family, sampler: Any) -> None:
    """Alone and together, in float64; with all off, they are the published loop's."""
    model = made(family).eval()
    config = replace(CONFIG, sampler=sampler)
    plain = draw(model, config, SampleSwitches.none())
    # diffusers' schedulers work in float32 whatever they get.
    tolerance = FLOAT32 if sampler == "dpm++" else FLOAT64
    for name in SWITCHES:
        got = draw(model, config, replace(SampleSwitches.none(), **{name: True}))
        assert relative_error(got, plain) <= tolerance, name
    assert relative_error(draw(model, config, SampleSwitches()), plain) <= tolerance
    if sampler != "dpm++":
        diffusion = sampling_diffusion(model.config, DiffusionConfig(), config)
        assert relative_error(plain, published(model, config, diffusion)) <= FLOAT64


@pytest.mark.parametrize("learn_sigma", [True, False])
@pytest.mark.parametrize("predict_xstart", [True, False])
@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
def test_the_fused_step_follows_the_diffusion(schedule: Any, predict_xstart: bool, learn_sigma: bool) -> None:
    model = made("mdtv2", torch.float32, learn_sigma=learn_sigma)
    trained = DiffusionConfig(noise_schedule=schedule, predict_xstart=predict_xstart)
    for config in (replace(CONFIG, sampler="ddim", eta=0.6), replace(CONFIG, sampler="ddpm")):
        for clip in (True, False):
            how: dict[str, Any] = {"trained": trained, "clip_denoised": clip}
            got = draw(model, config, SampleSwitches(), **how)
            plain = draw(model, config, SampleSwitches.none(), **how)
            assert relative_error(got, plain) <= FLOAT32


@pytest.mark.parametrize("chunk", [1, 2, 5, 100])
def test_modulations_of_a_chunk_are_those_of_the_steps(chunk: int) -> None:
    """However much memory there is; repeated labels are computed once."""
    model = made("mdtv2").eval()
    times, labels = [3, 90, 400, 777, 999], torch.tensor([2, 7, 10])
    size = 3 * 8 * sum(p.shape[0] for n, p in model.named_parameters() if "adaLN_modulation.1.bias" in n)
    modulations = StepModulations(model, times, labels, chunk_bytes=chunk * size)
    rows = torch.tensor([0, 1, 0, 2])
    with torch.no_grad():
        for index in range(4, -1, -1):
            c = modulations.conditioning(modulations(index, rows))
            t = torch.full((4,), times[index])
            x = torch.randn(4, 4, 8, 8, dtype=torch.float64)
            tokens, skip = model.embed(x, None)
            got = model.from_tokens(tokens, skip, c, None)
            assert relative_error(got, model(x, t, labels[rows])) <= FLOAT64
            assert len(modulations.values) <= max(1, min(chunk, 5))


def test_a_model_with_hooks_is_called_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """FSDP gathers weights in a hook, and users' hooks must run: the model is then not run in parts."""
    model, calls = made("mdtv2", torch.float32), []
    expected = draw(model, CONFIG, SampleSwitches())
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    assert not is_open(model)
    monkeypatch.setattr(sampling, "guided_pass", None)
    got = draw(model, CONFIG, SampleSwitches())
    assert len(calls) == 2 * CONFIG.steps  # two batches
    assert relative_error(got, expected) <= FLOAT32


class Counting(nn.Module):
    """A model that records how many rows it gets at which time."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.seen = model, {}

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name) if name == "model" else getattr(self.model, name)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        self.seen[int(t[0])] = len(x)
        return self.model(x, t, y)


@pytest.mark.parametrize(
    ("changes", "guided"),
    [
        ({"cfg_interval": (250.0, 750.0)}, {250, 500, 749}),
        ({"cfg_interval": (0.25, 0.75)}, {250, 500, 749}),
        ({"cfg_interval": (0.0, 1.0), "scale_pow": None}, {0, 250, 500, 749, 999}),
        ({"cfg_interval": (0.0, 0.0)}, {0}),
        ({"scale_pow": None}, {0, 250, 500, 749, 999}),
        ({}, {0, 250, 500, 749}),  # at 999 the power-cosine weight is 1 in float32
        ({"skip_below": 0.01}, {0, 250, 500}),
        ({"cfg_scale": 1.0, "scale_pow": None}, set()),
    ],
)
def test_half_of_the_rows_where_there_is_no_guidance(changes: dict[str, Any], guided: set[int]) -> None:
    model = Counting(made("mdtv2", torch.float32))
    config = replace(CONFIG, sampler="ddim", batch_size=4, **changes)
    diffusion = sampling_diffusion(model.config, DiffusionConfig(), config)
    sample(model, diffusion, LABELS, config)
    assert sorted(model.seen) == [0, 250, 500, 749, 999]
    assert {t for t, rows in model.seen.items() if rows == 8} == guided
    by_step = guidance_weights(diffusion, as_published(config, model.config))
    weights = dict(zip(diffusion.timestep_map, by_step.tolist()))
    assert {t for t, weight in weights.items() if weight != 1} == guided


@pytest.mark.parametrize(("family", "power"), [("mdtv2", 4.0), ("mdt", 4.0), ("dit", None)])
def test_guidance_is_by_default_as_published(family: Family, power: float | None) -> None:
    model = made(family, torch.float32).eval()
    by_default, chosen = (
        draw(model, config, SampleSwitches()) for config in (CONFIG, replace(CONFIG, scale_pow=power))
    )
    assert torch.equal(by_default, chosen)
    other = replace(CONFIG, scale_pow=4.0 if power is None else None)
    assert not torch.equal(by_default, draw(model, other, SampleSwitches()))


def test_the_widest_interval_is_guidance_and_an_empty_one_is_none() -> None:
    model = made("mdtv2")
    whole = replace(CONFIG, scale_pow=None)
    assert torch.equal(
        draw(model, replace(whole, cfg_interval=(0.0, 1.0)), SampleSwitches()),
        draw(model, whole, SampleSwitches()),
    )
    nowhere = draw(model, replace(whole, cfg_interval=(1.0, 2.0)), SampleSwitches())
    assert relative_error(nowhere, draw(model, replace(whole, cfg_scale=1.0), SampleSwitches())) <= FLOAT64


def test_leaving_guidance_out_near_1_is_off_and_small() -> None:
    model = made("mdtv2")
    config = replace(CONFIG, steps=20)
    exact = draw(model, config, SampleSwitches())
    errors = [
        relative_error(draw(model, replace(config, skip_below=bound), SampleSwitches()), exact)
        for bound in (1e-3, 1e-2, 1e-1)
    ]
    assert 0 < errors[0] < errors[1] < errors[2] < 0.05


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_types_are_near(dtype: Any) -> None:
    model = made("mdtv2", torch.float32)
    exact = draw(model, CONFIG, SampleSwitches())
    for switches in (SampleSwitches(), SampleSwitches.none()):
        got = draw(model, replace(CONFIG, dtype=dtype), switches)
        assert got.dtype == torch.float32
        assert 0 < relative_error(got, exact) < 0.03


@pytest.mark.parametrize("family", ["mdtv2", "mdt", "dit"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_cast_once_give_the_same_bits(family: Family, dtype: Any) -> None:
    """With fewer operations, and the model keeps its own weights."""
    model = made(family, torch.float32).eval()
    config, before = replace(CONFIG, dtype=dtype), [p.clone() for p in model.parameters()]
    pictures, counts = [], []
    for once in (True, False):
        with _Casts() as casts:
            pictures.append(draw(model, config, SampleSwitches(cast_once=once)))
        counts.append(casts.number)
    assert torch.equal(*pictures)
    blocks = model.depth
    assert counts[1] - counts[0] > 5 * 3 * blocks
    for parameter, was in zip(model.parameters(), before, strict=True):
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, was)


def test_a_batch_has_the_weights_as_they_are_when_it_begins() -> None:
    model = made("mdtv2", torch.float32).eval()
    config = replace(CONFIG, dtype="bfloat16")
    diffusion = sampling_diffusion(model.config, DiffusionConfig(), config)
    sampler = Sampler(model, diffusion, config)
    first = sampler(LABELS)
    with torch.no_grad():
        model.en_inblocks[0].mlp.fc1.weight.mul_(2)
    assert not torch.equal(sampler(LABELS), first)
    assert torch.equal(sampler(LABELS), Sampler(model, diffusion, config)(LABELS))


def test_whose_weights_are_not_cast() -> None:
    """Those that a hook, a compiled block or another module may read."""
    config = replace(CONFIG, dtype="bfloat16")

    def cast(model: nn.Module) -> int:
        diffusion = sampling_diffusion(model.config, DiffusionConfig(), config)
        sampler = Sampler(model, diffusion, config)
        assert sampler(LABELS).isfinite().all()
        return len(sampler.model.casts.cast)

    model = made("dit", torch.float32).eval()
    assert cast(model) == 4 * 4
    handle = model.blocks[0].register_forward_hook(lambda *_: None)
    assert cast(model) == 3 * 4
    handle.remove()
    model.blocks[1].compile(backend="eager")
    model.blocks[2].mlp.fc1 = nn.Sequential(model.blocks[2].mlp.fc1)
    assert cast(model) == 2 * 4 + 3
    assert cast(made("mdtv2", torch.float32).eval()) == 4 * 4 + 3  # long skips; no side block
    assert cast(made("mdtv2", torch.bfloat16).eval()) == 0
    in_float8 = made("dit", torch.float32).eval()
    use_float8(in_float8, emulate=True)
    assert cast(in_float8) == 4 * 4  # rounded anew in every step, from half the bytes
    pytest.importorskip("torchao", reason="torchao is not installed")
    use_float8(by_torchao := made("dit", torch.float32).eval(), "torchao", emulate=True)
    assert cast(by_torchao) == 0


def test_float64_is_not_cast() -> None:
    model, config = made("dit").eval(), replace(CONFIG, dtype="bfloat16")
    pictures = [draw(model, config, SampleSwitches(cast_once=once)) for once in (True, False)]
    assert torch.equal(*pictures)


@pytest.mark.parametrize("change", ["assign", "parameter", "layer", "hook", "switches"])
def test_whatever_is_changed_between_batches_counts(change: str) -> None:
    model, other = made("dit", torch.float32).eval(), made("dit", torch.float32).eval()
    config = replace(CONFIG, dtype="bfloat16")
    diffusion = sampling_diffusion(model.config, DiffusionConfig(), config)
    sampler = Sampler(model, diffusion, config)
    first = sampler(LABELS)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    block, theirs = model.blocks[0], other.blocks[0]
    if change == "assign":
        model.load_state_dict(other.state_dict(), assign=True)
    elif change == "parameter":
        block.attn.proj.weight = theirs.attn.proj.weight
    elif change == "layer":
        block.attn.proj = theirs.attn.proj
    elif change == "hook":
        block.register_forward_hook(lambda module, args, output: output * 1.5)
    else:
        model.set_switches(Switches.none())
    assert not torch.equal(sampler(LABELS), first)
    assert torch.equal(sampler(LABELS), Sampler(model, diffusion, config)(LABELS))


def test_samplers_are_copied_and_made_where_nothing_is_recorded() -> None:
    model, config = made("mdtv2", torch.float32).eval(), replace(CONFIG, dtype="bfloat16")
    diffusion = sampling_diffusion(model.config, DiffusionConfig(), config)
    with torch.inference_mode():
        sampler = Sampler(model, diffusion, config)
        inside = sampler(LABELS)
    assert torch.equal(sampler(LABELS), inside)
    with torch.no_grad():
        copied = copy.deepcopy(sampler)
        copied.model.model.en_inblocks[0].mlp.fc1.weight.mul_(2)
    assert not torch.equal(copied(LABELS), inside)
    assert torch.equal(sampler(LABELS), inside)


def test_a_pass_that_fails_leaves_the_weights_whole() -> None:
    model, config = made("dit", torch.float32).eval(), replace(CONFIG, dtype="bfloat16")
    sampler = Sampler(model, sampling_diffusion(model.config, DiffusionConfig(), config), config)
    sampler(LABELS)
    before = list(model.parameters())
    handle = model.final_layer.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sampler(LABELS)
    handle.remove()
    assert all(a is b for a, b in zip(model.parameters(), before, strict=True))


class _Casts(TorchDispatchMode):
    """``number``: how many weights are cast, one at a time."""

    number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += func is torch.ops.aten._to_copy.default and isinstance(args[0], nn.Parameter)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_a_diffusion_of_one_s_own_steps_by_itself(sampler: Any) -> None:
    class Own(GaussianDiffusion):
        calls = 0

        def p_from_output(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
            self.calls += 1
            found = super().p_from_output(*args, **kwargs)
            return {**found, "pred_xstart": found["pred_xstart"].clamp(-0.5, 0.5)}

    model, config = made("dit"), replace(CONFIG, sampler=sampler)
    plain = sampling_diffusion(model.config, DiffusionConfig(), config)
    kinds = {"mean_type": plain.mean_type, "var_type": plain.var_type, "loss_type": plain.loss_type}
    own = Own(make_betas("linear", 1000), steps_of(config, 1000), **kinds)
    fast, slow = (
        sample(model, own, LABELS, config, switches=switches)
        for switches in (SampleSwitches(), SampleSwitches.none())
    )
    assert own.calls == 2 * 2 * config.steps  # two batches
    assert relative_error(fast, slow) <= 10 * FLOAT32
