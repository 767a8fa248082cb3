"""A step's passes in a user's own loop: the objective's gradients, with graphs (a stand-in) and without."""

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mdt_fast import TrainingStep, create_diffusion
from mdt_fast.errors import UserError
from mdt_fast.models.embed import LabelEmbedder
from mdt_fast.training import passes
from replayed import Replayed
from small_models import made

DIFFUSION = create_diffusion()
CLASSES = 10


@pytest.fixture(params=[False, True], ids=["plain", "graphed"])
def step_of(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    def build(model: nn.Module, **settings: Any) -> TrainingStep:
        step = TrainingStep(model, DIFFUSION, **settings)
        if request.param:
            monkeypatch.setattr(passes, "Graphed", Replayed)
            step.cuda_graphs = True
        return step

    return build


def batch(B: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(B, 4, 8, 8, generator=generator, dtype=torch.float64)
    return x, torch.randint(CLASSES, (B,), generator=generator)


def gradients(model: nn.Module) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]


def same(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, e in zip(found, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("family", ["mdt", "mdtv2", "dit"])
def test_gradients_are_the_objectives(family: Any, step_of: Any) -> None:
    """Each call gives new gradients, whatever was there; timesteps are given or drawn, and everything else is
    drawn in the order of two passes."""
    masked = {} if family == "dit" else {"mask_ratio": 0.3}
    model = made(family, **masked, class_dropout_prob=0.5).train()
    step = step_of(model)
    for seed in range(4):
        x, y = batch(seed=seed)
        given = torch.randint(1000, (4,)) if seed % 2 else None
        torch.manual_seed(seed)
        terms, found = step(x, y, given), gradients(model)
        torch.manual_seed(seed)
        t = torch.randint(1000, (4,))
        t = t if given is None else given
        model.zero_grad()
        noise, full = torch.randn(4, 4, 8, 8), torch.where(torch.rand(4) < 0.5, CLASSES, y)
        if family == "dit":
            expected = DIFFUSION.training_losses(model, x, t, {"y": full, "drop_labels": False}, noise)
        else:
            noises = {"noise": noise, "noise_masked": torch.randn(4, 4, 8, 8)}
            masked_y = torch.where(torch.rand(4) < 0.5, CLASSES, y)
            plan = model.draw_plan(4, x.device)
            expected = DIFFUSION.two_pass_losses(model, x, t, full, masked_y, **noises, mask_plan=plan)
        sum(expected[name].mean() for name in ("loss", "m_loss") if name in expected).backward()
        assert terms.keys() == expected.keys()
        same([*terms.values()], [value.detach() for value in expected.values()])
        same(found, gradients(model))
        assert not any(value.requires_grad for value in terms.values())


def test_parts_of_an_update(step_of: Any) -> None:
    """Parts give the whole batch's gradients, whoever calls ``zero_grad``; the next update begins anew."""
    model = made("mdtv2", mask_ratio=0.3).train()
    whole, parts = TrainingStep(copy.deepcopy(model), DIFFUSION), step_of(model, accumulate=2)
    kept = set()
    for update in range(6):
        x, y = batch(seed=update)
        torch.manual_seed(update)
        terms = whole(x, y)
        torch.manual_seed(update)
        first = parts(x[:2], y[:2])
        kept.add(parts.draws.plan.len_keep)
        halves = [first, parts(x[2:], y[2:])]
        same(gradients(model), gradients(whole.model))
        same([torch.cat([half[name] for half in halves]) for name in terms], [*terms.values()])
        if update % 2:
            model.zero_grad()
    assert len(kept) > 1
    parts(x[:2], y[:2])
    with pytest.raises(UserError, match="x: batch of 1, but the other calls of this update have 2; restart"):
        parts(x[:1], y[:1])
    parts.restart()
    for rows in (slice(1), slice(1, 2)):
        parts(x[rows], y[rows])
    assert parts.draws is None


def test_unequal_parts_and_errors_between(step_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a later part needs another graph, the earlier gradients stay; an error restarts the update."""
    x, y = batch()
    found = []
    for change in ({}, {"y": y[2:].int()}, {"scale": torch.tensor([1.0], dtype=torch.float64)}):
        model = made("mdtv2", mask_ratio=0.3).train()
        step = step_of(model, accumulate=2)
        torch.manual_seed(0)
        step(x[:2], y[:2])
        step(x[2:], **{"y": y[2:], **change})
        found.append(gradients(model))
    same(found[1], found[0])
    same(found[2], found[0])
    torch.manual_seed(0)
    step(x[:2], y[:2])
    with monkeypatch.context() as broken:
        broken.setattr(type(step.made), "__call__", _raises)
        with pytest.raises(RuntimeError, match="no memory"):
            step(x[2:], y[2:])
    torch.manual_seed(0)
    for rows in (slice(2), slice(2, 4)):
        step(x[rows], y[rows])
    same(gradients(model), found[0])


def _raises(*args: Any) -> None:
    raise RuntimeError("no memory")


def test_scaled_gradients(step_of: Any) -> None:
    model = made("dit").train()
    step, (x, y) = step_of(model), batch()
    torch.manual_seed(1)
    terms, plain = step(x, y), gradients(model)
    torch.manual_seed(1)
    again = step(x, y, scale=torch.tensor(64.0, dtype=torch.float64))
    same(gradients(model), [64 * g for g in plain])
    torch.manual_seed(1)
    step(x, y, scale=64.0)
    same(gradients(model), [64 * g for g in plain])
    same([*again.values()], [*terms.values()])


class OfVectors(nn.Module):
    dropout_prob = 0.5

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 32).double()

    def drop(self, y: Tensor) -> Tensor:
        return y * (torch.rand(len(y), 1) >= self.dropout_prob)

    def forward(self, y: Tensor, train: bool) -> Tensor:
        return self.project(y)


@pytest.mark.parametrize("family", ["mdtv2", "dit"])
@pytest.mark.parametrize("passes", ["together", "in_turn"])
def test_conditioned_by_vectors(family: Any, passes: str, step_of: Any) -> None:
    """Its embedder drops some vectors, anew in each pass and call."""
    model = made(family, **({} if family == "dit" else {"mask_ratio": 0.3})).train()
    model.y_embedder = OfVectors()
    step, (x, _) = step_of(model, passes=passes), batch()
    y = torch.randn(4, 8, dtype=torch.float64)
    for seed in range(4):
        torch.manual_seed(seed)
        terms, found = step(x, y), gradients(model)
        torch.manual_seed(seed)
        t, noise = torch.randint(1000, (4,)), torch.randn(4, 4, 8, 8)
        if family == "dit":
            kwargs = {"y": model.drop_labels(y), "drop_labels": False}
            expected = DIFFUSION.training_losses(model, x, t, kwargs, noise)
        else:
            noises = {"noise": noise, "noise_masked": torch.randn(4, 4, 8, 8)}
            plan = model.draw_plan(4, x.device)
            full, masked = model.drop_labels(y), model.drop_labels(y)
            expected = DIFFUSION.two_pass_losses(model, x, t, full, masked, **noises, mask_plan=plan)
        model.zero_grad()
        sum(expected[name].mean() for name in ("loss", "m_loss") if name in expected).backward()
        same([*terms.values()], [value.detach() for value in expected.values()])
        same(found, gradients(model))


class Null(LabelEmbedder):
    """Counts its own drops."""

    drops = 0

    def drop(self, labels: Tensor, force_drop_ids: Tensor | None = None) -> Tensor:
        Null.drops += 1
        return torch.full_like(labels, self.num_classes)


class Learnt(OfVectors):
    """A learnt vector replaces the dropped ones."""

    def __init__(self) -> None:
        super().__init__()
        self.null = nn.Parameter(torch.ones(8, dtype=torch.float64))

    def drop(self, y: Tensor) -> Tensor:
        return torch.where(torch.rand(len(y), 1) < 0.5, self.null, y)


def test_embedders_with_drops_of_their_own(step_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Null, "drops", 0)
    model, (x, y) = made("mdtv2", mask_ratio=0.3).train(), batch()
    model.y_embedder = Null(CLASSES, 32, 0.1).double()
    step_of(model)(x, y)
    table = model.y_embedder.embedding_table.weight.grad
    assert Null.drops == 2  # once for each pass
    assert not table[:CLASSES].any()
    assert table[CLASSES].any()

    step = step_of(model)  # a later embedder is noticed
    model.y_embedder, y = Learnt(), torch.randn(4, 8, dtype=torch.float64)
    if step.cuda_graphs:
        with pytest.raises(UserError, match="requires a gradient, which a CUDA graph does not propagate"):
            step(x, y)
    else:
        step(x, y)
        assert model.y_embedder.null.grad.any()
    with pytest.raises(UserError, match="y: requires a gradient, which in_turn would need twice"):
        step_of(model, passes="in_turn")(x, y.requires_grad_())
    model.y_embedder = nn.Linear(8, 32)
    model.y_embedder.dropout_prob = 0.1
    with pytest.raises(UserError, match="y_embedder: got a Linear, which drops labels in its own forward"):
        step_of(model)


def test_weights_under_an_outer_autocast(step_of: Any) -> None:
    """The outer autocast keeps its casts until its end, beyond a step."""
    x, y = batch()
    found = []
    for outer in (nullcontext(), torch.autocast("cpu", torch.bfloat16)):
        model = made("mdtv2", torch.float32, mask_ratio=0.3).train()
        step = step_of(model, dtype="bfloat16")
        with outer:
            for seed in range(2):
                torch.manual_seed(seed)
                terms = step(x.float(), y)
                with torch.no_grad():
                    torch._foreach_mul_([*model.parameters()], 1.5)
        found.append([*terms.values(), *gradients(model)])
    for a, e in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=0)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64], ids=str)
def test_the_default_dtype_changes_nothing(default: torch.dtype, step_of: Any) -> None:
    """Neither noise nor masks nor labels dropped, whose draws would have ties in half precision."""
    x, y = batch()
    model = made("mdtv2", torch.float32, mask_ratio=0.3).train()
    step, found = step_of(model), []
    before = torch.get_default_dtype()
    for dtype in (torch.float32, default):
        torch.set_default_dtype(dtype)
        try:
            torch.manual_seed(0)
            found.append([*step(x.float(), y).values(), *gradients(model)])
            t = torch.randint(DIFFUSION.num_timesteps, (len(x),))
            found[-1] += DIFFUSION.two_pass_losses(model, x.float(), t, y).values()
        finally:
            torch.set_default_dtype(before)
    for a, e in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=0)


def test_the_dtype_and_the_order_of_passes_are_what_was_asked_for(
    step_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, (x, y), seen = made("mdtv2", torch.float32, mask_ratio=0.3).train(), batch(), []
    for dtype in ("float32", "bfloat16"):
        torch.manual_seed(0)
        step_of(model, dtype=dtype)(x.float(), y)
        seen.append(gradients(model))
    errors = [float((a - e).norm() / e.norm().clamp(1e-9)) for a, e in zip(seen[1], seen[0], strict=True)]
    assert 1e-4 < max(errors) < 0.5
    monkeypatch.setattr(type(model), "training_step_outputs", _raises)
    with pytest.raises(RuntimeError, match="no memory"):
        step_of(model)(x.float(), y)
    step_of(model, passes="in_turn")(x.float(), y)


def test_it_trains(step_of: Any) -> None:
    model = made("mdtv2", torch.float32, mask_ratio=0.3, std=0.02).train()
    step, (x, y) = step_of(model, passes="in_turn"), batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        losses.append(step(x.float(), y)["mse"].mean().item())
        optimizer.step()
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_graphs_are_made_anew_for_weights_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "Graphed", Replayed)
    model = made("dit").train()
    step, (x, y) = TrainingStep(model, DIFFUSION), batch()
    step.cuda_graphs = True
    step(x, y)
    first = step.made
    with torch.no_grad():
        model.x_embedder.proj.weight.mul_(2)
    step(x, y)
    assert step.made is first
    model.x_embedder.proj.weight.data = model.x_embedder.proj.weight.data.clone()
    step(x, y)
    second = step.made
    assert second is not first
    model.load_state_dict(model.state_dict(), assign=True)  # other parameters at the old addresses
    step(x, y)
    second, before = step.made, second
    assert second is not before
    assert all(a is b for a, b in zip(second.parameters, model.parameters(), strict=True))
    model.final_layer.linear.weight.requires_grad_(False)
    step(x, y)
    assert step.made is not second
    assert model.final_layer.linear.weight.grad is None
    assert copy.deepcopy(step).made is None


def test_refusals() -> None:
    model, (x, y) = made("mdtv2", torch.float32, mask_ratio=0.3), batch()
    with pytest.raises(UserError, match="model: got a Linear, expected this package's models"):
        TrainingStep(nn.Linear(2, 2), DIFFUSION)
    with pytest.raises(UserError, match=r"got a DataParallel, .*; two_pass_losses takes wrapped ones"):
        TrainingStep(nn.DataParallel(model), DIFFUSION)
    with pytest.raises(
        UserError, match="cuda_graphs: needs a CUDA device without shards, got a model on 'cpu'"
    ):
        TrainingStep(model, DIFFUSION, cuda_graphs=True)
    with pytest.raises(UserError, match="dtype"):
        TrainingStep(model, DIFFUSION, dtype="half")
    with pytest.raises(UserError, match="accumulate"):
        TrainingStep(model, DIFFUSION, accumulate=0)
    with pytest.raises(UserError, match="diffusion: got a str"):
        TrainingStep(model, "")
    with pytest.raises(UserError, match="cuda_graphs: got 'yes', expected None, True or False"):
        TrainingStep(model, DIFFUSION, cuda_graphs="yes")
    with pytest.raises(UserError, match=r"dtype: 'float32', but the model's weights are torch.bfloat16"):
        TrainingStep(copy.deepcopy(model).bfloat16(), DIFFUSION)
    step, x = TrainingStep(model, DIFFUSION), x.float()
    for match, args in {
        "x: on meta, but the model is on cpu": (x.to("meta"), y),
        "y: on meta, but the model is on cpu": (x, y.to("meta")),
        "x: got a ndarray, expected a torch.Tensor": (x.numpy(), y),
        "y: got a list, expected a torch.Tensor": (x, [1, 2, 3, 4]),
        r"y: shape \[3\], expected \[4\]": (x, y[:3]),
        r"y: shape \[4, 1\], expected \[4\]": (x, y[:, None]),
        r"x: \[4, 4, 8, 8\] torch.uint8, expected floating-point \[B, 4, 8, 8\]": (x.byte(), y),
        r"x: \[0, 4, 8, 8\] torch.float32, expected floating-point": (x[:0], y[:0]),
        r"x: \[4, 3, 8, 8\] torch.float32, expected floating-point \[B, 4, 8, 8\]": (x[:, :3], y),
        "x: dtype torch.float64, the model's weights are torch.float32": (x.double(), y),
        "t: ": (x, y, torch.tensor([0, 1, 2, 1000])),
    }.items():
        with pytest.raises(UserError, match=match):
            step(*args)
    with pytest.raises(UserError, match="scale: got a str, expected"):
        step(x, y, scale="2")
    with torch.no_grad(), pytest.raises(UserError, match="model: gradients are disabled"):
        step(x, y)
    with pytest.raises(UserError, match=r"scale: shape \[4\], expected one number"):
        step(x, y, scale=torch.ones(4))
    model.eval()
    with pytest.raises(UserError, match="model: in eval mode"):
        step(x, y)
