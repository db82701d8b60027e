"""One checkpoint on its way: taken at a step, written while training goes on, sealed once every rank's files are there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megatron_r1.errors import CheckpointError
from megatron_r1.runtime.background import ForkedWork
from megatron_r1.runtime.checkpoints import STATE, manifest_entry, seal
from megatron_r1.runtime.distributed import failing_together, gather_objects, is_rank_zero, on_rank_zero
from megatron_r1.runtime.files import TEMPORARY, write_atomically


@dataclass(frozen=True)
class Unwritten:
    """What is left to do for this rank's files once their content is fixed.

    Attributes:
        files: paths that `write` makes, relative to the checkpoint's folder.
        write: makes them. It may run in a forked process: no collective, no device, and a picklable result.
        finish: called on every rank with the result of its `write` after all ranks' were successful. May be collective.
    """

    files: Sequence[str]
    write: Callable[[], Any]
    finish: Callable[[Any], None]


#: Puts this rank's files into the folder it is given, or fixes their content and leaves the writing for later.
Write = Callable[[Path], Unwritten | None]

_NOTHING = Unwritten((), lambda: None, lambda _: None)


class PendingCheckpoint:
    """A checkpoint whose content is that of the step at which this object was made. All ranks call its methods together.

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
        with self._naming_problems():
            on_rank_zero(lambda: _make_empty(self._temporary))
            with failing_together():
                unwritten = write(self._temporary) or _NOTHING
            on_rank_zero(lambda: write_atomically(self._temporary / STATE, json.dumps(state, indent=1)))
            write_files = partial(_write_and_hash, unwritten, self._temporary)
            with failing_together():
                self._fork = ForkedWork(write_files) if asynchronous else None
            # Beside a fork nothing may keep `write_files`: it holds a copy of the whole state.
            self._written = write_files if self._fork is None else self._fork.result
            self._finish = unwritten.finish

    def is_written(self) -> bool:
        """Whether every rank's files are written, so that `seal` does not wait."""
        return all(gather_objects(self._fork is not None and self._fork.done()))

    def seal(self) -> Path:
        """Wait until every rank's files are written, and make the checkpoint a complete one."""
        with self._naming_problems():
            with failing_together():
                result, hashes = self._written()
            self._finish(result)
            known = {name: entry for of_rank in gather_objects(hashes) for name, entry in of_rank.items()}
            on_rank_zero(lambda: seal(self._temporary, self._final, {"step": self.step, "files": self._complete(known)}))
        return self._final

    def abandon(self) -> None:
        """End this rank's writer. Not collective; what was written stays under its temporary name."""
        if self._fork is not None:
            self._fork.kill()

    def _complete(self, known: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """`known` with the files that no writer hashed; for a policy they are few and small."""
        names = sorted(str(path.relative_to(self._temporary)) for path in self._temporary.rglob("*") if path.is_file())
        return {name: known[name] if name in known else manifest_entry(self._temporary / name) for name in names}

    @contextmanager
    def _naming_problems(self) -> Iterator[None]:
        try:
            yield
        except (OSError, CheckpointError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            if is_rank_zero():
                shutil.rmtree(self._temporary, ignore_errors=True)  # a full disk needs the room
            raise CheckpointError(
                f"checkpoint {self._final} cannot be written: {reason}; the run can resume from the one before"
            ) from None


def _make_empty(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def _write_and_hash(unwritten: Unwritten, folder: Path) -> tuple[Any, dict[str, dict[str, Any]]]:
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
