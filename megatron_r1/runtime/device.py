"""Where this process computes. The only module that asks torch whether CUDA is there: all others are handed the device."""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from megatron_r1.errors import DeviceError


@dataclass(frozen=True)
class Device:
    """Where this process computes."""

    kind: Literal["cpu", "cuda"]
    torch_device: torch.device
    backend: str  #: for torch.distributed; on CUDA gloo stays there for objects and CPU tensors

    def synchronize(self) -> None:
        """Wait for the device, so that a clock read afterwards counts its work."""
        if self.kind == "cuda":
            torch.cuda.synchronize(self.torch_device)

    def peak_memory(self) -> int:
        """Bytes that tensors took of the device at most since the last call; 0 on a CPU, where nobody counts them."""
        if self.kind == "cpu":
            return 0
        peak = torch.cuda.max_memory_allocated(self.torch_device)
        torch.cuda.reset_peak_memory_stats(self.torch_device)
        return peak

    def release_memory(self) -> None:
        """Give back the memory of what nothing refers to any more; a model refers to itself through its hooks."""
        gc.collect()
        gc.collect()  # what was held by something that the first one freed: see `overlap.free_with`
        if self.kind == "cuda":
            torch.cuda.empty_cache()


_BF16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")  # of x86, and of ARM

CPU = Device("cpu", torch.device("cpu"), "gloo")


def resolve_device(choice: Literal["auto", "cpu", "cuda"], local_rank: int = 0) -> Device:
    """Turn `runtime.device` into a `Device`. With CUDA, local rank n takes GPU n and makes it current.

    Raises DeviceError if CUDA is asked for and absent, or this machine has fewer GPUs than local ranks.
    """
    count = cuda_device_count()
    if choice == "cpu" or (choice == "auto" and not count):
        return CPU
    if not count:
        build = "this torch is built without CUDA" if torch.version.cuda is None else "torch finds no CUDA device"
        raise DeviceError(
            f"runtime.device is 'cuda' but {build}; set runtime.device=cpu, or see `megatron-r1 doctor --device cuda`"
        )
    if local_rank >= count:
        raise DeviceError(f"local rank {local_rank} needs a GPU of its own but this machine shows {count}: start {count} processes")
    torch.cuda.set_device(local_rank)
    return Device("cuda", torch.device("cuda", local_rank), "cpu:gloo,cuda:nccl")


def warn_of_slow_bf16(dtype: str, capabilities: Mapping[str, object]) -> str | None:
    """A line for users if the CPU computes in this `runtime.dtype` without instructions for it; None: it has them.

    Args:
        dtype: "fp32" or "bf16".
        capabilities: of the processor, as `torch.cpu.get_capabilities` names them.
    """
    if dtype != "bf16" or any(capabilities.get(name) for name in _BF16_INSTRUCTIONS):
        return None
    return (
        "warning: this processor has no bf16 instructions, which runtime.dtype=bf16 then imitates, slowly: fp32 may be faster here"
    )


def cuda_device_count() -> int:
    """How many CUDA devices torch can use here; 0 without CUDA."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def compute_capability() -> int:
    """The major compute capability of the GPU in use: 9 of Hopper, 10 of Blackwell; 0 without CUDA."""
    return torch.cuda.get_device_capability()[0] if cuda_device_count() else 0


def device_in_use() -> Device:
    """The GPU that this process has begun to use, else the CPU."""
    if torch.cuda.is_initialized() and torch.cuda.is_available():
        return Device("cuda", torch.device("cuda", torch.cuda.current_device()), "cpu:gloo,cuda:nccl")
    return CPU


def time_fixed_work(device: Device) -> float:
    """Seconds of a fixed piece of arithmetic on the device: a few milliseconds if the device is well."""
    size, dtype = (4096, torch.bfloat16) if device.kind == "cuda" else (256, torch.float32)
    matrix = torch.full((size, size), 1 / size, dtype=dtype, device=device.torch_device)
    device.synchronize()
    started = time.perf_counter()
    for _ in range(8):
        matrix = matrix @ matrix
    device.synchronize()
    return time.perf_counter() - started
