"""Weights in and out, shared storage, and the fast classes in place of the official ones."""

import argparse
import copy
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from golden_files import load, meta
from mdt_fast import MDTv2, UserError, from_reference, install, models, reference, uninstall
from mdt_fast.models import load_weights, read_weights, write_weights
from mdt_fast.models.attention import RelativePositionBias
from mdt_fast.models.convert import read_metadata
from tolerances import FLOAT32, relative_error

TINY = {
    "input_size": 8, "hidden_size": 16, "depth": 4, "num_heads": 2, "num_classes": 10,
    "mask_ratio": 0.3, "decode_layer": 2,
}  # fmt: skip


def randomised(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.05)
    return model


@pytest.mark.parametrize("name", ["v2_main", "v1_main", "v2_alt", "v1_alt", "v2_nomask"])
def test_from_reference_shares_storage(name: str) -> None:
    info, g = meta(f"{name}.cases"), load(f"{name}.cases")
    source = (reference.MDTv2 if info["version"] == "v2" else reference.MDT)(**info["config"])
    source.load_state_dict(load(f"{name}.state"))
    source.eval()
    fast = from_reference(source)
    assert not fast.training
    assert all(a is b for a, b in zip(fast.parameters(), source.parameters(), strict=True))
    with torch.no_grad():
        assert relative_error(fast(g["in/x"], g["in/t"], g["in/y"]), g["a/out"]) < FLOAT32
        source.pos_embed.add_(1)
        assert torch.equal(fast.pos_embed, source.pos_embed)


def test_from_reference_leaves_what_is_frozen_frozen() -> None:
    source = reference.MDTv2(**TINY)
    source.en_inblocks.requires_grad_(False)
    trained = {key: p.requires_grad for key, p in source.named_parameters()}
    fast = from_reference(source)
    assert {key: p.requires_grad for key, p in source.named_parameters()} == trained
    assert {key: p.requires_grad for key, p in fast.named_parameters()} == trained
    assert not all(trained.values())


def test_from_reference_of_a_compiled_module() -> None:
    source = reference.MDTv2(**TINY)
    assert from_reference(torch.compile(source)).pos_embed is source.pos_embed


def test_state_dict_shares_no_memory(tmp_path: Path) -> None:
    """safetensors' own save_file refuses tensors that share memory."""
    save_file(MDTv2(**TINY).state_dict(), tmp_path / "w.safetensors")


def test_from_reference_reads_a_foreign_module() -> None:
    """A module without our ``config`` (the official one): all is read from parameters and attributes."""
    source = reference.MDTv2(**TINY, class_dropout_prob=0.1)
    config = source.config
    del source.config
    source.decode_layer = 2
    assert models.convert.config_of(source) == config
    dit = reference.DiT(**{k: v for k, v in TINY.items() if k not in ("mask_ratio", "decode_layer")})
    config = dit.config
    del dit.config
    dit.num_heads = 2
    assert models.convert.config_of(dit) == config


@pytest.mark.parametrize("module", [nn.Linear(2, 2), nn.Sequential(nn.Conv2d(1, 1, 1))])
def test_from_reference_refuses_other_modules(module: nn.Module) -> None:
    with pytest.raises(UserError, match="is no MDT, MDTv2 or DiT"):
        from_reference(module)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_round_trip(tmp_path: Path, suffix: str) -> None:
    model, other, path = randomised(MDTv2(**TINY)), MDTv2(**TINY), tmp_path / f"w{suffix}"
    write_weights(path, model.state_dict(), step=3) if suffix != ".pt" else write_weights(
        path, model.state_dict()
    )
    load_weights(other, read_weights(path), source=path.name)
    for key, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    plain = tmp_path / "plain"
    plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode


def test_official_pt_file_loads_strictly(tmp_path: Path) -> None:
    torch.save(load("v2_main.state"), tmp_path / "ema_0.9999_010000.pt")
    model = MDTv2(**meta("v2_main.cases")["config"])
    load_weights(model, read_weights(tmp_path / "ema_0.9999_010000.pt"))
    model.load_state_dict(load("v2_main.state"), strict=True)


def test_another_models_weights_are_named_and_nothing_changes() -> None:
    model, other = MDTv2(**TINY), MDTv2(**{**TINY, "depth": 8})
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        UserError, match=r"^w.pt: weights of another model: \d+ unexpected \(en_inblocks.1.*more\)$"
    ):
        load_weights(model, other.state_dict(), source="w.pt")
    with pytest.raises(UserError, match=r"other shape \(.*instead of"):
        load_weights(model, MDTv2(**{**TINY, "hidden_size": 32}).state_dict())
    for wrapped, prefix in ((nn.DataParallel(other), "module."), (torch.compile(other), "_orig_mod.")):
        with pytest.raises(UserError, match=rf"all names begin with '{prefix}', which a wrapper put there"):
            load_weights(model, wrapped.state_dict())
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())


def test_files_of_other_trainings(tmp_path: Path) -> None:
    """Files like DiT's, of which the average is preferred, and files of wrapped models."""
    torch.manual_seed(0)
    model, ema = (MDTv2(**TINY) for _ in range(2))
    saved = {"model": model.state_dict(), "ema": ema.state_dict(), "opt": {"state": {}}, "steps": 3}
    for names, expected in ((("model", "ema"), ema), (("model",), model), (("state_dict",), model)):
        kept = {name: saved.get(name, model.state_dict()) for name in names}
        torch.save({**kept, "opt": saved["opt"], "steps": 3}, tmp_path / "training.pt")
        found = read_weights(tmp_path / "training.pt")
        assert all(torch.equal(found[key], value) for key, value in expected.state_dict().items())
    lightning = nn.ModuleDict({"model": model})
    for name, wrapped in (("w.pt", nn.DataParallel(torch.compile(model))), ("w.ckpt", lightning)):
        torch.save({"state_dict": wrapped.state_dict(), "epoch": 3}, tmp_path / name)
        found = read_weights(tmp_path / name)
        assert found.keys() == model.state_dict().keys()
        assert all(torch.equal(found[key], value) for key, value in model.state_dict().items())


def test_files_of_dits_training(tmp_path: Path) -> None:
    """Its options are an object: a class that only holds values is read, one that needs code is not."""
    saved = {"ema": MDTv2(**TINY).state_dict(), "args": argparse.Namespace(lr=1e-4, model="DiT-XL/2")}
    torch.save(saved, tmp_path / "0400000.pt")
    assert read_weights(tmp_path / "0400000.pt").keys() == saved["ema"].keys()
    torch.save({**saved, "args": Payload()}, tmp_path / "0400000.pt")
    with pytest.raises(UserError, match=r"needs code from the file to be executed"):
        read_weights(tmp_path / "0400000.pt")


def test_weights_of_another_size_say_what_to_do() -> None:
    model = MDTv2(**TINY)
    larger = MDTv2(**{**TINY, "input_size": 2 * TINY["input_size"]})
    with pytest.raises(
        UserError, match=r"other shape .*; resize_weights converts them to another image size$"
    ):
        load_weights(model, larger.state_dict())
    for state in (
        MDTv2(**{**TINY, "hidden_size": 32}).state_dict(),
        {**larger.state_dict(), "y_embedder.embedding_table.weight": torch.zeros(3, 16)},
        {},
    ):
        with pytest.raises(UserError, match="weights of another model") as caught:
            load_weights(model, state)
        assert "resize" not in str(caught.value)
    with pytest.raises(UserError, match="weights of another model: 2 missing"):
        load_weights(nn.Linear(2, 2), model.state_dict())


def test_reading_changes_nothing_of_what_torch_may_read(tmp_path: Path) -> None:
    torch.save(MDTv2(**TINY).state_dict(), tmp_path / "w.pt")
    with torch.serialization.safe_globals([argparse.Namespace]):
        read_weights(tmp_path / "w.pt")
        assert argparse.Namespace in torch.serialization.get_safe_globals()
    read_weights(tmp_path / "w.pt")
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


class Payload:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("executed",)


def test_bad_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    state = MDTv2(**TINY).state_dict()
    for suffix in (".pt", ".safetensors"):
        write_weights(f"whole{suffix}", state)
        whole = Path(f"whole{suffix}").read_bytes()
        for size in (0, 10, len(whole) // 2, len(whole) - 1):
            Path(f"torn{suffix}").write_bytes(whole[:size])
            with pytest.raises(UserError, match=rf"^torn{suffix}: "):
                read_weights(f"torn{suffix}")
    torch.save({"a": Payload()}, "evil.pt")
    with pytest.raises(UserError, match=r"evil.pt: needs code from the file to be executed"):
        read_weights("evil.pt")
    assert not Path("executed").exists()
    Path("junk.pt").write_bytes(b"this is no checkpoint")
    with pytest.raises(UserError, match=r"^junk.pt: "):
        read_weights("junk.pt")
    for number, odd in enumerate(
        [
            {},
            {1: torch.ones(1)},
            {"a": torch.ones(1, device="meta")},
            {"a": torch.eye(2).to_sparse()},
            {"a": 1},
        ]
    ):
        torch.save(odd, f"odd{number}.pt")
        with pytest.raises(UserError, match=r"holds no state_dict"):
            read_weights(f"odd{number}.pt")
    torch.save({"net": state, "step": 3}, "training.pt")
    with pytest.raises(UserError, match=r"holds no state_dict .*, but 'net', 'step'$"):
        read_weights("training.pt")
    Path("run").mkdir()
    with pytest.raises(UserError, match=r"run: is a folder, a file is needed .*; mdt-fast convert makes one"):
        read_weights("run")
    torch.save([1, 2], "list.pt")
    with pytest.raises(UserError, match=r"list.pt: holds no state_dict"):
        read_weights("list.pt")
    with pytest.raises(UserError, match=r"none.pt: no such file"):
        read_weights("none.pt")
    with pytest.raises(UserError, match=r"ends in '.onnx', expected .pt"):
        read_weights("w.onnx")
    with pytest.raises(UserError, match=r"folder nowhere does not exist"):
        write_weights("nowhere/w.pt", state)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "w.pt"
    write_weights(path, {"a": torch.ones(1)})

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(UserError, match=r"w.pt: cannot be written: No space left"):
        write_weights(path, {"a": torch.zeros(1)})
    assert torch.equal(read_weights(path)["a"], torch.ones(1))
    assert list(tmp_path.iterdir()) == [path]


def test_layers_share_one_index_also_after_moves_and_copies() -> None:
    for model in (MDTv2(**TINY), MDTv2(**TINY).double(), copy.deepcopy(MDTv2(**TINY))):
        indices = {
            id(m.relative_position_index) for m in model.modules() if isinstance(m, RelativePositionBias)
        }
        assert len(indices) == 1
        assert sum(key.endswith("relative_position_index") for key in model.state_dict()) == 5


@pytest.mark.parametrize("imported_before", [False, True])
def test_install_replaces_the_official_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, imported_before: bool
) -> None:
    package = tmp_path / "masked_diffusion"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "models.py").write_text("def MDTv2_S_2(**kwargs): return 'official'\nhelper = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    if imported_before:
        import masked_diffusion.models
    install()
    install()
    try:
        import masked_diffusion.models as models_mdt

        model = models_mdt.__dict__["MDTv2_S_2"](input_size=8, mask_ratio="0.3", decode_layer="6")
        assert isinstance(model, MDTv2)
        assert models_mdt.__getattr__("helper") == models_mdt.helper == 1  # of the official file
        assert not hasattr(models_mdt, "nothing")
    finally:
        uninstall()
        import masked_diffusion.models

        assert masked_diffusion.models.MDTv2_S_2() == "official"
        for name in ("masked_diffusion.models", "masked_diffusion"):
            sys.modules.pop(name, None)


def test_an_official_file_that_cannot_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "masked_diffusion"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "models.py").write_text("import not_installed\nhelper = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    install()
    try:
        import masked_diffusion.models as official

        assert not hasattr(official, "nothing")  # what looks through all modules asks for anything
        with pytest.raises(ImportError, match=r"^helper: .* cannot be imported .*not_installed"):
            official.__getattr__("helper")
        with pytest.raises(ImportError, match=r"provides mdt_fast\.models\.blocks\.Block in its place"):
            official.__getattr__("MDTBlock")
    finally:
        uninstall()
        for name in ("masked_diffusion.models", "masked_diffusion"):
            sys.modules.pop(name, None)


def test_weights_go_into_what_wraps_a_model() -> None:
    source = randomised(MDTv2(**TINY))
    for wrap in (torch.compile, nn.DataParallel, lambda model: torch.compile(nn.DataParallel(model))):
        model = MDTv2(**TINY)
        wrapped = wrap(model)
        load_weights(wrapped, source.state_dict())
        assert torch.equal(model.final_layer.linear.weight, source.final_layer.linear.weight)
        load_weights(wrapped, {key: 2 * value for key, value in wrapped.state_dict().items()})
        assert torch.equal(model.final_layer.linear.weight, 2 * source.final_layer.linear.weight)
        with pytest.raises(UserError, match="weights of another model"):
            load_weights(wrapped, {})


LOOPS = """
class GaussianDiffusion:
    num_timesteps = 250
    def p_sample_loop_progressive(self, model, shape, noise=None):
        yield from (model for _ in shape)
    def ddim_sample_loop_progressive(self, model, shape, noise=None):
        yield from (model for _ in shape)
"""


def test_install_lets_the_official_loops_call_a_quicker_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "masked_diffusion"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "gaussian_diffusion.py").write_text(LOOPS)
    monkeypatch.syspath_prepend(str(tmp_path))
    asked = []
    monkeypatch.setattr(MDTv2, "in_a_loop", lambda self, *given: asked.append(given) or "quicker")
    model, another = MDTv2(**TINY), nn.Linear(2, 2)
    install()
    install()
    try:
        from masked_diffusion.gaussian_diffusion import GaussianDiffusion

        diffusion = GaussianDiffusion()
        assert list(diffusion.p_sample_loop_progressive(model.forward_with_cfg, [1], noise=0)) == ["quicker"]
        assert list(diffusion.ddim_sample_loop_progressive(model, shape=[1, 2])) == ["quicker"] * 2
        assert asked == [(model.forward_with_cfg, 250), (model, 250)]
        assert list(diffusion.p_sample_loop_progressive(another, [1])) == [another]
    finally:
        uninstall()
    assert list(diffusion.p_sample_loop_progressive(model, [1])) == [model]
    install()
    for name in ("masked_diffusion.gaussian_diffusion", "masked_diffusion"):
        sys.modules.pop(name, None)
    install()  # a package imported anew
    from masked_diffusion.gaussian_diffusion import GaussianDiffusion as Another

    assert list(Another().p_sample_loop_progressive(model, [1])) == ["quicker"]
    for name in ("masked_diffusion.gaussian_diffusion", "masked_diffusion"):
        sys.modules.pop(name, None)
    uninstall()
    assert list(Another().p_sample_loop_progressive(model, [1])) == [model]
    for name in ("masked_diffusion.gaussian_diffusion", "masked_diffusion"):
        sys.modules.pop(name, None)


def test_install_without_the_official_package() -> None:
    with pytest.raises(UserError, match="masked_diffusion cannot be imported"):
        install()


def test_metadata_names_the_format(tmp_path: Path) -> None:
    """Accelerate refuses a file with metadata but without a format."""
    path = tmp_path / "w.safetensors"
    for metadata in ({}, {"step": 5}):
        write_weights(path, {"a": torch.ones(1)}, **metadata)
        with safe_open(path, framework="pt") as file:
            assert file.metadata() == {"format": "pt", **{key: str(value) for key, value in metadata.items()}}
        assert read_metadata(path) == {key: str(value) for key, value in metadata.items()}
    save_file({"a": torch.ones(1)}, path)
    assert read_metadata(path) == {}


def test_a_model_without_memory_cannot_be_filled() -> None:
    with torch.device("meta"):
        model = MDTv2(**TINY)
    state = MDTv2(**TINY).state_dict()
    with pytest.raises(UserError, match=r"^model: got weights on the meta device, expected .*to_empty"):
        load_weights(model, state)
    load_weights(model.to_empty(device="cpu"), state)
    assert torch.equal(model.state_dict()["pos_embed"], state["pos_embed"])


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_only_tensors_are_written(suffix: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^state: got int for 'step', expected tensors$"):
        write_weights(tmp_path / f"w{suffix}", {"step": 5})  # type: ignore[dict-item]
    assert list(tmp_path.iterdir()) == []
