"""The moving average of the weights on the host, updated beside the step (DeepSeek-V3, arXiv 2412.19437, section 3.2.3).

V3 keeps it to see early how good the model will be once its learning rate has fallen. Each rank averages the part of the fp32
weights that its optimizer holds, so nothing is sent, and 8 bytes a parameter of that part are on its host: the average, and the
weights that are about to go into it.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from megatron_r1.mcore.active import require_active
from megatron_r1.mcore.adam_state import distributed_optimizers
from megatron_r1.mcore.offload import host_memory
from megatron_r1.mcore.optimizer_state import held_boxes, master_weights

require_active()

from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.optimizer.optimizer import ChainedOptimizer

PREFIX = "ema."  #: of the average's names in a checkpoint, before those of the weights


class HostAverage:
    """average <- decay * average + (1 - decay) * weights, once an update, in a thread beside the next one.

    What goes in is copied before the next update writes it, so the average does not depend on how threads run. Weights that are
    not trained, and router biases, are no part of it.

    Args:
        optimizer: its fp32 weights are averaged; the average starts as they are.
        decay: of one update.
    """

    def __init__(self, optimizer: ChainedOptimizer, decay: float, device: torch.device) -> None:
        self._optimizer, self._device = optimizer, device
        self._share = 1.0 - decay
        self._weights = [weights for part in distributed_optimizers(optimizer) for _, weights in master_weights(part)]
        self.average = [host_memory(weights) for weights in self._weights]  #: fp32, this rank's parts
        self._taken = [host_memory(weights) for weights in self._weights]
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="average")
        self._added: Future[None] | None = None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.start()

    def start(self) -> None:
        """Begin with the weights as they are now: fresh ones, or those that were loaded."""
        self.settle()
        with torch.no_grad():
            for average, weights in zip(self.average, self._weights, strict=True):
                average.copy_(weights)

    def before_update(self) -> None:
        """The weights will be written: on a GPU that waits until they are copied, while this process goes on."""
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def after_update(self) -> None:
        """Take the new weights."""
        self.settle()
        copied = None
        if self._stream is None:
            self._copy()
        else:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._stream):
                self._copy()
            copied = self._stream.record_event()
        self._added = self._thread.submit(self._add, copied)

    def settle(self) -> None:
        """Wait until every update is in the average; what its thread raised is raised here."""
        if self._added is not None:
            self._added.result()
            self._added = None

    def sharded_state(self, model_state: dict[str, Any]) -> dict[str, ShardedTensor]:
        """Sharded tensors of what this rank holds of the average, to be stored or loaded into; see `optimizer_state`."""
        self.settle()
        return {str(number): tensor for number, tensor in enumerate(self._boxes(model_state))}

    def check_loaded(self, loaded: dict[str, torch.Tensor]) -> None:
        """Raises RuntimeError if the tensors of `sharded_state` were not loaded into the average itself."""
        own = {average.untyped_storage().data_ptr() for average in self.average}
        if not own.issuperset(tensor.untyped_storage().data_ptr() for tensor in loaded.values()):
            raise RuntimeError("megatron-core no longer loads into the tensors it is given: see mcore/ema.py")

    def _boxes(self, model_state: dict[str, Any]) -> Iterator[ShardedTensor]:
        averages = iter(self.average)
        for part in distributed_optimizers(self._optimizer):
            values = {parameter: next(averages) for parameter, _ in master_weights(part)}
            yield from held_boxes(part, model_state, PREFIX, values)

    def _copy(self) -> None:
        with torch.no_grad():
            for taken, weights in zip(self._taken, self._weights, strict=True):
                taken.copy_(weights, non_blocking=True)

    def _add(self, copied: torch.cuda.Event | None) -> None:
        if copied is not None:
            copied.synchronize()
        torch._foreach_lerp_(self.average, self._taken, self._share)
