"""What a batch script learns of the job that it started: how it ended, and how far it came.

The exit codes of many ranks do not tell: the first one that fails has the others killed. So the first that knows why the job ends
writes a word into the job's folder (`launch.job_folder`), where `slurm/common.sh` reads it:

    finished    nothing is left to do
    stopped     saved at a signal: start it again
    stalled     a rank hung: start it again
    retry       an engine or a device failed, or another process still writes there: start it again, perhaps elsewhere
    failed      it would fail again: bad input, a full disk, weights that differ

Where there is no word the job was killed. Without a job's folder nothing is written.
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
    """Tell that the job ends with this error, where it is one of ours. Before this rank leaves the others: they then fail for want of it."""
    if isinstance(error, StopRequested):
        record_outcome("stopped", str(error))
    elif isinstance(error, DeviceError | EngineLost | FolderBusy):
        record_outcome("retry", str(error))
    elif isinstance(error, R1Error):
        record_outcome("failed", str(error))


def record_outcome(outcome: Outcome, why: str = "") -> None:
    """Tell how the job ends, unless another rank has told already."""
    folder = job_folder()
    if folder is not None:
        write_once(folder / OUTCOME, f"{outcome}\n{why}\n")


def record_progress(run_folder: Path, step: int) -> None:
    """Tell that a checkpoint of `step` is complete: what fails after it has not failed at the same place twice."""
    folder = job_folder()
    if folder is not None:
        with suppress(OSError):  # a full disk; the run tells of its own
            write_atomically(folder / PROGRESS, f"{run_folder} {step}\n", durable=False)


def write_once(path: Path, text: str) -> bool:
    """Make a file, whole, where there is none yet. Returns whether this call made it. A folder that is gone makes no error."""
    temporary = path.with_name(f"{path.name}{TEMPORARY}{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.link(temporary, path)
    except OSError:
        return False
    finally:
        temporary.unlink(missing_ok=True)
    return True
