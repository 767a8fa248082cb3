"""A user's own data set in the trainer."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mdt_fast import UserError, train
from mdt_fast.config import DataConfig
from mdt_fast.data import open_images
from tiny import tensors_of, tiny


class Own:
    """The digits again, as a user's own class."""

    def __init__(self, **changes: Any):
        digits = open_images(DataConfig())
        self.digits, self.labels, self.classes = digits, digits.labels, list(digits.classes)
        self.shape, self.in_memory = digits.shape, False
        vars(self).update(changes)

    def load(self, index: int, rng: random.Random, mirror: bool = False) -> Any:
        return self.digits.load(index, rng, mirror)


def test_it_trains_as_the_same_images_do(tmp_path: Path) -> None:
    config = tiny(steps=4, save_every=2, tensorboard=False)
    train(config, tmp_path / "known")
    train(replace(config, train=replace(config.train, steps=2)), str(tmp_path / "own"), images=Own())
    assert train(config, str(tmp_path / "own"), images=Own(), resume="auto").steps == 4
    last = Path("checkpoints", "step_0000004")
    assert tensors_of(tmp_path / "own" / last) == tensors_of(tmp_path / "known" / last)
    with pytest.raises(UserError, match="its classes differ from those of the run"):
        train(config, tmp_path / "own", images=Own(classes=[*"abcdefghij"]), resume="auto")


def test_it_trains_without_classes_too(tmp_path: Path) -> None:
    config = tiny(steps=2, save_every=2, tensorboard=False)
    config = replace(
        config,
        data=replace(config.data, conditional=False),
        model=replace(config.model, num_classes=1, class_dropout_prob=0.0),
        sample=replace(config.sample, cfg_scale=1.0),
    )
    images = Own()
    train(config, tmp_path / "known")
    train(config, tmp_path / "own", images=images)
    last = Path("checkpoints", "step_0000002")
    assert tensors_of(tmp_path / "own" / last) == tensors_of(tmp_path / "known" / last)
    assert (len(images.classes), images.labels.max()) == (10, 9)  # the user's own set keeps its classes

    class Fixed(Own):
        classes = property(lambda _: [*"0123456789"], lambda *_: None)  # type: ignore[assignment]
        labels = property(lambda self: self.digits.labels)  # type: ignore[assignment]

        def __init__(self) -> None:
            self.digits = open_images(DataConfig())
            self.shape, self.in_memory = self.digits.shape, True

    with pytest.raises(UserError, match=r"^images: the labels and classes of a Fixed cannot be replaced"):
        train(config, tmp_path / "fixed", images=Fixed())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": np.zeros(3)}, r"images.labels: got float64 \(3,\), expected a list of integers"),
        ({"labels": np.zeros(0, int)}, r"images.labels: got int64 \(0,\), expected a list of integers"),
        ({"labels": np.array([0, 10])}, r"images.labels: got 0 to 10, expected 0 to 9, .*"),
        ({"shape": (1, 8, 9)}, r"images.shape: \[1, 8, 9\], but \[1, 8, 8\] is configured \(data.channels"),
        (
            {"load": lambda *_: np.zeros((1, 8, 9), np.float32)},
            r"images.load: returned float32 \[1, 8, 9\], expected float32",
        ),
        ({"load": lambda *_: None}, r"images.load: returned a NoneType, expected an array"),
        ({"classes": range(10)}, r"images.classes: got \[0, 1, 2, 3\], expected names"),
        ({"load": lambda *_: np.zeros((1, 8, 8))}, r"images.load: returned float64"),
    ],
    ids=["floats", "none", "no such class", "another size", "another shape", "nothing", "numbers", "float64"],
)
def test_what_is_no_set_of_images(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        train(tiny(), tmp_path / "run", images=Own(**changes))
    assert not (tmp_path / "run" / "config.json").exists()


def test_what_is_nothing_of_the_kind(tmp_path: Path) -> None:
    images: Any = [1, 2]
    with pytest.raises(UserError, match=r"images: a list has no labels; see mdt_fast.data.ImageSet"):
        train(tiny(), tmp_path / "run", images=images)
    config: Any = "digits"
    with pytest.raises(UserError, match=r"config: got str, expected a RunConfig"):
        train(config, tmp_path / "run")


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("train", {"optimizer": "sgd"}, "train.optimizer: got 'sgd', expected 'adan', 'adamw'"),
        ("train", {"parallel": "zero"}, "train.parallel: got 'zero', expected 'fsdp', 'hybrid', 'ddp'"),
        ("train", {"steps": 10.5}, "train.steps: got 10.5, expected int"),
        ("train", {"ema_decay": "0.9"}, "train.ema_decay: got '0.9', expected float"),
        ("train", {"float8_by": "nvidia"}, "train.float8_by: got 'nvidia', expected 'kernels', 'torchao'"),
        ("data", {"crop": "middle"}, "data.crop: got 'middle', expected 'center', 'random'"),
        ("diffusion", {"noise_schedule": 3}, "diffusion.noise_schedule: got 3, expected 'linear'"),
    ],
)
def test_settings_that_are_none(section: str, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    """Settings made in Python have not been checked before."""
    config = tiny(steps=2)
    config = replace(config, **{section: replace(getattr(config, section), **changes)})
    with pytest.raises(UserError, match=f"^{message}"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_errors_name_pythons_arguments(tmp_path: Path) -> None:
    """The command line replaces them with the names of its options."""
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^out: '.*file' is a file; a folder is needed"):
        train(tiny(steps=1), tmp_path / "file")
    config = tiny(steps=1)
    with pytest.raises(UserError, match=r"^device: got 'tpu9', expected auto"):
        train(replace(config, train=replace(config.train, device="tpu9")), tmp_path / "run")
    nothing: Any = None
    with pytest.raises(UserError, match=r"^device: got None, expected auto"):
        train(replace(config, train=replace(config.train, device=nothing)), tmp_path / "run")
    for out in ("", nothing):
        with pytest.raises(UserError, match=f"^out: got {out!r}, expected a folder"):
            train(config, out)
    yes: Any = True
    for resume in ("", yes):
        with pytest.raises(UserError, match=f"^resume: got {resume!r}, expected None, 'auto' or the path"):
            train(config, tmp_path / "run", resume=resume)
    train(config, tmp_path / "run")
    assert train(config, tmp_path / "run", resume=tmp_path / "run").steps == 1
