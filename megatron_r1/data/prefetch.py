"""Rows of the next updates are read while an update is made."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self

from megatron_r1.types import MicroBatch

#: Bytes of a token of a micro-batch that waits: tokens, labels, positions and documents, 8 each, and the loss mask, 4.
TOKEN_BYTES = 36

Update = Sequence[Sequence[int]]  #: of one rank: the rows of each of its micro-batches, by their numbers


class Readable(Protocol):
    """Rows that may be read in a thread. See `PretrainRows`."""

    def micro_batch(self, indices: Sequence[int]) -> MicroBatch: ...
    def name_of(self, micro_batch: MicroBatch, row: int, position: int) -> str: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class _ReadUpdate:
    micro_batches: list[tuple[list[int], MicroBatch]]  #: with the numbers of their rows
    state: dict[str, Any]  #: of the rows behind them


class RowsAhead:
    """Rows that a thread reads in the order in which they will be asked for, a bounded number of updates ahead.

    It takes the place of the rows it reads. Use it as a context manager: at its end the thread ends, too.

    Args:
        rows: to read from; nobody else may read from them meanwhile.
        plan: this rank's part of every update to come.
        updates: that wait at most; one more is being read, and one is being used.
    """

    def __init__(self, rows: Readable, plan: Iterable[Update], updates: int = 1) -> None:
        self._rows, self._plan = rows, plan
        self._read: queue.Queue[_ReadUpdate | BaseException | None] = queue.Queue(maxsize=updates)
        self._current: list[tuple[list[int], MicroBatch]] = []
        self._state: dict[str, Any] = {}  # of the rows behind the update that is being used
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._work, name="rows ahead", daemon=True)
        self._is_started = False

    def micro_batch(self, indices: Sequence[int]) -> MicroBatch:
        """The rows, which are the next ones of the plan. What the thread raised is raised here, when its turn comes."""
        if not self._is_started:
            self._is_started, self._state = True, self._rows.state_dict()
            self._thread.start()
        while not self._current:
            read = self._read.get()
            if isinstance(read, BaseException):
                self._read.put(read)  # whoever asks again hears it again
                raise read
            assert read is not None, "more rows are asked for than were planned"
            self._current, self._state = list(read.micro_batches), read.state
        planned, micro_batch = self._current.pop(0)
        assert planned == list(indices), f"rows {planned} were planned next, rows {list(indices)} are asked for"
        return micro_batch

    def name_of(self, micro_batch: MicroBatch, row: int, position: int) -> str:
        """See `PretrainRows`."""
        return self._rows.name_of(micro_batch, row, position)

    def state_dict(self) -> dict[str, Any]:
        """See `PretrainRows`: behind the rows that were asked for, whatever was read. Between two updates."""
        assert not self._current, "some rows of an update were not asked for"
        return self._state if self._is_started else self._rows.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `PretrainRows`. Before the first rows are asked for."""
        assert not self._is_started, "rows were read already"
        self._rows.load_state_dict(state)

    def close(self) -> None:
        """End the thread, whatever it does, and forget what it read."""
        self._stopped.set()
        while self._thread.is_alive():
            try:
                self._read.get_nowait()  # lets it go on from a full queue
            except queue.Empty:
                self._thread.join(0.01)
        self._current = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _work(self) -> None:
        last: BaseException | None = None
        try:
            for update in self._plan:
                read = []
                for indices in update:
                    if self._stopped.is_set():
                        return
                    read.append((list(indices), self._rows.micro_batch(indices)))
                self._read.put(_ReadUpdate(read, self._rows.state_dict()))
        except BaseException as error:  # noqa: BLE001 - raised again in the step
            last = error
        if not self._stopped.is_set():
            self._read.put(last)
