"""Models in folders and on the hub; nothing here uses the network."""

import copy
import json
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import mdt_fast
from mdt_fast import MDT, DiT, MDTv2, Transformer, UserError, from_reference
from mdt_fast.models.hub import CONFIG, WEIGHTS

SHAPE: dict[str, Any] = {
    "input_size": 8, "in_channels": 4, "hidden_size": 16, "depth": 4, "num_heads": 2, "num_classes": 10,
}  # fmt: skip
CLASSES = {"MDTv2": MDTv2, "MDT": MDT, "DiT": DiT}


def made(name: str = "MDTv2", **changes: Any) -> Any:
    masked = {} if name == "DiT" else {"mask_ratio": 0.3, "decode_layer": 2}
    model = CLASSES[name](**{**SHAPE, **masked, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    return model


def same(a: nn.Module, b: nn.Module) -> bool:
    one, two = a.state_dict(), b.state_dict()
    return one.keys() == two.keys() and all(
        torch.equal(one[key], two[key]) and one[key].dtype == two[key].dtype for key in one
    )


@pytest.mark.parametrize("name", CLASSES)
def test_a_model_comes_back(name: str, tmp_path: Path) -> None:
    model = made(name, class_dropout_prob=0.2, mlp_ratio=2)
    model.save_pretrained(tmp_path / "a" / "model")
    for cls in (CLASSES[name], Transformer):
        loaded = cls.from_pretrained(tmp_path / "a" / "model")
        assert type(loaded) is type(model)
        assert not loaded.training
        assert loaded.config == model.config
        assert same(loaded, model)
        trained = [parameter.requires_grad for parameter in loaded.parameters()]
        assert trained == [parameter.requires_grad for parameter in model.parameters()]
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([3, 900]), torch.tensor([1, 10])
    with torch.no_grad():
        assert torch.equal(loaded(x, t, y), model.eval()(x, t, y))
    copies = {id(module.rel_pos_bias.relative_position_index) for module in loaded.modules()
              if getattr(module, "rel_pos_bias", None) is not None}  # fmt: skip
    assert len(copies) <= 1  # the layers share one index again


def test_a_mask_ratio_that_was_set_since(tmp_path: Path) -> None:
    model = made()
    model.mask_ratio = 0.5
    model.save_pretrained(tmp_path)
    assert MDTv2.from_pretrained(tmp_path).mask_ratio == 0.5
    assert from_reference(model).mask_ratio == model.config.mask_ratio == 0.5
    for value, why in (
        (0.9, "got 0.9, expected 0..0.8 for mdtv2, or None"),
        ("x", "got 'x', expected a"),
    ):
        with pytest.raises(UserError, match=f"^mask_ratio: {why}"):
            model.mask_ratio = value
    assert model.mask_ratio == 0.5
    model.mask_ratio = None
    assert not model.mask_token.requires_grad
    model.mask_ratio = 0.3
    assert model.mask_token.requires_grad
    model.mask_token.requires_grad_(False)
    model.mask_ratio = 0.4  # a new ratio does not thaw it
    assert not model.mask_token.requires_grad


def test_dtypes_are_kept_or_chosen(tmp_path: Path) -> None:
    made().bfloat16().save_pretrained(tmp_path)
    assert MDTv2.from_pretrained(tmp_path).dtype == torch.bfloat16
    assert MDTv2.from_pretrained(tmp_path, dtype=torch.float32).dtype == torch.float32
    assert MDTv2.from_pretrained(tmp_path, torch_dtype=torch.float16).dtype == torch.float16


def test_a_model_is_a_plain_module(tmp_path: Path) -> None:
    model = made()
    assert same(copy.deepcopy(model), model)
    assert same(pickle.loads(pickle.dumps(model)), model)
    assert {key for key in model.state_dict() if "hub" in key} == set()
    assert model.device == torch.device("cpu")
    compiled = torch.compile(model)
    compiled.save_pretrained(tmp_path)  # the wrapped model, under its own names
    assert same(MDTv2.from_pretrained(tmp_path), model)


def test_saving_again_keeps_the_card(tmp_path: Path) -> None:
    model = made()
    model.save_pretrained(tmp_path, license="apache-2.0")
    card = huggingface_hub.ModelCard.load(tmp_path / "README.md")
    assert card.data.license == "apache-2.0"
    assert card.data.library_name == "mdt_fast"
    assert card.data.pipeline_tag == "unconditional-image-generation"
    assert "mdtv2" in card.data.tags
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", CONFIG, WEIGHTS]
    (tmp_path / "README.md").write_text("mine")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    made().save_pretrained(tmp_path / "other")
    assert huggingface_hub.ModelCard.load(tmp_path / "other" / "README.md").data.license is None


class Api:
    """The part of the hub that an upload talks to; keeps what it is sent."""

    def __init__(self, token: Any = None, *, has_card: bool = False):
        self.token, self.has_card, self.calls = token, has_card, []
        self.files: dict[str, bytes] = {}

    def create_repo(self, repo_id: str, **how: Any) -> SimpleNamespace:
        self.calls.append(("create_repo", repo_id, how))
        return SimpleNamespace(repo_id=repo_id)

    def file_exists(self, repo_id: str, name: str, **how: Any) -> bool:
        return self.has_card

    def upload_folder(self, *, folder_path: str, **how: Any) -> str:
        self.calls.append(("upload_folder", how))
        left_out = how["ignore_patterns"] or ()
        for path in Path(folder_path).iterdir():
            if path.name not in left_out:
                self.files[path.name] = path.read_bytes()
        return "https://hub/me/mdt/commit/1"


@pytest.mark.parametrize("has_card", [False, True])
def test_push_to_hub(has_card: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    api = Api(has_card=has_card)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda token=None: vars(api).update(token=token) or api)
    model = made()
    assert (
        model.push_to_hub("me/mdt", private=True, token="t", license="mit") == "https://hub/me/mdt/commit/1"
    )
    assert api.token == "t"
    assert api.calls[0] == ("create_repo", "me/mdt", {"private": True, "exist_ok": True})
    assert set(api.files) == {CONFIG, WEIGHTS} | (set() if has_card else {"README.md"})
    for name, content in api.files.items():
        (tmp_path / name).write_bytes(content)
    assert same(MDTv2.from_pretrained(tmp_path), model)


def test_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made().save_pretrained(tmp_path / "transformer")
    asked = []

    def download(repo_id: str, name: str, *, subfolder: str | None, **how: Any) -> str:
        asked.append((repo_id, subfolder, name, how["revision"], how["local_files_only"]))
        path = tmp_path / (subfolder or "") / name
        if not path.exists():
            raise OSError(f"404\n{name}")
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    model = Transformer.from_pretrained(
        "me/mdt", subfolder="transformer", revision="v1", local_files_only=True
    )
    assert isinstance(model, MDTv2)
    assert asked == [("me/mdt", "transformer", name, "v1", True) for name in (CONFIG, WEIGHTS)]
    (tmp_path / "transformer" / WEIGHTS).rename(tmp_path / "transformer" / "diffusion_pytorch_model.bin")
    refused("never read): 404", "me/mdt", subfolder="transformer")
    refused("no config.json of the hub's 'me/mdt': 404", "me/mdt")


def refused(message: str, name: Any, cls: Any = Transformer, **how: Any) -> None:
    with pytest.raises(UserError) as caught:
        cls.from_pretrained(name, **how)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_refusals(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    made().save_pretrained(folder)
    refused("got the class MDTv2, expected DiT; MDTv2.from_pretrained loads it", folder, DiT)
    refused("got 'nowhere', expected a folder or a hub name (me/mdt)", "nowhere")
    refused("expected a folder", tmp_path / "none")
    (tmp_path / "empty").mkdir()
    refused("no config.json in", tmp_path / "empty")
    refused("no config.json in", folder, subfolder="transformer")

    values = json.loads((folder / CONFIG).read_text())
    for changed, message in (
        ("{", "not a readable config.json"),
        ("[]", "names no class (_class_name)"),
        (
            json.dumps({**values, "_class_name": "MDTV2"}),
            "got _class_name 'MDTV2' (did you mean 'MDTv2'?), expected MDTv2, MDT, DiT",
        ),
        (json.dumps({**values, "dept": 4}), "unknown key 'dept' (did you mean 'depth'?)"),
        (json.dumps({**values, "depth": "4"}), "config.json.depth: got '4', expected int"),
        (json.dumps({**values, "depth": 6}), "weights of another model: "),
        (json.dumps({**values, "num_classes": 11}), "[11, 16] instead of [12, 16]"),
    ):
        (folder / CONFIG).write_text(changed)
        refused(message, folder)
    (folder / CONFIG).write_text(json.dumps(values))
    (folder / WEIGHTS).write_bytes(b"no weights")
    refused("not a readable .safetensors file", folder)


def test_pickled_weights_are_never_read(tmp_path: Path) -> None:
    made().save_pretrained(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    refused("pickled weights (.bin, .pt) are never read", tmp_path)
    with pytest.raises(UserError, match=r"weights are safetensors\)"):
        made().save_component(tmp_path, safe_serialization=False)


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot make the folder"):
        made().save_pretrained(tmp_path / "file")


def test_parts_of_several_processes_are_refused(tmp_path: Path) -> None:
    model = made()
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(UserError, match="save_pretrained: got a part of the weights in each process"):
            model.save_pretrained(tmp_path)
    finally:
        distributed.destroy_process_group()


def test_without_huggingface_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders need no huggingface_hub; the hub asks for it in one line."""
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    model = made()
    model.save_pretrained(tmp_path)
    assert same(Transformer.from_pretrained(tmp_path), model)
    refused("pip install 'mdt-fast[latents]'", "me/mdt")
    with pytest.raises(UserError, match="the hub needs huggingface_hub"):
        model.push_to_hub("me/mdt")


def small_dit(**changes: Any) -> Any:
    """Diffusers' DiT with one embedding for all blocks, as in conversions of published weights."""
    from diffusers import DiTTransformer2DModel

    settings = {
        "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 8,
        "num_layers": 3, "sample_size": 8, "num_embeds_ada_norm": 10, "norm_eps": 1e-6,
    }  # fmt: skip
    model = DiTTransformer2DModel(**{**settings, **changes}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    first = model.transformer_blocks[0].norm1.emb
    for block in model.transformer_blocks:
        block.norm1.emb.load_state_dict(first.state_dict())
    return model


def test_dit_of_diffusers(tmp_path: Path) -> None:
    """Equal once diffusers is set to the published frequencies; see ``dit_of_diffusers.py``."""
    theirs = small_dit().double()
    theirs.save_pretrained(tmp_path)
    ours = DiT.from_pretrained(tmp_path)
    x, t, y = torch.randn(3, 4, 8, 8).double(), torch.tensor([0, 500, 999]), torch.tensor([0, 9, 10])
    with torch.no_grad():
        got, other = ours(x, t, y), theirs(x, t, y).sample
        for block in theirs.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = 0
        same_frequencies = theirs(x, t, y).sample
    # Both have float32 sinusoids.
    torch.testing.assert_close(got, same_frequencies, rtol=1e-5, atol=1e-5)
    assert (got - other).abs().max() > 1e-3
    ours.save_pretrained(tmp_path / "ours")
    assert same(DiT.from_pretrained(tmp_path / "ours"), ours)


@pytest.mark.parametrize("name", ["num_attention_heads", "attention_head_dim", "in_channels"])
def test_a_number_that_is_none(name: str, tmp_path: Path) -> None:
    small_dit().save_pretrained(tmp_path)
    values = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**values, name: None}))
    refused(f"got {name} None, expected an integer", tmp_path)


def test_other_models_of_diffusers_are_refused(tmp_path: Path) -> None:
    small_dit().save_pretrained(tmp_path)
    refused("got the class DiT, expected MDTv2", tmp_path, MDTv2)
    state = load_file(tmp_path / WEIGHTS)
    odd = "transformer_blocks.1.norm1.emb.timestep_embedder.linear_1.bias"
    save_file({**state, odd: state[odd] + 1}, tmp_path / WEIGHTS)
    refused(f"{odd} is not that of the first block", tmp_path)
    save_file({key: value for key, value in state.items() if "attn1.to_k" not in key}, tmp_path / WEIGHTS)
    refused("weights of another model: no transformer_blocks.0.attn1.to_k.weight", tmp_path)
    values = json.loads((tmp_path / CONFIG).read_text())
    save_file(state, tmp_path / WEIGHTS)
    for key, message in (
        ("num_layers", "weights of another model: no transformer_blocks.3"),
        ("attention_head_dim", "weights of another model: hidden_size 16 instead of 2000000000"),
        ("sample_size", "sample_size is 1000000000: more than 1024 patches a side"),
    ):
        (tmp_path / CONFIG).write_text(json.dumps({**values, key: 1_000_000_000}))
        refused(message, tmp_path)
    (tmp_path / CONFIG).write_text(json.dumps({**values, "norm_type": "layer_norm"}))
    refused("got norm_type 'layer_norm', expected 'ada_norm_zero', as in a DiT", tmp_path)


def test_public_names() -> None:
    assert mdt_fast.Transformer is Transformer


def test_weights_and_config_of_two_savings_are_refused(tmp_path: Path) -> None:
    """As left by a process killed between writing the two files; the shapes are equal."""
    two, four = tmp_path / "two", tmp_path / "four"
    made("DiT", num_heads=2).save_pretrained(two)
    made("DiT", num_heads=4).save_pretrained(four)
    config = (two / CONFIG).read_text()
    (two / WEIGHTS).write_bytes((four / WEIGHTS).read_bytes())
    refused("was saved with another config.json than the one beside it", two)
    (two / CONFIG).write_text((four / CONFIG).read_text())
    assert DiT.from_pretrained(two).config.num_heads == 4
    values = {**json.loads((four / CONFIG).read_text()), "_diffusers_version": "0.1"}
    (four / CONFIG).write_text(json.dumps(dict(reversed(values.items()))))  # the same in another layout
    DiT.from_pretrained(four)
    (four / CONFIG).write_text(config)
    save_file(load_file(four / WEIGHTS), four / WEIGHTS)  # written by others, without the digest
    assert DiT.from_pretrained(four).config.num_heads == 2


def test_leftovers_of_a_killed_process_go(tmp_path: Path) -> None:
    for name in (CONFIG, WEIGHTS, "mine"):
        (tmp_path / f".{name}.0123abcd.partial").write_text("")
    made().save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.glob(".*")} == {".mine.0123abcd.partial"}


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("key", ["depth", "hidden_size", "input_size"])
def test_sizes_are_compared_before_a_model_is_built(name: str, key: str, tmp_path: Path) -> None:
    made(name, **({} if name == "DiT" else {"depth": 5})).save_pretrained(tmp_path)  # MDTv2 makes it 4
    Transformer.from_pretrained(tmp_path)
    values = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**values, key: 1_000_000_000}))
    refused(f"weights of another model: {key} {'4' if (name, key) == ('MDTv2', 'depth') else values[key]} "
            "instead of 1000000000", tmp_path)  # fmt: skip


def test_weights_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    made().save_pretrained(tmp_path)
    state = load_file(tmp_path / WEIGHTS)
    key = "final_layer.linear.weight"
    for dtype in (torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn):
        save_file({**state, key: state[key].to(dtype)}, tmp_path / WEIGHTS)
        refused(f"1 of another dtype ({key} {str(dtype).removeprefix('torch.')})", tmp_path)
    for value in (float("nan"), float("inf")):
        save_file({**state, key: torch.full_like(state[key], value)}, tmp_path / WEIGHTS)
        refused(f"weights that are not finite: 1 tensors ({key})", tmp_path)


def test_dtypes_by_name(tmp_path: Path) -> None:
    made().save_pretrained(tmp_path)
    assert MDTv2.from_pretrained(tmp_path, dtype="float16").dtype == torch.float16
    assert MDTv2.from_pretrained(tmp_path, torch_dtype="torch.bfloat16").dtype == torch.bfloat16
    allowed = "expected float32, float16, bfloat16, float64"
    refused(f"dtype: got torch.int8, {allowed}", tmp_path, dtype=torch.int8)
    refused(f"torch_dtype: got 'half', {allowed}", tmp_path, torch_dtype="half")
    refused(f"dtype: got 16, {allowed}", tmp_path, dtype=16)


def test_what_cannot_be_saved_leaves_nothing(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = DiT(**SHAPE)
    with pytest.raises(UserError, match="save_pretrained: got weights on the meta device"):
        model.save_pretrained(tmp_path / "meta")
    assert not (tmp_path / "meta").exists()
    for name in (CONFIG, WEIGHTS):
        (tmp_path / name).mkdir()
        with pytest.raises(UserError, match=r"save_directory: got a folder .*, expected a file"):
            made().save_pretrained(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [name]
        (tmp_path / name).rmdir()


def test_a_missing_subfolder_is_named(tmp_path: Path) -> None:
    made().save_pretrained(tmp_path)
    refused(f"{str(tmp_path)!r} has no subfolder 'transfromer'", tmp_path, subfolder="transfromer")
