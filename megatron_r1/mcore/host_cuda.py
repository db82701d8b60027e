"""What `torch.cuda` means inside megatron.core on a machine without CUDA (see `host_rewrite.py`).

There is one device, one stream, and everything is synchronous. Only the names that megatron.core reaches on our paths are
here: anything else raises AttributeError where it is used.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch

OutOfMemoryError = torch.OutOfMemoryError
FloatTensor, DoubleTensor, HalfTensor, BFloat16Tensor = (
    torch.FloatTensor,
    torch.DoubleTensor,
    torch.HalfTensor,
    torch.BFloat16Tensor,
)
IntTensor, LongTensor, ByteTensor = torch.IntTensor, torch.LongTensor, torch.ByteTensor


class Event:
    """A point on the only stream: always reached."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def record(self, stream: Stream | None = None) -> None:
        """Nothing to mark."""

    def wait(self, stream: Stream | None = None) -> None:
        """Already reached."""

    def synchronize(self) -> None:
        """Already reached."""

    def query(self) -> bool:
        """Already reached."""
        return True


class Stream:
    """The only stream. megatron.core compares streams and asserts that some are equal, so all instances are."""

    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream)

    def __hash__(self) -> int:
        return 0

    def wait_stream(self, stream: Stream) -> None:
        """Work is done when the call returns."""

    def wait_event(self, event: Event) -> None:
        """Work is done when the call returns."""

    def synchronize(self) -> None:
        """Work is done when the call returns."""

    def record_event(self, event: Event | None = None) -> Event:
        """A reached event."""
        return event or Event()


class CUDAGraph:
    """Named in type checks only."""


class nvtx:
    """Profiler ranges go nowhere."""

    @staticmethod
    def range_push(message: str) -> int:
        """Depth 0."""
        return 0

    @staticmethod
    def range_pop() -> int:
        """Depth 0."""
        return 0


_STREAM = Stream()


def is_available() -> bool:
    """There is no CUDA."""
    return False


def current_device() -> torch.device:
    """The device for new tensors."""
    return torch.device("cpu")


def set_device(device: object) -> None:
    """There is only one."""


def device_count() -> int:
    """One process is one device."""
    return 1


def synchronize(device: object = None) -> None:
    """Work is done when the call returns."""


def empty_cache() -> None:
    """There is no caching allocator."""


def get_device_capability(device: object = None) -> tuple[int, int]:
    """Older than anything that has a fused kernel."""
    return 0, 0


def is_current_stream_capturing() -> bool:
    """There are no CUDA graphs."""
    return False


def current_stream(device: object = None) -> Stream:
    """The only stream."""
    return _STREAM


def default_stream(device: object = None) -> Stream:
    """The only stream."""
    return _STREAM


def stream(stream: Stream | None) -> contextlib.AbstractContextManager[None]:
    """Switching to the only stream."""
    return contextlib.nullcontext()


def memory_allocated(device: object = None) -> int:
    """Not measured."""
    return 0


def memory_stats(device: object = None) -> dict[str, int]:
    """Not measured."""
    return {}


max_memory_allocated = memory_reserved = memory_allocated


def get_rng_state(device: object = None) -> torch.Tensor:
    """State of the default generator."""
    return torch.get_rng_state()


def set_rng_state(state: torch.Tensor, device: object = None) -> None:
    """Set the default generator."""
    torch.set_rng_state(state)


def manual_seed(seed: int) -> None:
    """Seed the default generator."""
    torch.manual_seed(seed)


def to_device(value: Any, *args: Any, **kwargs: Any) -> Any:
    """What `value.cuda(...)` becomes: tensors and modules stay, anything else keeps its own method."""
    return value if isinstance(value, (torch.Tensor, torch.nn.Module)) else value.cuda(*args, **kwargs)
