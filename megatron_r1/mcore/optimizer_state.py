"""Adam's state, parameter by parameter, so that a checkpoint does not depend on the layout it was written with.

Megatron-Core's own optimizer state loads into another layout, except across expert parallelism: with it an optimizer is a chain of
two (dense parameters and experts) with a state dict each, without it there is one. But tensors have the same names under every
layout, so only tensors are stored here; all else in the state dicts follows from the config and the number of updates.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from megatron_r1.mcore.active import require_active

require_active()

from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer


def optimizer_state(
    optimizer: ChainedOptimizer, model_state: dict[str, Any], metadata: dict[str, Any], *, is_loading: bool
) -> list[dict[int, Any]]:
    """Sharded tensors of every part of the optimizer: master weights and both moments, named after the model's tensors.

    Args:
        optimizer: the policy's. Tensors on the CPU are not copied unless they must be gathered.
        model_state: the model's sharded state dict.
        metadata: as for the model.
        is_loading: the tensors are to be filled; their content does not matter.
    """
    _create_moments(optimizer)
    return [
        _undivided_state(part, model_state)
        if part.data_parallel_group.size() == 1 and not is_loading
        else _gathered_state(part, model_state, metadata, is_loading)
        for part in _distributed_optimizers(optimizer)
    ]


def load_optimizer_state(optimizer: ChainedOptimizer, state: list[dict[int, Any]], updates: int) -> None:
    """Take what was loaded into `optimizer_state(..., is_loading=True)`, after `updates` updates that were applied."""
    for part, part_state in zip(_distributed_optimizers(optimizer), state, strict=True):
        # torch's AdamW counts updates per parameter, in place, so each parameter needs its own tensor. Megatron-Core would copy
        # the count from the checkpoint, which holds none.
        for moments in part.optimizer.state.values():
            moments.pop("step", None)
        part.load_parameter_state_from_fully_reshardable(part_state)
        if _counts_per_parameter(part):
            for moments in part.optimizer.state.values():
                moments["step"] = torch.tensor(float(updates))
        else:
            for group in part.optimizer.param_groups:
                group["step"] = updates


def _gathered_state(
    part: DistributedOptimizer, model_state: dict[str, Any], metadata: dict[str, Any], is_loading: bool
) -> dict[int, Any]:
    """The state that Megatron-Core gathers over data-parallel ranks, with every tensor taken from its right place.

    Megatron-Core 0.16.1 joins the buckets of a buffer without the padding between them, and then cuts tensors out by offsets that
    count the padding. With more than one bucket (under pipeline parallelism a shared embedding has its own) everything after the
    first would be shifted silently.
    """
    gather = part.get_parameter_state_dp_zero

    def gather_with_padding(*args: Any, **options: Any) -> dict[Any, Any]:
        state = gather(*args, **options)
        for i, buffer in enumerate(part.buffers):
            for tensors in state[i].values():
                for name in ("param", "exp_avg", "exp_avg_sq"):
                    tensors[name] = _spread_buckets(tensors[name], buffer)
        return state

    part.get_parameter_state_dp_zero = gather_with_padding
    try:
        return part.sharded_param_state_fully_reshardable(model_state, is_loading, metadata)
    finally:
        del part.get_parameter_state_dp_zero


def _spread_buckets(joined: torch.Tensor, buffer: Any) -> torch.Tensor:
    """[numel without padding] -> [numel], every bucket at its offset."""
    if joined.numel() == buffer.numel:
        return joined
    spread, start = joined.new_zeros(buffer.numel), 0
    for bucket in buffer.buckets:
        end = start + bucket.numel_unpadded
        spread[bucket.offset : bucket.offset + bucket.numel_unpadded] = joined[start:end]
        start = end
    return spread


def _undivided_state(part: DistributedOptimizer, model_state: dict[str, Any]) -> dict[int, Any]:
    """The same without copies: a single data-parallel rank holds all of it."""
    entries, _ = extract_sharded_tensors_and_factories(model_state)
    of_model = {entry.data: entry for entry in nested_values(entries)}
    state: dict[int, Any] = {}
    for parameter in (p for buffer in part.buffers for p in buffer.param_index_map):
        entry, own = of_model[parameter], part._get_main_param_and_optimizer_states(parameter)
        sharded = state[len(state)] = {}
        for name in ("param", "exp_avg", "exp_avg_sq"):
            fields = {"key": f"optimizer.state.{name}.{entry.key}", "data": own[name].detach().view(parameter.shape)}
            if isinstance(entry, ShardedTensor):  # a factory makes its sharded tensors, with their dtype, from the data
                fields["dtype"] = own[name].dtype
            sharded[name] = replace(entry, **fields)
    return state


def _create_moments(optimizer: ChainedOptimizer) -> None:
    """Adam creates its moments in the first update; to be saved or loaded into they must be there before."""
    for part in _distributed_optimizers(optimizer):
        if not _counts_per_parameter(part):
            if not part.optimizer.state:
                part.load_state_dict(part.state_dict())
            continue
        for parameter in (p for group in part.optimizer.param_groups for p in group["params"]):
            if not part.optimizer.state[parameter]:
                zeros = torch.zeros_like(parameter.data)
                part.optimizer.state[parameter].update(step=torch.tensor(0.0), exp_avg=zeros, exp_avg_sq=zeros.clone())


def _distributed_optimizers(optimizer: ChainedOptimizer) -> Iterator[DistributedOptimizer]:
    """The distributed optimizers in the chain that have parameters on this rank's model."""
    return (part for part in optimizer.chained_optimizers if not part.is_stub_optimizer)


def _counts_per_parameter(part: DistributedOptimizer) -> bool:
    """Whether this is torch's AdamW; Transformer Engine's and Apex's Adam count per parameter group."""
    return isinstance(part.optimizer, torch.optim.AdamW)
