"""What of a model is on the host while the device is needed for something else: how it gets there, and back.

On a machine without CUDA the device is the host: tensors move to other memory there, and all else is the same.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

import torch

from megatron_r1.mcore.active import require_active
from megatron_r1.mcore.adam_state import distributed_optimizers, state_tensors

require_active()

from megatron.core.optimizer.optimizer import ChainedOptimizer


def host_memory(like: torch.Tensor) -> torch.Tensor:
    """An uninitialised tensor on the host; pinned if `like` is on a GPU, so that copies are fast."""
    return torch.empty(like.shape, dtype=like.dtype, pin_memory=like.is_cuda)


def exchange(held: torch.Tensor, other: torch.Tensor) -> None:
    """Swap the contents of two tensors of the same shape, wherever they are, with one more tensor of that size on the device."""
    assert held.dtype == other.dtype, f"{held.dtype} would be rounded to {other.dtype}"
    scratch = other.clone()
    other.copy_(held)
    held.copy_(scratch)


@contextmanager
def borrowing(live: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> Iterator[None]:
    """Let the `live` tensors have the memory of `others` during the block: of their shapes, on their device. Nothing is copied.

    Forward passes without gradient alone may run in it: what a backward pass would need is kept by the tensor, not by its memory.
    """
    own = [tensor.data for tensor in live]
    try:
        for tensor, other in zip(live, others, strict=True):
            assert tensor.dtype == other.dtype, f"{tensor.dtype} would become {other.dtype}"
            tensor.data = other
        yield
    finally:
        for tensor, data in zip(live, own, strict=True):
            tensor.data = data


class Shelf:
    """Tensors that are on the device, or on the host in memory that is allocated when they first leave, and kept.

    Megatron-Core's own `offload_to_cpu` of optimizers allocates pageable memory every time.

    Args:
        tensors: each has its storage for itself. Only their data moves, so whoever holds a tensor finds it where it is.
        constant: nobody writes into them: they are copied to the host once.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], device: torch.device, *, constant: bool = False) -> None:
        self._tensors, self._device, self._constant = tensors, device, constant
        self._host: list[torch.Tensor] = []
        self.is_away = False

    @property
    def num_bytes(self) -> int:
        """Of all tensors, wherever they are."""
        return sum(tensor.nbytes for tensor in self._tensors)

    def to_host(self) -> None:
        """Free the tensors' memory on the device."""
        if self.is_away:
            return
        if not self._host or not self._constant:
            self._host = self._host or [host_memory(tensor) for tensor in self._tensors]
            for tensor, host in zip(self._tensors, self._host, strict=True):
                host.copy_(tensor.detach(), non_blocking=True)
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
        for tensor, host in zip(self._tensors, self._host, strict=True):
            tensor.data = host
        self.is_away = True

    def to_device(self) -> None:
        """Bring them back."""
        if not self.is_away:
            return
        for tensor, host in zip(self._tensors, self._host, strict=True):
            tensor.data = torch.empty_like(host, device=self._device).copy_(host, non_blocking=True)
        self.is_away = False

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Have them on the device during the block alone."""
        self.to_device()
        try:
            yield
        finally:
            self.to_host()


class TrainingOffload:
    """The optimizer's state and the gradient buffers of a model, as far as `runtime.offload` names them.

    Args:
        names: of `runtime.offload`.
        chunks: what the optimizer trains, inside Megatron-Core's DistributedDataParallel.
    """

    def __init__(
        self, names: Collection[str], optimizer: ChainedOptimizer, chunks: Sequence[torch.nn.Module], device: torch.device
    ) -> None:
        self._optimizer, self._device, self._is_away = optimizer, device, False
        # In fp32 the master weights are the weights, which stay.
        weights = {parameter.untyped_storage().data_ptr() for chunk in chunks for parameter in chunk.parameters()}
        held = (tensor for part in distributed_optimizers(optimizer) for tensor in state_tensors(part))
        own = [tensor for tensor in held if tensor.untyped_storage().data_ptr() not in weights]
        self._state = Shelf(own if "optimizer" in names else [], device)
        self._buffers = [
            buffer for chunk in chunks if "gradients" in names for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)
        ]

    @property
    def num_bytes(self) -> int:
        """What `leave` frees on the device; see `state_bytes.StateBytes.moved`."""
        return self._state.num_bytes + sum(buffer.grad_data.nbytes for buffer in self._buffers)

    def leave(self) -> None:
        """Free the device. A checkpoint can be written meanwhile: it takes the state from the host."""
        self._optimizer.zero_grad()  # what is left of the last update would hold the gradients' memory
        self._state.to_host()
        self._is_away = True
        for buffer in self._buffers:
            buffer.offload_to_cpu(move_params=False, move_grads=True)  # nothing is copied: the next update begins with zeros
        if self._device.type == "cuda":
            torch.cuda.empty_cache()  # another process, the engine, can have it

    def come_back(self) -> None:
        """Have all on the device again, gradients as zeros."""
        self._state.to_device()
        for buffer in self._buffers:
            buffer.reload_from_cpu(move_params=False, move_grads=True)
        self._is_away = False

    @property
    def absent_bytes(self) -> int:
        """What `come_back` will take on the device."""
        return self.num_bytes if self._is_away else 0
