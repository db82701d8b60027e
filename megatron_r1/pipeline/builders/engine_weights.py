"""The weights of any model folder under their Hugging Face names, as a rollout engine is given them."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch

from megatron_r1.config.runtime import RuntimeConfig
from megatron_r1.conversion.megatron_folder import find_megatron_folder, holds_megatron, open_megatron
from megatron_r1.rollout.collective import CollectiveEngine
from megatron_r1.rollout.protocol import RolloutEngine
from megatron_r1.runtime.checkpoints import COMPLETE, verify_checkpoint
from megatron_r1.runtime.distributed import on_rank_zero
from megatron_r1.runtime.files import new_checksum
from megatron_r1.weights.boxes import Box, slices_within, whole_box
from megatron_r1.weights.fused_tensors import unfuse
from megatron_r1.weights.hf import CONFIG, HfFolder
from megatron_r1.weights.mapping import ROUTER_BIAS
from megatron_r1.weights.shard_plan import StoredWeights

_READ_BYTES = 1 << 20  # at the start and at the end of each file


def load_engine(engine: RolloutEngine, folder: Path, runtime: RuntimeConfig) -> None:
    """Give an engine the weights of a model folder, in the engine's dtype. All ranks call this together.

    Raises:
        CheckpointError, ConversionError: see `open_weights`.
    """
    dtype = torch.bfloat16 if runtime.dtype == "bf16" else torch.float32
    # Each rank reads a Hugging Face folder for itself: a rank without an engine need not.
    unneeded = isinstance(engine, CollectiveEngine) and not engine.takes_part and not holds_megatron(folder)
    engine.load_weights(StoredWeights.of_tensors({}) if unneeded else open_weights(folder, dtype), version=0)


def open_weights(folder: Path, dtype: torch.dtype) -> StoredWeights:
    """The tensors of a Hugging Face folder, a converted folder, a checkpoint or a run (its newest checkpoint), read when asked for.

    Nothing is written and no policy is built: Megatron's fused tensors are split as they are read. All ranks call this together.

    Args:
        dtype: of the engine. For a bf16 engine, fp32 tensors are rounded to bf16, except the router's bias.

    Raises:
        CheckpointError, ConversionError: see `HfFolder` and `open_megatron`; also as it is read.
    """
    return _open_megatron_weights(folder, dtype) if holds_megatron(folder) else _open_hf_weights(folder, dtype)


def _open_hf_weights(folder: Path, dtype: torch.dtype) -> StoredWeights:
    opened = HfFolder(folder)
    shapes = {name: (opened.shape(name), _sent_dtype(name, opened.dtype(name), dtype)) for name in opened.files}

    def read(name: str, box: Box) -> torch.Tensor:
        rows, columns = (slice(*box[axis]) if axis < len(box) else slice(None) for axis in (0, 1))
        return opened.read(name, rows, columns, shapes[name][1])

    return StoredWeights(shapes, read)


def _open_megatron_weights(folder: Path, dtype: torch.dtype) -> StoredWeights:
    opened, _ = open_megatron(folder)
    verify_checkpoint(opened.folder)
    shapes, places = {}, {}
    for number, entry in enumerate(opened.entries):
        for part, (name, shape) in enumerate(zip(entry.hf, entry.shapes, strict=True)):
            shapes[name] = shape, _sent_dtype(name, opened.dtype(number), dtype)
            places[name] = number, part

    @lru_cache(maxsize=1)  # what is fused is asked for one part after the other
    def read_entry(number: int) -> list[torch.Tensor]:
        return unfuse(opened.entries[number], opened.read(number))

    def read(name: str, box: Box) -> torch.Tensor:
        number, part = places[name]
        return read_entry(number)[part][slices_within(box, whole_box(shapes[name][0]))].to(shapes[name][1])

    return StoredWeights(shapes, read)


def _sent_dtype(name: str, stored: torch.dtype, engine: torch.dtype) -> torch.dtype:
    """FP8 weights are dequantised, as `HfFolder` does."""
    if stored is torch.float8_e4m3fn:
        return torch.bfloat16
    return engine if stored is torch.float32 and not name.endswith(ROUTER_BIAS) else stored


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
