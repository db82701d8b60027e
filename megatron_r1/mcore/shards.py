"""What Megatron-Core itself stores of which weight: the sharded state of modules on the meta device, rank by rank."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_r1.errors import ConversionError
from megatron_r1.mcore import parallel
from megatron_r1.mcore.active import require_active
from megatron_r1.mcore.meta import MetaRank, meta_ranks
from megatron_r1.mcore.pieces import Piece, Shards
from megatron_r1.model.architecture import Architecture
from megatron_r1.model.rows import Split
from megatron_r1.weights.local_weights import local_weights

require_active()

from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories, is_main_replica

from megatron_r1.mcore.checkpoint import sharded_weights


def shards_of_ranks(arch: Architecture, layout: parallel.Layout, ranks: Sequence[int]) -> Shards:
    """Build the ranks and collect what each holds.

    Raises:
        ConversionError: a rank holds a tensor that the mapping table does not have, or with another shape.
    """
    shards = Shards()
    for rank, built in zip(ranks, meta_ranks(arch, layout, ranks), strict=True):
        _collect(shards, rank, built, arch)
    return shards


def _collect(shards: Shards, rank: int, built: MetaRank, arch: Architecture) -> None:
    local = local_weights(built.modules, arch, built.groups)
    rows = {i: arch.vocab_size for i in local.tensors if local.entries[i].split is Split.VOCAB}
    held = [(i, tensor) for i, tensors in local.tensors.items() for tensor in tensors]
    # Megatron-Core's sharded tensors are parameters or views of parts of them: their storage shows of which.
    entry_of = {tensor.untyped_storage()._cdata: i for i, tensor in held}
    shards.elements[rank] = sum(tensor.numel() for _, tensor in held)
    for i in local.tensors:
        shards.holders.setdefault(i, []).append(rank)
    for module in built.modules:
        state = sharded_weights(module)
        apply_factories(state)
        for part in nested_values(state):
            if isinstance(part, ShardedTensor) and is_main_replica(part.replica_id):
                shards.pieces.append(_piece(part, entry_of, rows))


def _piece(part: ShardedTensor, entry_of: dict[int, int], rows: dict[int, int]) -> Piece:
    """`rows`: how many of an entry are no padding; a conversion stores these alone, whatever the layout."""
    entry = entry_of.get(part.data.untyped_storage()._cdata)
    if entry is None:
        raise ConversionError(f"{part.key} would be stored, but is no weight of the mapping table")
    shape, whole, offset = (
        (1,) * part.prepend_axis_num + tuple(part.local_shape),
        tuple(part.global_shape),
        tuple(part.global_offset),
    )
    if entry in rows:
        start = min(offset[0], rows[entry])
        shape, whole, offset = (min(shape[0], rows[entry] - start), shape[1]), (rows[entry], whole[1]), (start, offset[1])
    return Piece(entry, part.key, whole, offset, shape)
