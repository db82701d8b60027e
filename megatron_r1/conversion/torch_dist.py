"""Files of Megatron-Core's `torch_dist` checkpoints (torch.distributed.checkpoint), written and read tensor by tensor.

A folder holds data files in which saved tensors stand end to end, and `.metadata`, a pickle that says which box of which tensor
is where. Megatron-Core adds `common.pt` (what is not sharded: nothing here) and `metadata.json` (the format's name).
"""

from __future__ import annotations

import io
import itertools
import json
import os
import pickle
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Self

import torch
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.utils.serialization import config as serialization

from megatron_r1.errors import CheckpointError
from megatron_r1.runtime.checkpoint_index import load_plain, read_index
from megatron_r1.runtime.direct_file import DirectFile
from megatron_r1.runtime.files import TEMPORARY

METADATA, COMMON, FORMAT = ".metadata", "common.pt", "metadata.json"
_FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch", "common_backend_version": 1}


class Chunk(NamedTuple):
    """A saved box of a tensor, and where it is."""

    key: str
    dtype: torch.dtype
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    position: int  #: of its first byte in the file
    length: int  #: bytes in the file


class DataFile:
    """A data file being written; it appears under its name when it is closed, and is on disk then.

    `discard`, or leaving the block by an exception, leaves nothing of a file that was not closed.
    """

    def __init__(self, path: Path) -> None:
        """Raises OSError."""
        self.path = path
        self.chunks: list[Chunk] = []
        self._temporary = path.with_name(f"{path.name}{TEMPORARY}{os.getpid()}")
        self._problem: OSError | None = None
        self._file = DirectFile(self._temporary)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()

    @property
    def bytes(self) -> int:
        """Written so far."""
        return self._file.bytes

    def close(self) -> None:
        """Put the file on disk under its name. Raises OSError."""
        try:
            self._file.close()
            self._temporary.rename(self.path)
        finally:
            self.discard()

    def discard(self) -> None:
        """Let go of the file; without effect after `close`."""
        self._file.discard()
        self._temporary.unlink(missing_ok=True)

    def add(self, key: str, global_shape: tuple[int, ...], offset: tuple[int, ...], tensor: torch.Tensor) -> None:
        """Append a box of the tensor `key`. Raises OSError."""
        position = self.bytes
        self.save(_alone(tensor))
        self.chunks.append(
            Chunk(key, tensor.dtype, global_shape, offset, tuple(tensor.shape), self.path.name, position, self.bytes - position)
        )

    def save(self, value: object) -> None:
        """Append anything that `torch.save` takes. Raises OSError."""
        try:
            with _without_crc():
                torch.save(value, self)
        except Exception:
            if self._problem is not None:
                raise self._problem from None  # torch's writer wraps it in an error of its own
            raise

    def checksum(self) -> str:
        """Of everything that was written. After `close`."""
        return self._file.checksum()

    def write(self, data: memoryview | bytes) -> int:
        """For torch.save."""
        view = memoryview(data).cast("B")
        try:
            self._file.write(view)
        except OSError as error:
            self._problem = error
            raise
        return len(view)

    def flush(self) -> None:
        """For torch.save."""


def write_metadata(folder: Path, chunks: Iterable[Chunk]) -> None:
    """Write what makes a folder of data files a checkpoint.

    Args:
        folder: of the data files.
        chunks: all that is in them.
    """
    tensors: dict[str, TensorStorageMetadata] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    for chunk in chunks:
        size, properties = torch.Size(chunk.global_shape), TensorProperties(dtype=chunk.dtype)
        tensor = tensors.setdefault(chunk.key, TensorStorageMetadata(properties, size, []))
        tensor.chunks.append(ChunkStorageMetadata(torch.Size(chunk.offset), torch.Size(chunk.shape)))
        storage[MetadataIndex(chunk.key, chunk.offset)] = _StorageInfo(chunk.file, chunk.position, chunk.length)
    metadata = Metadata(tensors, storage_data=storage, version=CURRENT_DCP_VERSION)
    (folder / METADATA).write_bytes(pickle.dumps(metadata))
    (folder / FORMAT).write_text(json.dumps(_FORMAT))
    torch.save({}, folder / COMMON)


class StoredTensors:
    """The tensors of a checkpoint folder, opened for reading.

    Raises:
        CheckpointError: no such folder, or no checkpoint in it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / METADATA).is_file():
            raise CheckpointError(f"{folder} is no Megatron checkpoint: it has no file {METADATA}")
        self._metadata = read_index(folder / METADATA)
        self._tensors = {
            key: stored for key, stored in self._metadata.state_dict_metadata.items() if isinstance(stored, TensorStorageMetadata)
        }
        self._by_lead: dict[tuple[str, int], dict[tuple[int, ...], list[ChunkStorageMetadata]]] = {}

    def names(self) -> set[str]:
        """Of all tensors."""
        return set(self._tensors)

    def shape(self, key: str) -> tuple[int, ...]:
        """Of the whole tensor. Raises CheckpointError if there is none."""
        return tuple(self._find(key).size)

    def dtype(self, key: str) -> torch.dtype:
        """Of the tensor. Raises CheckpointError if there is none."""
        return self._find(key).properties.dtype

    def read(self, key: str, lead: tuple[int, ...] = ()) -> torch.Tensor:
        """A tensor, put together from its boxes.

        Args:
            key: of the tensor.
            lead: read only this index of the first axes, which the result then lacks.

        Raises:
            CheckpointError: no such tensor; a file is missing or broken; the boxes do not make up the tensor.
        """
        stored, depth = self._find(key), len(lead)
        shape = tuple(stored.size)[depth:]
        out, filled = None, 0
        for chunk in self._boxes(key, depth).get(lead, []):
            box = self._load(key, tuple(chunk.offsets), tuple(chunk.sizes), stored.properties.dtype)
            for index, start in zip(lead, chunk.offsets, strict=False):
                box = box[index - start]
            if tuple(box.shape) == shape:
                return box
            if out is None:
                out = torch.empty(shape, dtype=box.dtype)
            area = zip(chunk.offsets[depth:], box.shape, strict=True)
            out[tuple(slice(start, start + size) for start, size in area)].copy_(box)
            filled += box.numel()
        if out is None or filled != out.numel():
            raise CheckpointError(f"{self.folder} holds only {filled} elements of tensor {key}{list(lead) or ''}")
        return out

    def _boxes(self, key: str, depth: int) -> dict[tuple[int, ...], list[ChunkStorageMetadata]]:
        """Index of the first `depth` axes -> the boxes that have a part of it."""
        if (key, depth) not in self._by_lead:
            boxes: dict[tuple[int, ...], list[ChunkStorageMetadata]] = {}
            for chunk in self._tensors[key].chunks:
                spans = zip(chunk.offsets[:depth], chunk.sizes[:depth], strict=True)
                for lead in itertools.product(*(range(start, start + size) for start, size in spans)):
                    boxes.setdefault(lead, []).append(chunk)
            self._by_lead[key, depth] = boxes
        return self._by_lead[key, depth]

    def _find(self, key: str) -> TensorStorageMetadata:
        if key not in self._tensors:
            raise CheckpointError(f"{self.folder} has no tensor {key}")
        return self._tensors[key]

    def _load(self, key: str, offset: tuple[int, ...], shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        place = self._metadata.storage_data.get(MetadataIndex(key, offset))
        if place is None:
            raise CheckpointError(f"{self.folder / METADATA} does not say where the box at {list(offset)} of tensor {key} is")
        path = self.folder / place.relative_path
        try:
            with path.open("rb", buffering=0) as file:
                box = load_plain(_Window(file, place.offset, place.length), map_location="cpu")
        except (OSError, pickle.UnpicklingError) as error:
            reason = error.strerror if isinstance(error, OSError) else "its bytes are not what was written"
            raise CheckpointError(f"tensor {key} in {path} cannot be read: {reason}") from error
        if not isinstance(box, torch.Tensor):
            raise CheckpointError(f"tensor {key} in {path} is a {type(box).__name__}")
        if tuple(box.shape) != shape or box.dtype != dtype:
            raise CheckpointError(f"tensor {key} in {path} is {list(box.shape)} {box.dtype}, expected {list(shape)} {dtype}")
        return box


class _Window(io.RawIOBase):
    """A part of a file as a file."""

    def __init__(self, file: io.FileIO, start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        return self._at

    def readinto(self, buffer: memoryview) -> int:
        view = memoryview(buffer).cast("B")[: max(self._length - self._at, 0)]
        count = os.preadv(self._file.fileno(), [view], self._start + self._at) if view else 0
        self._at += count
        return count


def _alone(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in a storage of its own size, since a storage is saved whole; rows of a larger one are not copied for it."""
    tensor = tensor.contiguous()
    if tensor.numel() == 0 or tensor.untyped_storage().nbytes() == tensor.nbytes:
        return tensor
    data = memoryview(tensor.view(-1).view(torch.uint8).numpy())
    return torch.frombuffer(data, dtype=tensor.dtype).view(tensor.shape)


@contextmanager
def _without_crc() -> Iterator[None]:
    # The manifest has a checksum of the file; CRC-32 would take as long as writing does.
    before = serialization.save.compute_crc32
    serialization.save.compute_crc32 = False
    try:
        yield
    finally:
        serialization.save.compute_crc32 = before
