"""Gradients that are reduced, and weights that are gathered, while a pass goes on: `megatron.overlap_*`."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch

from megatron_r1.mcore.active import require_active
from megatron_r1.mcore.switches import Switches

require_active()

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.transformer.transformer_config import TransformerConfig


def wrap_for_training(
    chunks: Sequence[torch.nn.Module], config: TransformerConfig, switches: Switches
) -> list[DistributedDataParallel]:
    """The chunks of a pipeline stage with buffers for their gradients, and what the schedule has to know of them in `config`."""
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True, **switches.ddp)
    wrapped = [DistributedDataParallel(config, ddp, chunk, disable_bucketing=i > 0) for i, chunk in enumerate(chunks)]
    config.finalize_model_grads_func = finalize_model_grads
    if ddp.overlap_grad_reduce:
        # All micro-batches but the last one only add up: what is under way is reduced once.
        without_sync = [chunk.no_sync for chunk in wrapped]
        config.no_sync_func = without_sync if len(wrapped) > 1 else without_sync[0]
    return wrapped


def free_with(owner: object, wrapped: Sequence[DistributedDataParallel]) -> None:
    """Have the chunks go when `owner`, which alone has a use for them, goes: weights, and buffers of weights and gradients.

    Megatron-Core hangs hooks, which hold the chunk, on nodes of autograd that the chunk's list holds, and its token dispatchers
    keep tensors of the last pass, whose graph ends in those nodes. Python does not see either circle whole, and would keep both.
    """
    nodes = [chunk.grad_accs for chunk in wrapped]
    keepers = [
        keeper
        for chunk in wrapped
        for module in chunk.modules()
        if (dispatcher := getattr(module, "token_dispatcher", None)) is not None
        for keeper in (dispatcher, getattr(dispatcher, "_comm_manager", None))
        if keeper is not None
    ]
    weakref.finalize(owner, _let_go, nodes, keepers).atexit = False


def _let_go(nodes: Sequence[list[Any]], keepers: Sequence[object]) -> None:
    for of_chunk in nodes:
        of_chunk.clear()
    for keeper in keepers:
        for name, value in vars(keeper).items():
            if isinstance(value, torch.Tensor) and value.grad_fn is not None:
                setattr(keeper, name, None)


class LateWeights:
    """Weights of which a rank has only its share new, between an update and the forward pass that gathers them.

    With `megatron.overlap_param_gather` Megatron-Core's hooks gather each layer's weights as it is reached in a forward pass.
    Whoever reads weights otherwise calls `gather` first. Without the switch nothing is ever late.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module]) -> None:
        self._chunks = [
            chunk for chunk in chunks if isinstance(chunk, DistributedDataParallel) and chunk.ddp_config.overlap_param_gather
        ]
        self._are_late = False

    def updated(self) -> None:
        """The optimizer has made a step."""
        self._are_late = bool(self._chunks)

    def passed(self) -> None:
        """A forward pass went through all layers, and all data-parallel ranks make as many."""
        self._are_late = False

    def gather(self) -> None:
        """Have all weights new, now. Collective over data-parallel ranks, if they are late, which they are on all ranks alike."""
        if self._are_late:
            for chunk in self._chunks:
                chunk.start_param_sync(force_sync=True)
            self._are_late = False
