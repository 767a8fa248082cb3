"""Replace the official classes by the fast ones, for scripts that import ``masked_diffusion.models``."""

import importlib
import sys
from collections.abc import Callable
from functools import wraps
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

_replaced: dict[str, Any] = {}
_loops: dict[str, tuple[type, Callable[..., Any]]] = {}
"""The official process's class and its original method, by the name of the loop."""


def install() -> None:
    """Make ``masked_diffusion.models`` provide the fast classes and factories to unchanged official scripts.

    Call it before the script's own imports (``python -c "import mdt_fast; mdt_fast.install(); ..."``) or
    after them: factories looked up in the module from then on are the fast ones. The official ``models.py``
    itself is not imported, so neither it nor timm needs to work. The official sampling loops run these models
    as this package's loops do: on a GPU, a step's pass is one launch. Raises ``UserError`` if no package
    ``masked_diffusion`` can be imported. :func:`uninstall` undoes it.
    """
    try:
        package = importlib.import_module("masked_diffusion")
    except ImportError as error:
        raise UserError(
            f"masked_diffusion cannot be imported ({error}): run from the official checkout, "
            "or put it on PYTHONPATH"
        ) from error
    if not _replaced:
        _replaced.update(module=sys.modules.get(MODULE), attribute=getattr(package, "models", None))
    official = _replaced["module"]
    module = ModuleType(MODULE, "The models of mdt_fast under the official module's name.")
    if official is not None:
        # Helpers that a script may have imported from the official module stay available.
        module.__dict__.update({key: v for key, v in vars(official).items() if not key.startswith("__")})
    module.__dict__.update({"MDT": MDT, "MDTv2": MDTv2, "DiT": DiT, **FACTORIES})
    sys.modules[MODULE] = module
    vars(package)["models"] = module
    process = _process()
    for name in LOOPS:
        if hasattr(process, name) and _loops.get(name, (None,))[0] is not process:
            _loops[name] = process, getattr(process, name)
            setattr(process, name, _quicker(getattr(process, name)))


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
