"""What is no plain file is written into and never replaced."""

from __future__ import annotations

import os
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megatron_r1.errors import DataError
from megatron_r1.runtime.files import FRESH_NANOSECONDS, is_written_through, telling_times, write_atomically, written_atomically


@pytest.fixture(params=["at once", "by pieces"])
def write(request):
    """Both ways to write a file."""

    def by_pieces(path: Path, text: str) -> None:
        with written_atomically(path) as file:
            for character in text:
                file.write(character)

    return write_atomically if request.param == "at once" else by_pieces


@contextmanager
def reading(path: Path) -> Iterator[list[str]]:
    """What somebody reads from a pipe meanwhile."""
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.append(path.read_text()))
    thread.start()
    yield found
    thread.join()


def test_a_pipe_is_written_into(tmp_path, write):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path / "link"):
        if path.name == "link":
            path.symlink_to("pipe")
        with reading(path) as found:
            write(path, "text \u4e09\n")
        assert found == ["text \u4e09\n"] and stat.S_ISFIFO(path.stat().st_mode)
    assert sorted(os.listdir(tmp_path)) == ["link", "pipe"]


def test_dev_null_stays_what_it_is(tmp_path, write):
    null = tmp_path / "null"
    try:
        os.mknod(null, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        write(null, "text")
    except PermissionError:
        pytest.skip("no device can be made here, or a made one is not opened")
    assert stat.S_ISCHR(null.stat().st_mode) and os.listdir(tmp_path) == ["null"]
    assert is_written_through(Path("/dev/null"))


def test_what_the_shell_opened_is_written_into(tmp_path, write):
    with (tmp_path / "out").open("w+") as file:
        write(Path(f"/dev/fd/{file.fileno()}"), "text")
        assert (tmp_path / "out").read_text() == "text" and os.listdir(tmp_path) == ["out"]
        assert os.fstat(file.fileno()).st_ino == (tmp_path / "out").stat().st_ino
    reader, writer = os.pipe()
    write(Path(f"/dev/fd/{writer}"), "text")
    os.close(writer)
    assert os.read(reader, 100) == b"text"
    os.close(reader)


def test_plain_files_are_replaced_whole_as_before(tmp_path, write):
    path = tmp_path / "file"
    write(path, "one")
    inode = path.stat().st_ino
    keeps = path.open()
    write(path, "two")
    assert path.read_text() == "two" and path.stat().st_ino != inode and keeps.read() == "one" and os.listdir(tmp_path) == ["file"]
    keeps.close()
    with pytest.raises((DataError, IsADirectoryError)):
        write(tmp_path, "x")


def test_times_tell_nothing_of_a_file_that_changed_just_now() -> None:
    now = time.time_ns()
    assert telling_times(5, now) == telling_times(5, now + 10**12) == (0, 0), "also of one that a clock ahead wrote"
    assert telling_times(5, now - FRESH_NANOSECONDS) == (5, now - FRESH_NANOSECONDS)
