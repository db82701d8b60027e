"""Who may write into a run folder: one process at a time, and only with the command and the settings that began the run."""

from __future__ import annotations

import datetime
import fcntl
import json
import os
import socket
from pathlib import Path
from typing import TextIO

from megatron_r1.config.keys import keys_that_may_change
from megatron_r1.config.load import flatten_config, load_config, save_config
from megatron_r1.config.schema import Config
from megatron_r1.errors import CheckpointError, ConfigError, FolderBusy
from megatron_r1.runtime import rollout_files
from megatron_r1.runtime.checkpoints import remove_leftovers
from megatron_r1.runtime.files import TEMPORARY, write_atomically
from megatron_r1.runtime.heartbeat import FOLDER as HEALTH
from megatron_r1.runtime.heartbeat import clear_signs

CHECKPOINTS = "checkpoints"
_MADE_BY = "run.json"


def lock_folder(folder: Path) -> TextIO:
    """Make the folder and lock it. The kernel releases the lock when the process ends, however it ends.

    Raises:
        ConfigError: the folder cannot be written.
        FolderBusy: another process holds the lock.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("a+", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"run_dir {folder} cannot be written: {error.strerror}") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        holder = lock.read().strip() or "another process"
        lock.close()
        raise FolderBusy(f"run_dir {folder} is being written by {holder}: wait for it, or choose another run_dir") from None
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()}")
    lock.flush()
    return lock


def prepare_folder(folder: Path, config: Config, command: str) -> TextIO:
    """Lock the folder, check that the run may go on in it, and remove what a killed process left half-written. Rank 0 only.

    Returns:
        The lock; closing it releases the folder.

    Raises:
        ConfigError: another process writes there, or another command or other settings began the run.
        CheckpointError: `run.json` is damaged.
        OSError: the folder cannot be written.
    """
    lock = lock_folder(folder)
    try:
        _check_resumes(folder, config, command)
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
    except BaseException:
        lock.close()
        raise
    return lock


def _check_resumes(folder: Path, config: Config, command: str) -> None:
    """Compare a run that began here with what is asked for now. Only marked settings may differ (`config.section.MAY_CHANGE`)."""
    metrics = folder / "metrics.jsonl"
    if not (folder / _MADE_BY).exists() or not metrics.exists() or metrics.stat().st_size == 0:
        return  # a run that stopped before its first step holds nothing that another setting could contradict
    try:
        made_by = json.loads((folder / _MADE_BY).read_text(encoding="utf-8"))["command"]
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{folder / _MADE_BY} does not name the command that made the run: choose another run_dir") from None
    if made_by != command:
        raise ConfigError(f"run_dir {folder} holds a run of '{made_by}', not of '{command}': choose another run_dir")
    before, now = flatten_config(load_config(folder / "config.yaml")), flatten_config(config)
    free = keys_that_may_change()
    for key, value in before.items():
        if value != now[key] and key not in free:
            raise ConfigError(
                f"run_dir {folder} was started with {key}={value}, now it is {now[key]}: keep the value, or choose another run_dir"
            )
