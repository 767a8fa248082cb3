"""The models as a diffusers pipeline. Diffusers is imported when ``MDTPipeline`` is first accessed."""

from typing import TYPE_CHECKING, Any

from ..errors import not_importable
from .schedulers import published_scheduler

if TYPE_CHECKING:
    from .pipeline import MDTPipeline

__all__ = ["MDTPipeline", "published_scheduler"]


def __getattr__(name: str) -> Any:
    if name != "MDTPipeline":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        import diffusers  # noqa: F401
    except (ImportError, RuntimeError) as error:  # diffusers turns its internal failures into RuntimeError
        raise not_importable("MDTPipeline: needs diffusers", error, "latents") from None
    from .pipeline import MDTPipeline

    return MDTPipeline
