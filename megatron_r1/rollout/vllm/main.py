"""Main program of the engine process: answers the trainer's calls over an inherited socket until it closes.

Run as `python -m megatron_r1.rollout.vllm.main SOCKET_FD TRAINER_PID`, in a session of its own.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

from megatron_r1.errors import ConfigError, EngineLost, R1Error, RolloutError
from megatron_r1.process_pools import shared_memory_problem
from megatron_r1.rollout.vllm.stream import PromptFeed, Request, say_to
from megatron_r1.runtime.interrupt import leave_to_rank
from megatron_r1.runtime.launch import free_port
from megatron_r1.types import Sampling

if TYPE_CHECKING:
    from megatron_r1.rollout.vllm.engine import VllmEngine

STARTS = ("find_port", "start", "follow")
CALLS = (
    "init_weight_transfer_engine", "start_weight_update", "update_weights", "finish_weight_update", "call_workers", "sleep",
    "wake_up",
)  # fmt: skip


def run_engine(socket_fd: int, trainer_pid: int) -> None:
    """Serve calls until the socket closes.

    "start" builds the engine, "follow" this node's workers of an engine whose head is on another node; the other calls need one.

    Every call is answered by (True, result) or (False, error). Before that, a long call sends any number of (None, part); the part
    None is a sign of life, and after the part ASK the trainer sends what it was asked for.

    Args:
        socket_fd: descriptor of the inherited socket.
        trainer_pid: the process ends when this process ends.
    """
    die_with_trainer(trainer_pid)
    leave_to_rank()
    connection = Connection(socket_fd)
    engine = None
    while True:
        try:
            call, args = connection.recv()
        except EOFError:
            return
        try:
            if call == "start":
                from megatron_r1.rollout.vllm.engine import VllmEngine

                engine = VllmEngine(*args)
                reply = None
            elif call == "follow":
                from megatron_r1.rollout.vllm.engine import FollowingWorkers

                engine = FollowingWorkers(*args, on_end=_leave)
                reply = None
            elif call == "find_port":
                reply = free_port("")
            elif call == "generate":
                reply = _sample_feed(engine, connection, *args)
            elif call == "answer":
                assert engine is not None, "started before anything else is called"
                reply = engine.answer(*args, say_to(connection))
            elif call in CALLS:
                reply = getattr(engine, call)(*args)
            else:
                raise RolloutError(f"the engine has no call {call!r}")
        except R1Error as error:
            connection.send((False, error))
        except Exception as error:  # noqa: BLE001 - reported to the trainer, which raises it
            traceback.print_exc()
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            # If a worker died, here or on another node, or a device failed, another engine may do better. A start would fail again.
            kind = RolloutError if call in STARTS else EngineLost
            answer: R1Error = kind(f"the rollout engine failed in {call}: {reason}")
            if call in STARTS and (problem := shared_memory_problem()):  # vLLM's processes talk through it
                answer = ConfigError(f"the rollout engine has no shared memory for its processes: {problem}")
            connection.send((False, answer))
        else:
            connection.send((True, reply))


def _sample_feed(engine: VllmEngine, connection: Connection, sampling: Sampling, first: list[Request], is_last: bool) -> None:
    feed = PromptFeed(connection, first, is_last)
    try:
        engine.generate(sampling, feed)
    finally:
        feed.close()


def die_with_trainer(trainer_pid: int) -> None:
    """End this process as soon as the trainer is gone, even in the middle of a long call and after a SIGKILL of the trainer."""

    def watch() -> None:
        while os.getppid() == trainer_pid:
            time.sleep(0.5)
        _leave()

    threading.Thread(target=watch, daemon=True).start()


def _leave() -> None:
    """End this process and vLLM's workers at once: a worker that waits for another node would not notice its end."""
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    run_engine(int(sys.argv[1]), int(sys.argv[2]))
