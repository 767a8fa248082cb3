"""The exported step: the pictures of ``sample``, any batch, none of this package's code in it, refusals."""

import copy
import json
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._inductor.exc import CppCompileError

from mdt_fast import MDTv2, create_diffusion
from mdt_fast.config import DiffusionConfig, ModelConfig, SampleConfig
from mdt_fast.errors import UserError
from mdt_fast.models.attention import Attention
from mdt_fast.models.zoo import build_model
from mdt_fast.sampling import export_step, read_description, run_exported, sample

MODEL = ModelConfig(
    family="mdtv2", input_size=4, patch_size=2, in_channels=4, hidden_size=16, depth=2, num_heads=2,
    num_classes=10, decode_layer=1,
)  # fmt: skip
CONFIG = SampleConfig(steps=4, batch_size=3, seed=3, cfg_scale=2.0)
LABELS = [3, 1, 4, 1]  # batches of 3 and 1
TRAINED = DiffusionConfig()
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def model_of(config: ModelConfig) -> nn.Module:
    torch.manual_seed(1)
    model = build_model(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    return model


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return model_of(MODEL)


@pytest.fixture(scope="module")
def package(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_step(model, TRAINED, tmp_path_factory.mktemp("export") / "step.pt2", CONFIG)


SAMPLERS = {
    "ddim": {"sampler": "ddim"},
    "ddim-eta0.7": {"sampler": "ddim", "eta": 0.7},
    "ddpm": {"sampler": "ddpm"},
    "ddpm-7": {"sampler": "ddpm", "steps": 7},
    "interval": {"cfg_interval": (0.2, 0.6), "scale_pow": None},
    "unguided": {"cfg_scale": 1.0},
}


@pytest.mark.parametrize("changes", SAMPLERS.values(), ids=SAMPLERS)
def test_the_pictures_are_those_of_sample(model: nn.Module, package: Path, changes: dict) -> None:
    """One file serves batches of three and of one."""
    config = replace(CONFIG, **changes)
    drawn = run_exported(package, LABELS, config, first_index=5)
    torch.testing.assert_close(drawn, sample(model, TRAINED, LABELS, config, first_index=5), **CLOSE)


@pytest.mark.parametrize("surroundings", ["float64", "autocast"])
def test_default_dtype_and_autocast_of_the_caller_do_not_count(
    surroundings: str, model: nn.Module, package: Path, tmp_path: Path
) -> None:
    expected = sample(model, TRAINED, LABELS, CONFIG)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64 if surroundings == "float64" else before)
        with torch.autocast("cpu", torch.bfloat16, enabled=surroundings == "autocast"):
            there = run_exported(package, LABELS)
            own = run_exported(export_step(model, TRAINED, tmp_path / "own.pt2", CONFIG), LABELS)
    finally:
        torch.set_default_dtype(before)
    for drawn in (there, own):
        torch.testing.assert_close(drawn, expected, **CLOSE)


def test_it_is_plain_pytorch(package: Path) -> None:
    program = torch.export.load(package)
    ops = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert ops
    assert not {op for op in ops if "mdt_fast" in op or "mkldnn" in op}


def test_the_file_says_all_a_loop_needs(package: Path) -> None:
    """A DDIM loop in plain torch, from what is in the file."""
    files = {"mdt_fast.json": ""}
    step = torch.export.load(package, extra_files=files).module()
    steps = json.loads(files["mdt_fast.json"])["steps"]
    assert read_description(package)["steps"] == steps
    x = start = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    zeros, y = torch.zeros_like(x), torch.tensor([7])
    for t, scale, row in zip(steps["t"], steps["scale"], steps["row"], strict=True):
        x = step(x, torch.tensor([t]), y, zeros, torch.tensor(row), torch.tensor([scale]))
    assert x.isfinite().all()
    assert not torch.equal(x, start)


@pytest.mark.parametrize(
    ("model_changes", "config_changes", "trained"),
    [
        ({"family": "dit", "mask_ratio": None, "decode_layer": 0}, {}, {}),
        ({"family": "mdt", "in_channels": 1, "learn_sigma": False}, {"sampler": "ddpm"}, {}),
        ({"class_dropout_prob": 0.0}, {"cfg_scale": 1.0}, {"predict_xstart": True}),
    ],
    ids=["dit", "mdt, pixels, fixed variance", "no guidance, x_0"],
)  # fmt: skip
def test_other_models_and_a_fixed_batch(
    tmp_path: Path, model_changes: dict, config_changes: dict, trained: dict
) -> None:
    config, diffusion = replace(CONFIG, **config_changes), replace(TRAINED, **trained)
    model = model_of(replace(MODEL, **model_changes))
    model.set_attention_backend("samples")  # which cannot be exported
    package = export_step(model, diffusion, tmp_path / "step.pt2", config, batch=3)
    assert {m.attention_backend for m in model.modules() if isinstance(m, Attention)} == {"samples"}
    drawn = run_exported(package, LABELS)
    torch.testing.assert_close(drawn, sample(model, diffusion, LABELS, config), **CLOSE)


def test_the_channels_that_were_exported_are_guided(model: nn.Module, tmp_path: Path) -> None:
    config = replace(CONFIG, guided_channels=4)
    package = export_step(model, TRAINED, tmp_path / "step.pt2", config)
    drawn = run_exported(package, LABELS)
    torch.testing.assert_close(drawn, sample(model, TRAINED, LABELS, config), **CLOSE)
    for other in (None, 3):
        with pytest.raises(UserError, match=f"guided_channels: the step was exported with 4, got {other}"):
            run_exported(package, LABELS, replace(CONFIG, guided_channels=other))


@pytest.mark.slow
def test_a_compiled_package_gives_the_same_pictures(model: nn.Module, tmp_path: Path) -> None:
    """Slow: it compiles C++, a minute on one core."""
    package = export_step(model, TRAINED, tmp_path / "compiled.pt2", CONFIG, aoti=True)
    assert read_description(package)["sample"]["steps"] == 4
    for sampler in ("ddim", "ddpm"):
        config = replace(CONFIG, sampler=sampler)
        drawn = run_exported(package, LABELS, config)
        torch.testing.assert_close(drawn, sample(model, TRAINED, LABELS, config), **CLOSE)


def test_without_a_compiler(model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor's error becomes one line."""

    def compile_it(*args: object, **options: object) -> None:
        raise CppCompileError(["no-such-compiler"], "two\nlines")

    monkeypatch.setattr("torch._inductor.aoti_compile_and_package", compile_it)
    with pytest.raises(UserError, match="aoti: AOTInductor cannot compile the step here") as refusal:
        export_step(model, TRAINED, tmp_path / "step.pt2", CONFIG, aoti=True)
    assert "\n" not in str(refusal.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "how", "message"),
    [
        ({"sampler": "unipc"}, {}, "sampler: a step of ddpm or ddim can be exported, got 'unipc'"),
        ({"dtype": "bfloat16"}, {}, "dtype: an exported step computes in the dtype of its weights"),
        ({"cfg_scale": -1.0}, {}, "cfg_scale: got -1.0, expected 0 or more"),
        ({"steps": 2000}, {}, "steps: got 2000, expected 1 to 1000"),
        ({}, {"batch": 0}, "batch: got 0, expected None or 1 to 65536"),
        ({}, {"batch": 1.5}, "batch: got 1.5, expected None or 1 to 65536"),
        ({}, {"batch": 10**20}, "batch: got 1000"),
        ({}, {"path": "none/step.pt2"}, "cannot write '.*step.pt2': no folder '.*none'"),
        ({}, {"path": "step.pt"}, "path: got 'step.pt', expected a name that ends in .pt2"),
    ],
)
def test_what_cannot_be_exported(
    model: nn.Module, tmp_path: Path, changes: dict, how: dict, message: str
) -> None:
    path = tmp_path / how.pop("path", "step.pt2")
    with pytest.raises(UserError, match=message):
        export_step(model, TRAINED, path, replace(CONFIG, **changes), **how)
    assert not list(tmp_path.iterdir())


def test_a_wrapped_model_is_refused(tmp_path: Path) -> None:
    model = model_of(MODEL)
    model.register_forward_hook(lambda module, args, output: output)
    with pytest.raises(UserError, match="model: has hooks, FSDP or torch"):
        export_step(model, TRAINED, tmp_path / "step.pt2", CONFIG)


def test_what_cannot_be_run(package: Path, tmp_path: Path) -> None:
    for changes, message in (
        ({"sampler": "dpm++"}, "sampler: a step of ddpm or ddim can be exported"),
        ({"steps": 0}, "steps: got 0, expected 1 to 1000"),
    ):
        with pytest.raises(UserError, match=message):
            run_exported(package, LABELS, replace(CONFIG, **changes))
    with pytest.raises(UserError, match="labels: got int: 3, expected a list of integers"):
        run_exported(package, 3)  # type: ignore[arg-type]
    indices: tuple[Any, ...] = (-1, 1.5)
    for index in indices:
        with pytest.raises(UserError, match=f"first_index: got {index}, expected an integer of 0 or more"):
            run_exported(package, [3], first_index=index)
    with pytest.raises(UserError, match="labels: got 10, expected 0 to 9"):
        run_exported(package, [10])
    with pytest.raises(UserError, match="No such file or directory"):
        run_exported(tmp_path / "none.pt2", LABELS)
    (tmp_path / "text.pt2").write_text("no archive")
    with pytest.raises(UserError, match="it is no zip archive"):
        run_exported(tmp_path / "text.pt2", LABELS)
    program = torch.export.export(nn.Linear(2, 2), (torch.zeros(1, 2),))
    torch.export.save(program, tmp_path / "other.pt2")
    with pytest.raises(UserError, match="was not written by export_step"):
        run_exported(tmp_path / "other.pt2", LABELS)


def test_places_and_models_are_checked_before_the_trace(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.export.export", lambda *args, **how: pytest.fail("it was traced"))
    (tmp_path / "folder.pt2").mkdir()
    with pytest.raises(UserError, match="is a folder; a file name is needed"):
        export_step(model, TRAINED, tmp_path / "folder.pt2", CONFIG)
    with torch.device("meta"):
        empty = build_model(MODEL)
    with pytest.raises(UserError, match="model: it is on the meta device"):
        export_step(empty, TRAINED, tmp_path / "step.pt2", CONFIG)
    process: Any = create_diffusion("")
    with pytest.raises(
        UserError, match=r"^diffusion: got GaussianDiffusion, expected the DiffusionConfig of"
    ):
        export_step(model, process, tmp_path / "step.pt2", CONFIG)
    assert [path.name for path in tmp_path.iterdir()] == ["folder.pt2"]


def test_what_a_killed_export_left_is_removed(model: nn.Module, tmp_path: Path) -> None:
    left = tmp_path / ".step.pt2.0123abcd.partial"
    left.mkdir()
    (left / "step.pt2").write_text("half")
    path = export_step(model, TRAINED, tmp_path / "step.pt2", CONFIG)
    assert list(tmp_path.iterdir()) == [path]


def rewritten(package: Path, path: Path, change: Callable[[str, bytes], bytes | None]) -> Path:
    """A copy of ``package`` with each member as ``change`` returns it; None leaves a member out."""
    with zipfile.ZipFile(package) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            if (content := change(name, old.read(name))) is not None:
                new.writestr(name, content)
    return path


def unloadable(path: Path, message: str) -> None:
    with pytest.raises(UserError, match=message) as refusal:
        run_exported(path, LABELS)
    assert "\n" not in str(refusal.value)


def test_damaged_files_are_refused(package: Path, tmp_path: Path) -> None:
    path = tmp_path / "step.pt2"
    whole = package.read_bytes()
    with zipfile.ZipFile(package) as archive:
        infos = {info.filename: info for info in archive.infolist()}
    weights = next(info for name, info in infos.items() if "/weights/" in name and info.file_size >= 64)
    at = weights.header_offset + len(weights.filename) + 30
    at += int.from_bytes(whole[weights.header_offset + 28 : weights.header_offset + 30], "little")
    path.write_bytes(whole[: at + 8] + bytes([whole[at + 8] ^ 16]) + whole[at + 9 :])
    unloadable(path, "damaged: .* is not as it was written")
    path.write_bytes(whole[: len(whole) // 2])
    unloadable(path, "it is no zip archive")
    for part in ("/models/", "/weights/", ".json"):
        some = [name for name in infos if part in name and "/extra/" not in name]
        rewritten(package, path, lambda name, content: None if name in some else content)  # noqa: B023
        unloadable(path, "the step in it cannot be loaded")
    path.write_bytes(whole.replace(b"PK\3\4", b"PK\3\5", 1))
    unloadable(path, "damaged: .* is not as it was written")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("model", None, "model: got NoneType, expected a table of settings"),
        ("model", {"depth": "4"}, "model.depth: got '4', expected int"),
        ("diffusion", [], "diffusion: got list, expected a table of settings"),
        ("sample", {"step": 4}, "sample: unknown key 'step'"),
        ("guided", 1, "guided: got 1, expected true or false"),
        ("batch", "3", "batch: got '3', expected null or 1 or more"),
        ("format", 9, "has format 9, this version reads 1"),
    ],
)
def test_wrong_descriptions_are_refused(
    package: Path, tmp_path: Path, name: str, value: object, message: str
) -> None:
    def change(member: str, content: bytes) -> bytes:
        if not member.endswith("/mdt_fast.json"):
            return content
        return json.dumps({**json.loads(content), name: value}).encode()

    unloadable(rewritten(package, tmp_path / "step.pt2", change), message)


class Own(MDTv2):
    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return super().forward(*args, **kwargs)


def test_what_is_not_ours_is_named(model: nn.Module, tmp_path: Path) -> None:
    hooked, modulated = copy.deepcopy(model), copy.deepcopy(model)
    hooked.register_forward_hook(lambda *args: None)
    modulated.final_layer.adaLN_modulation = nn.Identity()
    for other, message in (
        (Own(**MODEL.kwargs()), "model: got Own with its own forward, expected this package's"),
        (modulated, "model: got MDTv2 with its own adaLN_modulation, expected SiLU and a linear layer"),
        (hooked, "model: has hooks, FSDP or torch.compile around it; export the model without them"),
        (torch.compile(model), "model: has hooks, FSDP or torch.compile around it"),
    ):
        with pytest.raises(UserError, match=f"^{message}"):
            export_step(other, TRAINED, tmp_path / "step.pt2", CONFIG)
