"""Masked Diffusion Transformers (MDT v1, MDTv2, and DiT as their baseline), exact and fast.

Public names are loaded when first used, so that ``import mdt_fast`` is cheap.
"""

from importlib import import_module, util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import DataConfig as DataConfig
    from .config import DiffusionConfig as DiffusionConfig
    from .config import ModelConfig as ModelConfig
    from .config import RunConfig as RunConfig
    from .config import SampleConfig as SampleConfig
    from .config import SampleSwitches as SampleSwitches
    from .config import Switches as Switches
    from .config import TrainConfig as TrainConfig
    from .diffusion import create_diffusion as create_diffusion
    from .errors import UserError as UserError
    from .masking import MaskPlan as MaskPlan
    from .masking import draw_len_keep as draw_len_keep
    from .models import *  # noqa: F403
    from .optim import FusedAdamW as FusedAdamW
    from .optim import FusedAdan as FusedAdan
    from .pipelines import MDTPipeline as MDTPipeline
    from .presets import PRESETS as PRESETS
    from .sampling import inpaint as inpaint
    from .sampling import sample as sample
    from .training import TrainingStep as TrainingStep
    from .training import load_run as load_run
    from .training import train as train

__version__ = "0.1.0"

_HOMES = {
    "create_diffusion": ".diffusion",
    "DataConfig": ".config",
    "draw_len_keep": ".masking",
    "DiffusionConfig": ".config",
    "FusedAdamW": ".optim",
    "FusedAdan": ".optim",
    "MaskPlan": ".masking",
    "MDTPipeline": ".pipelines",
    "ModelConfig": ".config",
    "PRESETS": ".presets",
    "RunConfig": ".config",
    "inpaint": ".sampling",
    "load_run": ".training",
    "sample": ".sampling",
    "SampleConfig": ".config",
    "SampleSwitches": ".config",
    "Switches": ".config",
    "train": ".training",
    "TrainConfig": ".config",
    "TrainingStep": ".training",
    "UserError": ".errors",
}


def __getattr__(name: str) -> Any:
    if name == "__all__":
        return [known for known in __dir__() if known != "__version__"]
    if name in _HOMES:
        return getattr(import_module(_HOMES[name], __name__), name)
    models = import_module(".models", __name__) if not name.startswith("_") else None
    if models is not None and name in models.__all__:
        return getattr(models, name)
    close = "" if models is None else import_module(".errors", __name__).nearest(name, __dir__())
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}{close}")


def __dir__() -> list[str]:
    names = {*_HOMES, *import_module(".models", __name__).__all__, "__version__"}
    return sorted(names if util.find_spec("diffusers") else names - {"MDTPipeline"})
