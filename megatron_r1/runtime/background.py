"""Work in a forked process: it sees this process's memory as it was at the fork, while this process goes on changing its own."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Generic, TypeVar

import torch

from megatron_r1.errors import CheckpointError, R1Error
from megatron_r1.runtime.interrupt import leave_to_rank

T = TypeVar("T")

_PR_SET_PDEATHSIG = 1
_PRCTL = ctypes.CDLL(None).prctl  # looked up here: the loader's lock may be held by another thread when we fork


class ForkedWork(Generic[T]):
    """One function that runs in a process of its own, which does not outlive this process unless it asks for it.

    The function must not touch the device, the process group or files that are open now. Its result must be picklable.
    """

    def __init__(self, work: Callable[[], T]) -> None:
        self._answer, answer_end = multiprocessing.Pipe(duplex=False)
        context = multiprocessing.get_context("fork")
        self._process = context.Process(target=_run, args=(work, answer_end, os.getpid()), daemon=True)
        self._process.start()
        answer_end.close()

    def done(self) -> bool:
        """Whether `result` would return or raise at once."""
        return self._answer.poll()  # also true when the process died without an answer

    def wait(self, seconds: float) -> bool:
        """Wait at most so long. Returns whether `result` would return or raise at once."""
        return self._answer.poll(seconds)

    def result(self) -> T:
        """Wait for the end of the work and return its result. Call it once, or again if KeyboardInterrupt ended the wait.

        Raises:
            OSError, R1Error: as the work raised it.
            RuntimeError: another error of the work, whose traceback is on stderr.
            CheckpointError: the process died before it could answer.
        """
        self._answer.poll(None)  # apart from `recv`, so that an interrupted wait loses no answer
        try:
            result, error = self._answer.recv()
        except EOFError:
            self._process.join()
            code = self._process.exitcode
            reason = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
            raise CheckpointError(f"the process that was writing died ({reason}), perhaps for want of memory") from None
        finally:
            self._answer.close()
        self._process.join()
        if error is not None:
            raise error
        return result

    def kill(self) -> None:
        """Kill the process in the middle of its work."""
        self._process.kill()
        self._process.join()
        self._answer.close()


def outlive_parent() -> None:
    """From here on the work of this forked process goes on when its parent is killed."""
    _PRCTL(_PR_SET_PDEATHSIG, 0)


def _run(work: Callable[[], object], answer: Connection, parent: int) -> None:
    _PRCTL(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)  # the parent ended before the signal for its death was set
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which decides
    leave_to_rank()
    # Sockets and locks that the parent closes must be closed for the other side too.
    os.closerange(3, answer.fileno())
    os.closerange(answer.fileno() + 1, os.sysconf("SC_OPEN_MAX"))
    torch.set_num_threads(1)  # the threads of the parent's pool are not here
    gc.disable()  # freeing a device tensor of the parent would reach for a device that a forked process may not use
    outcome: tuple[object, Exception | None]
    try:
        outcome = (work(), None)
    except (OSError, R1Error) as error:
        outcome = (None, error)
    except Exception as error:  # noqa: BLE001 - `result` raises it; other exceptions may not survive pickling
        traceback.print_exc()
        outcome = (None, RuntimeError(f"{type(error).__name__}: {error}"))
    with suppress(BrokenPipeError):  # nobody is left to hear it
        answer.send(outcome)
