"""A compiled training step: how often it compiles, and what it computes."""

import copy
import io
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from mdt_fast import MaskPlan, MDTv2, UserError, compile_for_training
from mdt_fast.masking import draw_len_keep
from tolerances import FLOAT32, relative_error

KINDS = 4
"""Kinds of blocks: into the U, out of it, decoder, side block."""
DEPTHS = {"model": 3, "block": 4}
"""A block of each kind, as compiling a model takes longer with each block; and for blocks, two of one kind,
which must share a compilation."""


def model(depth: int = 4, **kwargs: Any) -> MDTv2:
    torch.manual_seed(0)
    made = MDTv2(
        hidden_size=16,
        depth=depth,
        num_heads=2,
        num_classes=10,
        mask_ratio=0.3,
        decode_layer=depth - 2,
        **kwargs,
    )
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return made.train()


def inputs(side: int, batch: int = 2) -> tuple[torch.Tensor, ...]:
    x = torch.randn(2, batch, 4, side, side)
    return x[0], x[1], torch.arange(batch) * 100, torch.arange(batch), torch.arange(batch)


@pytest.mark.slow
@pytest.mark.parametrize(("scope", "most"), [("model", 2), ("block", 2 * KINDS)])
def test_all_lengths_of_training(scope: str, most: int) -> None:
    """256 tokens keep 128 to 179 of them."""
    torch._dynamo.reset()
    compiled, counter = model(DEPTHS[scope]), CompileCounterWithBackend("aot_eager")
    compile_for_training(compiled, scope, backend=counter)
    lengths = sorted({draw_len_keep(256, 0.3) for _ in range(5000)})
    assert lengths == list(range(128, 180))
    for len_keep in lengths[::-1]:
        plan = MaskPlan.from_noise(torch.rand(2, 256), len_keep, ascending=True)
        full, masked = compiled.training_step_outputs(*inputs(32), plan)
        if len_keep % 10 == 0:
            (full.square().sum() + masked.square().sum()).backward()
    assert 0 < counter.frame_count <= most


@pytest.mark.slow
@pytest.mark.parametrize(("scope", "most"), [("model", 3), ("block", 6)])
def test_all_lengths_of_passes_in_turn(scope: str, most: int) -> None:
    """Passes over whole grids need one more compilation of the model; blocks need at most six in all."""
    torch._dynamo.reset()
    compiled, counter = model(DEPTHS[scope]), CompileCounterWithBackend("aot_eager")
    compile_for_training(compiled, scope, backend=counter)
    x, x_masked, t, y, _ = inputs(32)
    for len_keep in range(179, 127, -3):
        compiled(x, t, y, drop_labels=False)
        plan = MaskPlan.from_noise(torch.rand(2, 256), len_keep, ascending=True)
        compiled(x_masked, t, y, enable_mask=True, mask_plan=plan, drop_labels=False)
    assert 0 < counter.frame_count <= most


TRACED = "aot_eager_decomp_partition"
"""Inductor's tracing and recomputation, without its code: what checkpointing changes."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scope", "checkpointing", "backend"),
    [
        ("model", "none", "inductor"),
        ("block", "none", "inductor"),
        ("block", "selective", TRACED),
        ("block", "full", TRACED),
    ],
)
def test_it_gives_what_the_eager_model_gives(scope: str, checkpointing: str, backend: str) -> None:
    torch._dynamo.reset()
    eager, compiled = model(3, input_size=8), model(3, input_size=8)  # a block of each kind
    compiled.set_checkpointing(checkpointing)
    compile_for_training(compiled, scope, backend=backend)
    for len_keep in (11, 8):
        plan, arguments = MaskPlan.from_noise(torch.rand(2, 16), len_keep), inputs(8)
        results = []
        for m in (eager, compiled):
            m.zero_grad()
            outputs = m.training_step_outputs(*arguments, plan)
            sum(o.square().sum() for o in outputs).backward()
            results.append([*outputs, *(p.grad for p in m.parameters() if p.grad is not None)])
        assert len(results[0]) == len(results[1])
        for e, a in zip(*results, strict=True):
            assert relative_error(a, e) < 10 * FLOAT32  # key biases included, whose gradient is zero


def test_a_copy_runs_its_own_weights() -> None:
    torch._dynamo.reset()
    compiled = model(2, input_size=8)
    compile_for_training(compiled, "model", backend="aot_eager")
    plan, arguments = MaskPlan.from_noise(torch.rand(2, 16), 8, ascending=True), inputs(8)
    before = compiled.training_step_outputs(*arguments, plan)
    copied = copy.deepcopy(compiled)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(2)
    assert torch.equal(compiled.training_step_outputs(*arguments, plan)[0], before[0])
    changed = copied.training_step_outputs(*arguments, plan)
    plain = model(2, input_size=8)
    plain.load_state_dict(copied.state_dict())
    for a, e in zip(changed, plain.training_step_outputs(*arguments, plan), strict=True):
        assert relative_error(a, e) < FLOAT32
    assert not torch.equal(changed[0], before[0])


def test_refusal() -> None:
    with pytest.raises(UserError, match="scope: got 'layer', expected model, block"):
        compile_for_training(model(), "layer")
    with pytest.raises(UserError, match=r"model: got a DataParallel, expected .*; compile before wrapping"):
        compile_for_training(torch.nn.DataParallel(model()))


@pytest.mark.parametrize("scope", ["model", "block"])
def test_a_compiled_model_can_be_saved_whole(scope: str) -> None:
    """It comes back uncompiled, as PyTorch's own compiled modules do."""
    saved, counter, file = model(), CompileCounterWithBackend("eager"), io.BytesIO()
    plan, given = MaskPlan.from_noise(torch.rand(2, 256), 128, ascending=True), inputs(32)
    with torch.no_grad():
        expected = saved.training_step_outputs(*given, plan)
        compile_for_training(saved, scope, backend=counter)
        torch.save(saved, file)
        saved.x_embedder.proj.weight.zero_()
        loaded = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
        torch.testing.assert_close(loaded.training_step_outputs(*given, plan), expected)
    assert counter.frame_count == 0
