"""The models against the official implementation's numbers, reference and fast alike."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from golden_files import load, meta
from mdt_fast import models, reference
from mdt_fast.masking import MaskPlan, draw_len_keep
from tolerances import FLOAT32, FLOAT64, relative_error

NAMES = ["v2_main", "v1_main", "v2_alt", "v1_alt", "v2_nomask", "v2_f64"]
IMPLEMENTATIONS = {"reference": reference, "fast": models}


def build(implementation: str, name: str) -> nn.Module:
    """The model of a golden file, with its weights, in eval mode."""
    info = meta(f"{name}.cases")
    cls = (
        IMPLEMENTATIONS[implementation].MDTv2
        if info["version"] == "v2"
        else IMPLEMENTATIONS[implementation].MDT
    )
    model = cls(**info["config"]).to(dtype_of(name))
    state = load(f"{name}.state")
    if dtype_of(name) == torch.float64:
        state = {key: value.double() if value.is_floating_point() else value for key, value in state.items()}
    model.load_state_dict(state, strict=True)
    return model.eval()


def dtype_of(name: str) -> torch.dtype:
    return torch.float64 if name == "v2_f64" else torch.float32


def tolerance(name: str) -> float:
    return FLOAT64 if name == "v2_f64" else FLOAT32


@contextmanager
def injected_rand(monkeypatch: pytest.MonkeyPatch, draws: list[Tensor]) -> Iterator[None]:
    """``torch.rand`` returns the official model's draws, in order and by shape; all must be used."""
    queue = [draw.clone() for draw in draws]

    def rand(*size: int, **_: object) -> Tensor:
        draw = queue.pop(0)
        assert tuple(draw.shape) == tuple(size)
        return draw

    with monkeypatch.context() as patch:
        patch.setattr(torch, "rand", rand)
        yield
    assert not queue


def cases() -> Iterator[tuple[str, str]]:
    for name in NAMES:
        tensors = load(f"{name}.cases")
        for case in ("a", "a_train", "b_eval", "b_train", "b_hi", "b_nomask_ratio"):
            if f"{case}/out" in tensors:
                yield name, case


CASES = list(cases())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("name", "case"), CASES)
def test_golden_forward_and_gradients(
    implementation: str, name: str, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, g, info = build(implementation, name), load(f"{name}.cases"), meta(f"{name}.cases")
    train, masked = case.endswith("_train"), case.startswith("b_")
    model.train(train)
    draws = [g["in/label_u"]] if train and info["config"].get("class_dropout_prob", 0.1) > 0 else []
    if f"{case}/noise" in g:
        draws += [g[f"{case}/ratio_u"]] if f"{case}/ratio_u" in g else []
        draws += [g[f"{case}/noise"]]
    x = g["in/x"].requires_grad_()
    with injected_rand(monkeypatch, draws):
        out = model(x, g["in/t"], g["in/y"], enable_mask=masked)
    assert relative_error(out, g[f"{case}/out"]) < tolerance(name)

    (out * g["in/w"]).sum().backward()
    if f"{case}/grad_x" in g:
        assert relative_error(x.grad, g[f"{case}/grad_x"]) < tolerance(name)
    check_gradients(model, name, case)


def check_gradients(model: nn.Module, name: str, case: str) -> None:
    """Every stored gradient in full, and sum, sum |.| and sum of squares of every parameter's gradient."""
    golden, info = load(f"{name}.grads"), meta(f"{name}.cases")
    if f"{case}.checksum" not in golden:
        return
    grads = {key: p.grad for key, p in model.named_parameters()}
    without = info["params_without_grad"].get(case, [])
    assert list(grads) == info["param_names"]
    assert sorted(key for key, grad in grads.items() if grad is None) == sorted(without)
    rows = dict(zip(info["param_names"], golden[f"{case}.checksum"], strict=True))
    for key, grad in grads.items():
        if grad is None:
            assert rows[key].abs().max() == 0
            continue
        actual, expected = grad.double(), golden.get(f"{case}/{key}")
        if key.endswith("attn.qkv.bias"):
            # The exact gradient of a key bias is zero: both sides hold rounding noise only.
            kept = (
                torch.ones(3, len(grad) // 3, dtype=torch.bool)
                .index_fill(0, torch.tensor(1), False)
                .flatten()
            )
            assert actual[~kept].abs().max() < 1e-4 * max(1.0, actual.abs().max().item())
            if expected is not None:
                assert relative_error(actual[kept], expected[kept]) < tolerance(name), key
            continue
        if expected is not None:
            assert relative_error(actual, expected) < tolerance(name), key
        total, magnitude, squares = rows[key].tolist()
        assert abs(actual.sum().item() - total) <= 10 * tolerance(name) * magnitude + 1e-9, key
        assert math.isclose(
            actual.abs().sum().item(), magnitude, rel_tol=10 * tolerance(name), abs_tol=1e-9
        ), key
        assert math.isclose(
            actual.square().sum().item(), squares, rel_tol=20 * tolerance(name), abs_tol=1e-12
        ), key


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", NAMES)
def test_golden_fractional_timesteps(implementation: str, name: str) -> None:
    model, g = build(implementation, name), load(f"{name}.cases")
    with torch.no_grad():
        out = model(g["in/x"], g["in/t_float"], g["in/y"])
    assert relative_error(out, g["a/out_tfloat"]) < tolerance(name)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", NAMES)
def test_golden_guidance(implementation: str, name: str) -> None:
    model, g = build(implementation, name), load(f"{name}.cases")
    for i, (cfg_scale, scale_pow) in enumerate(meta(f"{name}.cases")["cfg_pairs"]):
        with torch.no_grad():
            out = model.forward_with_cfg(g["d/x"], g["d/t"], g["d/y"], cfg_scale, scale_pow=scale_pow)
        assert relative_error(out, g[f"d/out_{i}"]) < tolerance(name), (cfg_scale, scale_pow)
    if "d/out_none" in g:
        with torch.no_grad():
            out = model.forward_with_cfg(g["d/x"], g["d/t"], g["d/y"])
        assert relative_error(out, g["d/out_none"]) < tolerance(name)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("case", "masked"), [("a", False), ("b_train", True)])
def test_golden_activations(
    implementation: str, case: str, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each coarse module's output in v2_main; the fast model keeps tokens in ascending order."""
    model, g = build(implementation, "v2_main"), load("v2_main.cases")
    model.train(masked)
    seen: dict[str, Tensor] = {}
    for key in [k.removeprefix(f"{case}/act/") for k in g if k.startswith(f"{case}/act/")]:
        if implementation == "fast" and key == "x_embedder":
            continue  # tokens and position embedding are written together
        model.get_submodule(key).register_forward_hook(lambda _m, _i, out, key=key: seen.update({key: out}))
    draws = [g["in/label_u"], g["b_train/ratio_u"], g["b_train/noise"]] if masked else []
    with injected_rand(monkeypatch, draws), torch.no_grad():
        model(g["in/x"], g["in/t"], g["in/y"], enable_mask=masked)
    assert len(seen) >= 8
    for key, out in seen.items():
        expected = g[f"{case}/act/{key}"]
        if masked and implementation == "fast" and key.startswith("en_"):
            order = g["b_train/ids_keep"].argsort(dim=1)
            expected = expected.gather(1, order[:, :, None].expand_as(expected))
        if (
            masked and implementation == "fast" and key == "sideblocks.0"
        ):  # it computes only the masked tokens
            dropped = g["b_train/mask"] > 0
            out, expected = out[dropped], expected[dropped]
        assert relative_error(out, expected) < FLOAT32, key


@pytest.mark.parametrize(("name", "case"), [(n, c) for n, c in CASES if c in ("b_eval", "b_train", "b_hi")])
def test_golden_mask_plan(name: str, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    g, info = load(f"{name}.cases"), meta(f"{name}.cases")
    noise, random_ratio = g[f"{case}/noise"], info["version"] == "v2"
    draws = ([g[f"{case}/ratio_u"]] if random_ratio else []) + [noise]
    with injected_rand(monkeypatch, draws):
        plan = MaskPlan.draw(*noise.shape, info["config"]["mask_ratio"], random_ratio=random_ratio)
    assert plan.len_keep == g[f"{case}/len_keep"].item()
    for field in ("ids_keep", "ids_restore", "mask"):
        assert torch.equal(getattr(plan, field), g[f"{case}/{field}"]), field
    assert torch.equal(plan.sorted().mask, plan.mask)
    assert torch.equal(plan.sorted().ids_keep, plan.ids_keep.sort(dim=1).values)
    again = MaskPlan.from_keep(plan.ids_keep, plan.num_tokens)
    assert torch.equal(again.ids_keep, plan.ids_keep)
    assert torch.equal(again.mask, plan.mask)


@pytest.mark.parametrize("key", sorted(k.removesuffix("/u") for k in load("len_keep") if k.endswith("/u")))
def test_golden_len_keep(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """MDTv2's number of kept tokens just before and just after each of its changes."""
    g = load("len_keep")
    num_tokens, mask_ratio = key.removeprefix("v2/L").split("_r")
    for u, expected in zip(g[f"{key}/u"], g[f"{key}/len_keep"].tolist(), strict=True):
        with injected_rand(monkeypatch, [u[None]]):
            assert draw_len_keep(int(num_tokens), float(mask_ratio)) == expected


def test_golden_len_keep_v1() -> None:
    g = load("len_keep")
    for num_tokens, ratio, expected in zip(g["v1/L"], g["v1/mask_ratio"], g["v1/len_keep"], strict=True):
        plan = MaskPlan.draw(1, int(num_tokens), ratio.item(), random_ratio=False)
        assert plan.len_keep == expected
