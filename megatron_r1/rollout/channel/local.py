"""The engine process, seen from the trainer: started, called, watched and ended."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from megatron_r1.errors import EngineLost, RolloutError
from megatron_r1.rollout.channel.engine_channel import EngineSilent, OnPart, wait_for_answer

HOST_MODULE = "megatron_r1.rollout.vllm.main"  #: the engine process's program
_CLOSE_SECONDS = 10.0
_TAIL_LINES, _TAIL_CHARACTERS = 5, 600


class EngineProcess:
    """An `EngineChannel` to a Python module that runs in a process and session of its own and answers one call at a time.

    Args:
        module: run with `python -m`; its arguments are the socket's file descriptor and this process's id.
        log_path: the output of the process is appended to this file.
        environment: the process's complete environment.
    """

    def __init__(self, module: str, log_path: Path, environment: Mapping[str, str]) -> None:
        self.log_path = log_path
        log_path.parent.mkdir(parents=True, exist_ok=True)
        ours, theirs = socket.socketpair()
        with open(log_path, "ab") as log, theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, str(theirs.fileno()), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=dict(environment),
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C reaches the trainer only, which then closes the engine
            )
        self._connection = Connection(ours.detach())
        self._closed = False

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def call(self, name: str, *args: Any, timeout: float | None, on_part: OnPart | None = None, stall: float | None = None) -> Any:
        """See `EngineChannel.call`."""
        if self._closed:
            raise EngineLost(f"the rollout engine is closed: {name} cannot be called (see {self.log_path})")
        try:
            self._connection.send((name, args))
            succeeded, result = wait_for_answer(
                self._connection, name, timeout, on_part, stall, is_alive=lambda: self._process.poll() is None
            )
        except (EOFError, ConnectionError):
            self.close()
            raise EngineLost(f"the rollout engine died in {name} ({self._exit_reason()}); {self._log_tail()}") from None
        except EngineSilent as problem:
            self.close(patience=0)
            raise EngineLost(f"the rollout engine {problem}; {self._log_tail()}") from None
        if not succeeded:
            raise type(result)(f"{result} (see {self.log_path})") if isinstance(result, RolloutError) else result
        return result

    def close(self, patience: float = _CLOSE_SECONDS) -> None:
        """Give the process `patience` seconds to leave by itself, then kill it with what it started. Safe to call twice."""
        if self._closed:
            return
        self._closed = True
        self._connection.close()  # the process leaves at the end of the socket
        try:
            self._process.wait(patience)
        except subprocess.TimeoutExpired:
            pass
        try:
            os.killpg(self._process.pid, signal.SIGKILL)  # its session: the process, if it is left, and vLLM's workers
        except ProcessLookupError:
            pass
        self._process.wait()

    def _exit_reason(self) -> str:
        code = self._process.returncode
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"

    def _log_tail(self) -> str:
        with open(self.log_path, errors="replace") as log:
            lines = [line.strip() for line in log if line.strip()][-_TAIL_LINES:]
        return f"end of {self.log_path}: {' | '.join(lines)[-_TAIL_CHARACTERS:]}"
