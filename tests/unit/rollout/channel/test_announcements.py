"""Announcements are believed only in a folder and in files that nobody else can have made."""

from __future__ import annotations

import json
import os
import stat
from dataclasses import asdict
from pathlib import Path

import pytest

from megatron_r1.errors import ConfigError
from megatron_r1.rollout.channel.announcements import Announcement, announce, find_servers

ONE = Announcement(0, 1, "node0", 4000, "6b" * 32, 17)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One in which a server is announced."""
    announce(tmp_path / "job/engines", ONE)
    return tmp_path / "job/engines"


def refused(folder: Path, match: str) -> None:
    """A trainer refuses the folder, at once."""
    with pytest.raises(ConfigError, match=match) as caught:
        find_servers(folder, 30)
    assert "\n" not in str(caught.value)


def test_folder_and_file_are_the_owners_alone(folder):
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert [path.name for path in folder.iterdir()] == ["engine_00000.json"]
    assert stat.S_IMODE((folder / "engine_00000.json").stat().st_mode) == 0o600
    assert find_servers(folder, 0) == [ONE]


def test_a_folder_that_is_there_is_used_if_nobody_else_can_write(tmp_path):
    for mode in (0o700, 0o750, 0o755):
        (tmp_path / f"{mode:o}").mkdir(mode=mode)
        (tmp_path / f"{mode:o}/notes.txt").write_text("not an announcement")
        announce(tmp_path / f"{mode:o}", ONE)
        assert find_servers(tmp_path / f"{mode:o}", 0) == [ONE]


@pytest.mark.parametrize("mode", [0o770, 0o777, 0o1777, 0o702])
def test_a_folder_into_which_others_may_write_is_refused(folder, mode):
    folder.chmod(mode)
    refused(folder, "others may write into .*engines.*chmod go-w")
    with pytest.raises(ConfigError, match="chmod go-w"):
        announce(folder, ONE)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_what_belongs_to_another_user_is_refused(folder):
    os.chown(folder / "engine_00000.json", 4321, -1)
    refused(folder, "engine_00000.json belongs to user 4321")
    (folder / "engine_00000.log").touch()
    os.chown(folder / "engine_00000.log", 4321, -1)
    with pytest.raises(ConfigError, match="engine_00000.log belongs to user 4321"):
        announce(folder, ONE)
    os.chown(folder, 4321, -1)
    refused(folder, "engines belongs to user 4321")
    with pytest.raises(ConfigError, match="engines belongs to user 4321"):
        announce(folder, ONE)


def test_links_are_not_followed(folder, tmp_path):
    (tmp_path / "link").symlink_to(folder)
    refused(tmp_path / "link", "link is a symbolic link")
    with pytest.raises(ConfigError, match="link is a symbolic link"):
        announce(tmp_path / "link", ONE)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    refused(tmp_path / "dangling", "dangling")
    with pytest.raises(ConfigError, match="dangling"):
        announce(tmp_path / "dangling", ONE)
    assert not (tmp_path / "nowhere").exists()

    victim = tmp_path / "victim"
    victim.write_text("mine")
    (folder / "engine_00000.json").unlink()
    (folder / "engine_00000.json").symlink_to(victim)
    refused(folder, "engine_00000.json cannot be read: it is a symbolic link")
    announce(folder, ONE)  # takes the place of the link and leaves what it points to
    assert victim.read_text() == "mine" and find_servers(folder, 0) == [ONE]
    (folder / "engine_00000.log").symlink_to(victim)
    with pytest.raises(ConfigError, match="engine_00000.log is no plain file"):
        announce(folder, ONE)


def test_names_that_are_taken_do_no_harm(folder, tmp_path):
    (folder / f"engine_00000.json.tmp-{os.getpid()}").symlink_to(tmp_path / "victim")  # the name that was used once
    announce(folder, ONE)
    assert not (tmp_path / "victim").exists() and find_servers(folder, 0) == [ONE]
    (folder / "engine_00000.json").unlink()
    (folder / "engine_00000.json").mkdir()
    refused(folder, "engine_00000.json is no announcement")
    with pytest.raises(ConfigError, match="engine_00000.json cannot be written"):
        announce(folder, ONE)
    (folder / "engine_00000.json").rmdir()
    assert not [path for path in folder.iterdir() if not path.is_symlink()], "half a file was left"
    os.mkfifo(folder / "engine_00000.json", 0o600)
    refused(folder, "engine_00000.json is no announcement")  # and does not wait for somebody to write into it
    (tmp_path / "file").touch()
    refused(tmp_path / "file", "file is no folder")
    with pytest.raises(ConfigError, match="file"):
        announce(tmp_path / "file", ONE)


def test_a_key_that_others_may_read_is_no_key(folder):
    (folder / "engine_00000.json").chmod(0o644)
    refused(folder, "others may read .*engine_00000.json")


@pytest.mark.parametrize(
    "change",
    [
        {"number": -1}, {"number": 1}, {"number": 0.0}, {"number": True}, {"count": "1"}, {"count": 0}, {"host": ""},
        {"host": None}, {"port": 0}, {"port": 65536}, {"port": "4000"}, {"key": "6b"}, {"key": "zz" * 32}, {"key": None},
        {"pid": "x"}, {"more": 1},
    ],
    ids=str,
)  # fmt: skip
def test_what_is_no_announcement_is_one_line(folder, change):
    (folder / "engine_00000.json").write_text(json.dumps(asdict(ONE) | change))
    refused(folder, "engine_00000.json is no announcement of a rollout server")


@pytest.mark.parametrize("text", ["", "[]", "null", "{", '{"number": 0}', "\x00", "[" * 50_000, "9" * 5000, "x" * 70_000])
def test_broken_files_are_one_line(folder, text):
    (folder / "engine_00000.json").write_text(text)
    refused(folder, "engine_00000.json is no announcement of a rollout server")


def test_files_of_another_start_are_waited_out_and_then_told(folder):
    second = [Announcement(number, 2, "node1", 4000, "6b" * 32, 17) for number in range(2)]
    announce(folder, second[1])
    with pytest.raises(ConfigError, match="2 of 1 or 2 rollout servers .* files of another start"):
        find_servers(folder, 0)
    announce(folder, second[0])
    assert find_servers(folder, 0) == second
