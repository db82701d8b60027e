"""The index `.metadata` of a torch.distributed.checkpoint folder, read without running anything that stands in it.

The index is a pickle, and a pickle is a program: `FileSystemReader.read_metadata` runs whatever the file names. Here every class
that an index may name becomes an empty class of this one reading, and every other name ends the reading. torch's own classes are
then made from the plain values that were found, each of them checked.
"""

from __future__ import annotations

import gc
import io
import math
import pickle
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_r1.errors import CheckpointError, one_line

_DCP = "torch.distributed.checkpoint"
#: what torch and Megatron-Core write into an index: module -> names
_CLASSES: Mapping[str, Sequence[str]] = {
    f"{_DCP}.metadata": (
        "Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties",
        "StorageMeta", "_MEM_FORMAT_ENCODING",
    ),
    f"{_DCP}.filesystem": ("_StorageInfo", "_StoragePrefix"),
    f"{_DCP}.planner": ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData"),
    "torch.distributed._shard.sharded_tensor.metadata": ("TensorProperties", "MEM_FORMAT_ENCODING"),
    "megatron.core.dist_checkpointing.strategies.torch": ("MCoreMetadata", "MCoreSavePlan"),
    "torch": ("Size", "layout", "memory_format"),
    "torch.serialization": ("_get_layout",),
    "pathlib": ("Path", "PosixPath", "PurePosixPath"),
    "collections": ("OrderedDict",),
}  # fmt: skip
_LARGEST = 1 << 62


class _Record:
    """An object of the index: what it was made from."""

    state: Any = None

    def __init__(self, *arguments: Any) -> None:
        self.state = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Numbers(tuple):
    """A torch.Size of the index."""


class _Table(dict):
    """An ordered dictionary of the index."""


class _IndexReader(pickle.Unpickler):
    """Reads an index as records. Its classes are its own: a pickle can also change a class, and then changes nobody else's."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file)
        self._known: dict[tuple[str, str], Any] = {}

    def find_class(self, module: str, name: str) -> Any:
        """See pickle.Unpickler. Raises UnpicklingError for what no index needs."""
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        if name not in _CLASSES.get(module, ()):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no checkpoint needs")
        if (module, name) not in self._known:
            base = {"Size": _Numbers, "OrderedDict": _Table}.get(name, _Record)
            self._known[module, name] = type(name, (base,), {})
        return self._known[module, name]


def read_index(path: Path) -> Metadata:
    """What a checkpoint folder holds, and where: tensors, other objects and their places, without the plans that made them.

    Args:
        path: the folder's file `.metadata`.

    Raises:
        CheckpointError: the file is missing or broken, names something that no checkpoint needs, or describes what cannot be.
    """
    try:
        with path.open("rb") as file, _without_collection():
            index = _IndexReader(file).load()
            return _metadata_of(_fields(index, "Metadata"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except Exception as error:  # noqa: BLE001 - the bytes of a stranger raise whatever they like
        raise CheckpointError(f"{path} is broken: {one_line(error)}") from None


def load_plain(file: BinaryIO | io.BytesIO, **options: Any) -> Any:
    """What `torch.save` wrote, if it is made of tensors, numbers, text, lists and mappings; nothing else is loaded.

    Raises:
        pickle.UnpicklingError: it holds something else, or is broken.
        OSError: it cannot be read.
    """
    try:
        return torch.load(file, weights_only=True, **options)
    except OSError:
        raise
    except Exception as error:  # noqa: BLE001 - the bytes of a stranger raise whatever they like
        # torch's own message advises to load it without looking.
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"it asks for {asked[1]}, which no checkpoint needs" if asked else "its bytes are not what was written"
        raise pickle.UnpicklingError(reason) from None


@contextmanager
def _without_collection() -> Iterator[None]:
    # Python looks for unreachable objects again and again while millions are made: two thirds of the time.
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _metadata_of(fields: Mapping[str, Any]) -> Metadata:
    stored = {_text_of(name): _storage_of(name, entry) for name, entry in _mapping(fields["state_dict_metadata"]).items()}
    places = dict(_place_of(index, place) for index, place in _mapping(fields["storage_data"]).items())
    version = fields.get("version")
    return Metadata(stored, storage_data=places, version=None if version is None else _text_of(version))


def _storage_of(name: str, entry: Any) -> TensorStorageMetadata | BytesStorageMetadata:
    if type(entry).__name__ == "BytesStorageMetadata":
        return BytesStorageMetadata()
    fields = _fields(entry, "TensorStorageMetadata")
    size = _numbers(fields["size"])
    dtype = fields["properties"].state[0]
    if not isinstance(dtype, torch.dtype):
        raise pickle.UnpicklingError(f"tensor {name} has no dtype")
    if math.prod(size) > _LARGEST:
        raise pickle.UnpicklingError(f"tensor {name} has shape {list(size)}")
    chunks, elements = [], 0
    for record in fields["chunks"]:
        box = _fields(record, "ChunkStorageMetadata")
        offsets, sizes = _numbers(box["offsets"]), _numbers(box["sizes"])
        if not len(offsets) == len(sizes) == len(size) or any(o + s > n for o, s, n in zip(offsets, sizes, size, strict=True)):
            raise pickle.UnpicklingError(f"tensor {name} of shape {list(size)} has a box of {list(sizes)} at {list(offsets)}")
        elements += math.prod(sizes)
        chunks.append(ChunkStorageMetadata(offsets, sizes))
    if elements > math.prod(size):
        raise pickle.UnpicklingError(f"tensor {name} of shape {list(size)} has boxes that overlap")
    return TensorStorageMetadata(TensorProperties(dtype=dtype), size, chunks)


def _place_of(index: Any, place: Any) -> tuple[MetadataIndex, _StorageInfo]:
    key, info = _fields(index, "MetadataIndex"), _fields(place, "_StorageInfo")
    name = _text_of(info["relative_path"])
    if not name or name in (".", "..") or "/" in name or "\0" in name:
        raise pickle.UnpicklingError(f"{key['fqn']} stands in {name!r}, expected a file of the folder")
    if info.get("transform_descriptors"):
        raise pickle.UnpicklingError(f"{key['fqn']} is packed by {info['transform_descriptors']}, which is not read here")
    offset = key.get("offset")
    numbers = _numbers((info["offset"], info["length"]))
    return MetadataIndex(_text_of(key["fqn"]), None if offset is None else _numbers(offset)), _StorageInfo(name, *numbers)


def _fields(record: Any, kind: str) -> Mapping[str, Any]:
    if type(record).__name__ != kind or not isinstance(record, _Record) or not isinstance(record.state, dict):
        raise pickle.UnpicklingError(f"it holds a {type(record).__name__} where a {kind} belongs")
    return record.state


def _mapping(value: Any) -> Mapping[Any, Any]:
    if not isinstance(value, dict):
        raise pickle.UnpicklingError(f"it holds a {type(value).__name__} where a mapping belongs")
    return value


def _text_of(value: Any) -> str:
    if type(value) is not str:
        raise pickle.UnpicklingError(f"it holds a {type(value).__name__} where a name belongs")
    return value


def _numbers(value: Any) -> torch.Size:
    if not isinstance(value, tuple) or any(type(number) is not int or not 0 <= number <= _LARGEST for number in value):
        raise pickle.UnpicklingError("it holds a shape or place that is not made of whole numbers from 0")
    return torch.Size(value)
