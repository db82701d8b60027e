"""An engine on another node, held by `megatron-r1 serve-rollouts`, seen from the trainer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_r1.errors import EngineLost
from megatron_r1.rollout.channel.announcements import Announcement, connect
from megatron_r1.rollout.channel.engine_channel import EngineSilent, OnPart, wait_for_answer

_GRACE_SECONDS = 30.0  # the server keeps the same limits, and its error says more


class ServedEngine:
    """An `EngineChannel` over TCP. The server starts an engine process for each connection and ends both together.

    Args:
        server: its announcement.
        environment: variables that the engine process gets beside the server's.
        timeout: seconds to wait while the server ends another trainer's engine.

    Raises:
        EngineLost: it cannot be reached.
    """

    def __init__(self, server: Announcement, environment: Mapping[str, str], timeout: float) -> None:
        self._where = f"the rollout engine on {server.host}"
        self._connection = connect(server, timeout)
        self._closed = False
        self._connection.send(dict(environment))

    def call(self, name: str, *args: Any, timeout: float | None, on_part: OnPart | None = None, stall: float | None = None) -> Any:
        """See `EngineChannel.call`."""
        if self._closed:
            raise EngineLost(f"{self._where} is closed: {name} cannot be called")
        try:
            self._connection.send((name, args, timeout, stall))
            limit = None if stall is None else stall + _GRACE_SECONDS
            whole = None if timeout is None else timeout + _GRACE_SECONDS
            succeeded, result = wait_for_answer(self._connection, name, whole, on_part, limit)
        except (EOFError, OSError):
            self.close()
            raise EngineLost(f"{self._where} is gone in {name}: its server, or the way to it, broke down") from None
        except EngineSilent as problem:
            self.close()
            raise EngineLost(f"{self._where} {problem}") from None
        if not succeeded:
            raise result
        return result

    def close(self, patience: float = 0.0) -> None:
        """See `EngineChannel.close`. The server ends the engine when it finds the connection closed."""
        if not self._closed:
            self._closed = True
            self._connection.close()
