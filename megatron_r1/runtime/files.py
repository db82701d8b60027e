"""Files that are whole or not there, whenever the process is killed."""

from __future__ import annotations

import hashlib
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import xxhash

from megatron_r1.errors import DataError

#: the times of a file that changed so shortly before say nothing: it could change again within one tick of the file system's clock
FRESH_NANOSECONDS = 2_000_000_000
TEMPORARY = ".tmp-"  #: in the name of everything that is not yet whole
# Bytes. For longer writes Linux looks for contiguous memory of their length, which takes up to ten times the CPU time on a machine
# whose memory is full of cached files.
_PIECE = 1 << 19


def new_checksum() -> xxhash.xxh3_128:
    """XXH3 with 128 bits, as `xxh128sum` prints it: finds any damage, at several times the speed of SHA-256, but no forgery."""
    return xxhash.xxh3_128()


def path_of_rank(path: Path, rank: int) -> Path:
    """The file of a rank where each writes one: rank 0's is `path` itself, the others have the rank in their name."""
    return path if rank == 0 else path.with_name(f"{path.stem}_{rank:05d}{path.suffix}")


def file_checksum(path: Path) -> str:
    """Hexadecimal checksum of a file. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, new_checksum).hexdigest()


def telling_times(modified: int, changed: int) -> tuple[int, int]:
    """Times of a file that is known by them later, in ns; zeros, which no file has, if it changed just now."""
    return (0, 0) if time.time_ns() - changed < FRESH_NANOSECONDS else (modified, changed)


def write_buffer(fd: int, data: memoryview, offset: int | None = None) -> None:
    """Write all of `data` to a file, at `offset` or at the file's position. Raises OSError."""
    done = 0
    while done < len(data):
        piece = data[done : done + _PIECE]
        done += os.write(fd, piece) if offset is None else os.pwrite(fd, piece, offset + done)


def is_written_through(path: Path) -> bool:
    """Whether `path` is a pipe, a terminal or the like, which a renamed file must not replace: what is written goes into it.

    Raises:
        DataError: it is a disk, which nobody means.
    """
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    if stat.S_ISBLK(mode):
        raise DataError(f"{path}: is a disk, not a file; name a file")
    # /dev/stdout and /dev/fd/3 are links to what the shell opened, which may be a file.
    return stat.S_ISFIFO(mode) or stat.S_ISCHR(mode) or stat.S_ISSOCK(mode) or _is_open_elsewhere(path)


def _is_open_elsewhere(path: Path) -> bool:
    standard = (Path("/dev/stdin"), Path("/dev/stdout"), Path("/dev/stderr"))
    return path in standard or path.parent.resolve() == Path(f"/proc/{os.getpid()}/fd")


def write_atomically(path: Path, text: str, *, durable: bool = True) -> None:
    """Write `text` under a temporary name in the same folder, then rename it to `path`. A pipe or /dev/null is written into.

    Args:
        durable: wait until it is on disk; False for what nobody needs after a power cut.
    """
    if is_written_through(path):
        with path.open("w", encoding="utf-8") as file:
            file.write(text)
        return
    temporary = path.with_name(f"{path.name}{TEMPORARY}{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        if durable:
            file.flush()
            os.fsync(file.fileno())
    temporary.replace(path)


@contextmanager
def written_atomically(path: Path) -> Iterator[TextIO]:
    """A file to write piece by piece that appears under `path` when the block ends well. A pipe or /dev/null is written into.

    What UTF-8 cannot hold (half a surrogate pair, which tokenizers decode now and then) is written as an escape, which JSON reads
    back as it was.

    Raises:
        DataError: it cannot be written.
    """
    if is_written_through(path):
        try:
            with path.open("w", encoding="utf-8", errors="backslashreplace") as file:
                yield file
        except OSError as error:
            raise DataError(f"{path}: cannot be written ({error.strerror})") from None
        return
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
