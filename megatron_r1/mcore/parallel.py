"""Process groups of a layout, and each rank's share of a micro-batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from megatron_r1.errors import ConfigError
from megatron_r1.mcore.active import require_active
from megatron_r1.mcore.layout import Layout, resolve_layout
from megatron_r1.mcore.packing import local_token_indices
from megatron_r1.mcore.rank_groups import share_groups
from megatron_r1.mcore.shares import Place
from megatron_r1.runtime.distributed import collective_timeout
from megatron_r1.runtime.gloo import sharing_the_worlds_thread
from megatron_r1.types import MicroBatch

require_active()

from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, model_parallel_cuda_manual_seed
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

__all__ = [
    "Groups", "Layout", "build_process_groups", "data_parallel_rank", "find_share", "gather_context_parallel", "groups",
    "held_positions", "resolve_layout", "slice_context_parallel",
]  # fmt: skip

_built: tuple[Layout, dist.ProcessGroup] | None = None  # layout of the groups that are there, and the world they divide
_share: dist.ProcessGroup | None = None  # the ranks that compute this rank's samples, where Megatron-Core has no group of them


@dataclass(frozen=True)
class Groups:
    """Process groups that this rank belongs to."""

    tp: dist.ProcessGroup  #: tensor parallel
    etp: dist.ProcessGroup  #: tensor parallel inside experts
    ep: dist.ProcessGroup  #: expert parallel
    pp: dist.ProcessGroup  #: pipeline parallel, in stage order
    cp: dist.ProcessGroup  #: context parallel
    dp: dist.ProcessGroup  #: data parallel
    dp_cp: dist.ProcessGroup  #: data and context parallel: all ranks with the same non-expert parameters
    expert_dp: dist.ProcessGroup  #: all ranks with the same expert parameters


def build_process_groups(layout: Layout, seed: int) -> None:
    """Build the process groups of `layout`, and seed Megatron-Core's generators.

    Groups of the same layout are kept, for models that live side by side; those of another layout are replaced. torch.distributed
    is already initialised with `layout.world_size` ranks.
    """
    global _built, _share
    if not parallel_state.model_parallel_is_initialized() or _built != (layout, dist.group.WORLD):
        if parallel_state.model_parallel_is_initialized():
            parallel_state.destroy_model_parallel()
        with _one_timeout(), sharing_the_worlds_thread():
            parallel_state.initialize_model_parallel(
                tensor_model_parallel_size=layout.tp,
                pipeline_model_parallel_size=layout.pp,
                virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
                context_parallel_size=layout.cp,
                expert_model_parallel_size=layout.ep,
                expert_tensor_parallel_size=layout.etp,
            )
            made = [(ranks, parallel_state.create_group(ranks)) for ranks in (share_groups(layout) if layout.cp > 1 else ())]
        _share = next((group for ranks, group in made if dist.get_rank() in ranks), None)
        _built = (layout, dist.group.WORLD)
    # It keeps the shape of the first scale, and a loss without a schedule has another than one with.
    MoEAuxLossAutoScaler.main_loss_backward_scale = None
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def use_graphable_generators(seed: int) -> None:
    """Have Megatron-Core's generators be ones whose draws CUDA graphs may hold: it captures no layer without them."""
    model_parallel_cuda_manual_seed(seed, use_cudagraphable_rng=True, force_reset_rng=True)


def generator_states() -> dict[str, torch.Tensor]:
    """The states of Megatron-Core's generators, as bytes, of whichever kind they are."""
    states = get_cuda_rng_tracker().get_states()
    return {name: state.get_state() if isinstance(state, torch.Generator) else state for name, state in states.items()}


def set_generator_states(states: dict[str, torch.Tensor]) -> None:
    """Set what `generator_states` gave, also for generators of the other kind."""
    own = get_cuda_rng_tracker().get_states()
    for name, state in states.items():
        if isinstance(own.get(name), torch.Generator):
            own[name].set_state(state)  # graphs hold the generator itself
        else:
            own[name] = state
    get_cuda_rng_tracker().set_states(own)


@contextmanager
def _one_timeout() -> Iterator[None]:
    """Megatron-Core's groups get the timeout of all groups; its own `distributed_timeout_minutes` does not reach each of them."""
    create_group = parallel_state.create_group

    def create(*args: Any, **kwargs: Any) -> dist.ProcessGroup:
        return create_group(*args, **kwargs | {"timeout": collective_timeout()})

    parallel_state.create_group = create
    try:
        yield
    finally:
        parallel_state.create_group = create_group


def groups() -> Groups:
    """The process groups of this rank."""
    return Groups(
        tp=parallel_state.get_tensor_model_parallel_group(),
        etp=parallel_state.get_expert_tensor_parallel_group(),
        ep=parallel_state.get_expert_model_parallel_group(),
        pp=parallel_state.get_pipeline_model_parallel_group(),
        cp=parallel_state.get_context_parallel_group(),
        dp=parallel_state.get_data_parallel_group(),
        dp_cp=parallel_state.get_data_parallel_group(with_context_parallel=True),
        expert_dp=parallel_state.get_expert_data_parallel_group(),
    )


def find_share() -> Place:
    """Which share of a batch of samples this rank computes, and with whom."""
    of_tensor, of_context = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_context_parallel_rank()
    is_last = parallel_state.is_pipeline_last_stage()
    return Place(
        number=data_parallel_rank(),
        count=parallel_state.get_data_parallel_world_size(),
        speaks=is_last and of_tensor == of_context == 0,
        is_first=parallel_state.is_pipeline_first_stage(),
        is_last=is_last,
        peers=_share or parallel_state.get_model_parallel_group(),
    )


def data_parallel_rank() -> int:
    """Which share of the global batch this rank computes."""
    return parallel_state.get_data_parallel_rank()


def slice_context_parallel(micro_batch: MicroBatch) -> MicroBatch:
    """This rank's tokens of a micro-batch, in zigzag order; `cu_seqlens` keeps the global boundaries.

    Raises:
        ConfigError: a sequence length is not divisible by 2 * cp.
    """
    size = parallel_state.get_context_parallel_world_size()
    if size == 1:
        return micro_batch
    mine = _indices(micro_batch.cu_seqlens, micro_batch.token_ids.shape[1], size, parallel_state.get_context_parallel_rank())
    return replace(
        micro_batch,
        token_ids=micro_batch.token_ids[:, mine],
        labels=micro_batch.labels[:, mine],
        loss_mask=micro_batch.loss_mask[:, mine],
        position_ids=micro_batch.position_ids[:, mine],
        token_fields={name: values[:, mine] for name, values in micro_batch.token_fields.items()},
    )


def gather_context_parallel(values: torch.Tensor, cu_seqlens: torch.Tensor | None) -> torch.Tensor:
    """Per-token values [B, N / cp] of every context-parallel rank, put back into sequence order: [B, N].

    The gradient goes to this rank's own values only: each rank is to compute the same function of the whole.
    """
    group = parallel_state.get_context_parallel_group()
    if group.size() == 1:
        return values
    parts = [torch.empty_like(values) for _ in range(group.size())]
    dist.all_gather(parts, values.detach().contiguous(), group=group)
    parts[group.rank()] = values
    num_tokens = values.shape[1] * group.size()
    order = torch.cat([_indices(cu_seqlens, num_tokens, group.size(), rank) for rank in range(group.size())])
    return torch.cat(parts, dim=1)[:, order.argsort().to(values.device)]


def held_positions(micro_batch: MicroBatch, count: int) -> torch.Tensor:
    """Positions in the rows of a whole micro-batch of the `count` tokens that this rank holds between layers: [count].

    Context parallelism gives it some of them, and sequence parallelism a stretch of those.
    """
    size, num_tokens = parallel_state.get_context_parallel_world_size(), micro_batch.token_ids.shape[1]
    held = torch.arange(num_tokens)
    if size > 1:
        held = _indices(micro_batch.cu_seqlens, num_tokens, size, parallel_state.get_context_parallel_rank())
    start = count * parallel_state.get_tensor_model_parallel_rank() if count < len(held) else 0
    return held[start : start + count]


def _indices(cu_seqlens: torch.Tensor | None, num_tokens: int, cp_size: int, cp_rank: int) -> torch.Tensor:
    bounds = torch.tensor([0, num_tokens]) if cu_seqlens is None else cu_seqlens
    try:
        return local_token_indices(bounds, cp_size, cp_rank)
    except ValueError as error:
        raise ConfigError(f"parallel.cp={cp_size}: {error}") from error
