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
import torch.distributed as dist

from megatron_r1.errors import CheckpointError
from megatron_r1.mcore.active import require_active
from megatron_r1.runtime.distributed import is_rank_zero, on_rank_zero, world_size
from megatron_r1.runtime.saving import Unwritten
from megatron_r1.weights.finite import first_nonfinite

require_active()

from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync, WriteBucket
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.storage import WriteResult

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


def join(parts: Sequence[Unwritten]) -> Unwritten:
    """Several folders as one piece of work."""

    def finish(results: list[Any]) -> None:
        for finish_part, result in zip(finishes, results, strict=True):
            finish_part(result)

    writes, finishes = [part.write for part in parts], [part.finish for part in parts]
    return Unwritten([file for part in parts for file in part.files], lambda: [write() for write in writes], finish)


def _save_common(common: dict[str, Any], folder: Path) -> None:
    content = io.BytesIO()
    torch.save(common, content)
    (folder / COMMON_STATE_FNAME).write_bytes(content.getvalue())  # unlike torch.save, its error names the reason


def _write_buckets(buckets: list[WriteBucket], transforms: list[Any]) -> list[WriteResult]:
    """Write this rank's files and return what is where.

    Raises:
        CheckpointError: a tensor is NaN or infinite somewhere. Each is read once for that, in this process, before it is written.
        OSError: perhaps behind an error of torch's serializer.
    """
    results = []
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
        results += written
    return results


def _finish_folder(writer: FileSystemWriterAsync, metadata: Metadata | None, folder: Path, written: list[WriteResult]) -> None:
    """Write on rank 0 the index of where every tensor is. All ranks call this."""
    of_ranks: list[Any] | None = [None] * world_size() if is_rank_zero() else None
    dist.gather_object(written, of_ranks)

    def write() -> None:
        writer.finish(metadata, of_ranks)
        save_config(_FORMAT, str(folder))

    on_rank_zero(write)
