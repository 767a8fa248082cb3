"""Files of other trainings: averaged models, an EMA beside the model, several parts under one roof."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from mdt_fast import DiT, load_weights, read_weights
from mdt_fast.errors import UserError

SHAPE: dict[str, Any] = {"input_size": 4, "hidden_size": 16, "depth": 1, "num_heads": 2, "num_classes": 3}


def under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


@pytest.mark.parametrize("entry", [None, "ema", "state_dict"])
def test_an_averaged_model(entry: str | None, tmp_path: Path) -> None:
    model, loaded = DiT(**SHAPE), DiT(**SHAPE)
    averaged = AveragedModel(model)
    averaged.update_parameters(model)
    state = averaged.state_dict()
    torch.save(state if entry is None else {entry: state, "epoch": 1}, tmp_path / "averaged.pt")
    load_weights(loaded, read_weights(tmp_path / "averaged.pt"))
    assert torch.equal(loaded.final_layer.linear.weight, averaged.module.final_layer.linear.weight)
    assert torch.equal(loaded.t_embedder.mlp[0].weight, model.t_embedder.mlp[0].weight)


def test_the_average_is_preferred_under_its_other_name(tmp_path: Path) -> None:
    model, ema = DiT(**SHAPE), DiT(**SHAPE)
    torch.save({"model": model.state_dict(), "model_ema": ema.state_dict(), "epoch": 1}, tmp_path / "w.pt")
    found = read_weights(tmp_path / "w.pt")
    assert torch.equal(found["t_embedder.mlp.0.weight"], ema.t_embedder.mlp[0].weight)


def test_several_parts_under_one_roof_say_which_to_load(tmp_path: Path) -> None:
    model = DiT(**SHAPE)
    state = model.state_dict()
    mixed = {**under("model.", state), **under("ema.", state), "vae.conv.weight": torch.zeros(1)}
    torch.save({"state_dict": mixed}, tmp_path / "last.ckpt")
    found = read_weights(tmp_path / "last.ckpt")
    with pytest.raises(
        UserError, match=r"names that begin with 'ema\.' and 'model\.' are this model's"
    ) as error:
        load_weights(model, found, "last.ckpt")
    advice = str(error.value).rpartition("load one of them, ")[2]
    load_weights(model, eval(advice, {"state": found}))
    with pytest.raises(UserError) as error:
        load_weights(model, {**under("model.", state), "vae.conv.weight": torch.zeros(1)})
    assert "begin with 'model.' are this model's" in str(error.value)
    with pytest.raises(UserError) as error:
        load_weights(model, {"vae.conv.weight": torch.zeros(1)})
    assert "begin with" not in str(error.value)
