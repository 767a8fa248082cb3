"""What others do to a model: offloading, pruning, other label tables, FSDP1, two passes in one autocast."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import prune

from mdt_fast import (
    DiffusionConfig,
    SampleConfig,
    SampleSwitches,
    Switches,
    create_diffusion,
    reference,
    sample,
)
from mdt_fast.errors import UserError
from mdt_fast.models import MDT, DiT, MDTv2, Transformer
from mdt_fast.reference.embed import LabelEmbedder
from mdt_fast.training.step import TrainingStep
from tolerances import FLOAT32, relative_error

SIZES: dict[str, Any] = {
    "input_size": 8, "patch_size": 2, "hidden_size": 32, "depth": 4, "num_heads": 2, "num_classes": 10
}  # fmt: skip
MASKED: dict[str, Any] = {**SIZES, "mask_ratio": 0.3, "decode_layer": 2}


def made(family: type[Any] = MDTv2, **other: Any) -> Any:
    torch.manual_seed(0)
    model = family(**(SIZES if family in (DiT, reference.DiT) else MASKED) | other)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.15)
    return model


def inputs(batch: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(batch, 4, 8, 8), torch.randint(1000, (batch,)), torch.randint(10, (batch,))


class Brought(nn.Module):
    """As offloading does it: weights are elsewhere, and brought for a module's forward pass only."""

    @staticmethod
    def everywhere(model: nn.Module) -> None:
        for module in model.modules():
            own = dict(module.named_parameters(recurse=False))
            if own:
                module.register_forward_pre_hook(lambda m, _, own=own: m._parameters.update(own))
                module.register_forward_hook(lambda m, *_, own=own: Brought.away(m, own))
                Brought.away(module, own)

    @staticmethod
    def away(module: nn.Module, own: dict[str, nn.Parameter]) -> None:
        module._parameters.update({name: nn.Parameter(p.to("meta")) for name, p in own.items()})


@pytest.mark.parametrize("family", [MDTv2, MDT, DiT])
def test_weights_that_are_brought_for_each_layer(family: type[Any]) -> None:
    """As accelerate's cpu_offload. A model's own positions and mask token stay."""
    model = made(family).eval()
    expected = model(*inputs())
    for child in model.children():
        Brought.everywhere(child)
    assert all(p.is_meta for child in model.children() for p in child.parameters())
    with torch.no_grad():
        assert relative_error(model(*inputs()), expected) < FLOAT32


def test_a_pruned_bias_table_trains_as_the_references_does() -> None:
    found = []
    for family in (MDTv2, reference.MDTv2):
        model = made(family).eval()
        for module in model.modules():
            if hasattr(module, "relative_position_bias_table"):
                prune.l1_unstructured(module, "relative_position_bias_table", 0.3)
        for _ in range(2):
            model.zero_grad()
            loss = model(*inputs()).square().mean()
            loss.backward()
        found.append((loss.detach(), {name: p.grad for name, p in model.named_parameters()}))
    (ours, gradients), (theirs, expected) = found
    assert relative_error(ours, theirs) < FLOAT32
    for name, gradient in expected.items():
        if gradient is not None and not name.endswith("qkv.bias"):
            assert relative_error(gradients[name], gradient) < 10 * FLOAT32, name


@pytest.mark.parametrize("classes", [20, 5])
def test_another_label_table_has_its_own_null_class(classes: int) -> None:
    """In every way that drops labels or guides: the model's, the training step's and the sampler's."""
    model = made(MDTv2)
    model.y_embedder = LabelEmbedder(classes, 32, 1.0)
    assert model.num_classes == classes
    with pytest.raises(UserError, match=r"num_classes: got 7, expected .*; replace y_embedder instead"):
        model.num_classes = 7
    seen: list[Tensor] = []
    model.y_embedder.embedding_table.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    x, _, y = inputs()
    TrainingStep(model, create_diffusion(""))(x, y % classes)
    assert set(torch.cat(seen).tolist()) == {classes}
    seen.clear()
    config = SampleConfig(steps=2, cfg_scale=2.0, sampler="ddpm", scale_pow=None)
    for switches in (SampleSwitches.none(), SampleSwitches()):
        sample(model, DiffusionConfig(), [classes - 1], config, clip_denoised=False, switches=switches)
        assert set(torch.cat(seen).tolist()) == {classes - 1, classes}


@pytest.mark.parametrize("family", [MDTv2, MDT, DiT])
def test_selective_checkpointing_of_two_passes_in_one_autocast(family: type[Any]) -> None:
    """Autocast's cache has the casts of the first pass in the second, and nothing while recomputing."""
    gradients = []
    for mode in ("none", "selective"):
        model = made(family).train()
        model.set_checkpointing(mode)
        model.set_switches(Switches(packed=False))
        x, t, y = inputs()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(x, t, y, drop_labels=False).float().square().mean()
            loss = loss + model(x + 1, t, y, drop_labels=False).float().square().mean()
        loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    # With the cache, the passes' gradients of a cast weight are added in bfloat16.
    assert max(relative_error(ours, plain) for ours, plain in zip(*gradients, strict=True)) < 1e-2


def test_times_have_the_dtype_of_flattened_weights(tmp_path: Path) -> None:
    """FSDP1 leaves a layer no parameters: its tensors are views of one that is flat."""
    from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision

    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = made(MDTv2)
        wrapped = FullyShardedDataParallel(
            model, mixed_precision=MixedPrecision(param_dtype=torch.bfloat16), device_id=torch.device("cpu")
        )
        x, t, y = inputs()
        terms = create_diffusion("").two_pass_losses(wrapped, x, t, y)
        (terms["loss"].mean() + terms["m_loss"].mean()).backward()
        gradients = [p.grad for p in wrapped.parameters() if p.grad is not None]
        assert gradients
        assert all(gradient.isfinite().all() for gradient in gradients)
    finally:
        dist.destroy_process_group()


def test_a_model_within_a_model_keeps_its_own_index() -> None:
    model = made(MDT)
    model.teacher = made(MDT, input_size=16)
    both: Transformer = model.float()
    state = both.state_dict()
    name = next(key for key in state if key.endswith("relative_position_index"))
    assert state[name].shape == (16, 16)
    assert state[f"teacher.{name}"].shape == (64, 64)
    assert copy.deepcopy(both).state_dict()[f"teacher.{name}"].shape == (64, 64)
