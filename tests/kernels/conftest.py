"""Makes Triton's interpreter take two thirds of its time."""

from typing import Any

from mdt_fast.kernels.backends import INTERPRETING


def patch_once_a_launch() -> None:
    """When a kernel calls a function, the interpreter replaces all of ``triton.language``; with this, it does
    so once per module and launch."""
    from triton.runtime import interpreter

    patch, launch, done = interpreter._patch_lang, interpreter.GridExecutor.__call__, set[int]()
    launches: list[Any] = []

    def launch_once(self: Any, *args: Any, **kwargs: Any) -> Any:
        done.clear()
        launches.append(self)
        try:
            return launch(self, *args, **kwargs)
        finally:
            launches.pop()
            done.clear()

    def patch_once(fn: Any) -> Any:
        module = id(fn.__globals__)
        if launches and module in done:
            return None  # for a called function, which ignores it
        done.add(module)
        return patch(fn)

    interpreter._patch_lang = patch_once
    interpreter.GridExecutor.__call__ = launch_once


if INTERPRETING:
    patch_once_a_launch()
