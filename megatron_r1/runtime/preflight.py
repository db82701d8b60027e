"""Examine every node before a job begins, and name those that would break the job or slow all others down.

It runs on every rank of the job. First each rank examines its device, memory and disks alone; an error is noted and does not end
the check. Then the ranks meet: they compare clocks, send to their neighbours and sum a tensor over all. A node is bad if a check
fails or if one of its speeds is below a share of the median.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

from megatron_r1.runtime import distributed
from megatron_r1.runtime.device import CPU, Device, resolve_device, time_fixed_work
from megatron_r1.runtime.files import write_atomically
from megatron_r1.runtime.launch import configure_threads, node_name, read_launch
from megatron_r1.runtime.open_files import hard_limit, most_file_descriptors, needed_file_descriptors, open_files_problem

BAD_NODES = 3  #: exit code
CLOCK_SECONDS = 2.0  #: largest difference of clocks: beyond it munge refuses and logs are out of order
_CLOCK_LOOKS = 3
_MEETING_SECONDS = 300.0
_DISK_BYTES = 64 << 20
_MEMORY_BYTES = 64 << 20
_NETWORK_BYTES = 16 << 20
_SPEEDS = {
    "device": "fixed works/s",
    "device memory": "GB/s",
    "memory": "GB/s",
    "network": "GB/s",
}  # compared with those of the other ranks; more is better


@dataclass
class Findings:
    """What was found on one rank."""

    node: str
    rank: int
    speeds: dict[str, float] = field(default_factory=dict)  #: by name, in the unit of `_SPEEDS`
    disks: dict[str, float] = field(default_factory=dict)  #: folder -> MB/s, written and read back
    clock_seconds: float = 0.0  #: ahead of rank 0
    open_files: int = 0  #: the hard limit; 0: none
    problems: list[str] = field(default_factory=list)  #: one line each


def run_preflight(choice: Literal["auto", "cpu", "cuda"], disks: Sequence[Path], bad_nodes: Path | None, slowest: float) -> int:
    """Examine this rank, meet the others, and print the report on rank 0. Returns 0, or 3 on all ranks if a node is bad.

    Args:
        disks: folders to write to; `{node}` stands for the node's name. One rank of each node tests them.
        bad_nodes: file for the names of bad nodes, one a line; not written if there are none.
        slowest: share of the median speed below which a node is bad.

    Raises:
        DeviceError: the ranks cannot meet.
    """
    launch = read_launch()
    configure_threads(1)
    found = Findings(node_name(), launch.rank)
    device = _resolve_or_note(choice, launch.local_rank, found)
    if device is not None:
        _examine(found, "device", lambda: _measure_device(found, device))
    # Every layout has at least the connections of the world; what a layout needs is checked where its groups are made.
    if problem := open_files_problem(needed_file_descriptors(launch.world_size)):
        found.problems.append(problem)
    found.open_files = hard_limit()
    _examine(found, "memory", lambda: found.speeds.update(memory=_copy_speed(CPU)))
    if launch.local_rank == 0:
        for pattern in disks:
            folder = Path(str(pattern).replace("{node}", found.node))
            _examine(found, f"disk {folder}", partial(_measure_disk, found, folder))
    # First over gloo alone: a rank with a broken GPU must still be able to report it.
    distributed.join_process_group(launch, CPU, _MEETING_SECONDS)
    try:
        _compare_clocks(found)
        _meet(found, device)
        ranks = distributed.gather_objects(found)
    finally:
        distributed.shutdown()
    bad = find_bad_nodes(ranks, slowest)
    if launch.rank == 0:
        print(preflight_report(ranks, bad), file=sys.stderr, flush=True)
        if bad and bad_nodes is not None:
            write_atomically(bad_nodes, "".join(f"{node}\n" for node in sorted(bad)))
    return BAD_NODES if bad else 0


def find_bad_nodes(ranks: Sequence[Findings], slowest: float) -> dict[str, list[str]]:
    """Node -> what is wrong with it, for every bad node."""
    bad: dict[str, list[str]] = {}
    for found in ranks:
        for problem in found.problems:
            bad.setdefault(found.node, []).append(problem)
        if abs(found.clock_seconds) > CLOCK_SECONDS:
            bad.setdefault(found.node, []).append(f"clock is {found.clock_seconds:+.1f} s off that of rank 0")
    for name, unit in _SPEEDS.items():
        speeds = {found.rank: found.speeds[name] for found in ranks if name in found.speeds}
        if not speeds:
            continue
        median = statistics.median(speeds.values())
        for found in ranks:
            if found.rank in speeds and speeds[found.rank] < slowest * median:
                bad.setdefault(found.node, []).append(
                    f"{name} of rank {found.rank}: {speeds[found.rank]:.3g} {unit}, the median is {median:.3g}"
                )
    return bad


def preflight_report(ranks: Sequence[Findings], bad: dict[str, list[str]]) -> str:
    """One line for each node: what is wrong with it, or the lowest speeds of its ranks."""
    nodes: dict[str, list[Findings]] = {}
    for found in ranks:
        nodes.setdefault(found.node, []).append(found)
    lines = [f"preflight: {len(nodes)} node(s), {len(ranks)} rank(s), {len(bad)} bad node(s)"]
    for node, of_node in nodes.items():
        if node in bad:
            lines += [f"preflight: {node} is bad: {problem}" for problem in bad[node]]
            continue
        least = {name: min(f.speeds[name] for f in of_node if name in f.speeds) for name in of_node[0].speeds}
        disks = {folder: speed for found in of_node for folder, speed in found.disks.items()}
        parts = [f"{name} {value:.3g} {_SPEEDS[name]}" for name, value in least.items()]
        parts += [f"{folder} {speed:.0f} MB/s" for folder, speed in disks.items()]
        lines.append(f"preflight: {node} is well: {', '.join(parts)}, clock {of_node[0].clock_seconds:+.3f} s")
    limits = [found.open_files for found in ranks if found.open_files]
    has = f"at least {min(limits)}" if limits else "any number of"
    lines.append(f"preflight: every rank may open {has} files, and needs at most {most_file_descriptors(len(ranks))} in any layout")
    return "\n".join(lines)


def _resolve_or_note(choice: Literal["auto", "cpu", "cuda"], local_rank: int, found: Findings) -> Device | None:
    devices: list[Device] = []
    _examine(found, "device", lambda: devices.append(resolve_device(choice, local_rank)))
    return devices[0] if devices else None


def _examine(found: Findings, what: str, work: Callable[[], None]) -> None:
    """Run one check; an error becomes a problem of this rank."""
    try:
        work()
    except Exception as error:  # noqa: BLE001 - a broken node may raise anything
        reason = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
        found.problems.append(f"{what}: {reason or type(error).__name__}")


def _measure_device(found: Findings, device: Device) -> None:
    """Check that the device computes correctly, and how fast. On CUDA measure the device's own memory, too."""
    numbers = torch.arange(64, dtype=torch.float32, device=device.torch_device).view(8, 8)
    if not torch.equal((numbers @ numbers).cpu(), (numbers.cpu() @ numbers.cpu())):  # exact: whole numbers below 2^24
        raise RuntimeError("a product of two matrices is wrong")
    time_fixed_work(device)
    found.speeds["device"] = 1 / min(time_fixed_work(device) for _ in range(3))
    if device.kind == "cuda":
        found.speeds["device memory"] = _copy_speed(device)


def _copy_speed(device: Device) -> float:
    """GB/s read and written by copies."""
    source = torch.ones(_MEMORY_BYTES, dtype=torch.uint8, device=device.torch_device)
    target = torch.empty_like(source)
    target.copy_(source)
    best = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        target.copy_(source)
        device.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * _MEMORY_BYTES / best / 1e9


def _measure_disk(found: Findings, folder: Path) -> None:
    found.disks[str(folder)] = _disk_speed(folder)


def _disk_speed(folder: Path) -> float:
    """MB/s for writing a file to the disk and reading it back. Raises OSError; RuntimeError if other bytes come back."""
    content = os.urandom(1 << 20)
    path = folder / f".tmp-preflight-{node_name()}-{os.getpid()}"
    started = time.perf_counter()
    try:
        with path.open("wb") as file:
            for _ in range(_DISK_BYTES >> 20):
                file.write(content)
            file.flush()
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # so that it is read from the disk
        with path.open("rb") as file:
            if any(file.read(1 << 20) != content for _ in range(_DISK_BYTES >> 20)):
                raise RuntimeError("a file does not come back as it was written")
    finally:
        path.unlink(missing_ok=True)
    return 2 * _DISK_BYTES / (time.perf_counter() - started) / 1e6


def _compare_clocks(found: Findings) -> None:
    distributed.barrier()
    ahead = []
    for _ in range(_CLOCK_LOOKS):  # a rank may be late once, and a clock may be set in between
        distributed.barrier()
        times = distributed.gather_objects(time.time())
        ahead.append(times[found.rank] - times[0])
    found.clock_seconds = statistics.median(ahead)


def _meet(found: Findings, device: Device | None) -> None:
    """Send to both neighbours and sum over all, over the network that the job will use."""
    if distributed.world_size() == 1:
        return
    where = device if device is not None and device.kind == "cuda" else CPU
    kinds = set(distributed.gather_objects(where.kind))
    if len(kinds) > 1:
        return  # some rank's GPU is broken and noted; the others cannot try NCCL without it
    group = dist.new_group(timeout=distributed.collective_timeout(), backend="nccl") if kinds == {"cuda"} else None
    _examine(found, "all-reduce", lambda: _check_sum(where, group))
    _examine(found, "network", lambda: found.speeds.update(network=_neighbour_speed(found.rank, where, group)))


def _check_sum(where: Device, group: dist.ProcessGroup | None) -> None:
    values = torch.full((1 << 20,), float(distributed.rank() + 1), device=where.torch_device)
    dist.all_reduce(values, group=group)
    wanted = distributed.world_size() * (distributed.world_size() + 1) / 2
    if not bool((values == wanted).all()):
        raise RuntimeError("the sum over all ranks is wrong")


def _neighbour_speed(rank: int, where: Device, group: dist.ProcessGroup | None) -> float:
    """GB/s to or from the better of the two neighbours: a slow node is slow with both, its neighbours with one."""
    size, best = distributed.world_size(), 0.0
    tensor = torch.ones(_NETWORK_BYTES, dtype=torch.uint8, device=where.torch_device)
    # In the first round the pairs are 0-1, 2-3 ..., in the second 1-2, 3-4 ...; with an odd number of ranks one waits.
    for first in (0, 1):
        lower = (rank - first) % 2 == 0 and rank >= first
        peer = rank + 1 if lower else rank - 1
        if 0 <= peer < size and (rank >= first):
            for attempt in range(2):  # the first one opens the connection
                started = time.perf_counter()
                order = (dist.send, dist.recv) if lower else (dist.recv, dist.send)
                for move in order:
                    move(tensor, peer, group=group)
                where.synchronize()
                if attempt:
                    best = max(best, 2 * _NETWORK_BYTES / (time.perf_counter() - started) / 1e9)
        distributed.barrier()
    return best
