"""The scoring pool: worker processes that score responses while the trainer does something else.

`submit` returns at once. One thread hands out the responses, watches the clock and replaces workers. Every response is scored
alone, so neither its verdict nor the order of results depends on the number of workers.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Self

from megatron_r1.errors import RewardError
from megatron_r1.rewards.protocol import Verdict
from megatron_r1.rewards.scorers import ScorerSpec
from megatron_r1.rewards.workers.process import START_SECONDS, PendingResponse, WorkerLimits, WorkerProcess

_MAX_FAILED_STARTS = 3  # in a row, after which the pool gives up
_OVERSLEPT_SECONDS = 0.5  # the job and its workers were suspended: that time does not count for the workers
_MAX_GIVEN = 2  # how often a response is handed out if its worker dies before it begins
_MAX_BATCH_ITEMS, _MAX_BATCH_CHARACTERS = 16, 100_000


class ScoringPool:
    """Scores responses in `workers` killable processes. Use it as a context manager, or call `close`.

    If a worker is late, its response is a "timeout"; if it dies, an "error". The next worker scores the rest of the batch.
    A scorer that raises RewardError before it has scored anything cannot work here, e.g. without a sandbox: that ends the pool.

    Args:
        specs: scorers by name.
        max_pending: responses taken and not yet scored; `submit` waits at this bound.
        environment: of the workers; None: this process's own.
        log: takes the workers' output.

    Raises:
        RewardError: a scorer cannot be built, or the workers do not start.
    """

    def __init__(
        self,
        specs: Mapping[str, ScorerSpec],
        *,
        workers: int,
        limits: WorkerLimits,
        max_pending: int = 16384,
        environment: Mapping[str, str] | None = None,
        log: Path | None = None,
    ) -> None:
        self.replaced: Counter[str] = Counter()  #: workers replaced, by reason: "timeout", "crash", "memory"
        self._specs, self._limits, self._environment, self._log = dict(specs), limits, environment, log
        self._num_workers = workers
        self._pending: deque[PendingResponse] = deque()
        self._room = threading.BoundedSemaphore(max_pending)
        self._ids = itertools.count()
        self._workers: list[WorkerProcess] = []
        self._failed_starts = 0
        self._worked: set[str] = set()  # scorers that have worked: if one refuses later, it is an error of one response
        self._error: RewardError | None = None
        self._closing = False
        self._lock = threading.Lock()  # guards what `submit` and the thread both change: _pending, _error, _closing
        self._woken, self._wake = os.pipe()
        os.set_blocking(self._wake, False)
        self._started = threading.Event()
        # Workers die with the thread that started them. This thread lives as long as the pool.
        self._thread = threading.Thread(target=self._run, name="scoring", daemon=True)
        self._thread.start()
        self._started.wait()
        if self._error is not None:
            self.close()
            raise self._error

    def submit(self, scorer: str, response: str, reference: Any = None) -> Future[Verdict]:
        """Start scoring a response; see `Scorer.score`. The future raises RewardError if the pool is closed or broken.

        Raises:
            RewardError: there is no such scorer.
        """
        if scorer not in self._specs:
            raise RewardError(f"no scorer {scorer!r} in this pool; it has {', '.join(self._specs)}")
        self._room.acquire()
        item = PendingResponse(next(self._ids), scorer, self._specs[scorer].opening + response, reference, Future())
        item.verdict.add_done_callback(lambda _: self._room.release())
        with self._lock:
            error = self._error
            if error is None:
                self._pending.append(item)
                self._wake_up()
        if error is not None:
            item.verdict.set_exception(error)
        return item.verdict

    def stream(self, items: Iterable[tuple[str, str, Any]], window: int = 256) -> Iterator[Verdict]:
        """The verdicts on (scorer, response, reference), in order. At most `window` of them are read ahead."""
        futures: deque[Future[Verdict]] = deque()
        for item in items:
            futures.append(self.submit(*item))
            if len(futures) >= window:
                yield futures.popleft().result()
        while futures:
            yield futures.popleft().result()

    def worker_pids(self) -> list[int]:
        """Process ids of the current workers."""
        return [worker.pid for worker in self._workers]

    def close(self) -> None:
        """Kill the workers; what is not scored yet gets a RewardError. Safe to call twice."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
            self._error = self._error or RewardError("the scoring pool was closed before this response was scored")
            self._wake_up()
        self._thread.join()
        os.close(self._wake)
        os.close(self._woken)

    def _wake_up(self) -> None:
        try:
            os.write(self._wake, b"x")
        except BlockingIOError:
            pass  # the pipe is full of wake-ups that the thread has not read yet

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # What follows runs in the pool's thread.

    def _run(self) -> None:
        try:
            while self._error is None:
                self._start_workers()
                self._hand_out()
                self._wait()
        except Exception as error:  # noqa: BLE001 - a defect here must not leave the trainer waiting for ever
            self._break(RewardError(f"the scoring pool failed: {type(error).__name__}: {error}"))
        self._started.set()
        left = [item for worker in self._workers for item in worker.items]
        for worker in self._workers:
            worker.end()
        self._workers.clear()
        with self._lock:
            left.extend(self._pending)
            self._pending.clear()
        for item in left:
            item.verdict.set_exception(self._error)

    def _start_workers(self) -> None:
        while len(self._workers) < self._num_workers:
            self._workers.append(WorkerProcess(self._specs, self._limits, self._environment, self._log))

    def _hand_out(self) -> None:
        for worker in [w for w in self._workers if w.ready and not w.items]:
            batch = self._next_batch()
            if not batch:
                return
            try:
                worker.give(batch)
            except ConnectionError:  # the worker died while it was idle
                self._replace(worker, "crash")

    def _next_batch(self) -> list[PendingResponse]:
        """A fair share of the small responses at once, so that a worker does not wait for this thread after each."""
        with self._lock:
            share = min(_MAX_BATCH_ITEMS, max(1, len(self._pending) // (4 * self._num_workers)))
            batch: list[PendingResponse] = []
            characters = 0
            while self._pending and len(batch) < share and (not batch or characters < _MAX_BATCH_CHARACTERS):
                item = self._pending.popleft()
                characters += len(item.response)
                batch.append(item)
            return batch

    def _wait(self) -> None:
        """Read what the workers send until one of them needs something or is late."""
        deadlines = [worker.deadline for worker in self._workers if worker.deadline is not None]
        timeout = max(0.0, min(deadlines) - time.monotonic()) if deadlines else None
        by_connection = {worker.connection: worker for worker in self._workers}
        started = time.monotonic()
        ready = wait([self._woken, *by_connection], timeout)
        slept = time.monotonic() - started
        if timeout is not None and slept > timeout + _OVERSLEPT_SECONDS:
            for worker in self._workers:
                if worker.deadline is not None:
                    worker.deadline += slept
        for source in ready:
            if source == self._woken:
                os.read(self._woken, 65536)
            else:
                self._listen(by_connection[source])
        now = time.monotonic()
        for worker in list(self._workers):
            # If this thread was kept waiting, an answer that came in time may lie there unread.
            if worker.deadline is not None and worker.deadline < now and not worker.connection.poll(0):
                self._end_late(worker)

    def _listen(self, worker: WorkerProcess) -> None:
        try:
            kind, *rest = worker.receive()
        except (EOFError, ConnectionError):
            self._replace(worker, "crash")
            return
        if kind == "ready":
            worker.ready, worker.deadline = True, None
            self._failed_starts = 0
            self._started.set()
        elif kind == "broken":
            self._break(RewardError(rest[0]))
        elif kind == "started":
            worker.start_clock()
        else:
            item_id, verdict, refused, leaves = rest
            item = worker.items.popleft()
            assert item.id == item_id, "verdicts come in the order of the batch"
            worker.start_clock()
            item.verdict.set_result(Verdict(**verdict))
            if not refused:
                self._worked.add(item.scorer)
            elif item.scorer not in self._worked:
                self._break(RewardError(verdict["detail"]))
            if leaves:
                self._replace(worker, "memory")

    def _end_late(self, worker: WorkerProcess) -> None:
        if not worker.ready:
            self._break(RewardError(f"a scoring worker did not start within {START_SECONDS:.0f} s{self._see_log()}"))
            return
        limit = self._specs[worker.items[0].scorer].time_limit_seconds if worker.clock_runs else START_SECONDS
        self._replace(worker, "timeout", Verdict(None, "timeout", f"not scored within {limit:g} s"))

    def _replace(self, worker: WorkerProcess, reason: str, verdict: Verdict | None = None) -> None:
        """End a worker. Its current response gets `verdict`, or an "error" that says how the worker ended; the rest goes back."""
        self._workers.remove(worker)
        how = worker.end(by_itself=reason == "crash")
        if not worker.ready:
            self._failed_starts += 1
            if self._failed_starts >= _MAX_FAILED_STARTS:
                self._break(RewardError(f"scoring workers end while starting ({how}){self._see_log()}"))
            return
        self.replaced[reason] += 1
        began = worker.items and (worker.clock_runs or worker.items[0].given == _MAX_GIVEN)
        if began and reason != "memory":
            verdict = verdict or Verdict(None, "error", f"the scoring worker died ({how})")
            worker.items.popleft().verdict.set_result(verdict)
        with self._lock:
            self._pending.extendleft(reversed(worker.items))
        worker.items.clear()

    def _break(self, error: RewardError) -> None:
        with self._lock:
            self._error = self._error or error

    def _see_log(self) -> str:
        return f"; see {self._log}" if self._log else ""
