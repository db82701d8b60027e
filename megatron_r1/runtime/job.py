"""What a batch script learns about the job that it started: how the job ended and how far it came.

The exit codes of the ranks do not say: once one rank fails, the launcher kills the others. So the first rank that knows why the
job ends writes one word into the job's folder (`launch.job_folder`), where `slurm/common.sh` reads it:

    finished    nothing is left to do
    stopped     saved at a signal: start it again
    stalled     a rank hung: start it again
    retry       an engine or a device failed, or another process still writes there: start it again, perhaps elsewhere
    failed      it would fail again: bad input, a full disk, weights that differ

If there is no word, the job was killed. Without a job's folder nothing is written.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Literal

from megatron_r1.errors import DeviceError, EngineLost, FolderBusy, R1Error, StopRequested
from megatron_r1.runtime.files import TEMPORARY, write_atomically
from megatron_r1.runtime.launch import job_folder

OUTCOME, PROGRESS = "outcome", "progress"

Outcome = Literal["finished", "stopped", "stalled", "retry", "failed"]


def record_error(error: BaseException | None) -> None:
    """Note that the job ends with this error, if it is one of ours.

    Call it before this rank leaves the others, which fail once it is gone.
    """
    if isinstance(error, StopRequested):
        record_outcome("stopped", str(error))
    elif isinstance(error, DeviceError | EngineLost | FolderBusy):
        record_outcome("retry", str(error))
    elif isinstance(error, R1Error):
        record_outcome("failed", str(error))


def record_outcome(outcome: Outcome, why: str = "") -> None:
    """Note how the job ends, unless another rank has done so before."""
    folder = job_folder()
    if folder is not None:
        write_once(folder / OUTCOME, f"{outcome}\n{why}\n")


def record_progress(run_folder: Path, step: int) -> None:
    """Note that a checkpoint of `step` is complete: a job that fails after it did not fail twice at the same place."""
    folder = job_folder()
    if folder is not None:
        with suppress(OSError):  # a full disk, which the run reports itself
            write_atomically(folder / PROGRESS, f"{run_folder} {step}\n", durable=False)


def write_once(path: Path, text: str) -> bool:
    """Make a whole file unless there is one. Returns whether this call made it; False, too, if the folder is gone."""
    temporary = path.with_name(f"{path.name}{TEMPORARY}{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.link(temporary, path)
    except OSError:
        return False
    finally:
        temporary.unlink(missing_ok=True)
    return True
