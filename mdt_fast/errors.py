"""The error for user mistakes, and helpers for messages."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A user mistake, named in one line. The CLI prints it and exits with 2."""


def nearest(name: str, allowed: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` with the closest of ``allowed``, or an empty string."""
    close = difflib.get_close_matches(str(name), list(allowed), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def one_line(error: BaseException, limit: int = 300) -> str:
    """The message of ``error`` on one line, cut off at ``limit`` characters; its type if it has none."""
    return " ".join(str(error).split())[:limit] or type(error).__name__


def not_importable(what: str, error: Exception, extra: str) -> UserError:
    """The error for a package that cannot be imported. ``what``: names the package and what needs it;
    ``extra``: our extra that installs it."""
    advice = f"install it with pip install 'mdt-fast[{extra}]'"
    return UserError(f"{what}, which cannot be imported ({one_line(error)}); {advice}")
