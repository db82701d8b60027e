"""Part 5: how fast weights go from the trainer to an engine on the same node, step by step, and through the device alone."""

from __future__ import annotations

import mmap
import os
import time
from multiprocessing.connection import Connection

import torch
from torch.multiprocessing.reductions import reduce_tensor

from tests.gpu.hour.ground import Ground

IPC = "tests.gpu.hour.transfer:share"


def run(ground: Ground) -> None:
    """Every step for a small and a large bucket, checksums, then sharing with and without expandable segments."""
    for size in ground.pick((64 << 20, 1 << 30), (1 << 20,)):
        _measure_steps(ground, size)
    _measure_checksum(ground)
    plain = ground.start(IPC)
    ground.check("a tensor shared with another process: it ends", plain.wait(40) == 0)
    if ground.kind == "cuda":  # torch may refuse to share such memory; what it says is the result
        code = ground.start(IPC, PYTORCH_CUDA_ALLOC_CONF="expandable_segments:True").wait(40)
        ground.say("the same with expandable segments", "it works" if code == 0 else f"it fails, exit code {code}")


def _measure_steps(ground: Ground, size: int) -> None:
    weight = torch.ones(size // 2, dtype=torch.bfloat16, device=ground.device)
    host = torch.empty(size // 2, dtype=torch.bfloat16)
    live = torch.empty(size // 16, dtype=torch.bfloat16, device=ground.device)
    file = os.memfd_create("first_hour")
    os.ftruncate(file, size)
    shared = mmap.mmap(file, size)  # closed with the last tensor that looks into it
    view = torch.frombuffer(shared, dtype=torch.bfloat16)
    steps = {
        "device to pageable memory": (size, lambda: host.copy_(weight)),
        "memory to a memory file, one thread": (size, lambda: view.copy_(host)),
        "device to a memory file at once": (size, lambda: view.copy_(weight)),
        "memory file into a bytearray": (size, lambda: bytearray(shared)),
        "an eighth of the memory file into a live weight": (size // 8, lambda: live.copy_(view[: len(live)])),
    }
    if ground.kind == "cuda":
        pinned = torch.empty(size // 2, dtype=torch.bfloat16, pin_memory=True)
        steps["device to pinned memory"] = (size, lambda: pinned.copy_(weight, non_blocking=True))
        steps["pinned memory to device"] = (size, lambda: weight.copy_(pinned, non_blocking=True))
    for name, (moved, work) in steps.items():
        ground.say(f"{name}, {size >> 20} MiB", moved / ground.seconds(work) / 1e9, "GB/s")
    ground.check(f"the bytes came through, {size >> 20} MiB", bool((live == 1).all()))
    os.close(file)


def _measure_checksum(ground: Ground) -> None:
    from megatron_r1.weights.checksum import checksum

    rows, columns = ground.pick((32768, 16384), (512, 256))
    generator = torch.Generator(ground.device).manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator, device=ground.device, dtype=torch.bfloat16)
    ground.say("checksum", weight.nbytes / ground.seconds(lambda: checksum(weight)) / 1e9, "GB/s")
    ground.check("the checksum is that of the CPU", checksum(weight[:64]) == checksum(weight[:64].cpu()))


def share(ground: Ground) -> None:
    """Hand a tensor to another process without copying it, which copies it into its own memory."""
    size = ground.pick(1 << 30, 1 << 20)
    weight = torch.full((size,), 7, dtype=torch.uint8, device=ground.device)
    method = "spawn" if ground.kind == "cuda" else "fork"
    context = torch.multiprocessing.get_context(method)
    here, there = context.Pipe()
    reader = context.Process(target=_read, args=(there, reduce_tensor(weight), ground.kind))
    started = time.perf_counter()
    reader.start()
    if not here.poll(30):
        reader.kill()
        raise TimeoutError("the other process does not answer")
    total, seconds = here.recv()
    reader.join()
    name = os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "plain")
    ground.say(f"open and copy in another process, {name}", size / seconds / 1e9, "GB/s")
    ground.say(f"with the start of the process, {name}", time.perf_counter() - started, "s")
    ground.check(f"the other process reads the same, {name}", total == 7 * size)


def _read(answer: Connection, handle: tuple, kind: str) -> None:
    rebuild, arguments = handle
    started = time.perf_counter()
    copied = rebuild(*arguments).clone()
    if kind == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    answer.send((int(copied.sum(dtype=torch.int64)), seconds))
