"""Files appear whole or not at all."""

import os
from pathlib import Path

import pytest

from mdt_fast.files import aside, folder_aside, remove_leftovers


def test_the_file_appears_when_the_block_is_done(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with aside(path) as file:
        file.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def interrupted() -> None:
        with aside(path) as file:
            file.write_text("half of the n")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_block_that_writes_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), aside(tmp_path / "a.txt"):
        pass
    assert not list(tmp_path.iterdir())


def test_the_umask_decides_who_may_read(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    with aside(tmp_path / "ours") as file:
        file.touch(mode=0o600)
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    with aside(tmp_path / "a.txt") as file:
        left = tmp_path / file.name
        file.write_text("new")
    left.write_text("half of the n")
    others = {"a.txt", ".notes.partial", ".a.0123abcd", "b.0123abcd.partial", ".folder.0123abcd.partial"}
    for name in others - {"a.txt", ".folder.0123abcd.partial"}:
        (tmp_path / name).write_text("")
    (tmp_path / ".folder.0123abcd.partial").mkdir()
    remove_leftovers(tmp_path)
    remove_leftovers(tmp_path / "none")
    assert {path.name for path in tmp_path.iterdir()} == others


def test_a_folder_aside_is_gone_afterwards_and_so_is_what_was_left_of_it(tmp_path: Path) -> None:
    left, others = tmp_path / ".step.pt2.0123abcd.partial", tmp_path / ".other.pt2.0123abcd.partial"
    for folder in (left, others):
        folder.mkdir()
        (folder / "half").write_text("")
    (tmp_path / ".step.pt2.89abcdef.partial").write_text("")
    with folder_aside(tmp_path / "step.pt2") as folder:
        (folder / "part").write_text("")
        assert sorted(tmp_path.iterdir()) == sorted([folder, others])
        assert folder.name.startswith(".step.pt2.")
    assert list(tmp_path.iterdir()) == [others]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell the umask")
def test_the_umask_is_read_without_setting_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All threads share it: files that others make meanwhile would become private."""
    monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("set"))
    with aside(tmp_path / "ours") as file:
        file.touch()
