"""``python -m mdt_fast.official``: an official script, unchanged, on the fast models."""

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import argparse
import helper_beside_the_script
import masked_diffusion.models as models_mdt
parser = argparse.ArgumentParser()
parser.add_argument("--model")
args = parser.parse_args()
if __name__ == "__main__":
    print(type(models_mdt.__dict__[args.model](input_size=8, mask_ratio=None, decode_layer=None)).__module__)
"""


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mdt_fast.official", *arguments]
    return subprocess.run(command, cwd=cwd, env={"PYTHONPATH": str(cwd)}, capture_output=True, text=True)


def test_a_script_runs_on_the_fast_models(tmp_path: Path) -> None:
    (tmp_path / "masked_diffusion").mkdir()
    (tmp_path / "masked_diffusion" / "__init__.py").write_text("")
    (tmp_path / "masked_diffusion" / "models.py").write_text("import a_package_nobody_has\n")
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "train.py").write_text(SCRIPT)
    (tmp_path / "scripts" / "helper_beside_the_script.py").write_text("")
    done = run("scripts/train.py", "--model", "MDTv2_S_2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "mdt_fast.models.mdt"


def test_other_names_of_the_official_file(tmp_path: Path) -> None:
    """They come from that file, or the error says what this package has in their place."""
    (tmp_path / "masked_diffusion").mkdir()
    (tmp_path / "masked_diffusion" / "__init__.py").write_text("")
    (tmp_path / "script.py").write_text(
        "from masked_diffusion.models import MDTv2, MDTBlock\nprint(MDTBlock)"
    )
    done = run("script.py", cwd=tmp_path)
    assert done.stderr.splitlines()[-1] == (
        "ImportError: MDTBlock: the official masked_diffusion.models cannot be imported (there is no "
        "models.py); mdt_fast provides mdt_fast.models.blocks.Block in its place"
    )
    (tmp_path / "masked_diffusion" / "models.py").write_text("from .other import MDTBlock\nMDTv2 = None\n")
    done = run("script.py", cwd=tmp_path)
    assert "(No module named 'masked_diffusion.other')" in done.stderr.splitlines()[-1]
    (tmp_path / "masked_diffusion" / "other.py").write_text("MDTBlock = 3\n")
    assert run("script.py", cwd=tmp_path).stdout == "3\n"


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    done = run("nothing.py", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (2, "mdt_fast.official: error: nothing.py: no such script\n")
    (tmp_path / "script.py").write_text("")
    done = run("script.py", cwd=tmp_path)
    assert done.returncode == 2
    assert "masked_diffusion cannot be imported" in done.stderr
    assert "`from mdt_fast import DiT_models`" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert run(cwd=tmp_path).returncode == 2
