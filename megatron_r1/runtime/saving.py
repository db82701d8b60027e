"""One checkpoint on its way: taken at a step, written while training goes on, sealed as soon as every rank's files are there."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from megatron_r1.errors import CheckpointError, R1Error
from megatron_r1.runtime import interrupt
from megatron_r1.runtime.background import ForkedWork, outlive_parent
from megatron_r1.runtime.checkpoints import STATE, manifest_entry, seal
from megatron_r1.runtime.distributed import (
    failing_together,
    gather_objects,
    gather_on_rank_zero,
    is_rank_zero,
    on_rank_zero,
    rank,
    world_size,
)
from megatron_r1.runtime.files import TEMPORARY, write_atomically


@dataclass(frozen=True)
class Unwritten:
    """What is left to do for this rank's files once their content is fixed.

    Attributes:
        files: paths that `write` makes, relative to the checkpoint's folder.
        write: makes them. It may run in a forked process: no collective, no device, and a result that survives JSON.
        finish: called on rank 0 with every rank's result of `write`, in the order of ranks, once all are written. It, too, may run
            in a forked process.
    """

    files: Sequence[str]
    write: Callable[[], Any]
    finish: Callable[[list[Any]], None]


#: Puts this rank's files into the folder it is given, or fixes their content and leaves the writing for later.
Write = Callable[[Path], Unwritten | None]

_NOTHING = Unwritten((), lambda: None, lambda _: None)
_NOTES = f"{TEMPORARY}written-"  # before the name of a checkpoint: its rank_0.json has what rank 0 wrote, and says that it is there
_LONGEST_PAUSE = 1.0  # seconds between two looks for notes
_LOOK = 0.1  # seconds between two looks whether `finish` has to give up
_WAIT_FOR_OTHERS = 60.0  # seconds at least that rank 0 waits for the other ranks' files in `finish`

_Written = tuple[Any, dict[str, dict[str, Any]]]  # a rank's result of `write`, and size and hash of its files


class PendingCheckpoint:
    """A checkpoint whose content is that of the step at which this object was made. All ranks call its methods together.

    Beside training, every rank's writer leaves a note when its files are there, and the writer of rank 0 seals the checkpoint once
    all notes are. So it counts from the moment when the last file is written, whatever becomes of the next step, and a run that
    fails before waits for that (`finish`).

    Args:
        folder: of all checkpoints.
        step: names the checkpoint.
        write: see `Write`.
        state: of the run; must survive JSON; rank 0's is kept.
        asynchronous: whether files are written by a forked process, or by `seal`.

    Raises:
        CheckpointError: on every rank, if files cannot be written. Files that were begun are removed.
    """

    def __init__(self, folder: Path, step: int, write: Write, state: dict[str, Any], *, asynchronous: bool) -> None:
        self.step = step
        self._temporary, self._final = folder / f"{TEMPORARY}step_{step:06d}", folder / f"step_{step:06d}"
        self._notes = folder / f"{_NOTES}step_{step:06d}"
        self._begun = time.monotonic()
        self._fork: ForkedWork[None] | None = None
        self._collected: Exception | None | Literal["not yet"] = "not yet"  # how the fork ended, once it is known
        with self._naming_problems():
            on_rank_zero(lambda: _make_empty(self._temporary, self._notes))
            with failing_together():
                unwritten = write(self._temporary) or _NOTHING
            on_rank_zero(lambda: write_atomically(self._temporary / STATE, json.dumps(state, indent=1)))
            places = (self._temporary, self._final, self._notes, step, rank(), world_size())
            with failing_together():
                self._fork = ForkedWork(partial(_write_beside_training, unwritten, *places)) if asynchronous else None
            # Beside a fork nothing may keep `unwritten`: it holds a copy of the whole state.
            self._unwritten = unwritten if self._fork is None else None

    def is_written(self) -> bool:
        """Whether `seal` does not wait: the checkpoint is sealed, or a rank failed to write its part."""
        if self._fork is not None and self._collected == "not yet" and self._fork.done():
            with suppress(Exception):  # `seal` raises it
                self._collect()
        states = gather_objects(self._collected)
        return any(isinstance(state, Exception) for state in states) or all(state is None for state in states)

    def seal(self) -> Path:
        """Wait until every rank's files are written and the checkpoint is a complete one."""
        with self._naming_problems():
            if self._unwritten is not None:
                unwritten = self._unwritten
                with failing_together():
                    written = _write_and_hash(unwritten, self._temporary)
                of_ranks = gather_on_rank_zero(written)
                on_rank_zero(lambda: _complete(unwritten, self._temporary, self._final, self.step, of_ranks))
                on_rank_zero(lambda: shutil.rmtree(self._notes))
            else:
                with failing_together():
                    if not is_rank_zero():
                        self._collect()
                on_rank_zero(self._collect)  # not before: it waits for the notes of all
        return self._final

    def finish(self, begins_to_wait: Callable[[], None] = lambda: None) -> bool:
        """Wait until this rank's files are written, and on rank 0 until the checkpoint is sealed. Not collective.

        For the end of a run that failed, on all ranks or on this one. Rank 0 gives up on ranks that take much longer than itself:
        they may be gone. Ctrl-C gives up, too (not in the first second: a launcher passes on the one that came before). What is
        given up stays under its temporary name, and its writer ends.

        Args:
            begins_to_wait: called if there is something to wait for.

        Returns:
            Whether it is sealed, as far as rank 0 knows.
        """
        fork = self._fork
        if fork is None or self._collected != "not yet":
            return self._collected is None and is_rank_zero()
        if not fork.done():
            begins_to_wait()
        begun, own_note = time.monotonic(), self._notes / f"rank_{rank()}.json"
        give_up_at: float | None = None
        try:
            with interrupt.ctrl_c_noted() as pressed:
                while not fork.wait(_LOOK):
                    now = time.monotonic()
                    if give_up_at is None and own_note.exists():
                        give_up_at = now + max(_WAIT_FOR_OTHERS, 2 * (now - self._begun))
                    if any(at > begun + 1 for at in pressed) or now > (give_up_at or now):
                        return False
            with suppress(OSError, R1Error, RuntimeError):  # an error of the run is being told; this one is less
                self._collect()
                return is_rank_zero()
            return False
        finally:
            if self._collected == "not yet":
                fork.kill()

    def _collect(self) -> None:
        """Wait for this rank's writer. Raises what it raised, also a second time."""
        assert self._fork is not None
        if self._collected == "not yet":
            try:
                self._fork.result()
                self._collected = None
            except Exception as error:  # not Ctrl-C, after which `finish` waits again
                self._collected = error
                raise
        if isinstance(self._collected, Exception):
            raise self._collected

    @contextmanager
    def _naming_problems(self) -> Iterator[None]:
        try:
            yield
        except (OSError, CheckpointError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            if self._fork is not None and self._collected == "not yet":
                self._collected = error
                self._fork.kill()  # it may wait for a rank that will never be done
            if is_rank_zero():
                shutil.rmtree(self._temporary, ignore_errors=True)  # a full disk needs the room
                shutil.rmtree(self._notes, ignore_errors=True)
            raise CheckpointError(
                f"checkpoint {self._final} cannot be written: {reason}; the run can resume from the one before"
            ) from None


def _make_empty(*folders: Path) -> None:
    for folder in folders:
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)


def _write_beside_training(
    unwritten: Unwritten, temporary: Path, final: Path, notes: Path, step: int, rank: int, ranks: int
) -> None:
    """What a forked process does: write a rank's files; on rank 0 seal the checkpoint when all ranks have."""
    written = _write_and_hash(unwritten, temporary)
    write_atomically(notes / f"rank_{rank}.json", json.dumps(written), durable=False)
    if rank > 0:
        return
    pause = 0.01
    while len(_noted(notes)) < ranks:
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)
    outlive_parent()  # all is written, and what is left takes no time
    of_ranks = [json.loads((notes / f"rank_{number}.json").read_text(encoding="utf-8")) for number in range(ranks)]
    _complete(unwritten, temporary, final, step, of_ranks)
    shutil.rmtree(notes)


def _noted(notes: Path) -> list[str]:
    """The notes that are there."""
    try:
        return [name for name in os.listdir(notes) if name.endswith(".json")]
    except FileNotFoundError:
        return []


def _complete(unwritten: Unwritten, temporary: Path, final: Path, step: int, of_ranks: Sequence[_Written]) -> None:
    """Make the checkpoint complete, in any process of rank 0."""
    unwritten.finish([result for result, _ in of_ranks])
    known = {name: entry for _, hashes in of_ranks for name, entry in hashes.items()}
    # The files that no writer hashed; for a policy they are few and small.
    names = sorted(str(path.relative_to(temporary)) for path in temporary.rglob("*") if path.is_file())
    files = {name: known[name] if name in known else manifest_entry(temporary / name) for name in names}
    seal(temporary, final, {"step": step, "files": files})


def _write_and_hash(unwritten: Unwritten, folder: Path) -> _Written:
    """The result of `unwritten.write`, and size and hash of each of its files."""
    try:
        result = unwritten.write()
        return result, {name: manifest_entry(folder / name) for name in unwritten.files}
    except Exception as error:  # noqa: BLE001 - raised again as what is behind it
        raise _behind(error) from None


def _behind(error: BaseException) -> BaseException:
    """The error of the operating system behind `error`, if there is one: serializers wrap it in errors of their own."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return cause or error
