"""Files that are whole or not there, whenever the process is killed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import xxhash

from megatron_r1.errors import DataError

TEMPORARY = ".tmp-"  #: in the name of everything that is not yet whole
# Bytes. For longer writes Linux looks for contiguous memory of their length, which takes up to ten times the CPU time on a machine
# whose memory is full of cached files.
_PIECE = 1 << 19


def new_checksum() -> xxhash.xxh3_128:
    """XXH3 with 128 bits, as `xxh128sum` prints it: finds any damage, at several times the speed of SHA-256, but no forgery."""
    return xxhash.xxh3_128()


def file_checksum(path: Path) -> str:
    """Hexadecimal checksum of a file. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, new_checksum).hexdigest()


def write_buffer(fd: int, data: memoryview, offset: int | None = None) -> None:
    """Write all of `data` to a file, at `offset` or at the file's position. Raises OSError."""
    done = 0
    while done < len(data):
        piece = data[done : done + _PIECE]
        done += os.write(fd, piece) if offset is None else os.pwrite(fd, piece, offset + done)


def write_atomically(path: Path, text: str, *, durable: bool = True) -> None:
    """Write `text` under a temporary name in the same folder, then rename it to `path`.

    Args:
        durable: wait until it is on disk; False for what nobody needs after a power cut.
    """
    temporary = path.with_name(f"{path.name}{TEMPORARY}{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        if durable:
            file.flush()
            os.fsync(file.fileno())
    temporary.replace(path)


@contextmanager
def written_atomically(path: Path) -> Iterator[TextIO]:
    """A file to write piece by piece that appears under `path` when the block ends well.

    What UTF-8 cannot hold (half a surrogate pair, which tokenizers decode now and then) is written as an escape, which JSON reads
    back as it was.

    Raises:
        DataError: it cannot be written.
    """
    temporary = path.with_name(f"{path.name}{TEMPORARY}{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8", errors="backslashreplace") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror})") from None
    finally:
        temporary.unlink(missing_ok=True)
