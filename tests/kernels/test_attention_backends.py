"""Each attention backend against the reference where it can run; what each refuses; how one is chosen."""

import sys
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mdt_fast import DiT_S_8, MDTv2_S_2
from mdt_fast.errors import UserError
from mdt_fast.kernels import attention_backends, rel_attention, rel_attention_qkvpacked
from mdt_fast.kernels.rel_attention import reference, with_flash_attn, with_flex, with_xformers
from mdt_fast.kernels.rel_attention.call import Call, Side
from mdt_fast.models.attention import Attention
from parity import compare
from tolerances import FLOAT32, relative_error

CUDA = torch.cuda.is_available()
HOPPER_OR_BLACKWELL = CUDA and torch.cuda.get_device_capability()[0] in (9, 10)
plain = partial(rel_attention, attention_backend="sdpa")


def heads(B: int, H: int, L: int, d: int, G: int | None, device: str = "cpu") -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(B, H, L, d)] * 3 + ([] if G is None else [((2 * G - 1) ** 2 + 3, H)])
    return [torch.randn(s, device=device) for s in shapes]


def kept(B: int, G: int, length: int, device: str = "cpu") -> Tensor:
    return torch.rand(B, G * G, device=device).argsort(1)[:, :length]


@pytest.mark.parametrize("length", [None, 7])
def test_flex_forward_on_the_cpu(length: int | None) -> None:
    G = 4
    pos = None if length is None else kept(2, G, length)
    args = heads(2, 3, length or G * G, 24, G)
    places = {"grid_size": G, "q_pos": pos, "k_pos": pos}
    ours = rel_attention(*args, **places, attention_backend="flex")
    assert relative_error(ours, plain(*args, **places)) <= FLOAT32
    assert relative_error(rel_attention(*args[:3], attention_backend="flex"), plain(*args[:3])) <= FLOAT32


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["sdpa", "flex", "xformers"])
@pytest.mark.parametrize("d", [64, 72])
@pytest.mark.parametrize("length", [None, 153])
def test_on_a_gpu(length: int | None, d: int, name: str) -> None:
    """Against float64, by the rule for half types; bits may differ, as atomics sum the table's gradient."""
    if name == "xformers" and (with_xformers.installed() is None or not with_xformers.built()):
        pytest.skip("xformers is not installed, or without CUDA kernels for this torch")
    pos = None if length is None else kept(2, 16, length, "cuda")
    args = [x.bfloat16() for x in heads(2, 4, length or 256, d, 16, "cuda")]
    places = {"grid_size": 16, "q_pos": pos, "k_pos": pos}
    op = partial(rel_attention, **places, attention_backend=name)
    if name == "flex":
        exact = plain(*(x.double() for x in args), **places)
        assert relative_error(op(*args), exact) <= 2 * relative_error(plain(*args, **places), exact)
    else:
        compare(op, partial(plain, **places), args, torch.bfloat16, twice=False)


@pytest.mark.gpu
@pytest.mark.skipif(not (with_flash_attn.VERSION_2 or with_flash_attn.VERSION_3), reason="needs flash-attn")
@pytest.mark.parametrize("d", [64, 72])
def test_flash_attn_without_a_table(d: int) -> None:
    args = heads(2, 4, 256, d, None, "cuda")
    compare(partial(rel_attention, attention_backend="flash_attn"), plain, args, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.skipif(with_flash_attn.VERSION_4 is None, reason="needs flash-attn 4")
@pytest.mark.skipif(not HOPPER_OR_BLACKWELL, reason="needs compute capability 9 or 10")
@pytest.mark.parametrize("d", [64, 72])
@pytest.mark.parametrize("length", [None, 153, 192])
def test_flash_attn_4_forward_with_a_table(length: int | None, d: int) -> None:
    pos = None if length is None else kept(2, 16, length, "cuda")
    args = [x.bfloat16() for x in heads(2, 4, length or 256, d, 16, "cuda")]
    places = {"grid_size": 16, "q_pos": pos, "k_pos": pos}
    exact = plain(*(x.double() for x in args), **places)
    ours = rel_attention(*args, **places, attention_backend="flash_attn")
    assert relative_error(ours, exact) <= 2 * relative_error(plain(*args, **places), exact)


@pytest.mark.gpu
@pytest.mark.skipif(with_flash_attn.VERSION_4 is None, reason="needs flash-attn 4")
@pytest.mark.skipif(not HOPPER_OR_BLACKWELL, reason="needs compute capability 9 or 10")
def test_flash_attn_4_forward_of_different_lengths() -> None:
    offsets = torch.tensor([0, 130, 130, 283], dtype=torch.int32, device="cuda")
    pos = torch.cat([torch.randperm(256, device="cuda")[:n] for n in (130, 153)])
    qkv = torch.randn(283, 3, 4, 72, device="cuda").bfloat16()
    table = torch.randn(31 * 31 + 3, 4, device="cuda").bfloat16()
    op = partial(rel_attention_qkvpacked, grid_size=16, pos=pos, offsets=offsets)
    exact = op(qkv.double(), table.double(), attention_backend="sdpa")
    plain_error = relative_error(op(qkv, table, attention_backend="sdpa"), exact)
    assert relative_error(op(qkv, table, attention_backend="flash_attn"), exact) <= 2 * plain_error


@pytest.mark.parametrize("loaded", [False, True])
def test_xformers_without_its_extension_is_not_there(loaded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it xformers calls PyTorch's own kernel available, but then refuses the call."""
    cutlass = SimpleNamespace(FwOp=SimpleNamespace(is_available=lambda: True))
    stand = {
        "xformers": SimpleNamespace(_cpp_lib=SimpleNamespace(_built_with_cuda=loaded)),
        "xformers.ops": SimpleNamespace(), "xformers.ops.fmha": SimpleNamespace(cutlass=cutlass),
    }  # fmt: skip
    for name, module in stand.items():
        monkeypatch.setitem(sys.modules, name, module)
    assert with_xformers.built.__wrapped__() == loaded


def refused(message: str, **change: Any) -> None:
    q, k, v, table = heads(1, 2, 16, 8, 4)
    args: dict[str, Any] = {"q_BHMd": q, "k_BHNd": k, "v_BHNd": v, "table_RH": table, "grid_size": 4}
    with pytest.raises(ValueError, match=message):
        rel_attention(**(args | change))


def test_refusals() -> None:
    refused(
        "attention_backend: got 'cudnn', expected auto, triton, samples, sdpa, flex",
        attention_backend="cudnn",
    )
    cannot = "attention_backend: {!r} cannot serve this call: "
    q = torch.randn(1, 2, 16, 8, requires_grad=True)
    refused(
        cannot.format("flex") + "FlexAttention has no gradients on cpu", q_BHMd=q, attention_backend="flex"
    )
    refused(
        cannot.format("flash_attn")
        + "training with a bias table: flash-attn 2 and 3 take no bias; 4 gives a table no gradient",
        q_BHMd=q,
        attention_backend="flash_attn",
    )
    if with_flash_attn.VERSION_4 is None:
        refused(
            cannot.format("flash_attn") + "with a bias table it needs flash-attn 4, which is not installed",
            attention_backend="flash_attn",
        )
    if not (with_flash_attn.VERSION_2 or with_flash_attn.VERSION_3):
        refused(
            cannot.format("flash_attn") + "flash-attn 2 or 3 is not installed",
            table_RH=None,
            attention_backend="flash_attn",
        )
    if with_xformers.installed() is None:
        refused(cannot.format("xformers") + "xformers is not installed", attention_backend="xformers")


def call_with(**change: Any) -> Call:
    side = Side(pos=None, offsets=None, length=256, batch=2)
    return Call(**({"queries": side, "keys": side, "grid_size": 16, "scale": 0.1} | change))


@pytest.mark.parametrize(
    ("d", "table", "capability", "reason"),
    [
        (72, True, (9, 0), None),
        (72, True, (10, 0), None),
        (72, True, (8, 0), "a bias table on compute capability 8.0, it needs 9"),
        (36, True, (9, 0), "head size 36, with a bias table it takes multiples of 8 up to 128"),
        (136, True, (10, 0), "head size 136, with a bias table it takes multiples of 8 up to 128"),
        (72, False, (8, 0), None),
        (36, False, (8, 0), None),
        (264, False, (9, 0), "head size 264, it takes at most 256"),
        (64, False, (7, 5), "flash-attn 2 needs compute capability 8.0 or more, this GPU has 7.5"),
    ],
)
def test_what_flash_attn_takes_on_each_gpu(
    d: int, table: bool, capability: tuple[int, int], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(with_flash_attn, "VERSION_2", "2.8.3")
    monkeypatch.setattr(with_flash_attn, "VERSION_3", None)
    q = torch.empty(2, 4, 256, d)
    found = with_flash_attn.limits(q, torch.empty(964, 4) if table else None, capability)
    assert (found or "").startswith(reason or "")
    assert (found is None) == (reason is None)


def test_flash_attn_3_is_for_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(with_flash_attn, "VERSION_2", None)
    monkeypatch.setattr(with_flash_attn, "VERSION_3", "3")
    q = torch.empty(2, 4, 256, 64)
    assert with_flash_attn.limits(q, None, (9, 0)) is None
    assert "flash-attn 3 is for compute capability 9.0" in (with_flash_attn.limits(q, None, (8, 0)) or "")
    assert "head size 36" in (with_flash_attn.limits(q[..., :36], None, (9, 0)) or "")


def test_what_xformers_takes_on_each_gpu() -> None:
    q, table = torch.empty(2, 4, 256, 72), torch.empty(964, 4, requires_grad=True)
    limits = with_xformers.limits
    assert limits(q, table.detach(), call_with(), True, (9, 0)) is None
    assert limits(q, None, call_with(), True, (10, 0)) is None
    assert "up to compute capability 9.0" in (limits(q, table, call_with(), True, (10, 0)) or "")
    assert "it takes multiples of 4 in torch.float32" in (
        limits(q[..., :70], None, call_with(), False, (9, 0)) or ""
    )
    assert "multiples of 8 in torch.float16" in (
        limits(q[..., :36].half(), None, call_with(), False, (9, 0)) or ""
    )
    assert "xformers would give none" in (limits(q, table, call_with(), True, (9, 0)) or "")
    apart = Side(pos=None, offsets=torch.zeros(3, dtype=torch.int32), length=256, batch=2)
    assert "different lengths" in (limits(q, None, call_with(queries=apart), True, (9, 0)) or "")


def test_what_flex_takes() -> None:
    q = torch.empty(2, 4, 256, 72)
    assert with_flex.limits(q, True, "cuda") is None
    assert "no gradients on cpu" in (with_flex.limits(q, True, "cpu") or "")
    assert "on CUDA it takes 16 or more" in (with_flex.limits(q[..., :8], False, "cuda") or "")
    assert "got torch.float64" in (with_flex.limits(q.double(), False, "cuda") or "")


def test_flex_without_gradients_of_a_leaf_that_has_them() -> None:
    args = [x.requires_grad_() for x in heads(1, 2, 16, 8, 4)]
    with torch.no_grad():
        ours = rel_attention(*args, grid_size=4, attention_backend="flex")
        assert relative_error(ours, plain(*args, grid_size=4)) <= FLOAT32


@pytest.mark.parametrize("multiple", [1, 8])
@pytest.mark.parametrize("pos", [None, kept(2, 4, 7)])
def test_the_mask_and_its_rows(pos: Tensor | None, multiple: int) -> None:
    q, _, _, table = heads(2, 3, 16 if pos is None else 7, 8, 4)
    mask = reference.bias_mask(q, table, call_with(grid_size=4), pos, pos, multiple)
    every = torch.arange(16) if pos is None else pos
    assert torch.equal(mask, reference.relative_bias(table, 4, every, every).expand(2, -1, -1, -1))
    assert mask.stride(-2) % multiple == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_masks_gradient_is_rounded_once(dtype: torch.dtype) -> None:
    """A row of a half table is read hundreds of times; its gradient is summed in float32."""
    q, _, _, table = heads(4, 3, 60, 8, 8)
    pos = kept(4, 8, 60)
    table, weights = table.to(dtype), torch.randn(4, 3, 60, 60).to(dtype)
    found = []
    for t in (table, table.double()):
        mask = reference.bias_mask(q.to(t.dtype), t.requires_grad_(), call_with(grid_size=8), pos, pos)
        found.append(torch.autograd.grad(mask, t, weights.to(t.dtype))[0])
    assert (found[0] == found[1].to(dtype)).float().mean() > 0.99  # float32 may round a tie the other way


@pytest.mark.skipif(CUDA, reason="is about machines without CUDA")
def test_triton_is_refused_without_cuda() -> None:
    from mdt_fast.kernels.backends import INTERPRETING

    if not INTERPRETING:
        refused("'triton' cannot serve this call: it needs a CUDA device", attention_backend="triton")


def test_ragged_is_refused_where_it_is_not_served() -> None:
    offsets = torch.tensor([0, 5, 16], dtype=torch.int32)
    with pytest.raises(ValueError, match="'flex' cannot serve this call: samples of different lengths"):
        rel_attention_qkvpacked(torch.randn(16, 3, 2, 8), offsets=offsets, attention_backend="flex")


def test_rows_for_the_doctor() -> None:
    rows = attention_backends()
    assert [row.op for row in rows] == ["triton", "samples", "sdpa", "flex", "xformers", "flash_attn"]
    assert all(row.backend and row.reason for row in rows)


def test_a_model_takes_a_backend() -> None:
    model = DiT_S_8(input_size=16, attention_backend="flex").eval()
    layers = [module for module in model.modules() if isinstance(module, Attention)]
    assert layers
    assert {layer.attention_backend for layer in layers} == {"flex"}
    inputs = torch.randn(2, 4, 16, 16), torch.tensor([1, 2]), torch.tensor([3, 4])
    with torch.no_grad():
        ours = model(*inputs)
        model.set_attention_backend("auto")
        assert relative_error(ours, model(*inputs)) <= FLOAT32
    keys = DiT_S_8(input_size=16).state_dict().keys()
    assert model.state_dict().keys() == keys
    with pytest.raises(
        UserError, match="attention_backend: got 'fast', expected auto, triton, samples, sdpa, flex"
    ):
        model.set_attention_backend("fast")
    with pytest.raises(UserError, match="attention_backend: got 'fast'"):
        MDTv2_S_2(attention_backend="fast")


@pytest.mark.parametrize(
    ("dtype", "head_dim", "allowed", "capability", "kind"),
    [
        (torch.float32, 72, "tf32", (9, 0), "tf32"),
        (torch.float32, 32, "tf32", (9, 0), "tf32"),
        (torch.float32, 40, "tf32", (9, 0), "float32"),
        (torch.float32, 72, "ieee", (9, 0), "float32"),
        (torch.float32, 72, "none", (9, 0), "float32"),
        (torch.float32, 72, "tf32", (7, 5), "float32"),
        (torch.bfloat16, 40, "tf32", (9, 0), "half"),
    ],
)
def test_tf32_where_torch_may_take_it_and_the_gpu_has_it(
    dtype: torch.dtype,
    head_dim: int,
    allowed: str,
    capability: tuple[int, int],
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("triton")
    from mdt_fast.kernels.rel_attention import launch

    monkeypatch.setattr(launch, "capability", lambda device: capability)
    before = torch.backends.cuda.matmul.fp32_precision
    cuda = torch.device("cuda:0")
    x = SimpleNamespace(
        is_cuda=True, device=cuda, element_size=lambda: dtype.itemsize, shape=(2, 4, 9, head_dim)
    )  # fmt: skip
    try:
        torch.backends.cuda.matmul.fp32_precision = allowed
        assert launch._kind(x) == kind
        assert launch._kind(torch.ones(1)) == "float32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
