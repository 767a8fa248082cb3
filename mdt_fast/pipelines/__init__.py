"""The models as a diffusers pipeline. Diffusers is imported when ``MDTPipeline`` is first asked for."""

from typing import TYPE_CHECKING, Any

from ..errors import UserError
from .schedulers import published_scheduler

if TYPE_CHECKING:
    from .pipeline import MDTPipeline

__all__ = ["MDTPipeline", "published_scheduler"]


def __getattr__(name: str) -> Any:
    if name != "MDTPipeline":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        import diffusers  # noqa: F401
    except (ImportError, RuntimeError) as error:  # diffusers turns failures inside it to RuntimeError
        reason = " ".join(str(error).split())
        raise UserError(
            f"MDTPipeline: is one of diffusers, which cannot be imported ({reason}); install it with "
            "pip install 'mdt-fast[latents]'"
        ) from None
    from .pipeline import MDTPipeline

    return MDTPipeline
