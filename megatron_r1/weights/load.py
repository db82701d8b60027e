"""A Hugging Face folder into the shards of a Megatron model: each rank reads what it holds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_r1.errors import ConversionError
from megatron_r1.model.architecture import SCORE_HEAD, Architecture
from megatron_r1.model.rows import Split
from megatron_r1.weights.fused_tensors import fuse
from megatron_r1.weights.groups import WeightGroups, group_rank, group_size
from megatron_r1.weights.hf import HfFolder
from megatron_r1.weights.local_weights import local_weights, tensor_group
from megatron_r1.weights.mapping import Entry, hf_shapes, repeated_names


@torch.no_grad()
def load_weights(
    modules: Sequence[torch.nn.Module], arch: Architecture, folder: Path, groups: WeightGroups, trunk_of: Architecture | None = None
) -> None:
    """Fill every parameter and persistent buffer of the modules. Not collective, but strict about the whole folder.

    Values are converted to the dtype of the parameters. Copies of embedding and output layer, which published checkpoints repeat
    in the multi-token-prediction layer, and an output layer that a tied model stores, must equal them if they are there:
    Megatron-Core shares them.

    Args:
        modules: this rank's Megatron modules without wrappers, one per virtual pipeline stage.
        arch: the model's shape.
        folder: config.json and safetensors.
        groups: this rank's process groups.
        trunk_of: the folder holds this language model, and the modules a reward model on its trunk, whose head is left as it is.

    Raises:
        CheckpointError: a missing or broken folder or file.
        ConversionError: tensors that are missing, unknown or of another shape, on either side; copies that differ.
    """
    source = HfFolder(folder)
    source.check_names(hf_shapes(trunk_of or arch), repeated_names(trunk_of or arch))
    local = local_weights(modules, arch, groups)
    for i, targets in local.tensors.items():
        entry = local.entries[i]
        if trunk_of is not None and entry.name == SCORE_HEAD:
            continue
        source.check_shapes({name: shape for name, shape in entry.hf_shapes.items() if name in source.files})
        for target in targets:
            _fill_shard(entry, target, source, groups)


def _fill_shard(entry: Entry, target: torch.Tensor, source: HfFolder, groups: WeightGroups) -> None:
    group = tensor_group(entry, groups)
    rank, parts = group_rank(group), group_size(group)
    if entry.split is Split.VOCAB:
        _fill_vocabulary(entry, target, source, rank)
    elif entry.split is Split.ROW:
        target.copy_(source.read(entry.name, columns=_span(entry.shapes[0][1], rank, parts), dtype=target.dtype))
    else:
        rows = [_span(shape[0], rank, parts) for shape in entry.shapes]
        pieces = [source.read(name, mine, dtype=target.dtype) for name, mine in zip(entry.hf, rows, strict=True)]
        target.copy_(fuse(entry, pieces, parts))


def _fill_vocabulary(entry: Entry, target: torch.Tensor, source: HfFolder, rank: int) -> None:
    count, size = target.shape[0], entry.full_shape[0]
    mine = slice(min(rank * count, size), min((rank + 1) * count, size))
    rows = source.read(entry.name, mine, dtype=target.dtype)
    for copy in (name for name in entry.repeats if name in source.files):
        if not torch.equal(source.read(copy, mine, dtype=target.dtype), rows):
            raise ConversionError(
                f"tensor {copy} in {source.folder} differs from {entry.name}: Megatron-Core shares one tensor between them"
            )
    target[: rows.shape[0]].copy_(rows)
    target[rows.shape[0] :].zero_()  # padding: no token has these ids


def _span(size: int, rank: int, parts: int) -> slice:
    return slice(rank * (size // parts), (rank + 1) * (size // parts))
