"""Replace the official classes by the fast ones, for scripts that import ``masked_diffusion.models``."""

import importlib
import importlib.machinery
import importlib.util
import re
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor

from ..diffusion.sampler import in_a_loop
from ..errors import UserError
from .dit import DiT
from .mdt import MDT, MDTv2
from .zoo import FACTORIES

MODULE = "masked_diffusion.models"
LOOPS = "p_sample_loop_progressive", "ddim_sample_loop_progressive"

IN_PLACE = {
    "MDTBlock": "models.blocks.Block",
    "FinalLayer": "models.blocks.FinalLayer",
    "Attention": "models.attention.Attention",
    "RelativePositionBias": "models.attention.RelativePositionBias",
    "TimestepEmbedder": "models.embed.TimestepEmbedder",
    "LabelEmbedder": "models.embed.LabelEmbedder",
    "get_2d_sincos_pos_embed": "reference.embed.sincos_position_table",
}
"""What this package has in place of the official module's other names."""

_replaced: dict[str, Any] = {}
_loops: dict[str, tuple[type, Callable[..., Any]]] = {}
"""The official process's class and its original method, by the name of the loop."""


def install() -> None:
    """Make ``masked_diffusion.models`` provide the fast classes and factories to unchanged official scripts.

    Call it before the script's own imports (``python -c "import mdt_fast; mdt_fast.install(); ..."``) or
    after them: factories looked up in the module from then on are the fast ones. The official ``models.py``
    itself is imported only for another of its names (``get_2d_sincos_pos_embed``, say), so neither it nor
    timm needs to work otherwise. The official sampling loops run these models
    as this package's loops do: on a GPU, a step's pass is one launch. Raises ``UserError`` if no package
    ``masked_diffusion`` can be imported. :func:`uninstall` undoes it.
    """
    try:
        package = importlib.import_module("masked_diffusion")
    except ImportError as error:
        raise UserError(
            f"masked_diffusion cannot be imported ({error}): run from the official MDT checkout, or put it "
            "on PYTHONPATH; in DiT's code, replace `from models import DiT_models` by `from mdt_fast import "
            "DiT_models`"
        ) from error
    if not _replaced:
        _replaced.update(module=sys.modules.get(MODULE), attribute=getattr(package, "models", None))
    official = _replaced["module"]
    module = ModuleType(MODULE, "The models of mdt_fast under the official module's name.")
    if official is not None:
        # Helpers that a script may have imported from the official module stay available.
        module.__dict__.update({key: v for key, v in vars(official).items() if not key.startswith("__")})
    module.__dict__["__getattr__"] = _official_names(package, official)
    module.__dict__.update({"MDT": MDT, "MDTv2": MDTv2, "DiT": DiT, **FACTORIES})
    sys.modules[MODULE] = module
    vars(package)["models"] = module
    process = _process()
    for name in LOOPS:
        if hasattr(process, name) and _loops.get(name, (None,))[0] is not process:
            _loops[name] = process, getattr(process, name)
            setattr(process, name, _quicker(getattr(process, name)))


def _official_names(package: ModuleType, official: ModuleType | None) -> Callable[[str], Any]:
    """A module's ``__getattr__``, which reads the official file when a name of it is first asked for."""
    loaded = official

    def get(name: str) -> Any:
        nonlocal loaded
        if name.startswith("__"):
            raise AttributeError(f"module {MODULE!r} has no attribute {name!r}")
        if loaded is None:
            loaded = _load_official(package, name)
        return getattr(loaded, name)

    return get


def _load_official(package: ModuleType, name: str) -> ModuleType:
    """The official module, without a place in ``sys.modules``. ``ImportError`` says what there is instead;
    ``AttributeError`` for a name that is none of the official module's, which is not run for it."""
    spec = importlib.machinery.PathFinder.find_spec(MODULE, list(package.__path__))
    source = Path(spec.origin).read_text() if spec is not None and spec.origin is not None else ""
    if name not in IN_PLACE and not re.search(rf"\b{re.escape(name)}\b", source):
        raise AttributeError(f"module {MODULE!r} has no attribute {name!r}")
    reason = "there is no models.py"
    if spec is not None and spec.loader is not None:
        module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
            return module
        except ImportError as error:
            reason = str(error)
    known = f"mdt_fast.{IN_PLACE[name]}" if name in IN_PLACE else "MDT, MDTv2, DiT and their constructors"
    raise ImportError(
        f"{name}: the official {MODULE} cannot be imported ({reason}); mdt_fast provides {known} in its place"
    )


def _process() -> Any:
    """The class with the official sampling loops, or None."""
    try:
        module = importlib.import_module("masked_diffusion.gaussian_diffusion")
    except ImportError:
        return None
    return getattr(module, "GaussianDiffusion", None)


def _quicker(loop: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(loop)
    def called(diffusion: Any, model: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Any:
        return loop(diffusion, in_a_loop(model, diffusion.num_timesteps), *args, **kwargs)

    return called


def uninstall() -> None:
    """Undo :func:`install`."""
    if not _replaced:
        return
    package = sys.modules.get("masked_diffusion", ModuleType("masked_diffusion"))
    for name, (process, loop) in _loops.items():
        setattr(process, name, loop)
    _loops.clear()
    module, attribute = _replaced.pop("module"), _replaced.pop("attribute")
    if module is None:
        sys.modules.pop(MODULE, None)
    else:
        sys.modules[MODULE] = module
    if attribute is None:
        vars(package).pop("models", None)
    else:
        vars(package)["models"] = attribute
