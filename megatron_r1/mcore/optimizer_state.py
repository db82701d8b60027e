"""Adam's state, parameter by parameter, so that a checkpoint does not depend on the layout it was written with.

Megatron-Core's own optimizer state loads into another layout, except across expert parallelism: with it an optimizer is a chain of
two (dense parameters and experts) with a state dict each, without it there is one. But tensors have the same names under every
layout, so only tensors are stored here; all else in the state dicts follows from the config and the number of updates.

Every data-parallel rank stores the part of each tensor that it holds, and reads that part. Megatron-Core 0.16.1 offers three ways
for its distributed optimizer: `fully_reshardable` gathers whole buffers on one rank or on all (12 bytes a parameter, twice to three
times), `dp_reshardable` gathers nothing but ties a checkpoint to tp, pp and ep, and `fully_sharded_model_space` did what is done
here until flattened ranges were taken out of its sharded tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import prod
from typing import Any

import torch

from megatron_r1.mcore.active import require_active
from megatron_r1.mcore.adam_state import distributed_optimizers, held_state, set_updates, state_tensors

require_active()

from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer

_Box = tuple[tuple[int, ...], tuple[int, ...]]  # offset and shape


def optimizer_state(optimizer: ChainedOptimizer, model_state: dict[str, Any]) -> dict[str, ShardedTensor]:
    """Sharded tensors of what this rank holds of the optimizer: master weights and both moments, named after the model's tensors.

    They are views of the optimizer's own tensors, to be stored or to be loaded into: nothing is copied or gathered. The keys of the
    result mean nothing.

    Args:
        optimizer: the policy's, see `create_moments`.
        model_state: the model's sharded state dict.
    """
    of_model = _entries(model_state)
    held = (tensor for part in distributed_optimizers(optimizer) for tensor in _held_tensors(part, of_model))
    return {str(number): tensor for number, tensor in enumerate(held)}


def held_boxes(
    part: DistributedOptimizer, model_state: dict[str, Any], prefix: str, values: Mapping[torch.Tensor, torch.Tensor]
) -> Iterator[ShardedTensor]:
    """Sharded tensors of something that this rank has for each element of the weights that it holds.

    Args:
        model_state: the model's sharded state dict.
        prefix: before the names of the model's tensors.
        values: the model's parameter -> numbers for the range that this rank holds of it, in order.
    """
    of_model = _entries(model_state)
    for parameter, numbers in values.items():
        start = part._get_model_param_range_map(parameter)["param"].start
        yield from _boxes(of_model[parameter], f"{prefix}{of_model[parameter].key}", numbers, start)


def master_weights(part: DistributedOptimizer) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(The model's parameter, fp32 weights of the range that this rank holds of it), which offloading moves by their `data`."""
    for parameter in part.model_param_group_index_map:
        yield parameter, held_state(part, parameter)["param"]


def _entries(model_state: dict[str, Any]) -> dict[torch.Tensor, Any]:
    entries, _ = extract_sharded_tensors_and_factories(model_state)
    return {entry.data: entry for entry in nested_values(entries)}


def finish_loading(optimizer: ChainedOptimizer, loaded: dict[str, torch.Tensor], updates: int) -> None:
    """Set the count of updates, which no checkpoint holds, once the tensors of `optimizer_state` are loaded.

    Args:
        loaded: the tensors under the keys of `optimizer_state`.
        updates: that were applied.
    """
    own = {tensor.untyped_storage().data_ptr() for part in distributed_optimizers(optimizer) for tensor in state_tensors(part)}
    if not own.issuperset(tensor.untyped_storage().data_ptr() for tensor in loaded.values()):
        raise RuntimeError("megatron-core no longer loads into the tensors it is given: see mcore/optimizer_state.py")
    for part in distributed_optimizers(optimizer):
        set_updates(part, updates)


def boxes_of_range(shape: tuple[int, ...], start: int, stop: int) -> Iterator[_Box]:
    """The boxes that make up the elements `start` to `stop` of a tensor in row-major order: at most 2 for each axis, less one.

    Each box holds consecutive elements, and they come in order.
    """
    if start >= stop:
        return
    if start == 0 and stop == prod(shape):
        yield (0,) * len(shape), shape
        return
    inner = shape[1:]
    size = prod(inner)
    row, skipped = divmod(start, size)
    if skipped:  # the rest of a row
        end = min(stop, (row + 1) * size)
        yield from _in_row(row, boxes_of_range(inner, skipped, end - row * size))
        start, row = end, row + 1
    last, rest = divmod(stop, size)
    if last > row:
        yield (row, *(0 for _ in inner)), (last - row, *inner)
    if rest and stop > start:  # the start of a row
        yield from _in_row(last, boxes_of_range(inner, 0, rest))


def _in_row(row: int, boxes: Iterator[_Box]) -> Iterator[_Box]:
    return (((row, *offset), (1, *shape)) for offset, shape in boxes)


def _held_tensors(part: DistributedOptimizer, of_model: dict[torch.Tensor, Any]) -> Iterator[ShardedTensor]:
    for parameter in part.model_param_group_index_map:  # those that this rank holds a range of
        entry, start = of_model[parameter], part._get_model_param_range_map(parameter)["param"].start
        for name, values in held_state(part, parameter).items():
            yield from _boxes(entry, f"optimizer.state.{name}.{entry.key}", values.detach(), start)


def _boxes(entry: Any, key: str, values: torch.Tensor, start: int) -> Iterator[ShardedTensor]:
    """`values`, the elements from `start` on of the model's sharded tensor or factory, as sharded tensors named `key`."""
    for whole, place in _placed_tensors(entry, key):
        first, last = max(start, place), min(start + values.numel(), place + prod(whole.local_shape))
        leading = (0,) * whole.prepend_axis_num
        for offset, shape in boxes_of_range(tuple(whole.local_shape), first - place, last - place):
            count = prod(shape)
            box = (*(1 for _ in leading), *shape)
            yield replace(
                whole,
                key=key,
                data=values.view(-1)[first - start : first - start + count].view(box),
                dtype=values.dtype,
                local_shape=box,
                global_offset=tuple(map(sum, zip(whole.global_offset, (*leading, *offset), strict=True))),
                axis_fragmentations=None,  # boxes of other sizes on other ranks
                prepend_axis_num=0,
                replica_id=(*whole.replica_id[:2], 0),  # no other data-parallel rank holds these elements
            )
            first += count


def _placed_tensors(entry: Any, key: str) -> Iterator[tuple[ShardedTensor, int]]:
    """The sharded tensors, without data, that a model's entry is stored as, and the number of each one's first element in it."""
    if not isinstance(entry, ShardedTensorFactory):
        yield replace(entry, data=None), 0
        return
    shape = torch.empty(entry.data.shape, dtype=entry.data.dtype, device="meta")
    for tensor in nested_values(entry.build_fn(key, shape, entry.replica_id, None)):
        assert tensor.key == key and tensor.data.is_contiguous(), f"{tensor} is not a run of the elements of {key}"
        yield replace(tensor, data=None), tensor.data.storage_offset()
