"""Each attention backend against the reference where it can run; what each refuses; how it is chosen."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from mdt_fast import DiT_S_8, MDTv2_S_2
from mdt_fast.errors import UserError
from mdt_fast.kernels import attention_backends, rel_attention, rel_attention_qkvpacked
from mdt_fast.kernels.rel_attention import with_flash_attn, with_xformers
from mdt_fast.models.attention import Attention
from parity import compare
from tolerances import FLOAT32, relative_error

CUDA = torch.cuda.is_available()
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
    """Against Triton's float64-checked result, by the rule for half types. flex sums the table by atomics."""
    if name == "xformers" and with_xformers.installed() is None:
        pytest.skip("xformers is not installed")
    pos = None if length is None else kept(2, 16, length, "cuda")
    args = [x.bfloat16() for x in heads(2, 4, length or 256, d, 16, "cuda")]
    places = {"grid_size": 16, "q_pos": pos, "k_pos": pos}
    op = partial(rel_attention, **places, attention_backend=name)
    if name == "flex":
        exact = plain(*(x.double() for x in args), **places)
        assert relative_error(op(*args), exact) <= 2 * relative_error(plain(*args, **places), exact)
    else:
        compare(op, partial(plain, **places), args, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.skipif(with_flash_attn.installed() is None, reason="flash-attn is not installed")
@pytest.mark.parametrize("d", [64, 72])
def test_flash_attn_without_a_table(d: int) -> None:
    args = heads(2, 4, 256, d, None, "cuda")
    compare(partial(rel_attention, attention_backend="flash_attn"), plain, args, torch.bfloat16)


def refused(message: str, **change: Any) -> None:
    q, k, v, table = heads(1, 2, 16, 8, 4)
    args: dict[str, Any] = {"q_BHMd": q, "k_BHNd": k, "v_BHNd": v, "table_RH": table, "grid_size": 4}
    with pytest.raises(ValueError, match=message):
        rel_attention(**(args | change))


def test_refusals() -> None:
    refused("attention_backend: got 'cudnn', allowed are auto, triton, sdpa, flex", attention_backend="cudnn")
    cannot = "attention_backend: {!r} cannot serve this call: "
    q = torch.randn(1, 2, 16, 8, requires_grad=True)
    refused(
        cannot.format("flex") + "FlexAttention has no gradients on cpu", q_BHMd=q, attention_backend="flex"
    )
    refused(
        cannot.format("flash_attn")
        + "flash-attn 2 and 3 take no bias; flash-attn 4 gives a bias table no gradient",
        attention_backend="flash_attn",
    )
    if with_flash_attn.installed() is None:
        refused(
            cannot.format("flash_attn") + "flash-attn is not installed",
            table_RH=None,
            attention_backend="flash_attn",
        )
    if with_xformers.installed() is None:
        refused(cannot.format("xformers") + "xformers is not installed", attention_backend="xformers")


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
    assert [row.op for row in rows] == ["triton", "sdpa", "flex", "xformers", "flash_attn"]
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
        UserError, match="attention_backend: got 'fast', allowed are auto, triton, sdpa, flex"
    ):
        model.set_attention_backend("fast")
    with pytest.raises(UserError, match="attention_backend: got 'fast'"):
        MDTv2_S_2(attention_backend="fast")
