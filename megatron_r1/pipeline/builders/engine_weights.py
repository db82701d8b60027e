"""The weights of any model folder under their Hugging Face names, as a rollout engine takes them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_r1.config.runtime import RuntimeConfig
from megatron_r1.conversion.megatron_folder import find_megatron_folder, holds_megatron, open_megatron
from megatron_r1.rollout.collective import CollectiveEngine
from megatron_r1.rollout.protocol import RolloutEngine
from megatron_r1.runtime.checkpoints import COMPLETE, verify_checkpoint
from megatron_r1.runtime.distributed import on_rank_zero
from megatron_r1.runtime.files import new_checksum
from megatron_r1.weights.fused_tensors import unfuse
from megatron_r1.weights.hf import CONFIG, HfFolder
from megatron_r1.weights.mapping import ROUTER_BIAS

_READ_BYTES = 1 << 20  # at the start and at the end of each file


def load_engine(engine: RolloutEngine, folder: Path, runtime: RuntimeConfig) -> None:
    """Give an engine the weights of a model folder, in the engine's dtype. All ranks call this together.

    Raises:
        CheckpointError, ConversionError: see `read_hf_weights`.
    """
    dtype = torch.bfloat16 if runtime.dtype == "bf16" else torch.float32
    # Each rank reads a Hugging Face folder for itself: a rank without an engine need not.
    unneeded = isinstance(engine, CollectiveEngine) and not engine.takes_part and not holds_megatron(folder)
    engine.load_weights(() if unneeded else _FolderWeights(folder, dtype), version=0)


@dataclass(frozen=True)
class _FolderWeights:
    """Reads the folder again each time it is iterated."""

    folder: Path
    dtype: torch.dtype

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return read_hf_weights(self.folder, self.dtype)


def read_hf_weights(folder: Path, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a Hugging Face folder, a converted folder, a checkpoint or a run (its newest checkpoint), one at a time.

    Nothing is written and no policy is built: Megatron's fused tensors are split as they are read. All ranks call this together.

    Args:
        dtype: of the engine. For a bf16 engine, fp32 tensors are rounded to bf16, except the router's bias.

    Raises:
        CheckpointError, ConversionError: see `HfFolder` and `open_megatron`.
    """
    for name, tensor in _read_megatron(folder) if holds_megatron(folder) else _read_hf(folder):
        narrows = tensor.dtype is torch.float32 and not name.endswith(ROUTER_BIAS)
        yield name, tensor.to(dtype) if narrows else tensor


def _read_hf(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    opened = HfFolder(folder)
    for name in opened.files:
        yield name, opened.read(name)


def _read_megatron(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    opened, _ = open_megatron(folder)
    verify_checkpoint(opened.folder)
    for number, entry in enumerate(opened.entries):
        parts = unfuse(entry, opened.read(number))
        for name, part in [*zip(entry.hf, parts, strict=True), *((copy, parts[0]) for copy in entry.copies)]:
            yield name, part.contiguous()


def weights_fingerprint(folder: Path) -> str:
    """Identifies a set of weights without reading all of it. All ranks call this.

    For a checkpoint it is the checkpoint's own checksum. For a Hugging Face folder it covers config.json and the size, start and
    end of every weights file: an update changes every tensor, and so the parts that are read.

    Raises:
        CheckpointError: there is no such model.
    """
    return on_rank_zero(lambda: _hash_folder(folder))


def _hash_folder(folder: Path) -> str:
    if holds_megatron(folder):
        return (find_megatron_folder(folder) / COMPLETE).read_text().strip()
    total = new_checksum()
    for path in sorted([folder / CONFIG, *(folder / name for name in set(HfFolder(folder).files.values()))]):
        size = path.stat().st_size
        total.update(f"{path.name}\0{size}\n".encode())
        with path.open("rb") as file:
            total.update(file.read(_READ_BYTES))
            file.seek(max(0, size - _READ_BYTES))
            total.update(file.read(_READ_BYTES))
    return total.hexdigest()
