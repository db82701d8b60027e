"""Calls to a rollout engine, wherever it runs, and the wait for their answers."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, Protocol

from megatron_r1.runtime.waiting import give_sign

_POLL_SECONDS = 0.2

OnPart = Callable[[Any], Any]
ASK = "ask"  #: a part of an answer that is a question: what `on_part` returns for it goes to the engine


class EngineSilent(Exception):
    """The engine let a time limit pass; the message names the limit."""


class MessageConnection(Protocol):
    """What is needed of a connection to wait for an answer."""

    def poll(self, timeout: float = 0.0) -> bool:
        """Whether a message, or the end, arrives within `timeout` seconds."""

    def recv(self) -> Any:
        """The next message."""

    def send(self, message: Any) -> None:
        """Send a message."""


class EngineChannel(Protocol):
    """Calls to one engine: to its process, or to the server on another node that holds it."""

    def call(self, name: str, *args: Any, timeout: float | None, on_part: OnPart | None = None, stall: float | None = None) -> Any:
        """Call and wait for the answer.

        Args:
            timeout: seconds for the whole call; None: no limit beside `stall`.
            on_part: called with what the engine sends before the answer; None is only a sign of life, ASK a question.
            stall: the engine is given up after this many seconds without a message; None: only `timeout` counts.

        Raises:
            EngineLost: the engine is gone, or let a limit pass and was ended.
            R1Error: the error that the call raised in the engine.
        """

    def close(self, patience: float = 10.0) -> None:
        """End the engine, at the latest after `patience` seconds. Safe to call twice."""


def wait_for_answer(
    connection: MessageConnection,
    name: str,
    timeout: float | None,
    on_part: OnPart | None,
    stall: float | None,
    is_alive: Callable[[], bool] = lambda: True,
) -> tuple[bool, Any]:
    """(True, result) or (False, error), as the engine sends it after any number of (None, part).

    Each look is a sign of life of this rank: it waits within the limits of this call.

    Args:
        is_alive: whether the other side can still send.

    Raises:
        EOFError, ConnectionError: the other side is gone.
        EngineSilent: a limit passed.
    """
    deadline = math.inf if timeout is None else time.monotonic() + timeout
    while True:
        silent_at = deadline if stall is None else min(deadline, time.monotonic() + stall)
        while not connection.poll(_POLL_SECONDS):
            give_sign()
            now = time.monotonic()
            if now > deadline:
                raise EngineSilent(f"did not answer {name} in {timeout:.0f} s")
            if now > silent_at:
                raise EngineSilent(f"gave no sign for {stall:.0f} s in {name}")
            if not is_alive() and not connection.poll(0):
                raise EOFError
        succeeded, result = connection.recv()
        if succeeded is not None:
            return succeeded, result
        give_sign()
        reply = None if on_part is None else on_part(result)
        if result == ASK:
            connection.send(reply)
