"""Who may write into a run folder: one process at a time, and only with the command and the settings that began the run."""

from __future__ import annotations

import datetime
import json
import os
import socket
from pathlib import Path
from typing import TextIO

from megatron_r1.config.load import load_config, save_config
from megatron_r1.config.resume import check_settings
from megatron_r1.config.schema import Config
from megatron_r1.errors import CheckpointError, ConfigError, FolderBusy
from megatron_r1.runtime import rollout_files
from megatron_r1.runtime.checkpoints import remove_leftovers
from megatron_r1.runtime.file_locks import lock_file
from megatron_r1.runtime.files import TEMPORARY, write_atomically
from megatron_r1.runtime.heartbeat import FOLDER as HEALTH
from megatron_r1.runtime.heartbeat import clear_signs
from megatron_r1.runtime.metrics import read_metrics

CHECKPOINTS = "checkpoints"
METRICS = "metrics.jsonl"
_MADE_BY = "run.json"


def lock_folder(folder: Path) -> TextIO:
    """Make the folder and lock it. The kernel releases the lock when the process ends, however it ends.

    Raises:
        ConfigError: the folder cannot be written, or its file system has no locks.
        FolderBusy: another process holds the lock.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("a+", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"run_dir {folder} cannot be written: {error.strerror}") from None
    try:
        lock_file(lock, f"run_dir {folder}")
    except BlockingIOError:
        lock.seek(0)
        holder = lock.read().strip() or "another process"
        lock.close()
        raise FolderBusy(f"run_dir {folder} is being written by {holder}: wait for it, or choose another run_dir") from None
    except BaseException:
        lock.close()
        raise
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()}")
    lock.flush()
    return lock


def claim_folder(folder: Path, config: Config, command: str) -> tuple[TextIO, Config | None]:
    """Lock the folder, and check that a run of this command may go on in it with these settings. Rank 0 only.

    Returns:
        The lock, closing which releases the folder, and the config that the run began with; None if it begins now.

    Raises:
        ConfigError: another process writes there, or another command or other settings began the run.
        CheckpointError: `run.json` is damaged.
    """
    lock = lock_folder(folder)
    try:
        return lock, _check_resumes(folder, config, command)
    except BaseException:
        lock.close()
        raise


def prepare_folder(folder: Path, config: Config, command: str) -> None:
    """Note what runs here, and remove what a killed process left half-written. Rank 0 only, which holds the lock.

    Raises:
        OSError: the folder cannot be written.
    """
    save_config(config, folder / "config.yaml")
    if not (folder / _MADE_BY).exists():
        started = datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds")
        write_atomically(folder / _MADE_BY, json.dumps({"command": command, "started": started}) + "\n")
    rollouts, checkpoints = folder / rollout_files.FOLDER, folder / CHECKPOINTS
    rollouts.mkdir(exist_ok=True)
    checkpoints.mkdir(exist_ok=True)
    remove_leftovers(checkpoints)
    clear_signs(folder / HEALTH)
    for path in [*folder.glob(f"*{TEMPORARY}*"), *rollouts.glob(f"*{TEMPORARY}*")]:
        if path.is_file():
            path.unlink()


def command_of_run(folder: Path) -> str:
    """Which command made the run. Raises CheckpointError if the folder does not say it."""
    try:
        return str(json.loads((folder / _MADE_BY).read_text(encoding="utf-8"))["command"])
    except (OSError, ValueError, KeyError, TypeError):
        raise CheckpointError(f"{folder / _MADE_BY} does not name the command that made the run: choose another run_dir") from None


def _check_resumes(folder: Path, config: Config, command: str) -> Config | None:
    """Compare a run that began here with what is asked for now; see `config.resume`."""
    metrics = folder / METRICS
    if not (folder / _MADE_BY).exists() or not metrics.exists() or metrics.stat().st_size == 0:
        return None  # a run that stopped before its first step holds nothing that another setting could contradict
    made_by = command_of_run(folder)
    if made_by != command:
        raise ConfigError(f"run_dir {folder} holds a run of '{made_by}', not of '{command}': choose another run_dir")
    before = load_config(folder / "config.yaml")
    check_settings(before, config, command, f"run_dir {folder} was started with", updates_per_epoch=updates_per_epoch(folder))
    return before


def updates_per_epoch(folder: Path) -> float | None:
    """From the last line of a run's metrics that tells the epoch; None if none does."""
    for record in reversed(read_metrics(folder / METRICS)):
        if record.get("epoch"):
            return record["step"] / record["epoch"]
    return None
