"""Files that are whole or not there, whenever the process is killed."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import xxhash

TEMPORARY = ".tmp-"  #: in the name of everything that is not yet whole
# Bytes. For longer writes Linux looks for contiguous memory of their length, which takes up to ten times the CPU time on a machine
# whose memory is full of cached files.
_PIECE = 1 << 19


def new_checksum() -> xxhash.xxh3_128:
    """XXH3 with 128 bits, as `xxh128sum` prints it: tells any damage, at several times the speed of SHA-256. No protection from intent."""
    return xxhash.xxh3_128()


def file_checksum(path: Path) -> str:
    """Hexadecimal checksum of a file. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, new_checksum).hexdigest()


def write_all(fd: int, data: memoryview, offset: int | None = None) -> None:
    """Write all of `data` to a file, at `offset` or where the file stands. Raises OSError."""
    done = 0
    while done < len(data):
        piece = data[done : done + _PIECE]
        done += os.write(fd, piece) if offset is None else os.pwrite(fd, piece, offset + done)


def write_atomically(path: Path, text: str) -> None:
    """Write `text` under a temporary name in the same folder, then rename it to `path`."""
    temporary = path.with_name(f"{path.name}{TEMPORARY}{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
