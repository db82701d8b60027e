"""Who does the work: this process, several processes of this machine, or the ranks of an MPI job, which may be on many.

All follow the same program. `lead` is for what one process does, `run` for what all share.
"""

from __future__ import annotations

import multiprocessing
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol, TypeVar

from megatron_r1.errors import ConfigError, DataError, R1Error
from megatron_r1.preprocess.job import Bench, PreprocessJob, Report
from megatron_r1.process_pools import starting_processes
from megatron_r1.runtime.launch import LaunchInfo, use_mpi_abi

T = TypeVar("T")
Work = Callable[[Bench, Any, Report], None]  #: what is done with one task; a function of a module

_SMALL = 1 << 28  # bytes that a process reads or writes in the time that another takes to start
_STOP, _DONE = 1, 2  # tags of messages between ranks


class Crew(Protocol):
    """Processes that work together."""

    size: int  #: how many
    leads: bool  #: whether this process is the one that prints and plans

    def lead(self, work: Callable[[], T]) -> T:
        """Do something in the leading process. All get its result, or raise its R1Error."""

    def run(self, job: PreprocessJob, work: Work, tasks: Sequence[Any], report: Report) -> None:
        """Do all tasks. All processes call this with the same arguments; `report` is called where it leads.

        Raises:
            R1Error: of the first task that failed; the others stop.
        """


class Alone:
    """This process."""

    size, leads = 1, True

    def lead(self, work: Callable[[], T]) -> T:
        """See `Crew`."""
        return work()

    def run(self, job: PreprocessJob, work: Work, tasks: Sequence[Any], report: Report) -> None:
        """See `Crew`."""
        bench = Bench(job)
        for task in tasks:
            work(bench, task, report)


class Pool:
    """Processes of this machine, which get a task whenever they have none."""

    leads = True

    def __init__(self, size: int) -> None:
        self.size = size

    def lead(self, work: Callable[[], T]) -> T:
        """See `Crew`."""
        return work()

    def run(self, job: PreprocessJob, work: Work, tasks: Sequence[Any], report: Report) -> None:
        """See `Crew`."""
        waiting = list(reversed(tasks))
        context = multiprocessing.get_context("spawn")  # not forked: this process may have threads
        processes = []
        links: list[Connection] = []
        try:
            with starting_processes(f"--workers {self.size}", "take --workers 1"):
                for _ in range(min(self.size, len(tasks))):
                    ours, theirs = context.Pipe()
                    process = context.Process(target=_take_tasks, args=(theirs, job, work), daemon=True)
                    process.start()
                    theirs.close()
                    processes.append(process)
                    links.append(ours)
            busy = list(links)
            for link in list(busy):
                self._next_task(link, waiting, busy)
            while busy:
                for link in [link for link in wait(busy) if isinstance(link, Connection)]:
                    kind, value = self._receive(link)
                    if kind == "report":
                        report(*value)
                    elif kind == "error":
                        raise value
                    else:
                        self._next_task(link, waiting, busy)
            for process in processes:
                process.join()
        finally:
            for process in processes:
                process.kill()
                process.join()

    @staticmethod
    def _next_task(link: Connection, waiting: list[Any], busy: list[Connection]) -> None:
        with suppress(BrokenPipeError):  # it died: reading from it says so
            if waiting:
                link.send(waiting.pop())
            else:
                busy.remove(link)
                link.send(None)

    @staticmethod
    def _receive(link: Connection) -> tuple[str, Any]:
        try:
            return link.recv()
        except (EOFError, ConnectionResetError):
            raise DataError(
                "a process of preprocessing died, probably because memory ran out: take fewer --workers or a smaller "
                "--most-document-mb; finished parts are kept"
            ) from None


def _take_tasks(link: Connection, job: PreprocessJob, work: Work) -> None:
    """A process of a pool. It ends when its parent does: then the pipe breaks."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends its processes
    bench = Bench(job)
    with suppress(EOFError, BrokenPipeError):
        while (task := link.recv()) is not None:
            try:
                work(bench, task, lambda done, tokens: link.send(("report", (done, tokens))))
            except R1Error as error:
                link.send(("error", error))
                return
            link.send(("done", None))


class _OtherFailed(Exception):
    """Another rank has an error to tell."""


class Ranks:
    """The ranks of an MPI job. Each takes every so-manyth task."""

    def __init__(self, comm: Any) -> None:
        """Args: a communicator of mpi4py, or what has its methods."""
        self._comm = comm
        self.size: int = comm.Get_size()
        self._rank: int = comm.Get_rank()
        self.leads = self._rank == 0
        self._sent: list[Any] = []  # requests, until MPI has taken what they send

    def lead(self, work: Callable[[], T]) -> T:
        """See `Crew`."""
        outcome: tuple[Any, R1Error | None] = (None, None)
        if self.leads:
            try:
                outcome = work(), None
            except R1Error as raised:
                outcome = None, raised
            except Exception:  # noqa: BLE001 - see `_abort`
                self._abort()
        result, error = self._comm.bcast(outcome, 0)
        if error is not None:
            raise error
        return result

    def run(self, job: PreprocessJob, work: Work, tasks: Sequence[Any], report: Report) -> None:
        """See `Crew`."""
        error: R1Error | None = None
        bench = Bench(job)
        try:
            for task in tasks[self._rank :: self.size]:
                work(bench, task, lambda done, tokens: self._hear(done, tokens, report))
        except R1Error as raised:
            error = raised
            for other in set(range(self.size)) - {self._rank}:
                self._send(None, other, _STOP)
        except _OtherFailed:
            pass
        except Exception:  # noqa: BLE001 - see `_abort`
            self._abort()
        errors = self._comm.allgather(error)
        self._comm.barrier()  # all messages were sent
        for tag in (_STOP, _DONE):
            while self._comm.iprobe(tag=tag):
                message = self._comm.recv(tag=tag)
                if tag == _DONE:
                    report(*message)
        first = next((found for found in errors if found is not None), None)
        if first is not None:
            raise first

    def _hear(self, done: int, tokens: int, report: Report) -> None:
        """Tell rank 0 what is done, and stop if another rank has failed."""
        if self._comm.iprobe(tag=_STOP):
            raise _OtherFailed
        if not self.leads:
            self._send((done, tokens), 0, _DONE)
            return
        report(done, tokens)
        while self._comm.iprobe(tag=_DONE):
            report(*self._comm.recv(tag=_DONE))

    def _send(self, message: Any, rank: int, tag: int) -> None:
        self._sent = [request for request in self._sent if not request.Test()]
        self._sent.append(self._comm.isend(message, dest=rank, tag=tag))

    def _abort(self) -> None:
        """Not an error of the user's: the others would wait for this rank for ever."""
        traceback.print_exc()
        sys.stderr.flush()
        self._comm.Abort(1)


def crew_for(crew: Crew, size: int) -> Crew:
    """Who copies or reads so many bytes: this process, where starting others would take longer."""
    return Alone() if isinstance(crew, Pool) and size < _SMALL else crew


def gather_crew(launch: LaunchInfo, workers: int | None) -> Crew:
    """The processes that are there.

    Args:
        launch: how this process was started.
        workers: processes to start; None: one, or the ranks of an MPI job.

    Raises:
        ConfigError: both ranks and workers, or ranks that MPI does not know.
    """
    if launch.world_size == 1:
        return Pool(workers) if workers is not None and workers > 1 else Alone()
    if (workers or 1) > 1:
        raise ConfigError(f"--workers {workers} inside a job of {launch.world_size} ranks: take one of the two")
    if launch.launcher == "torchrun":
        raise ConfigError("torchrun starts no ranks of MPI: start `preprocess` with mpirun, or by itself with --workers N")
    use_mpi_abi(launch)
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: it found no MPI library
        raise ConfigError(f"{launch.world_size} ranks need mpi4py: install megatron_r1[mpi] ({error})") from None
    if MPI.COMM_WORLD.Get_size() != launch.world_size:
        raise ConfigError(
            f"{launch.launcher} started {launch.world_size} ranks, mpi4py sees {MPI.COMM_WORLD.Get_size()}: it uses another MPI"
        )
    return Ranks(MPI.COMM_WORLD)
