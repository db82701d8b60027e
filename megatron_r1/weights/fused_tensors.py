"""Several Hugging Face tensors as the one tensor that Megatron-Core keeps of them, and back."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_r1.model.rows import Split
from megatron_r1.weights.mapping import Entry


def fuse(entry: Entry, tensors: Sequence[torch.Tensor], parts: int = 1) -> torch.Tensor:
    """The Megatron tensor of an entry: gate over up; or for every query group its query heads, its key and its value head.

    Args:
        entry: of the mapping table.
        tensors: one per name in `entry.hf`: whole, or the same one of `parts` equal pieces of axis 0.
        parts: number of pieces into which tensor parallelism cuts the rows.

    Returns:
        The tensor, or this piece of it as tensor parallelism cuts it; the argument itself if there is only one.
    """
    if len(tensors) == 1:
        return tensors[0]
    return torch.cat([tensor.unflatten(0, (_groups(entry, parts), -1)) for tensor in tensors], 1).flatten(0, 1)


def unfuse(entry: Entry, tensor: torch.Tensor, parts: int = 1) -> list[torch.Tensor]:
    """The tensors named by `entry.hf` from the Megatron tensor or one of `parts` pieces of it: the inverse of `fuse`.

    They are views if the rows of each are contiguous.
    """
    if len(entry.hf) == 1:
        return [tensor]
    groups = _groups(entry, parts)
    sizes = [shape[0] // parts // groups for shape in entry.shapes]
    return [piece.flatten(0, 1) for piece in tensor.unflatten(0, (groups, -1)).split(sizes, 1)]


def _groups(entry: Entry, parts: int) -> int:
    return entry.query_groups // parts if entry.split is Split.QKV else 1
