"""The training step's other forms, with a stand-in for CUDA graphs, give the plain form's numbers."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

import providers
import steps
from inputs import load
from mdt_fast.models import graphed
from mdt_fast.models.float8 import use_float8
from mdt_fast.presets import PRESETS
from mdt_fast.training import passes
from measure import peak_bytes
from replayed import Captured, Replayed
from rows import RowFile
from session import Result, Session
from tiny import needs_csrc


@pytest.mark.parametrize("family", ["mdtv2", "dit"])
def test_every_form_of_a_step_is_the_plain_one(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "Graphed", Replayed)
    small = {"hidden_size": 32, "depth": 2, "num_heads": 2, "decode_layer": 0, "family": family}
    if family == "dit":
        small["mask_ratio"] = None
    config = replace(PRESETS["digits"].model, **small)
    device = torch.device("cpu")
    case = steps.Case("small", config, "train", 4, torch.float32, device)
    inputs = load("digits", config, 4)
    lengths = (11, 8, 11) if family != "dit" else (None,)
    found = []
    for name in ("fast", "fast-graphs", "fast-in-turn", "fast-in-turn-graphs"):
        modules = providers.Modules(config, device, None)
        module = modules.get("fast")
        provider = replace(providers.make(name.removesuffix("-graphs"), modules), name=name)
        assert (provider.both is None) == (provider.in_turn or family == "dit")
        kind = steps.GraphedTrainStep if provider.graphed else steps.TrainStep
        step = kind(case, provider, inputs, lengths, None)
        outcome = step.outcome()
        for index in range(4):
            step(index)
        found.append([*outcome, *(p.detach().clone() for p in module.parameters())])
    for other in found[1:]:
        for ours, plain in zip(other, found[0], strict=True):
            torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)


def test_a_sampling_step_as_a_graph_is_the_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphed, "Graphed", Captured)
    monkeypatch.setattr(graphed, "on_a_gpu", lambda tensor: True)
    monkeypatch.setattr(Captured, "captures", [])
    monkeypatch.setattr(providers, "make", partial(_on_a_cpu, providers.make))
    config = replace(PRESETS["digits"].model, hidden_size=32, depth=2, num_heads=2, decode_layer=0)
    case = steps.Case("small", config, "sample", 2, torch.float32, torch.device("cpu"))
    modules, inputs = providers.Modules(config, case.device, None), load("digits", config, 2)
    plain, one = (
        steps.step_of(case, providers.make(name, modules), inputs, [None]) for name in ("fast", "fast-graphs")
    )
    assert isinstance(one, steps.GraphedSampleStep)
    for index in range(3):
        assert torch.equal(one(index), plain(index))
    assert steps.disagreement(one, plain.outcome()) == (0.0, None)
    assert len(Captured.captures) == 1


def _on_a_cpu(make: Any, name: str, modules: providers.Modules) -> providers.Provider:
    return replace(make(name.removesuffix("-graphs"), modules), name=name)


@pytest.mark.parametrize("form", [
    *(pytest.param(form, marks=needs_csrc) for form in ("lean", "lean-graphs", "lean-in-turn")),
    pytest.param("lean-float8-graphs", marks=needs_csrc),
    "float8", "float8-graphs", "float8-torchao", "float8-torchao-graphs",
])  # fmt: skip
def test_other_precisions_agree_and_keep_what_they_should(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Near the reference, within the bench's bounds; weights, moments and memory are those of the form."""
    if "torchao" in form:
        pytest.importorskip("torchao", reason="torchao is not installed")
    monkeypatch.setattr(providers, "use_float8", partial(use_float8, emulate=True))
    monkeypatch.setattr(passes, "Graphed", Replayed)
    small = {"hidden_size": 32, "depth": 2, "num_heads": 2, "decode_layer": 0}
    config, device = replace(PRESETS["digits"].model, **small), torch.device("cpu")
    case = steps.Case("small", config, "train", 4, torch.bfloat16, device)
    modules, inputs = providers.Modules(config, device, None), load("digits", config, 4)
    expected = steps.TrainStep(case, providers.make("reference", modules), inputs, (11, 8), None).outcome()
    name = f"fast-{form}"
    provider = replace(providers.make(name.removesuffix("-graphs"), modules), name=name)
    assert provider.implementation == "fast"
    assert provider.in_turn == ("in-turn" in form)
    assert provider.module is not providers.make("fast", modules).module
    kind = steps.GraphedTrainStep if provider.graphed else steps.TrainStep
    step = kind(case, provider, inputs, (11, 8), None)
    difference, problem = steps.disagreement(step, expected)
    assert problem is None
    assert difference > 0
    for index in range(3):
        step(index)
    again = kind(case, provider, inputs, (11, 8), step)
    assert (again.optimizer, again.ema) == (step.optimizer, step.ema)
    weights = [p for p in step.module.parameters() if p.requires_grad]
    assert {p.dtype for p in weights} == {torch.bfloat16 if "lean" in form else torch.float32}
    states = [step.optimizer.state[p] for p in weights]
    if "lean" in form:
        assert {state["exp_avg"].dtype for state in states} == {torch.bfloat16}
        for p, state in zip(weights, states, strict=True):
            assert torch.equal(p, state["master"].bfloat16())
    kept = 2 + 4 + 4 + 4 * 2 if "lean" in form else 4 + 4 + 4 * 4
    numbers = sum(p.numel() for p in weights)
    frozen = sum(p.numel() for p in step.module.parameters()) - numbers
    more = steps.TrainStep.own_bytes(step) - numbers * kept  # the frozen weights and their average; an index
    assert 6 * frozen <= more <= 8 * frozen + 20_000


def test_a_sampling_step_of_a_bfloat16_model_agrees() -> None:
    config, device = PRESETS["digits"].model, torch.device("cpu")
    case = steps.Case("digits", config, "sample", 2, torch.bfloat16, device)
    modules, inputs = providers.Modules(config, device, None), load("digits", config, 2)
    names = "reference", "fast", "fast-lean"
    reference, fast, lean = (
        steps.step_of(case, providers.make(name, modules), inputs, [None]) for name in names
    )
    assert {p.dtype for p in lean.provider.module.parameters()} == {torch.bfloat16}
    assert steps.disagreement(lean, reference.outcome())[1] is None
    assert lean.own_bytes() < 0.6 * fast.own_bytes()


def test_where_other_precisions_are_left_out() -> None:
    config, device = PRESETS["digits"].model, torch.device("cpu")
    inputs = load("digits", config, 2)
    for mode, name, dtype, why in (
        ("train", "fast-lean", torch.float32, "only for bfloat16: use --dtype bfloat16"),
        ("sample", "fast-lean", torch.float32, "only for bfloat16: use --dtype bfloat16"),
        ("sample", "fast-in-turn", torch.bfloat16, "only for training: use --mode train"),
    ):
        case = steps.Case("digits", config, mode, 2, dtype, device)
        provider = providers.make(name, providers.Modules(config, device, None))
        with pytest.raises(providers.Skip, match=why):
            steps.step_of(case, provider, inputs, (11,), None)
    case, modules = steps.Case("digits", config, "sample", 2, torch.bfloat16, device), providers.Modules
    float8 = replace(providers.make("fast", modules(config, device, None)), name="fast-float8-torchao")
    with pytest.raises(providers.Skip, match="only for training"):
        steps.step_of(case, float8, inputs, (11,), None)
    with pytest.raises(providers.Skip, match="float8: needs "):
        providers.make("fast-float8", providers.Modules(config, device, None))


def test_memory_is_the_same_whoever_ran_before() -> None:
    """Gradients that another measurement left behind do not count as memory that a step frees."""
    config, device = PRESETS["digits"].model, torch.device("cpu")
    case = steps.Case("digits", config, "train", 2, torch.float32, device)
    provider = providers.make("fast", providers.Modules(config, device, None))
    step = steps.TrainStep(case, provider, load("digits", config, 2), (11,), None)
    step(0)
    session, found = Session(RowFile(None, {}), print), [Result("fast"), Result("fast")]
    for one in found:
        session.memory(case, step, one)
    whole, again = (one.peak_bytes for one in found)
    assert whole is not None
    assert again is not None
    assert abs(whole - again) <= 64  # the optimiser's scalars
    assert peak_bytes(step, device) < whole - step.own_bytes() - 2**20  # what it would be otherwise


def test_without_a_gpu_it_is_left_out() -> None:
    modules = providers.Modules(PRESETS["digits"].model, torch.device("cpu"), None)
    with pytest.raises(providers.Skip, match="CUDA graphs need a GPU"):
        providers.make("fast-graphs", modules)
