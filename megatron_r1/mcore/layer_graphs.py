"""Parts of layers as CUDA graphs of Transformer Engine: `megatron.cuda_graph_impl=transformer_engine`.

Megatron-Core's helper captures them and its layers replay them; when, for which micro-batches and with which weights gathered is up
to the training loop, which in Megatron-LM is `megatron.training`. `local` graphs need no loop: the schedule captures them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from megatron_r1.errors import ConfigError, one_line
from megatron_r1.mcore.active import require_active
from megatron_r1.mcore.overlap import LateWeights
from megatron_r1.types import MicroBatch

require_active()

from megatron.core.num_microbatches_calculator import reconfigure_num_microbatches_calculator
from megatron.core.optimizer.optimizer import ChainedOptimizer
from megatron.core.transformer.cuda_graphs import TECudaGraphHelper


class LayerGraphs:
    """The graphs of a rank's layers; without the switch, nothing.

    Args:
        chunks: what the schedule runs, inside Megatron-Core's DistributedDataParallel.
        optimizer: of these; None: nothing is trained, and nothing captured.
        late: weights that a forward pass would gather.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module], optimizer: ChainedOptimizer | None, late: LateWeights) -> None:
        self._chunks, self._optimizer, self._late = chunks, optimizer, late
        self._config = chunks[0].config
        self._is_on = optimizer is not None and self._config.cuda_graph_impl == "transformer_engine"
        self._updates = self._captured = 0  # micro-batches that the graphs are for; 0: there are none
        self._helper: Any = None

    def before_passes(self, micro_batches: Sequence[MicroBatch]) -> None:
        """Capture the graphs if the first updates have run without, or if a pipeline has another number of micro-batches now.

        A pipeline has several micro-batches under way, and a graph for each of them in the order of its schedule; without one, a
        single graph does for all. Called when gradients are zero: the capture runs every layer, and leaves them zero. Collective.

        Raises:
            ConfigError: the environment excludes them.
        """
        if not self._is_on:
            return
        self._updates += 1
        count = len(micro_batches) if self._config.pipeline_model_parallel_size > 1 else 1
        if self._updates <= self._config.cuda_graph_warmup_steps or self._captured == count:
            return
        if self._helper is not None:
            self._helper.delete_cuda_graphs()
        reconfigure_num_microbatches_calculator(1, None, count, 1, 1)  # of which the helper asks a global for the number
        rows, width = micro_batches[0].token_ids.shape
        try:
            self._helper = TECudaGraphHelper(list(self._chunks), self._config, width, rows, [self._optimizer])
        except AssertionError as error:
            raise ConfigError(f"megatron.cuda_graph_impl=transformer_engine does not fit: {one_line(error)}") from None
        self._late.gather()
        gathering = [chunk for chunk in self._chunks if chunk.ddp_config.overlap_param_gather]
        for chunk in gathering:  # their hooks communicate, which no graph may
            chunk.disable_forward_pre_hook(param_sync=False)
        self._helper.create_cudagraphs()
        for chunk in gathering:
            chunk.enable_forward_pre_hook()
        if gathering:
            self._helper.cuda_graph_set_manual_hooks()
        self._captured = count

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Run the layers without their graphs during the block: for passes of another schedule, or of other micro-batches."""
        layers = [layer for of_chunk in self._helper.callables_per_chunk for layer in of_chunk] if self._captured else []
        graphs = [layer.cuda_graphs for layer in layers]
        for layer in layers:
            layer.cuda_graphs = []
        try:
            yield
        finally:
            for layer, own in zip(layers, graphs, strict=True):
                layer.cuda_graphs = own
