"""Files as bytes, whatever they are packed with and wherever they come from."""

from __future__ import annotations

import gzip
import io
from pathlib import Path
from typing import BinaryIO, cast

from megatron_r1.errors import DataError
from megatron_r1.runtime.files import read_once

PACKED = (".gz", ".zst")  #: suffixes
#: Times that data unpack to of their size at most; records all made from one template unpack to less than a hundred times.
_MOST_TIMES = 300
_ALWAYS_BYTES = 256 << 20  # whatever the file's size
_BUFFER = 1 << 18


def open_unpacked(path: Path) -> BinaryIO:
    """The content of a file, unpacked if its name ends in .gz or .zst. Of a pipe it can be opened again and again.

    Reading raises what gzip and pyarrow raise at broken files, and DataError at one that unpacks to hundreds of times its size.

    Raises:
        OSError: it cannot be opened.
        DataError: it is a device.
    """
    place = read_once(path)
    if path.suffix == ".gz":
        packed: io.IOBase = gzip.open(place, "rb")  # noqa: SIM115 - closed by what is returned
    elif path.suffix == ".zst":
        import pyarrow

        packed = pyarrow.CompressedInputStream(pyarrow.PythonFile(place.open("rb")), "zstd")
    else:
        return place.open("rb")
    limit = max(_ALWAYS_BYTES, _MOST_TIMES * place.stat().st_size)
    return cast(BinaryIO, io.BufferedReader(_Bounded(packed, path, limit), _BUFFER))


class _Bounded(io.RawIOBase):
    """A stream that ends in an error when it goes on for longer than any data would."""

    def __init__(self, stream: io.IOBase, path: Path, limit: int) -> None:
        self._stream, self._path, self._limit, self._done = stream, path, limit, 0

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
        super().close()
