"""The official implementation as a provider: ``masked_diffusion/models.py`` of the user's checkout.

Only that file is loaded, under a separate name, and none of its code is kept here. It imports three names
from timm; if timm cannot be imported, the stand-ins below replace them during that import. Its mask drawing
is replaced by the plan that all providers share, so that it does the same work as they do.
"""

import contextlib
import importlib
import importlib.util
import io
import sys
import types
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mdt_fast.config import ModelConfig
from mdt_fast.errors import UserError
from mdt_fast.masking import MaskPlan

FILE = Path("masked_diffusion") / "models.py"
BRANCH = {"mdtv2": "main", "mdt": "mdtv1"}
CLASS = {"mdtv2": "MDTv2", "mdt": "MDT"}


@dataclass(frozen=True)
class Official:
    """The loaded file, the model family it defines, and the origin of its timm names."""

    module: types.ModuleType
    family: str
    timm: str


def load(checkout: Path) -> Official:
    """Load the official models from ``checkout``. Raises a ``UserError`` that says what was looked for."""
    path = checkout / FILE
    if not path.is_file():
        raise UserError(
            f"--official: no file {str(path)!r}; expected the folder of a checkout of sail-sg/MDT"
        )
    spec = importlib.util.spec_from_file_location("official_mdt_models", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with _timm() as timm:
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            raise UserError(f"--official: {str(path)!r} cannot be loaded: {_one_line(error)}") from None
    for family, name in CLASS.items():
        if hasattr(module, name):
            return Official(module, family, timm)
    raise UserError(f"--official: {str(path)!r} defines neither of the classes {', '.join(CLASS.values())}")


def build(official: Official, config: ModelConfig) -> nn.Module:
    """The official model for ``config``, with our call signature. Raises ``UserError`` if there is none."""
    if config.family != official.family:
        wanted = BRANCH.get(config.family)
        where = f"; a {CLASS[config.family]} is on branch {wanted}" if wanted else ""
        held = f"{CLASS[official.family]} (branch {BRANCH[official.family]})"
        raise UserError(f"the checkout holds {held}{where}")
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():  # its constructor prints
        warnings.filterwarnings("ignore", message="torch.meshgrid")
        model = getattr(official.module, CLASS[config.family])(**config.kwargs())
    return OfficialModel(model)


class OfficialModel(nn.Module):
    """The official model with an extra argument ``mask_plan``. It loads the inner model's state dict."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner
        self.plan: MaskPlan | None = None
        inner.random_masking = self._planned_masking

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor, enable_mask: bool = False, mask_plan: MaskPlan | None = None
    ) -> Tensor:
        self.plan = mask_plan
        return self.inner(x, t, y, enable_mask=enable_mask)

    def forward_with_cfg(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.inner.forward_with_cfg(*args, **kwargs)

    def load_state_dict(self, state: Any, *args: Any, **kwargs: Any) -> Any:
        return self.inner.load_state_dict(state, *args, **kwargs)

    def _planned_masking(self, x_BLD: Tensor, mask_ratio: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(kept tokens, mask, ids_restore, ids_keep) from the shared plan."""
        assert self.plan is not None
        ids_keep = self.plan.ids_keep
        kept = x_BLD.gather(1, ids_keep[:, :, None].expand(-1, -1, x_BLD.shape[2]))
        return kept, self.plan.mask, self.plan.ids_restore, ids_keep


class PatchEmbed(nn.Module):
    """Images [B, C, S, S] -> tokens [B, L, D] by a strided convolution, row by row."""

    def __init__(self, img_size: int, patch_size: int, in_chans: int, embed_dim: int, bias: bool = True):
        super().__init__()
        self.patch_size = (patch_size, patch_size)
        self.num_patches = (img_size // patch_size) ** 2
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class Mlp(nn.Module):
    """Linear, activation, linear."""

    def __init__(
        self, in_features: int, hidden_features: int, act_layer: type[nn.Module] = nn.GELU, drop: float = 0.0
    ):
        super().__init__()
        if drop:
            raise ValueError(f"drop: got {drop}, expected 0")
        self.fc1 = nn.Linear(in_features, hidden_features)
        self.act = act_layer()
        self.fc2 = nn.Linear(hidden_features, in_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


@contextlib.contextmanager
def _timm() -> Iterator[str]:
    """Make timm's two modules importable. Yields a description of the timm in use."""
    try:
        importlib.import_module("timm.models.vision_transformer")
        importlib.import_module("timm.models.layers")
    except Exception:
        pass
    else:
        yield f"timm {getattr(sys.modules['timm'], '__version__', '')}".strip()
        return
    names = ("timm", "timm.models", "timm.models.vision_transformer", "timm.models.layers")
    saved = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "timm"}
    made = {name: types.ModuleType(name) for name in names}
    made["timm.models.vision_transformer"].PatchEmbed = PatchEmbed
    made["timm.models.vision_transformer"].Mlp = Mlp
    made["timm.models.layers"].trunc_normal_ = nn.init.trunc_normal_
    sys.modules.update(made)
    try:
        yield "a stand-in for timm's PatchEmbed, Mlp and trunc_normal_ (timm cannot be imported)"
    finally:
        for name in names:
            del sys.modules[name]
        sys.modules.update(saved)


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
