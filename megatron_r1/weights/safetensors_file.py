"""One safetensors file: read piece by piece without mapping it into memory, written tensor by tensor.

The format (safetensors, README "Format"): 8 bytes little-endian length of the header, a JSON header of names, dtypes, shapes and
offsets padded with spaces, then the tensors end to end.
"""

from __future__ import annotations

import json
import math
import os
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open

from megatron_r1.errors import CheckpointError, ConversionError
from megatron_r1.runtime.files import TEMPORARY, write_buffer
from megatron_r1.weights.finite import is_finite

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_METADATA = "__metadata__"
_LARGEST_READ = 1 << 30  # bytes; Linux reads less than 2 GiB at a time
_PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


@dataclass(frozen=True)
class HfTensor:
    """A tensor that is to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """On disk."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in a file."""

    dtype: str  #: as the header spells it
    shape: tuple[int, ...]
    offset: int  #: of its first byte, from the start of the file
    nbytes: int


class SafetensorsFile:
    """A file opened for reading.

    Raises:
        CheckpointError: a file that is missing, truncated, or no safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            weakref.finalize(self, os.close, self._fd)
            with safe_open(path, framework="pt"):
                pass  # checks that the header fits the file and that offsets fit dtypes and shapes
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is not a readable safetensors file: {self._diagnose(error)}") from error
        length = int.from_bytes(os.pread(self._fd, 8, 0), "little")
        header = json.loads(os.pread(self._fd, length, 8))
        header.pop(_METADATA, None)
        self.tensors = {
            name: StoredTensor(entry["dtype"], tuple(entry["shape"]), 8 + length + start, end - start)
            for name, entry in header.items()
            for start, end in [entry["data_offsets"]]
        }

    def read_into(self, target: torch.Tensor, offset: int) -> None:
        """Fill a contiguous CPU tensor with the bytes from `offset` on.

        Raises:
            CheckpointError: the file ends before, or cannot be read.
        """
        rest = _bytes_of(target)
        try:
            while rest:
                count = os.preadv(self._fd, [rest[:_LARGEST_READ]], offset)
                if count == 0:
                    raise CheckpointError(f"{self.path} was cut off while it was read")
                rest, offset = rest[count:], offset + count
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read: {error.strerror}") from error

    def _diagnose(self, error: Exception) -> str:
        if not self.path.is_file():
            return "there is no such file"
        with self.path.open("rb") as file:
            if file.read(4).startswith(_PICKLES):
                return "it is a pickle under this name, which is never loaded; convert it to safetensors"
        return str(error)


class SafetensorsWriter:
    """A file written tensor by tensor, in any order, that appears under its name when it is closed with all of them.

    Use as a context manager: after an exception, or with tensors missing, nothing is left.

    Args:
        path: of the file.
        tensors: what it will hold.

    Raises:
        CheckpointError: the disk is full, or the file cannot be written.
    """

    def __init__(self, path: Path, tensors: Sequence[HfTensor]) -> None:
        self.path = path
        self.missing = {tensor.name: tensor for tensor in tensors}
        if len(self.missing) < len(tensors):
            raise ConversionError(f"{path} would hold a tensor twice")
        # Larger dtypes first, as safetensors itself does: every tensor is then aligned, whatever the shapes.
        ordered = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
        header: dict[str, dict[str, Any]] = {_METADATA: {"format": "pt"}}
        begins, size = {}, 0
        for tensor in ordered:
            begins[tensor.name] = size
            offsets = [size, size := size + tensor.nbytes]
            header[tensor.name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": tensor.shape, "data_offsets": offsets}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        start = 8 + len(text)
        self.nbytes = start + size  #: of the whole file
        self._offsets = {name: start + begin for name, begin in begins.items()}
        self._temporary = path.with_name(f"{path.name}{TEMPORARY}{os.getpid()}")
        try:
            self._file = self._temporary.open("wb", buffering=0)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be written: {error.strerror}") from error
        self._write_at(memoryview(len(text).to_bytes(8, "little") + text), 0)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one of the announced tensors, from any device.

        Raises:
            ConversionError: it was not announced, is there already, has another shape or dtype, or holds NaN or infinite values.
            CheckpointError: the disk is full, or the file cannot be written.
        """
        announced = self.missing.get(name)
        if announced is None:
            raise ConversionError(f"tensor {name} does not belong into {self.path} or is there already")
        if tuple(tensor.shape) != announced.shape or tensor.dtype != announced.dtype:
            raise ConversionError(
                f"tensor {name} for {self.path} is {list(tensor.shape)} {tensor.dtype}, "
                f"announced was {list(announced.shape)} {announced.dtype}"
            )
        on_cpu = tensor.detach().cpu().contiguous()
        if not is_finite(on_cpu):
            raise ConversionError(f"tensor {name} for {self.path} holds NaN or infinite values, as {tensor.dtype}")
        self._write_at(_bytes_of(on_cpu), self._offsets[name])
        del self.missing[name]

    def close(self) -> None:
        """Put the file on disk under its name.

        Raises:
            ConversionError: tensors are missing.
            CheckpointError: the disk is full.
        """
        try:
            if self.missing:
                raise ConversionError(f"{self.path} lacks {len(self.missing)} tensors, the first is {next(iter(self.missing))}")
            os.fsync(self._file.fileno())
            self._temporary.replace(self.path)
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be written: {error.strerror}") from error
        finally:
            self.discard()

    def discard(self) -> None:
        """Close the file and leave nothing of it; without effect after `close`."""
        self._file.close()
        self._temporary.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self.close()
        else:
            self.discard()

    def _write_at(self, data: memoryview, offset: int) -> None:
        try:
            write_buffer(self._file.fileno(), data, offset)
        except OSError as error:
            self.discard()
            raise CheckpointError(f"{self.path} cannot be written: {error.strerror}") from error


def plan_files(tensors: Iterable[HfTensor], max_shard_bytes: int) -> dict[str, list[HfTensor]]:
    """Spread tensors over files in their order, a new one begun before `max_shard_bytes` would be passed.

    Returns:
        File name, as published models have them, -> its tensors.
    """
    shards: list[list[HfTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, without a copy."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data
