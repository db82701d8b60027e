"""One process of a command: sets up threads, device, process group and Megatron-Core, and tears them down again."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from megatron_r1.config.runtime import RuntimeConfig
from megatron_r1.runtime import distributed, launch
from megatron_r1.runtime.cores import choose_threads
from megatron_r1.runtime.device import Device, resolve_device, warn_of_slow_bf16
from megatron_r1.runtime.heap import keep_freed_memory


@dataclass(frozen=True)
class Session:
    """What this process is and computes on."""

    launch: launch.LaunchInfo
    device: Device
    threads: int = 1  #: of this process on the CPU, and of its engine
    _untold: list[str] = field(default_factory=list)

    def tell_threads(self) -> None:
        """Say once, on rank 0, how many threads were chosen: when the work begins, so that an error before it is one line."""
        while self._untold:
            print(self._untold.pop(), file=sys.stderr, flush=True)


@contextmanager
def open_session(runtime: RuntimeConfig) -> Iterator[Session]:
    """Join the other ranks for the block.

    `mcore.policy` and its siblings import Megatron-Core, so import them inside the block: on a machine without CUDA, `mcore.host`
    changes Megatron-Core as it is imported.
    """
    # Megatron-Core and torch warn about optional packages that are missing. `megatron-r1 doctor` reports them once.
    warnings.filterwarnings("ignore", module=r"megatron\.core\b.*")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\b.*")
    info = launch.read_launch()
    if runtime.device != "cuda":
        launch.configure_threads(runtime.threads or 1)
    device = resolve_device(runtime.device, info.local_rank)
    if device.kind == "cpu":
        keep_freed_memory()
    if device.kind == "cpu" and info.rank == 0:
        slow = warn_of_slow_bf16(runtime.dtype, torch.cpu.get_capabilities())
        if slow is not None:
            print(slow, file=sys.stderr, flush=True)
    from megatron_r1.mcore import host

    host.activate(device.kind)
    distributed.join_process_group(info, device, runtime.collective_timeout_seconds)
    try:
        yield Session(info, device, *_settle_threads(runtime, info, device))
    finally:
        distributed.shutdown()


def _settle_threads(runtime: RuntimeConfig, info: launch.LaunchInfo, device: Device) -> tuple[int, list[str]]:
    """The number of threads that is set, or one that is chosen on the CPU, and on rank 0 what to say of the choice. Collective."""
    if runtime.threads is not None or device.kind != "cpu":
        return runtime.threads or 1, []
    threads, reason = choose_threads(info.local_world_size)
    launch.configure_threads(threads)
    line = f"threads of each process: {threads}, as {reason}; runtime.threads=N takes another number"
    return threads, [line] if distributed.is_rank_zero() else []
