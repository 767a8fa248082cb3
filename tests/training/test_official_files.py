"""A run to the official loop's files and back, bit for bit; labels, layouts, and files that do not fit."""

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from golden_files import load, meta
from mdt_fast import reference
from mdt_fast.cli import main, parse
from mdt_fast.commands.official_config import _published
from mdt_fast.config import RunConfig, to_dict
from mdt_fast.models import zoo
from mdt_fast.models.convert import label_rows, shape_of
from mdt_fast.presets import PRESETS
from mdt_fast.training import train
from mdt_fast.training.checkpoint import open_checkpoint
from mdt_fast.training.official_files import find_files
from tiny import LEAN, needs_csrc, tensors_of, tiny

REFERENCE = {"mdtv2": reference.MDTv2, "mdt": reference.MDT, "dit": reference.DiT}
SHAPES: dict[str, dict[str, Any]] = {
    "mdtv2": {"depth": 5, "decode_layer": 2, "mlp_ratio": 2.3},  # a block is dropped, and a width rounded
    "mdt": {"depth": 3, "decode_layer": 1},
    "dit": {"depth": 2, "decode_layer": 0, "mask_ratio": None},
}


def config_of(family: str, **settings: Any) -> RunConfig:
    """A tiny run with the family's optimiser."""
    adan = family == "mdtv2"
    recipe = {"optimizer": "adan" if adan else "adamw", "max_grad_norm": float(adan), "tensorboard": False}
    config = tiny(**{**recipe, **settings})
    return replace(config, model=replace(config.model, family=family, **SHAPES[family]))


def convert(*arguments: object) -> None:
    assert main(["convert", *map(str, arguments)]) == 0


def error(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that a refused conversion prints."""
    capsys.readouterr()
    assert main(["convert", *map(str, arguments)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    return line.removeprefix("mdt-fast: error: ")


def as_yaml(folder: Path, config: RunConfig) -> Path:
    """A ``--config`` file in JSON, which YAML can read."""
    path = folder / "settings.yaml"
    path.write_text(json.dumps({"preset": "digits", **to_dict(config)}))
    return path


def saved(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    ("family", "settings"),
    [*((family, {}) for family in SHAPES), pytest.param("mdtv2", LEAN, marks=needs_csrc)],
    ids=str,
)
def test_to_official_files_and_back(family: str, settings: dict[str, Any], tmp_path: Path) -> None:
    """All tensors keep their bits, also in the run that goes on from the files. (The files' moments are
    float32 until a run has rounded them.)"""
    config = config_of(family, steps=5, save_every=3, **settings)
    train(config, tmp_path / "whole")
    step_3, step_5 = (tmp_path / "whole" / "checkpoints" / f"step_000000{step}" for step in (3, 5))
    convert(step_3, tmp_path / "official", "--official")
    assert saved(tmp_path / "official") == ["ema_0.995_000002.pt", "model000002.pt", "opt000002.pt"]
    packed = torch.load(tmp_path / "official" / "opt000002.pt", weights_only=True)
    assert {t.dtype for entries in packed["state"].values() for t in entries.values()} == {torch.float32}
    convert(tmp_path / "official", tmp_path / "run", "--config", as_yaml(tmp_path, config))
    back = tmp_path / "run" / "checkpoints"
    found, wanted = (tensors_of(folder) for folder in (back / "step_0000003", step_3))
    if settings:
        assert all(found[key] == wanted[key] for key in wanted if "optimizer/" not in key)
    else:
        assert found == wanted
    opened, before = open_checkpoint(back / "step_0000003"), open_checkpoint(step_3)
    assert opened.config == before.config
    moments, moments_before = (opened.tensors("optimizer") for opened in (opened, before))
    assert all(
        torch.equal(moments[key], value.to(moments[key].dtype)) for key, value in moments_before.items()
    )
    (group,), (group_before,) = (opened.state["optimizer_groups"] for opened in (opened, before))
    assert {**group, "lr": 0} == {**group_before, "lr": 0}  # each step sets the rate
    assert json.loads((tmp_path / "run" / "config.json").read_text()) == to_dict(config)
    assert train(config, tmp_path / "run", resume="auto").steps == 5
    assert tensors_of(back / "step_0000005") == tensors_of(step_5)


@pytest.mark.parametrize("family", SHAPES)
def test_the_files_are_what_the_official_loop_loads(family: str, tmp_path: Path) -> None:
    config = config_of(family, steps=3, lr_anneal_steps=10)
    train(config, tmp_path / "run")
    convert(tmp_path / "run", tmp_path, "--official")
    opened = open_checkpoint(tmp_path / "run")
    model = REFERENCE[family](**config.model.kwargs())
    for name, part in (("model000002.pt", "model"), ("ema_0.995_000002.pt", "ema")):
        state = torch.load(tmp_path / name, weights_only=True)
        assert list(state) == list(model.state_dict())
        model.load_state_dict(state, strict=True)
        for key, tensor in opened.tensors(part).items():
            assert torch.equal(dict(model.named_parameters())[key].detach(), tensor)

    packed = torch.load(tmp_path / "opt000002.pt", weights_only=True)
    names = [name for name, _ in model.named_parameters()]
    trained = [i for i, p in enumerate(model.parameters()) if p.requires_grad]
    (group,) = packed["param_groups"]
    assert group["params"] == list(range(len(names)))
    assert list(packed["state"]) == trained
    assert group["lr"] == config.train.lr * (1 - 2 / 10)  # the loop anneals after the step, then saves
    moments = opened.tensors("optimizer")
    for i, entries in packed["state"].items():
        for entry, tensor in entries.items():
            assert torch.equal(tensor, moments[f"{names[i]}/{entry}"])
    if family == "mdtv2":
        assert set(packed["state"][0]) == {"exp_avg", "exp_avg_sq", "exp_avg_diff", "neg_pre_grad"}
        expected = {
            "betas": (0.98, 0.92, 0.99), "eps": 1e-8, "weight_decay": 0.0, "max_grad_norm": 1.0, "step": 3,
            "no_prox": False, "foreach": True, "fused": True,
        }  # fmt: skip
        assert {key: group[key] for key in expected} == expected
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1.0)
        optimizer.load_state_dict(packed)
        assert optimizer.param_groups[0]["lr"] == group["lr"]
        assert {int(state["step"]) for state in optimizer.state.values()} == {3}


@pytest.fixture
def official(tmp_path: Path) -> tuple[Path, Any, Any, Any]:
    """What an official run leaves: an MDT v1 and its AdamW, written by torch alone."""
    torch.manual_seed(0)
    model = REFERENCE["mdt"](**config_of("mdt").model.kwargs())
    average = REFERENCE["mdt"](**config_of("mdt").model.kwargs())
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4, weight_decay=0.01, betas=(0.8, 0.95))
    for _ in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    folder = tmp_path / "logs"
    folder.mkdir()
    for label, state in (("000002", model), ("000000", average)):
        torch.save(state.state_dict(), folder / f"model{label}.pt")
    torch.save(average.state_dict(), folder / "ema_0.999_000002.pt")
    torch.save(optimizer.state_dict(), folder / "opt000002.pt")
    return folder, model, average, optimizer


def test_an_official_run_goes_on(
    official: tuple[Path, Any, Any, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, model, average, optimizer = official
    options = ["--preset=digits", "--set=model.family=mdt", "--set=model.decode_layer=1"]
    convert(folder, tmp_path / "run", *options, "--set=train.device=cpu", "--set=train.batch_size=4")
    printed = capsys.readouterr().out
    assert "2 steps in" in printed
    assert "using the newest: model000002.pt" in printed
    for change in (
        "model.depth 3 (not 6)", "train.ema_decay 0.999 (not 0.995)", "train.weight_decay 0.01 (not 0.0)",
    ):  # fmt: skip
        assert change in printed
    assert "warning" not in printed
    opened = open_checkpoint(tmp_path / "run")
    settings = opened.config.train
    assert opened.step == 3
    # digits warms up for 50 steps: the rate of the third is the schedule's, not the recipe's
    assert (settings.lr, settings.weight_decay, settings.ema_decay) == (3e-3, 0.01, 0.999)
    assert opened.state["optimizer_groups"][0]["betas"] == [0.8, 0.95]
    for part, module in (("model", model), ("ema", average)):
        tensors = opened.tensors(part)
        assert {key: p.tolist() for key, p in module.named_parameters()} == {
            key: tensor.tolist() for key, tensor in tensors.items()
        }
    moments = opened.tensors("optimizer")
    for name, parameter in model.named_parameters():
        for entry, tensor in optimizer.state[parameter].items():
            assert torch.equal(moments[f"{name}/{entry}"], tensor)
    more = replace(opened.config, train=replace(settings, steps=5))
    assert train(more, tmp_path / "run", resume="auto").steps == 5


def test_without_average_and_optimiser_they_start_anew(
    official: tuple[Path, Any, Any, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _, average, _ = official
    options = ["--preset=digits", "--set=model.family=mdt", "--set=train.warmup_steps=0"]
    convert(folder / "model000000.pt", tmp_path / "run", *options, "--set=train.steps=2")
    printed = capsys.readouterr().out
    assert "warning: no ema_0.995_000000.pt beside model000000.pt: the EMA starts as a copy" in printed
    assert "warning: no opt000000.pt beside model000000.pt: the optimiser's moments start at zero" in printed
    opened = open_checkpoint(tmp_path / "run")
    assert opened.step == 1
    assert opened.tensors("optimizer").keys() == {"counters/skipped_steps"}
    for part in ("model", "ema"):
        assert torch.equal(opened.tensors(part)["pos_embed"], average.pos_embed.detach())
    assert train(replace(opened.config), tmp_path / "run", resume="auto").steps == 2


def test_published_weights_start_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = config_of("mdtv2", steps=2)
    torch.manual_seed(0)
    model = REFERENCE["mdtv2"](**config.model.kwargs())
    torch.save(model.state_dict(), tmp_path / "mdt_v2_ckpt.pt")
    convert(tmp_path / "mdt_v2_ckpt.pt", tmp_path / "fine", "--config", as_yaml(tmp_path, config))
    assert "mdt_v2_ckpt.pt is step 0 of" in capsys.readouterr().out
    opened = open_checkpoint(tmp_path / "fine")
    assert (opened.step, opened.config) == (0, config)
    assert torch.equal(opened.tensors("ema")["pos_embed"], model.pos_embed.detach())
    assert "is at step 0, and" in error(capsys, tmp_path / "fine", tmp_path / "x", "--official")
    assert train(config, tmp_path / "fine", resume="auto").steps == 2


def test_published_weights_learn_other_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """If asked for, the label table is new, except the null class; otherwise a note names the mismatch."""
    config = config_of("mdtv2", steps=1)
    torch.manual_seed(0)
    weights = REFERENCE["mdtv2"](**{**config.model.kwargs(), "num_classes": 12}).state_dict()
    torch.save(weights, tmp_path / "twelve.pt")
    yaml = as_yaml(tmp_path, replace(config, model=replace(config.model, num_classes=12)))
    convert(tmp_path / "twelve.pt", tmp_path / "kept", "--config", yaml)
    assert "the data has 10 classes, the weights 12" in capsys.readouterr().out
    convert(tmp_path / "twelve.pt", tmp_path / "new", "--config", yaml, "--set=model.num_classes=10")
    assert "the label table is new, except the null class" in capsys.readouterr().out
    name = "y_embedder.embedding_table.weight"
    kept, new = (open_checkpoint(tmp_path / folder).tensors("ema") for folder in ("kept", "new"))
    assert torch.equal(kept[name], weights[name])
    assert new[name].shape == (11, 16)
    assert torch.equal(new[name][-1], weights[name][-1])
    assert new[name][:-1].std().item() == pytest.approx(0.02, rel=0.3)
    assert all(torch.equal(new[key], kept[key]) for key in kept if key != name)
    assert train(open_checkpoint(tmp_path / "new").config, tmp_path / "new", resume="auto").steps == 1


def test_an_optimiser_that_counted_more_and_one_that_is_done(
    official: tuple[Path, Any, Any, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, *_ = official
    for name in ("model", "opt", "ema_0.999_"):
        (folder / f"{name}000002.pt").rename(folder / f"{name}000001.pt")
    options = ["--preset=digits", "--set=model.family=mdt", "--set=train.steps=2"]
    convert(folder, tmp_path / "run", *options)
    printed = capsys.readouterr().out
    assert "opt000001.pt has counted 3 updates, but the label says 2" in printed
    assert "train.steps is 2: pass --steps N" in printed


@pytest.mark.parametrize("name", zoo.SHAPES)
def test_published_shapes_are_known_by_their_weights(name: str) -> None:
    with torch.device("meta"):
        state = zoo.make(name).state_dict()
    shape = shape_of(state)
    preset = _published(shape)
    assert preset == name.lower().replace("_", "-", 1).replace("_", "")
    wanted = to_dict(PRESETS[preset].model)
    assert {key: wanted[key] for key in shape if key != "decode_layer"} == {
        key: value for key, value in shape.items() if key != "decode_layer"
    }
    assert label_rows(state) == 1001


@pytest.mark.parametrize("name", ["v2_main", "v1_main", "v2_alt", "v1_alt", "v2_nomask", "v2_f64"])
def test_shapes_of_official_weights(name: str) -> None:
    config, shape = meta(f"{name}.cases")["config"], shape_of(load(f"{name}.state"))
    if name == "v2_alt":
        config["depth"] -= 1  # an odd depth loses a block
    unknown = {"mask_ratio", "class_dropout_prob", "num_classes", "decode_layer"}
    for key in config.keys() - unknown:
        assert shape[key] == config[key], key
    assert shape.get("decode_layer") == (config["decode_layer"] if name.startswith("v2") else None)


def test_files_that_do_not_fit(
    official: tuple[Path, Any, Any, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, model, _, optimizer = official
    run = tmp_path / "run"
    options = [folder, run, "--preset=digits", "--set=model.family=mdt"]
    assert "no modelNNNNNN.pt of the official training loop" in error(
        capsys, tmp_path, run, "--preset=digits"
    )
    assert "got 'nothing'" in error(capsys, folder, run, "--preset=nothing")
    assert "--preset: needed, as no published model has the shape" in error(capsys, folder, run)
    assert "'dit-s2' is a recipe for dit" in error(capsys, folder, run, "--preset=dit-s2")
    assert "model.depth: 4, but the weights in" in error(capsys, *options, "--set=model.depth=4")
    assert "'MDT_S_4' has hidden_size 384" in error(capsys, *options, "--model=MDT_S_4")
    assert "train.ema_decay: no EMA of rate 0.9 beside" in error(
        capsys, *options, "--set=train.ema_decay=0.9"
    )
    assert "train.optimizer: 'adan', but" in error(capsys, *options, "--set=train.optimizer=adan")
    assert "data.source" in error(capsys, *options, "--set=data.source=")
    assert "model.num_classes: 9, but the weights in" in error(capsys, *options, "--set=model.num_classes=9")
    colour = small(in_channels=3)
    torch.save(colour.state_dict(), tmp_path / "colour.pt")
    assert "model.in_channels: 3, but the data has 1" in error(
        capsys, tmp_path / "colour.pt", run, *options[2:]
    )
    spoilt = {
        "opt000002.pt": [
            ({"state": {}}, "holds no state of AdamW or Adan"),
            ([1], "holds no state of AdamW or Adan"),
            ({**optimizer.state_dict(), "state": {0: {"exp_avg": 1}}}, "holds no state of AdamW or Adan"),
            ({**optimizer.state_dict(), "state": {0: {"step": 1}}}, "state of parameter 0: no 'exp_avg'"),
            (torch.optim.AdamW([torch.ones(1)]).state_dict(), "state of 1 parameters, but the model has"),
            (torch.optim.AdamW(model.parameters(), amsgrad=True).state_dict(), "amsgrad: True is not supp"),
            (other_shapes(optimizer.state_dict()), "exp_avg of shape"),
        ],
        "ema_0.999_000002.pt": [
            ({"pos_embed": torch.ones(1)}, "weights of another model"),
            (small().state_dict(), "weights of another model"),
        ],
        "model000002.pt": [
            ({"a": torch.ones(1)}, "not weights of an MDT, MDTv2 or DiT"),
            (small().state_dict(), "weights of another model"),
            ({**model.state_dict(), "mask_token": torch.full((1, 1, 16), torch.nan)}, "are not finite"),
        ],
    }
    for name, contents in spoilt.items():
        whole = (folder / name).read_bytes()
        for content, message in contents:
            torch.save(content, folder / name)
            line = error(capsys, *options)
            assert message in line
            assert name in line or message == "weights of another model"
        (folder / name).write_bytes(whole[: len(whole) // 2])
        assert f"{folder / name}: not a readable .pt file" in error(capsys, *options)
        (folder / name).write_bytes(whole)
    assert not run.exists()
    convert(*options)
    before = tensors_of(run / "checkpoints" / "step_0000003")
    assert f"'{run}' already holds a run" in error(capsys, *options)
    assert "does not make one" in error(capsys, run, tmp_path / "x.pt", "--preset=digits")
    assert tensors_of(run / "checkpoints" / "step_0000003") == before


def test_official_files_are_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(config_of("mdtv2", steps=1), tmp_path / "run")
    convert(tmp_path / "run", tmp_path / "a" / "b", "--official")
    assert "takes label 0 as a fresh start" in capsys.readouterr().out
    files = find_files(tmp_path / "a" / "b")
    (tmp_path / "a" / "b" / "model000000.pt").write_text("mine")
    assert "model000000.pt' already exists" in error(
        capsys, tmp_path / "run", tmp_path / "a" / "b", "--official"
    )
    assert files.model.read_text() == "mine"
    assert "checkpoints are in" in error(
        capsys, tmp_path / "run", tmp_path / "run" / "checkpoints" / "step_0000001", "--official"
    )


def test_a_full_disk_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train(config_of("mdtv2", steps=1), tmp_path / "run")
    convert(tmp_path / "run", tmp_path / "files", "--official")

    def full(*_: object, **__: object) -> None:
        raise RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed")

    monkeypatch.setattr("mdt_fast.training.official_files.packed_optimizer", full)
    (tmp_path / "empty").mkdir()
    assert "opt000000.pt: cannot be written" in error(
        capsys, tmp_path / "run", tmp_path / "empty", "--official"
    )
    assert saved(tmp_path / "empty") == []
    monkeypatch.setattr("mdt_fast.training.saving.dcp.save", full)
    options = [tmp_path / "files", tmp_path / "new", "--config", as_yaml(tmp_path, config_of("mdtv2"))]
    assert "cannot save the checkpoint" in error(capsys, *options)
    assert not (tmp_path / "new").exists()


def test_commands_of_the_document_parse() -> None:
    text = (Path(__file__).parents[2] / "docs" / "official_files.md").read_text()
    commands = re.findall(r"^mdt-fast (.*)$", text, re.MULTILINE)
    assert len(commands) == 11
    for command in commands:
        assert parse(shlex.split(command)).command == command.split()[0]


def other_shapes(packed: dict[str, Any]) -> dict[str, Any]:
    """Make it the state of a model of other sizes."""
    for entries in packed["state"].values():
        entries.update({key: torch.ones(3) for key in entries if key != "step"})
    return packed


def small(**sizes: int) -> torch.nn.Module:
    return REFERENCE["mdt"](**replace(config_of("mdt").model, **{"hidden_size": 8, **sizes}).kwargs())
