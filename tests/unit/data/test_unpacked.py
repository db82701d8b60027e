"""Packed files, and packed files that are traps; pipes."""

from __future__ import annotations

import gzip
import json
import os
import threading
import time
import zlib
from pathlib import Path

import pyarrow
import pytest

from megatron_r1 import cli
from megatron_r1.data import unpacked
from megatron_r1.data.record_files import read_records, read_text, stream_lines
from megatron_r1.data.unpacked import is_piped, open_unpacked, read_once
from megatron_r1.errors import DataError

LINES = b"".join(
    json.dumps({"number": i, "text": "a template that is the same for all " * 20}).encode() + b"\n" for i in range(3000)
)


def bomb(path: Path, byte: bytes, size: int) -> Path:
    """A file that unpacks to `size` times `byte`: a thousandth of it on the disk."""
    pack = zlib.compressobj(9, wbits=31)
    with path.open("wb") as file:
        for _ in range(size >> 24):
            file.write(pack.compress(byte * (1 << 24)))
        file.write(pack.flush())
    return path


def test_packed_files_are_read_as_plain_ones(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(LINES)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(LINES))
    with pyarrow.CompressedOutputStream(str(tmp_path / "a.jsonl.zst"), "zstd") as file:
        file.write(LINES)
    for name in ("a.jsonl", "a.jsonl.gz", "a.jsonl.zst"):
        with open_unpacked(tmp_path / name) as file:
            assert file.read() == LINES
        with open_unpacked(tmp_path / name) as file:
            assert sum(1 for _ in file) == 3000
    assert [line.offset for line in stream_lines(tmp_path / "a.jsonl.gz")] == [
        line.offset for line in stream_lines(tmp_path / "a.jsonl")
    ]
    many = (LINES[:700] + b"\n") * 2000  # like nothing else, and still only a hundredth on the disk
    (tmp_path / "same.jsonl.gz").write_bytes(gzip.compress(many))
    assert read_text(tmp_path / "same.jsonl.gz").encode() == many


@pytest.mark.parametrize("byte", [b"\0", b"\n", b" "])
def test_bombs_are_one_line(monkeypatch, tmp_path, byte):
    monkeypatch.setattr(unpacked, "_ALWAYS_BYTES", 16 << 20)
    path = bomb(tmp_path / "bomb.jsonl.gz", byte, 48 << 20)
    assert path.stat().st_size < 1 << 20
    started = time.process_time()
    for read in (lambda: list(stream_lines(path)), lambda: read_text(path)) if byte == b"\0" else (lambda: read_text(path),):
        with pytest.raises(DataError, match="bomb.jsonl.gz: unpacks to more than .* hundreds of times its size"):
            read()
    assert time.process_time() - started < 30


def test_broken_packed_files_are_one_line(tmp_path):
    packed = gzip.compress(LINES)
    for content in (packed[:-20], packed[:50], b"", b"x" * 100, packed[:100] + b"\xff" * 50 + packed[150:]):
        (tmp_path / "a.jsonl.gz").write_bytes(content)
        for read in (lambda: list(stream_lines(tmp_path / "a.jsonl.gz")), lambda: read_text(tmp_path / "a.jsonl.gz")):
            with pytest.raises(DataError, match="a.jsonl.gz"):
                read()


def piped(content: bytes) -> Path:
    """As the shell's <(...) gives it."""
    reader, writer = os.pipe()
    threading.Thread(target=lambda: (os.write(writer, content), os.close(writer)), daemon=True).start()
    return Path(f"/dev/fd/{reader}")


def test_pipes_are_records_a_line(tmp_path):
    path = piped(b'{"a": 1}\n{"a": 2}\n')
    for _ in range(2):
        assert [record for _, record in read_records(path)] == [{"a": 1}, {"a": 2}]
    os.mkfifo(tmp_path / "a.csv")
    threading.Thread(target=lambda: (tmp_path / "a.csv").write_text("a,b\n1,2\n"), daemon=True).start()
    assert [record for _, record in read_records(tmp_path / "a.csv")] == [{"a": "1", "b": "2"}]
    with pytest.raises(DataError, match="empty"):
        list(read_records(piped(b"")))


def test_score_reads_a_pipe_and_writes_to_one(tmp_path, capfd):
    """The whole input, although it is looked at twice, and the output as it comes."""
    lines = b"".join(json.dumps({"response": f"<think>{i}</think><answer>{i}</answer>"}).encode() + b"\n" for i in range(50))
    command = ["score", "--reward", "format", "--workers", "1", "--input"]
    assert cli.main([*command, str(piped(lines)), "--output", str(tmp_path / "out.jsonl")]) == 0
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 50
    os.mkfifo(tmp_path / "pipe")
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.append((tmp_path / "pipe").read_text()))
    thread.start()
    assert cli.main([*command, str(tmp_path / "out.jsonl"), "--output", str(tmp_path / "pipe")]) == 0
    thread.join()
    assert len(found[0].splitlines()) == 50 and (tmp_path / "pipe").is_fifo()
    assert cli.main([*command, str(tmp_path / "out.jsonl"), "--output", "/dev/null"]) == 0
    assert Path("/dev/null").is_char_device()
    capfd.readouterr()
    assert cli.main([*command, str(piped(b"")), "--output", str(tmp_path / "never.jsonl")]) == 2
    assert "the file is empty" in capfd.readouterr().err and not (tmp_path / "never.jsonl").exists()


def test_a_pipe_is_read_once_and_can_be_opened_again(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    content = bytes(range(256)) * 1000
    thread = threading.Thread(target=lambda: (tmp_path / "pipe").write_bytes(content))
    thread.start()
    assert is_piped(tmp_path / "pipe")
    for _ in range(3):
        assert read_once(tmp_path / "pipe").read_bytes() == content
    thread.join()
    reader, writer = os.pipe()
    os.write(writer, b"text")
    os.close(writer)
    assert [read_once(Path(f"/dev/fd/{reader}")).read_bytes() for _ in range(2)] == [b"text"] * 2
    os.close(reader)


def test_a_pipe_is_not_shared_among_ranks(monkeypatch):
    monkeypatch.setattr(unpacked, "_ranks", lambda: 2)
    with pytest.raises(DataError, match="each of 2 processes would get a part"):
        read_once(piped(b"text"))


def test_what_is_no_pipe_is_read_where_it_is(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to("file")
    for path in (tmp_path, tmp_path / "file", tmp_path / "link", tmp_path / "nowhere"):
        assert read_once(path) is path and not is_piped(path)
    assert read_once(Path("/dev/null")).read_bytes() == b""
    with pytest.raises(DataError, match="/dev/zero: is a device"):
        read_once(Path("/dev/zero"))
