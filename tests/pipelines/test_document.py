"""What docs/diffusers.md tells a user to type works, in its order."""

import re
from pathlib import Path

import pytest

from mdt_fast.cli import main
from tiny import ARGUMENTS

SMALLER = [
    ("num_inference_steps=50", "num_inference_steps=5"),
    ("MDTv2_S_2(", "MDTv2(hidden_size=16, depth=6, num_heads=2, "),
]
DOCUMENT = (Path(__file__).parents[2] / "docs" / "diffusers.md").read_text()


def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As printed, except for small models, two updates and fewer steps."""
    monkeypatch.chdir(tmp_path)
    quick = ["--steps=2", "--save-every=2", "--set=sample.steps=2", "--device=cpu"]
    assert main(["train", "--preset=digits", *ARGUMENTS, *quick, "--out=runs/digits"]) == 0
    examples = re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL)
    assert len(examples) == 3
    names: dict[str, object] = {}
    for code in examples:
        for printed, run in SMALLER:
            code = code.replace(printed, run)
        exec(code, names)
    assert (tmp_path / "three.png").is_file()
    assert (tmp_path / "s2" / "README.md").is_file()
    assert (tmp_path / "own" / "model_index.json").is_file()
