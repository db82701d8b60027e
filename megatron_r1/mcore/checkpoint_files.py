"""One folder of Megatron's `torch_dist` format, made in three steps: plan, write, finish. Only writing takes long.

`dist_checkpointing.save` does all three at once, but if rank 0 cannot write one of its small files, the other ranks wait for ever.
"""

from __future__ import annotations

import io
import queue
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_r1.errors import CheckpointError
from megatron_r1.mcore.active import require_active
from megatron_r1.runtime.distributed import on_rank_zero
from megatron_r1.runtime.saving import Unwritten
from megatron_r1.weights.finite import first_nonfinite

require_active()

from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync, WriteBucket
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.storage import WriteResult

_Result = list[Any]  # a WriteResult as JSON holds it: it travels by a file, from which nothing is unpickled
_FORMAT = CheckpointingConfig("torch_dist", 1)


class _Planner(TorchDistSaveShardedStrategy):
    """Megatron's strategy up to the point where it would hand the writing to one of its own processes."""

    def _get_save_and_finalize_callbacks(
        self, writer: FileSystemWriterAsync, save_state_dict_ret: Sequence[Any]
    ) -> tuple[FileSystemWriterAsync, Metadata | None]:
        return writer, save_state_dict_ret[1]  # the metadata of the whole checkpoint, on rank 0


def plan_folder(state: dict[str, Any], checkpoint: Path, name: str) -> Unwritten:
    """Fix what every rank writes into `checkpoint / name`. All ranks call this.

    Args:
        state: sharded tensors and objects; this call takes it apart. Tensors on the CPU are not copied, so they must not change
            in the process that writes them until they are written.
        checkpoint: exists.
        name: the folder to make in it.
    """
    folder = checkpoint / name
    on_rank_zero(folder.mkdir)
    # The stock queue lives in a process that is spawned, imports the program again, and outlives it when it is killed.
    filesystem_async._results_queue = queue.SimpleQueue()
    sharded, common = save_preprocess(state)
    dict_list_map_inplace(_as_written, sharded)
    on_rank_zero(lambda: _save_common(common, folder))
    writer, metadata = _Planner(_FORMAT.sharded_backend, _FORMAT.sharded_backend_version, thread_count=1).async_save(
        sharded, folder
    )
    buckets = FileSystemWriterAsync.preload_tensors(writer.write_buckets)
    writer.write_buckets = None  # `finish` keeps the writer, and should not keep the tensors
    transforms = [writer.transforms] if hasattr(writer, "transforms") else []
    return Unwritten(
        files=[f"{name}/{file}" for _, file, _ in buckets],
        write=partial(_write_buckets, buckets, transforms),
        finish=partial(_finish_folder, writer, metadata, folder),
    )


def _as_written(entry: Any) -> Any:
    """Have tensors on the CPU in a form that is written as it lies there.

    Pinned ones are copied: a forked process may share such memory with this one, which goes on writing to it. Of part of a buffer,
    as every weight is, torch's serializer would write the whole buffer, and Megatron-Core copies it for that: all weights at once.
    """
    if isinstance(entry, ShardedTensor) and entry.data.device.type == "cpu":
        entry.data = entry.data.clone() if entry.data.is_pinned() else storage_of_its_own(entry.data)
    return entry


def storage_of_its_own(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as a tensor with a storage that is no larger than itself; one with gaps or without numbers as it is."""
    if not tensor.is_contiguous() or not tensor.numel():
        return tensor
    same = torch.from_numpy(tensor.detach().reshape(-1).view(torch.uint8).numpy())  # NumPy has no bfloat16
    return same.view(tensor.dtype).view(tensor.shape)


def join(parts: Sequence[Unwritten]) -> Unwritten:
    """Several folders as one piece of work."""

    def finish(of_ranks: list[Any]) -> None:
        for number, finish_part in enumerate(finishes):
            finish_part([results[number] for results in of_ranks])

    writes, finishes = [part.write for part in parts], [part.finish for part in parts]
    return Unwritten([file for part in parts for file in part.files], lambda: [write() for write in writes], finish)


def _save_common(common: dict[str, Any], folder: Path) -> None:
    content = io.BytesIO()
    torch.save(common, content)
    (folder / COMMON_STATE_FNAME).write_bytes(content.getvalue())  # unlike torch.save, its error names the reason


def _write_buckets(buckets: list[WriteBucket], transforms: list[Any]) -> list[_Result]:
    """Write this rank's files and return what is where.

    Raises:
        CheckpointError: a tensor is NaN or infinite somewhere. Each is read once for that, in this process, before it is written.
        OSError: perhaps behind an error of torch's serializer.
    """
    results: list[_Result] = []
    for bucket in buckets:
        _, _, (_, tensors) = bucket
        broken = first_nonfinite((item.index.fqn, tensor) for item, tensor in tensors)
        if broken is not None:
            raise CheckpointError(f"tensor {broken} holds NaN or infinite values")
        answers, running = queue.SimpleQueue(), queue.Queue()
        running.put(None)
        FileSystemWriterAsync.write_preloaded_data(transforms, 0, bucket, answers, running, use_fsync=True)
        _, written = answers.get()
        if isinstance(written, Exception):
            raise written
        results += map(_to_json, written)
    return results


def _finish_folder(writer: FileSystemWriterAsync, metadata: Metadata | None, folder: Path, of_ranks: list[list[_Result]]) -> None:
    """Write the index of where every tensor is. On rank 0, which has the metadata."""
    writer.finish(metadata, [[_from_json(result) for result in results] for results in of_ranks])
    save_config(_FORMAT, str(folder))


def _to_json(result: WriteResult) -> _Result:
    index, place = result.index, result.storage_data
    offset = None if index.offset is None else list(index.offset)
    transforms = None if place.transform_descriptors is None else list(place.transform_descriptors)
    return [index.fqn, offset, index.index, result.size_in_bytes, place.relative_path, place.offset, place.length, transforms]


def _from_json(result: _Result) -> WriteResult:
    name, offset, number, size, *place = result
    index = MetadataIndex(name, None if offset is None else torch.Size(offset), number)
    return WriteResult(index, size, _StorageInfo(*place))
