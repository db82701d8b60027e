"""Updates of weights inside a worker's process: what memory they take, and over NCCL with a communicator that is played."""

from __future__ import annotations

import queue
import threading
import tracemalloc
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_r1.errors import EngineLost
from megatron_r1.rollout.sync.transfer import WeightTransfer
from megatron_r1.rollout.vllm.in_place import InPlaceTransfer
from megatron_r1.rollout.vllm.nccl_transfer import NcclEngine, NcclLink
from tests.random_weights import random_source

_SECONDS = 60.0


class NewTensors(TorchDispatchMode):
    """Counts the bytes of tensors that operations make."""

    def __init__(self) -> None:
        super().__init__()
        self.most, self._live = 0, {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs or {})) if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and (place := tensor.untyped_storage().data_ptr()) not in known:
                self._live[place] = tensor.untyped_storage().nbytes()
                weakref.finalize(tensor, self._live.pop, place, None)
        self.most = max(self.most, sum(self._live.values()))
        return result


def measure(work: Callable[[], None]) -> int:
    """Most bytes of Python and of torch that `work` holds at a time, beside what was there."""
    tracemalloc.start()
    try:
        with NewTensors() as tensors:
            work()
        return tensors.most + tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


class Wire:
    """Both ends of a communicator of two."""

    def __init__(self, is_lost: bool = False) -> None:
        self._sent: queue.Queue[torch.Tensor] = queue.Queue()
        self._left = threading.Event()
        self._is_lost = is_lost

    def send(self, tensor: torch.Tensor, dst: int) -> None:
        assert dst == 1
        if not self._is_lost:
            self._sent.put(tensor.clone())
        elif not self._left.wait(_SECONDS):
            raise AssertionError("what was sent to a lost engine was not aborted")

    def recv(self, tensor: torch.Tensor, src: int) -> None:
        assert src == 0
        tensor.copy_(self._sent.get(timeout=_SECONDS))

    def destroy(self) -> None:
        self._left.set()


def update_over_nccl(worker: Any, arch: Any, seed: int, bucket_bytes: int, is_lost: bool) -> list[str]:
    """Send weights over a `NcclLink` to a `NcclEngine` of the worker's model; the calls that the engine got.

    Args:
        is_lost: the engine dies in its first bucket.
    """
    like: InPlaceTransfer = worker.weight_transfer_engine
    engine = NcclEngine(like.config, like.vllm_config, like.device, like.model)
    wire, calls = Wire(is_lost), []
    engine.join = lambda meeting, rank, device: wire

    def call(name: str, *args: Any) -> Any:
        calls.append(name)
        if name == "init_weight_transfer_engine":
            engine.init_transfer_engine(engine.parse_init_info(args[0]))
        elif name == "update_weights":
            if is_lost:
                raise EngineLost("the rollout engine gave no sign")
            engine.update_weights(args[0])
        elif name == "call_workers" and args[0] == "weight_boxes":
            return [engine.live.boxes]
        elif name == "call_workers":
            engine.take_plan(args[1][0], args[2])
        else:
            getattr(engine, name)()
        return None

    settings = {
        "bucket_bytes": bucket_bytes, "verify_weights": True, "tensor_parallel_size": 1, "is_draft_layer": lambda name: False,
    }  # fmt: skip
    link = NcclLink(call, SimpleNamespace(**settings), "127.0.0.1", _SECONDS, torch.device("cpu"), lambda *_: wire)
    try:
        WeightTransfer().send(random_source(arch, seed), link)
        link.finish(1)
        report = engine.report()
        assert not report.unsent and not report.different and report.held_bytes < report.received_bytes < 1.02 * report.held_bytes
    except EngineLost as error:
        calls.append(f"lost: {error}")
    link.release()
    link.close()
    engine.shutdown()
    return calls
