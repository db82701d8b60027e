"""A Hugging Face folder into the shards of a Megatron model: each rank reads what it holds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_r1.errors import ConversionError
from megatron_r1.model.architecture import Architecture
from megatron_r1.weights.groups import WeightGroups, group_rank, group_size
from megatron_r1.weights.hf import HfFolder
from megatron_r1.weights.local import local_weights, shard_shape, tensor_group
from megatron_r1.weights.mapping import Entry, Split, hf_shapes


@torch.no_grad()
def load_weights(modules: Sequence[torch.nn.Module], arch: Architecture, folder: Path, groups: WeightGroups) -> None:
    """Fill every parameter and persistent buffer of the modules. Not collective, but strict about the whole folder.

    Values are converted to the dtype of the parameters. The copies of embedding and output layer that published checkpoints
    repeat in the multi-token-prediction layer must be there, and are not read.

    Args:
        modules: this rank's Megatron modules without wrappers, one per virtual pipeline stage.
        arch: the model's shape.
        folder: config.json and safetensors.
        groups: this rank's process groups.

    Raises:
        CheckpointError: a missing or broken folder or file.
        ConversionError: tensors that are missing, unknown or of another shape, on either side.
    """
    source = HfFolder(folder)
    source.check_names(hf_shapes(arch))
    local = local_weights(modules, arch, groups)
    for i, targets in local.tensors.items():
        entry = local.entries[i]
        for name in entry.hf:
            if source.shape(name) != entry.shape:
                raise ConversionError(
                    f"tensor {name} in {folder} has shape {list(source.shape(name))}, expected {list(entry.shape)}"
                )
        for target in targets:
            _fill(entry, target, source, groups)


def _fill(entry: Entry, target: torch.Tensor, source: HfFolder, groups: WeightGroups) -> None:
    group = tensor_group(entry, groups)
    rank, parts = group_rank(group), group_size(group)
    if entry.split is Split.VOCAB:
        start = rank * target.shape[0]
        rows = source.read(entry.hf[0], slice(min(start, entry.shape[0]), min(start + target.shape[0], entry.shape[0])))
        target[: rows.shape[0]].copy_(rows)
        target[rows.shape[0] :].zero_()  # padding: no token has these ids
        return
    size = shard_shape(entry, groups)[1] if entry.split is Split.ROW else entry.shape[0] // parts
    part = slice(rank * size, (rank + 1) * size)
    area = (slice(None), part) if entry.split is Split.ROW else (part, slice(None))
    target.copy_(torch.cat([source.read(name, *area) for name in entry.hf]))
