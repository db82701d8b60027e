"""Files as bytes, whatever they are packed with and wherever they come from."""

from __future__ import annotations

import gzip
import io
import os
import shutil
import stat
import sys
import tempfile
from pathlib import Path
from typing import BinaryIO, cast

from megatron_r1.errors import DataError

PACKED = (".gz", ".zst")  #: suffixes
#: Times that data unpack to of their size at most; records all made from one template unpack to less than a hundred times.
_MOST_TIMES = 300
_ALWAYS_BYTES = 256 << 20  # whatever the file's size
_BUFFER = 1 << 18
_copies: dict[tuple[str, int, int], BinaryIO] = {}  # of what can be read only once


def open_unpacked(path: Path) -> BinaryIO:
    """The content of a file, unpacked if its name ends in .gz or .zst. Of a pipe it can be opened again and again.

    Reading raises what gzip and pyarrow raise at broken files, and DataError at one that unpacks to hundreds of times its size.

    Raises:
        OSError: it cannot be opened.
        DataError: it is a device.
    """
    place = read_once(path)
    source = place.open("rb")
    if path.suffix == ".gz":
        packed: io.IOBase = gzip.GzipFile(fileobj=source, mode="rb")  # closed by what is returned
    elif path.suffix == ".zst":
        import pyarrow

        packed = pyarrow.CompressedInputStream(pyarrow.PythonFile(source), "zstd")
    else:
        return source
    limit = max(_ALWAYS_BYTES, _MOST_TIMES * place.stat().st_size)
    return cast(BinaryIO, io.BufferedReader(_Bounded(packed, source, path, limit), _BUFFER))


def packed_position(file: BinaryIO) -> int:
    """Bytes of the file itself that were read of what `open_unpacked` gave, up to a buffer's length more than were asked for."""
    bounded = getattr(file, "raw", None)
    return bounded.source.tell() if isinstance(bounded, _Bounded) else file.tell()


def read_once(path: Path) -> Path:
    """`path`, or a copy of all that comes through it if it can be read only once: a pipe, as `<(...)` and /dev/stdin are.

    The copy has no name and takes space where temporary files are; it stays until this process ends, and is made once.

    Raises:
        DataError: it is a device without an end, or several processes of a job would share it.
    """
    try:
        found = path.stat()
    except OSError:
        return path  # whoever opens it says why
    mode = found.st_mode
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
        return path
    name = os.fspath(path), found.st_dev, found.st_ino  # descriptors are used again for other pipes
    if name not in _copies:
        if (ranks := _ranks()) > 1:
            raise DataError(f"{path}: each of {ranks} processes would get a part of what comes through this pipe; name a file")
        is_endless = stat.S_ISBLK(mode) or (stat.S_ISCHR(mode) and not path.samefile(os.devnull))
        try:
            with path.open("rb") as source:
                if is_endless and not source.isatty():
                    raise DataError(f"{path}: is a device, not a file")
                copy = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the process
                shutil.copyfileobj(source, copy)
                copy.flush()
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from None
        _copies[name] = copy
    return Path(f"/proc/{os.getpid()}/fd/{_copies[name].fileno()}")


def is_piped(path: Path) -> bool:
    """Whether `read_once` copies it."""
    return path.exists() and not path.is_file() and not path.is_dir()


def _ranks() -> int:
    """Processes of this job; of a command that has not imported torch one."""
    dist = sys.modules.get("torch.distributed")
    return dist.get_world_size() if dist is not None and dist.is_available() and dist.is_initialized() else 1


class _Bounded(io.RawIOBase):
    """A stream that ends in an error when it goes on for longer than any data would."""

    def __init__(self, stream: io.IOBase, source: BinaryIO, path: Path, limit: int) -> None:
        self._stream, self.source, self._path, self._limit, self._done = stream, source, path, limit, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        content = self._stream.read(len(buffer))
        self._done += len(content)
        if self._done > self._limit:
            raise DataError(
                f"{self._path}: unpacks to more than {self._limit >> 20} MB, hundreds of times its size; unpack it yourself"
            )
        buffer[: len(content)] = content
        return len(content)

    def close(self) -> None:
        self._stream.close()
        self.source.close()
        super().close()
