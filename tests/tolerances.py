"""The tolerances of all tests. Loosening one needs a written reason, here.

``relative_error`` is the largest absolute difference over the largest absolute reference value.
"""

from torch import Tensor

FLOAT64 = 1e-10
FLOAT32 = 1e-5
# The gap between neighbouring float32 numbers: between kinds of CPU, PyTorch's exp, log and erfinv, and so
# its random draws, differ by this much.
ONE_BIT = 2.0**-23
# Half types: at most this times the error of the plain PyTorch op in the same dtype, both against float64.
HALF_FACTOR = 2
# Adam-type optimisers divide by the root of a running mean of squares: rounding noise in a gradient
# near zero moves a parameter by a noticeable part of lr. Five steps of lr 1e-3 move at most 5e-3.
PARAMETERS_AFTER_OPTIMISER = 1e-4


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """max |actual - expected| / max |expected| (absolute where ``expected`` is all zeros), in float64."""
    if actual.shape != expected.shape:
        raise AssertionError(f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}")
    if actual.numel() == 0:
        return 0.0
    difference = (actual.double() - expected.double()).abs().max().item()
    scale = expected.double().abs().max().item()
    return difference / scale if scale > 0 else difference
