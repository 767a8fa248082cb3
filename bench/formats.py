"""Format numbers, the same way in tables, reports and pictures, and errors."""

from collections.abc import Mapping

from mdt_fast.errors import UserError

Quantiles = tuple[float | None, float, float | None]
"""The 20th, 50th and 80th percentile; the outer ones may be unknown."""

BUSY = 1.3
"""p80/p20 of a step's time above which the machine must have been busy with other work."""


def number(value: float) -> str:
    """Three significant digits, with trailing zeros; integers from 100 on."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:#.3g}".rstrip(".")


def interval(low: float, high: float) -> str:
    return f"{number(low)}-{number(high)}"


def memory(size: float) -> str:
    """``size`` bytes in GiB or MiB."""
    unit, scale = memory_unit(size)
    return f"{number(size / scale)} {unit}"


def memory_unit(size: float) -> tuple[str, int]:
    """The unit for ``size`` bytes, and the number of bytes in it."""
    return ("GiB", 2**30) if size >= 2**30 else ("MiB", 2**20)


def sizes(shape: Mapping[str, int]) -> str:
    """A shape as text, such as ``B 2, L 256``."""
    return ", ".join(f"{name} {size}" for name, size in shape.items())


def ratio(quantiles: Quantiles) -> str:
    """The median and, if there is any spread, p20-p80."""
    p20, p50, p80 = quantiles
    if p20 is None or p20 == p80:
        return f"{p50:.2f}x"
    return f"{p50:.2f}x ({p20:.2f}-{p80:.2f})"


def one_line(error: BaseException | None) -> str:
    """The error's type and the first line of its message; a ``UserError``'s whole message."""
    if isinstance(error, UserError):
        return str(error)
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first}"[:300]
