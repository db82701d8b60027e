"""A folder lives as long as its process, and the next process removes what a kill left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from megatron_r1.runtime import temporary
from megatron_r1.runtime.temporary import remove_left, temporary_folder
from tests.paths import ROOT

HOLDER = """
import sys
from megatron_r1.runtime.temporary import temporary_folder
with temporary_folder("own-") as folder:
    (folder / "file").write_text("x")
    print(folder, flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def hold(place: Path) -> tuple[subprocess.Popen[str], Path]:
    environment = {**os.environ, "TMPDIR": str(place), "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_what_a_kill_left_is_removed_and_nothing_that_lives(place: Path) -> None:
    killed, left = hold(place)
    living, used = hold(place)
    weights = place / "weights"
    weights.mkdir()
    (weights / "file").write_text("y")
    (left / "link").symlink_to(weights)
    (place / "own-link").symlink_to(weights)
    (place / "own-file").write_text("z")
    (place / "other-folder").mkdir()
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert (left / "file").exists()
    with temporary_folder("own-") as folder:
        assert not left.exists() and (used / "file").exists() and folder.stat().st_mode & 0o077 == 0
        with temporary_folder("own-") as second:
            assert folder.is_dir() and second != folder, "one process may have two"
    living.communicate()
    assert living.returncode == 0 and not used.exists()
    assert {path.name for path in place.iterdir()} == {"weights", "own-link", "own-file", "other-folder"}
    assert (weights / "file").read_text() == "y"


def test_a_folder_that_is_removed_before_it_is_locked_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    made, make = [], tempfile.mkdtemp

    def make_and_lose(prefix: str) -> str:
        made.append(make(prefix=prefix))
        if len(made) == 1:
            remove_left(prefix)
        return made[-1]

    monkeypatch.setattr(temporary.tempfile, "mkdtemp", make_and_lose)
    with temporary_folder("own-") as folder:
        assert made == [made[0], str(folder)] and folder.is_dir() and not Path(made[0]).exists()


def test_without_locks_everything_stays(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(37, "No locks available")

    (place / "own-left").mkdir()
    monkeypatch.setattr(temporary.fcntl, "flock", refuse)
    with temporary_folder("own-") as folder:
        assert folder.is_dir() and (place / "own-left").is_dir()
