"""Folders as strangers have them, and parts of corpora of any size."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from megatron_r1.errors import DataError
from megatron_r1.preprocess.sources import Source, find_sources, part_size

LINE = '{"text": "a"}\n'


def write(path: Path, text: str = LINE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def refused(path: Path) -> str:
    with pytest.raises(DataError) as found:
        find_sources([path])
    return str(found.value)


def test_a_folder_gives_its_data_once_and_nothing_hidden(tmp_path):
    folder = tmp_path / "corpus"
    kept = [
        write(folder / name) for name in ("a b\nc.jsonl", "below/deep/a.json", "d.md", "\u6587.jsonl", os.fsdecode(b"\xff.jsonl"))
    ]
    for name in (".cache/huggingface/a.jsonl", ".ipynb_checkpoints/d-checkpoint.md", "._d.md", ".DS_Store", "LICENSE.txt", "x.py"):
        write(folder / name)
    write(tmp_path / "elsewhere/e.jsonl")
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "dangling").symlink_to("nowhere")  # its name says that it is no data
    socket.socket(socket.AF_UNIX).bind(str(folder / "socket"))
    sources, aside = find_sources([folder])
    assert [Path(source.path) for source in sources] == sorted([*kept, folder / "linked/e.jsonl"])
    names = {str(path.relative_to(folder)) for path in aside}
    assert names == {".cache", ".ipynb_checkpoints", "._d.md", ".DS_Store", "LICENSE.txt", "x.py", "dangling", "socket"}


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda folder: (folder / "b.jsonl").symlink_to("nowhere"), "b.jsonl: is a link to nothing"),
        (lambda folder: os.mkfifo(folder / "b.jsonl.gz"), "b.jsonl.gz: is a pipe"),
        (lambda folder: (folder / "again").symlink_to("."), "again: is a link to a folder above it"),
        (lambda folder: (folder / "b.jsonl").symlink_to("a.jsonl"), "b.jsonl: is named twice, also as"),
        (lambda folder: write(folder / "b.jsonl", ""), "b.jsonl: the file is empty"),
        (
            lambda folder: (folder / "b.json.gz").write_bytes(b"\x1f\x8b\x08\0\0\0\0\0\0\0" + b"\xff" * 50),
            "b.json.gz: cannot be read",
        ),
    ],
)
def test_what_would_be_missing_or_there_twice_is_refused(tmp_path, make, told):
    write(tmp_path / "a.jsonl")
    make(tmp_path)
    assert told in refused(tmp_path)


def test_a_folder_or_file_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    write(tmp_path / "below/a.jsonl")
    write(tmp_path / "b.jsonl")
    scan, read = os.scandir, Path.open

    def no_scan(path):
        if str(path).endswith("below"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", no_scan)
        assert refused(tmp_path) == f"{tmp_path / 'below'}: the folder cannot be read (Permission denied)"

    def no_read(path, *arguments, **named):
        if path.name == "a.jsonl":
            raise PermissionError(13, "Permission denied", str(path))
        return read(path, *arguments, **named)

    monkeypatch.setattr(Path, "open", no_read)
    assert "below/a.jsonl: cannot be read" in refused(tmp_path) and "Permission denied" in refused(tmp_path)


def test_parts_are_small_for_who_loses_one_and_few_for_a_folder():
    def parts(size: int) -> tuple[int, int]:
        part = part_size([Source("a.jsonl", "lines", size, 0, 0)])
        return part, -(-size // part)

    assert parts(1) == (16 << 20, 1) and parts(2 * 10**9) == (16 << 20, 120)
    part, count = parts(15 * 10**12 * 4)  # 15T tokens of four bytes
    assert part == 1 << 30 and count <= 1 << 16
