"""The official code as a provider: a made-up checkout, and the real one that MDT_OFFICIAL names."""

import os
import sys
from pathlib import Path

import pytest
import torch

import official
import providers
import session
import steps
import throughput
from mdt_fast.config import ModelConfig
from mdt_fast.errors import UserError

CHECKOUT = os.environ.get("MDT_OFFICIAL")
SHAPE = {
    "input_size": 8, "patch_size": 2, "in_channels": 4, "hidden_size": 32, "depth": 4, "num_heads": 2,
    "num_classes": 10, "decode_layer": 2,
}  # fmt: skip

FAKE = """
from timm.models.vision_transformer import PatchEmbed, Mlp
from timm.models.layers import trunc_normal_
import torch

class MDTv2(torch.nn.Module):
    def __init__(self, hidden_size, input_size, patch_size, in_channels, **kwargs):
        super().__init__()
        print("constructing")
        self.x_embedder = PatchEmbed(input_size, patch_size, in_channels, hidden_size, bias=True)
        self.mlp = Mlp(in_features=hidden_size, hidden_features=8, act_layer=torch.nn.GELU, drop=0)
        trunc_normal_(self.mlp.fc1.weight, std=0.02)

    def forward(self, x, t, y, enable_mask=False):
        x = self.x_embedder(x)
        assert x.shape[1] == self.x_embedder.num_patches
        if enable_mask:
            return self.random_masking(x, 0.3)
        return self.mlp(x)
"""


@pytest.fixture
def fake(tmp_path: Path) -> Path:
    (tmp_path / "masked_diffusion").mkdir()
    (tmp_path / "masked_diffusion" / "models.py").write_text(FAKE)
    return tmp_path


def test_a_checkout_is_loaded_with_the_shared_mask(fake: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loaded = official.load(fake)
    assert loaded.family == "mdtv2"
    model = official.build(loaded, ModelConfig(**SHAPE))
    assert capsys.readouterr().out == ""
    x, t = torch.randn(2, 4, 8, 8), torch.zeros(2, dtype=torch.int64)
    plan = official.MaskPlan.draw(2, 16, 0.5, random_ratio=False)
    kept, mask, ids_restore, ids_keep = model(x, t, t, enable_mask=True, mask_plan=plan)
    assert kept.shape == (2, 8, 32)
    assert ids_keep is plan.ids_keep
    assert ids_restore is plan.ids_restore
    assert mask.sum(1).tolist() == [8, 8]
    assert model(x, t, t).shape == (2, 16, 32)


def test_no_stand_in_stays_behind(fake: Path) -> None:
    before = {name for name in sys.modules if name.split(".")[0] == "timm"}
    loaded = official.load(fake)
    assert "timm" in loaded.timm
    if not before:
        assert not [
            name for name in sys.modules if name.split(".")[0] == "timm" and "stand-in" in loaded.timm
        ]


@pytest.mark.parametrize("family", ["mdt", "dit"])
def test_models_that_the_checkout_lacks_are_skipped_with_a_reason(fake: Path, family: str) -> None:
    config = ModelConfig(**SHAPE, family=family)
    modules = providers.Modules(config, torch.device("cpu"), official.load(fake))
    with pytest.raises(providers.Skip, match=r"the checkout holds MDTv2 \(branch main\)"):
        providers.make("official", modules)


def test_files_that_are_something_else(fake: Path) -> None:
    file = fake / "masked_diffusion" / "models.py"
    file.write_text("import a_package_nobody_has")
    with pytest.raises(UserError, match="cannot be loaded: ModuleNotFoundError"):
        official.load(fake)
    file.write_text("")
    with pytest.raises(UserError, match="defines neither of the classes MDTv2, MDT"):
        official.load(fake)


@pytest.mark.skipif(CHECKOUT is None, reason="MDT_OFFICIAL names no checkout of the official code")
@pytest.mark.parametrize("mode", ["train", "sample"])
def test_the_real_one_agrees(mode: str) -> None:
    assert CHECKOUT is not None
    loaded = official.load(Path(CHECKOUT))
    config = ModelConfig(**SHAPE, family=loaded.family)
    case = steps.Case("tiny", config, mode, 2, torch.float32, torch.device("cpu"))
    run = session.Session(throughput.RowFile(None, {}), lambda text: None)
    found = {name: session.Result(name) for name in ("reference", "official")}
    modules = providers.Modules(config, case.device, loaded)
    images = throughput.inputs.load("synthetic", config, 2)
    agreeing = run.agreeing(case, list(found), modules, images, found, float("inf"))
    assert list(agreeing) == ["reference", "official"], found["official"].notes
