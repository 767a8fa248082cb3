"""Weights of one image size, resized for a model of another."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mdt_fast import MDT, DiT, MDTv2, UserError, load_weights, resize_weights
from mdt_fast.cli import main
from mdt_fast.config import to_dict
from mdt_fast.reference.embed import sincos_position_table
from mdt_fast.training import train
from mdt_fast.training.checkpoint import open_checkpoint
from tiny import tiny

SHAPE: dict[str, Any] = {
    "in_channels": 3, "hidden_size": 32, "num_heads": 2, "depth": 2, "num_classes": 5, "patch_size": 2,
}  # fmt: skip
FAMILIES: dict[type, dict[str, Any]] = {
    MDTv2: {"decode_layer": 0, "mask_ratio": 0.3}, MDT: {"decode_layer": 1, "mask_ratio": 0.3}, DiT: {},
}  # fmt: skip
TABLE = "sideblocks.0.attn.rel_pos_bias.relative_position_bias_table"


def model(cls: type, input_size: int) -> Any:
    torch.manual_seed(0)
    return cls(input_size=input_size, **SHAPE, **FAMILIES[cls])


@pytest.mark.parametrize("cls", FAMILIES, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("size", [2, 6, 16, 26])
def test_models_of_other_sizes_take_them(cls: type, size: int) -> None:
    state = resize_weights(model(cls, 8).bfloat16().state_dict(), size)
    other = model(cls, size).bfloat16()
    load_weights(other, state)
    x, labels = torch.randn(2, 3, size, size).bfloat16(), torch.tensor([0, 5])
    assert other.eval()(x, torch.tensor([3.0, 700.0]), labels).shape == (2, 6, size, size)


def test_of_the_same_size_they_are_the_same_tensors() -> None:
    state = model(MDTv2, 8).state_dict()
    assert all(value is state[key] for key, value in resize_weights(state, 8).items())
    larger = resize_weights(state, 16)
    changed = {key.rpartition(".")[2] for key, value in larger.items() if value is not state[key]}
    assert changed == {
        "pos_embed", "decoder_pos_embed", "relative_position_bias_table", "relative_position_index",
    }  # fmt: skip


@pytest.mark.parametrize("after", [3, 7, 20])
def test_positions_are_the_table_at_the_places_and_what_was_learnt(after: int) -> None:
    before, D = 7, 32
    learnt = torch.randn(1, before**2, D, dtype=torch.float64)
    state = model(MDT, 2 * before).double().state_dict()
    state["decoder_pos_embed"] = sincos_position_table(D, before)[None]  # nothing learnt in this one
    state["pos_embed"] = state["decoder_pos_embed"] + learnt
    resized = resize_weights(state, 2 * after)
    places = (np.arange(after) + 0.5) * before / after - 0.5
    first_row = resized["decoder_pos_embed"][0, :after, 0]  # the column's highest frequency
    np.testing.assert_allclose(first_row, np.sin(places), atol=1e-12)
    alone = resized["pos_embed"] - resized["decoder_pos_embed"]
    for i, j in np.ndindex(after, after):
        row, column = (cubic_shares(places[n], before) for n in (i, j))
        expected = sum(a * b * learnt[0, r * before + c] for r, a in row.items() for c, b in column.items())
        torch.testing.assert_close(alone[0, i * after + j], expected, rtol=0, atol=1e-12)


def cubic_shares(place: float, side: int) -> dict[int, float]:
    """The share of each of ``side`` values in the value at ``place``: a cubic through the four around it,
    with the slopes between their neighbours (border values continue beyond the border)."""
    first, found = math.floor(place), {}
    t = place - first
    for offset, share in zip(
        range(-1, 3),
        (-t * (1 - t) ** 2, 2 + t**2 * (3 * t - 5), t * (1 + (4 - 3 * t) * t), -(t**2) * (1 - t)),
        strict=True,
    ):
        tap = min(max(first + offset, 0), side - 1)
        found[tap] = found.get(tap, 0.0) + share / 2
    return found


@pytest.mark.parametrize("after", [6, 8, 16, 23])
def test_a_bias_of_the_distance_stays_that(after: int) -> None:
    """The bias is quadratic in the offsets, which are measured in parts of the picture's side."""

    def table(grid: int) -> torch.Tensor:
        offsets = torch.arange(1 - grid, grid, dtype=torch.float64) / grid
        bias = 3 * offsets[:, None] ** 2 - 2 * offsets * offsets[:, None] + offsets
        return torch.cat([bias.flatten(), torch.tensor([7.0, 8.0, 9.0])])[:, None].expand(-1, 2)

    state = model(MDTv2, 16).double().state_dict()
    state[TABLE] = table(8)
    resized, expected = resize_weights(state, 2 * after)[TABLE], table(after)
    assert torch.equal(resized[-3:], expected[-3:])
    border = math.ceil(2 * after / 8)  # further inside than two old tokens, the border has no influence
    inner, side = slice(border, -border), 2 * after - 1
    squares = (t[:-3].unflatten(0, (side, side))[inner, inner] for t in (resized, expected))
    torch.testing.assert_close(*squares, rtol=0, atol=1e-12)


def test_twice_the_size_and_back() -> None:
    state = model(MDTv2, 16).double().state_dict()
    back = resize_weights(resize_weights(state, 32), 16)
    torch.testing.assert_close(back[TABLE], state[TABLE], rtol=0, atol=1e-12)


def test_what_cannot_be_resized() -> None:
    state = model(MDT, 8).state_dict()
    sizes: list[Any] = [7, 0, -2, True, 8.0, "16"]
    for size in sizes:
        with pytest.raises(UserError, match=r"^input_size: got .*, expected multiples of .* 2$"):
            resize_weights(state, size)
    for other in ({"weight": torch.zeros(3)}, model(DiT, 8)):
        with pytest.raises(UserError, match=r"^state: not weights of an MDT, MDTv2 or DiT \(lacks"):
            resize_weights(other, 8)
    with pytest.raises(UserError, match=r"^state: 15 tokens, expected a square number of them$"):
        resize_weights({**state, "pos_embed": torch.zeros(1, 15, 32)}, 8)


def test_a_run_starts_from_weights_of_another_size(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny(steps=1, tensorboard=False)
    settings = tmp_path / "settings.yaml"
    settings.write_text(json.dumps({"preset": "digits", **to_dict(config)}))
    for name in "ab":
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(3):
            pixels = np.random.default_rng(i).integers(0, 256, (16, 16), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{i}.png")
    weights = MDTv2(**config.model.kwargs()).state_dict()
    torch.save(weights, tmp_path / "small.pt")
    command = [
        "convert", str(tmp_path / "small.pt"), str(tmp_path / "run"), "--config", str(settings),
        "--data", str(tmp_path / "images"), "--image-size=16",
    ]  # fmt: skip
    assert main(command) == 2
    assert "--image-size 8 fits the images to it, --set model.input_size=16" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert main([*command, "--set=model.input_size=15"]) == 2
    assert main([*command, "--set=model.input_size=16"]) == 0
    assert "position embeddings and bias tables are resized" in capsys.readouterr().out
    opened, resized = open_checkpoint(tmp_path / "run"), resize_weights(weights, 16)
    tensors = opened.tensors("ema")
    assert all(torch.equal(tensors[key], resized[key]) for key in tensors)
    assert opened.config.model == replace(config.model, input_size=16)
    assert train(opened.config, tmp_path / "run", resume="auto").steps == 1
