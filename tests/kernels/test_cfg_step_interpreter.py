"""``cfg_step``'s kernel in Triton's interpreter (``TRITON_INTERPRET=1``): random shapes, poisoned memory."""

from typing import Any, get_args

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mdt_fast.kernels import cfg_step, ddim_coefficients, ddpm_coefficients
from mdt_fast.kernels.backends import INTERPRETING
from mdt_fast.kernels.cfg_step import reference
from mdt_fast.kernels.cfg_step.op import Kind, Predicts
from parity import poisoned
from tolerances import FLOAT32, relative_error

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(not INTERPRETING, reason="needs TRITON_INTERPRET=1 in the environment"),
]


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> Any:
    with poisoned(monkeypatch):
        yield


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_random_calls(data: st.DataObject) -> None:
    """All arguments vary at once, against ``reference.py`` in float64; two runs give the same bits."""

    def one_of(*values: Any) -> Any:
        return data.draw(st.sampled_from(values))

    pairs, C = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 5))
    rest = one_of((), (7,), (5, 3), (8, 8), (33, 32), (2, 3, 4))
    guided, half, learned, noisy, per_sample, clip = (data.draw(st.booleans()) for _ in range(6))
    kind, predicts = one_of(*get_args(Kind)), one_of(*get_args(Predicts))
    guided_channels, scale = data.draw(st.integers(0, C)), one_of(-1.0, 0.0, 1.0, 3.8)
    as_tensor, transposed = data.draw(st.booleans()), data.draw(st.booleans())

    B = 2 * pairs
    x, noise = torch.randn(2, B, C, *rest)
    output = torch.randn(B, (1 + learned) * C, *rest).to(one_of(torch.float32, torch.float16))
    if transposed:  # other strides, the same numbers
        x, output = (a.transpose(0, 1).contiguous().transpose(0, 1) for a in (x, output))
    a = torch.linspace(0.999, 0.01, 20, dtype=torch.float64)
    table = ddpm_coefficients(a) if kind == "ddpm" else ddim_coefficients(a, one_of(0.0, 0.6))
    coefficients = table[torch.arange(B) * 3] if per_sample else table[one_of(0, 8, 19)]
    scale_n = torch.full((pairs,), scale) + 0.1 * torch.arange(pairs) * as_tensor
    weight = (scale_n if as_tensor else scale) if guided else None
    stepped = slice(0, pairs if guided and half else B)

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        return cfg_step(
            output, x[stepped], noise[stepped] if noisy else None,
            coefficients[stepped] if per_sample else coefficients, scale=weight,
            guided_channels=guided_channels, kind=kind, predicts=predicts, clip_denoised=clip,
        )  # fmt: skip

    exact = reference.cfg_step(
        output.double(), x.double(), noise.double() if noisy else None, coefficients.expand(B, -1).double(),
        scale_n if guided else None, guided_channels, kind, predicts, clip,
    )  # fmt: skip
    for got, again, expected in zip(run(), run(), exact, strict=True):
        assert got.dtype == torch.float32
        assert torch.equal(got, again)
        assert relative_error(got, expected[stepped]) <= FLOAT32
