"""Whole training steps against the official implementation's numbers: losses, gradients, updates, EMA."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from golden_files import load, meta
from mdt_fast import reference
from mdt_fast.config import TrainConfig
from mdt_fast.diffusion import create_diffusion
from mdt_fast.models import MDT, MDTv2
from mdt_fast.training.objective import total_loss
from mdt_fast.training.optim import Ema, build_optimizer, learning_rate, set_learning_rate
from objective import two_pass_losses
from tolerances import FLOAT32, PARAMETERS_AFTER_OPTIMISER, relative_error

NAMES = ["train_v2_adamw", "train_v2_adan", "train_v2_adamw_anneal", "train_v1_adamw"]
CLASSES = {
    "fast": {"v2": MDTv2, "v1": MDT},
    "reference": {"v2": reference.MDTv2, "v1": reference.MDT},
}


@pytest.fixture
def replay(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Queues that ``torch.rand`` and ``torch.randn_like`` draw from; both must be empty at the end."""
    uniforms: list[Tensor] = []
    normals: list[Tensor] = []

    def rand(*size, **_) -> Tensor:
        drawn = uniforms.pop(0)
        assert drawn.shape == torch.Size(size[0] if len(size) == 1 and not isinstance(size[0], int) else size)
        return drawn

    def randn_like(like: Tensor, **_) -> Tensor:
        drawn = normals.pop(0)
        assert drawn.shape == like.shape
        return drawn

    monkeypatch.setattr(torch, "rand", rand)
    monkeypatch.setattr(torch, "randn_like", randn_like)
    yield uniforms, normals
    assert not uniforms
    assert not normals


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("implementation", ["reference", "fast"])
def test_golden_trajectory(name: str, implementation: str, replay: tuple[list[Tensor], list[Tensor]]) -> None:
    saved, info = load(name), meta(name)
    version = info["version"]
    model = CLASSES[implementation][version](**info["config"])
    initial = load(f"{info['init_state']}.state")
    model.load_state_dict(initial)
    model.train()
    config = TrainConfig(
        optimizer=info["optimizer"],
        lr=info["lr"],
        weight_decay=info["weight_decay"],
        max_grad_norm=1.0 if info["optimizer"] == "adan" else 0.0,
        lr_anneal_steps=info["lr_anneal_steps"],
    )
    optimizer = build_optimizer(model.parameters(), config)
    averages = {rate: Ema(model, rate) for rate in info["ema_rates"]}
    for average in averages.values():
        average.attach(optimizer)
    diffusion = create_diffusion(info["respacing"], min_snr_gamma=5.0 if version == "v2" else None)
    uniforms, normals = replay

    for step in range(len(saved["t"])):
        normals += [saved["noise_1"][step], saved["noise_2"][step]]
        ratio = [saved["ratio_u"][step]] if version == "v2" else []
        uniforms += [saved["label_u_1"][step], saved["label_u_2"][step], *ratio, saved["mask_noise"][step]]
        x, t, y = (saved[key][step] for key in ("x_start", "t", "y"))
        param_norm = torch.stack([p.detach().norm() for p in model.parameters()]).norm()

        terms = two_pass_losses(model, diffusion, x, t, y)
        optimizer.zero_grad()
        total_loss(terms).backward()
        lr = learning_rate(config, step)
        set_learning_rate(optimizer, lr)
        optimizer.step()

        assert lr == pytest.approx(saved["lr"][step].item(), rel=1e-12)
        for term, values in terms.items():
            assert relative_error(values.detach(), saved[term][step]) < FLOAT32, (step, term)
        assert total_loss(terms).item() == pytest.approx(saved["total"][step].item(), rel=FLOAT32)
        assert optimizer.grad_norm.item() == pytest.approx(saved["grad_norm"][step].item(), rel=FLOAT32)
        assert param_norm.item() == pytest.approx(saved["param_norm"][step].item(), rel=FLOAT32)

    trained = {f"ema_{rate}": average.tensors for rate, average in averages.items()}
    for prefix, parameters in {"final": dict(model.named_parameters()), **trained}.items():
        assert list(parameters) == info["param_names"]
        sums = saved[f"{prefix}.checksum"][:, 0]
        for (key, parameter), expected_sum in zip(parameters.items(), sums):
            actual = without_key_bias(key, parameter.detach())
            expected = saved.get(f"{prefix}/{key}")
            if expected is not None:
                error = (actual - without_key_bias(key, expected)).abs().max().item()
                assert error < PARAMETERS_AFTER_OPTIMISER, f"{prefix}/{key}"
            if not key.endswith("attn.qkv.bias"):
                error = abs(actual.double().sum().item() - expected_sum.item())
                assert error < PARAMETERS_AFTER_OPTIMISER * actual.numel() ** 0.5, f"{prefix}/{key} (sum)"


def without_key_bias(key: str, value: Tensor) -> Tensor:
    """Drops the middle third of a qkv bias: its true gradient is zero, Adam moves it by rounding noise."""
    if not key.endswith("attn.qkv.bias"):
        return value
    third = value.numel() // 3
    return torch.cat([value[:third], value[2 * third :]])


def test_ema_of_golden_samplers() -> None:
    saved = load("samplers")
    source = torch.nn.Linear(5, 1, bias=False)
    source.weight.data = saved["ema/source"]
    average = Ema(source, 0.9999)
    average.tensors["weight"].copy_(saved["ema/target"])
    optimizer = build_optimizer(source.parameters(), TrainConfig(lr=0.0))
    average.attach(optimizer)
    source.weight.grad = torch.zeros_like(source.weight)
    optimizer.step()
    assert relative_error(average.tensors["weight"], saved["ema/after_0.9999"]) < FLOAT32
