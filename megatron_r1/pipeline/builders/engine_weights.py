"""The weights of any model folder under their Hugging Face names, as a rollout engine takes them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_r1.config.schema import Config
from megatron_r1.conversion.megatron_folder import find_megatron_folder, holds_megatron, open_megatron
from megatron_r1.rollout.collective import CollectiveEngine
from megatron_r1.rollout.protocol import RolloutEngine
from megatron_r1.runtime.checkpoints import COMPLETE, verify_checkpoint
from megatron_r1.runtime.distributed import on_rank_zero
from megatron_r1.runtime.files import new_checksum
from megatron_r1.weights.fused_tensors import unfuse
from megatron_r1.weights.hf import CONFIG, HfFolder
from megatron_r1.weights.mapping import ROUTER_BIAS

_LOOKED_AT = 1 << 20  # bytes of each file


def load_engine(engine: RolloutEngine, config: Config) -> None:
    """Give an engine the weights of `model.weights`, in the engine's dtype. All ranks call this together.

    Raises:
        CheckpointError, ConversionError: see `read_hf_weights`.
    """
    dtype = torch.bfloat16 if config.runtime.dtype == "bf16" else torch.float32
    folder = Path(config.model.weights)
    # A Hugging Face folder is read by each rank for itself: where there is no engine nobody needs it.
    unneeded = isinstance(engine, CollectiveEngine) and not engine.takes_part and not holds_megatron(folder)
    engine.load_weights(() if unneeded else _FolderWeights(folder, dtype), version=0)


@dataclass(frozen=True)
class _FolderWeights:
    """`read_hf_weights` as often as it is iterated."""

    folder: Path
    dtype: torch.dtype

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return read_hf_weights(self.folder, self.dtype)


def read_hf_weights(folder: Path, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a Hugging Face folder, a converted folder, a checkpoint or a run (its newest checkpoint), one at a time.

    Nothing is written and no policy is built: Megatron's tensors are taken apart as they are read. All ranks call this together.

    Args:
        dtype: of the engine. fp32 tensors are rounded to bf16 for a bf16 engine, but for the router's bias, which stays as it is.

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
    """Tells one set of weights from another without reading them all. All ranks call this.

    A checkpoint's own checksum; of a Hugging Face folder, config.json, and size, start and end of its files: an update changes every
    tensor, and so the parts that are looked at.

    Raises:
        CheckpointError: there is no such model.
    """
    return on_rank_zero(lambda: _fingerprint(folder))


def _fingerprint(folder: Path) -> str:
    if holds_megatron(folder):
        return (find_megatron_folder(folder) / COMPLETE).read_text().strip()
    total = new_checksum()
    for path in sorted([folder / CONFIG, *(folder / name for name in set(HfFolder(folder).files.values()))]):
        size = path.stat().st_size
        total.update(f"{path.name}\0{size}\n".encode())
        with path.open("rb") as file:
            total.update(file.read(_LOOKED_AT))
            file.seek(max(0, size - _LOOKED_AT))
            total.update(file.read(_LOOKED_AT))
    return total.hexdigest()
