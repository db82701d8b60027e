"""What Megatron-Core and torch read from a checkpoint without running what stands in it.

`dist_checkpointing.load` reads three pickles: the index of the folder, the saved objects of each rank (random states), and
`common.pt`. The classes here read them as plain values.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

from megatron_r1.errors import CheckpointError
from megatron_r1.mcore.active import require_active
from megatron_r1.runtime.checkpoint_index import load_plain, read_index

require_active()

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import torch as megatron_torch
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME, TorchCommonLoadStrategy
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint._nested_dict import set_element
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem


class _PlainFolderReader(FileSystemReader):
    """Reads the index once, as plain values."""

    _index: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._index is None:
            self._index = read_index(Path(self.path) / ".metadata")
            self._index.storage_meta = StorageMeta(load_id=self.load_id)
        return self._index


class _PlainPlanner(megatron_torch.MCoreLoadPlanner):
    """Loads the objects of a checkpoint as plain values."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        name = read_item.dest_index.fqn
        try:
            loaded = load_plain(value, map_location="cpu")
        except pickle.UnpicklingError as error:
            raise CheckpointError(f"object {name} cannot be read: {error}") from None
        set_element(self.original_state_dict, self.mappings[name], loaded)


class _Common(TorchCommonLoadStrategy):
    """Loads `common.pt` as plain values."""

    def load_common(self, checkpoint_dir: str | Path) -> dict[str, Any]:
        path = Path(checkpoint_dir) / COMMON_STATE_FNAME
        try:
            with path.open("rb") as file:
                common = load_plain(file, map_location="cpu")
        except FileNotFoundError:
            raise CheckpointError(f"{path} is missing") from None
        except pickle.UnpicklingError as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from None
        if not isinstance(common, dict):
            raise CheckpointError(f"{path} holds a {type(common).__name__}, expected a mapping")
        return common


def _open_reader(folder: str | Path, cache_metadata: bool = False) -> FileSystemReader:
    return _PlainFolderReader(folder)


# Megatron's strategy makes its reader and its planner itself, by these names of its module.
for _name, _ours in (("_get_filesystem_reader", _open_reader), ("MCoreLoadPlanner", _PlainPlanner)):
    if not hasattr(megatron_torch, _name):
        raise RuntimeError(f"megatron-core has no {megatron_torch.__name__}.{_name} any more: see mcore/checkpoint_reading.py")
    setattr(megatron_torch, _name, _ours)


def read_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a checkpoint. Raises whatever the reading of its index does."""
    index = read_index(folder / ".metadata").state_dict_metadata
    return {name: tuple(entry.size) for name, entry in index.items() if isinstance(entry, TensorStorageMetadata)}


def read_checkpoint(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    """`state` with the values of a folder in Megatron's `torch_dist` format. All ranks call this.

    Raises:
        CheckpointError: something in the folder is more than plain values.
        Exception: whatever Megatron-Core and torch raise at a folder that does not fit.
    """
    return dist_checkpointing.load(state, str(folder), megatron_torch.TorchDistLoadShardedStrategy(), _Common())
