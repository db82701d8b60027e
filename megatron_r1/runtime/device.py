"""Every choice that depends on CPU or GPU, made once. No other module asks whether CUDA is there."""

from __future__ import annotations

import importlib.util
import time
from dataclasses import dataclass
from typing import Literal

import torch

from megatron_r1.errors import DeviceError


@dataclass(frozen=True)
class Device:
    """Where this process computes, and what follows from it."""

    kind: Literal["cpu", "cuda"]
    torch_device: torch.device
    backend: str  #: for torch.distributed; on CUDA gloo stays there for objects and CPU tensors
    layer_specs: Literal["host", "torch", "transformer_engine"]  #: which Megatron-Core layers are built
    weight_transfer: Literal["shm", "nccl"]  #: how weights travel to the rollout engine

    def synchronize(self) -> None:
        """Wait for the device, so that a clock read afterwards counts its work."""
        if self.kind == "cuda":
            torch.cuda.synchronize(self.torch_device)


def resolve_device(choice: Literal["auto", "cpu", "cuda"], local_rank: int = 0) -> Device:
    """Turn `runtime.device` into a `Device`. With CUDA, local rank n takes GPU n and makes it current.

    Raises DeviceError where CUDA is asked for and absent, or this machine has fewer GPUs than local ranks.
    """
    if choice == "cpu" or (choice == "auto" and not torch.cuda.is_available()):
        return Device("cpu", torch.device("cpu"), "gloo", "host", "shm")
    if not torch.cuda.is_available():
        build = "this torch is built without CUDA" if torch.version.cuda is None else "torch finds no CUDA device"
        raise DeviceError(
            f"runtime.device is 'cuda' but {build}; set runtime.device=cpu, or see `megatron-r1 doctor --device cuda`"
        )
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise DeviceError(f"local rank {local_rank} needs a GPU of its own but this machine shows {count}: start {count} processes")
    torch.cuda.set_device(local_rank)
    specs = "transformer_engine" if importlib.util.find_spec("transformer_engine") else "torch"
    return Device("cuda", torch.device("cuda", local_rank), "cpu:gloo,cuda:nccl", specs, "nccl")


def time_fixed_work() -> float:
    """Seconds of a fixed piece of arithmetic on this process's device: a few milliseconds where the device is well."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        device, size, dtype, repeats = torch.device("cuda", torch.cuda.current_device()), 4096, torch.bfloat16, 8
    else:
        device, size, dtype, repeats = torch.device("cpu"), 256, torch.float32, 8
    matrix = torch.full((size, size), 1 / size, dtype=dtype, device=device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    for _ in range(repeats):
        matrix = matrix @ matrix
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started
