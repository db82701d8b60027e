"""The run folder: config, steps, timers, metrics, rollouts, checkpoints and resume.

    run_dir/
        config.yaml       the resolved config
        run.json          which command made the run, and when
        metrics.jsonl     one JSON object a step
        tensorboard/      the same numbers as events
        rollouts/         step_000001.jsonl: every response of the step with its rewards
        checkpoints/      see checkpoints.py
        health/           signs of life of every rank, see heartbeat.py
        ranks.jsonl       times of every rank, see stragglers.py
        .lock             held while a process writes here

A run killed at any moment resumes with the same command: what was recorded after the newest intact checkpoint is dropped and
done again. Layout and number of processes may be others than before.
"""

from __future__ import annotations

import datetime
import fcntl
import json
import os
import socket
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from megatron_r1.config.load import flatten_config, keys_that_may_change, load_config, save_config
from megatron_r1.config.schema import Config
from megatron_r1.errors import CheckpointError, ConfigError, FolderBusy, StopRequested
from megatron_r1.runtime import interrupt
from megatron_r1.runtime.checkpoints import (
    newest_intact,
    prune_checkpoints,
    read_state,
    remove_leftovers,
    step_of,
)
from megatron_r1.runtime.distributed import any_rank, broadcast_object, is_rank_zero, on_rank_zero, rank, world_size
from megatron_r1.runtime.files import TEMPORARY, write_atomically
from megatron_r1.runtime.heartbeat import FOLDER as HEALTH
from megatron_r1.runtime.heartbeat import Heartbeat, clear_signs
from megatron_r1.runtime.job import record_error, record_progress
from megatron_r1.runtime.metrics import MetricsWriter
from megatron_r1.runtime.progress import Progress
from megatron_r1.runtime.saving import PendingCheckpoint, Write
from megatron_r1.runtime.stragglers import StragglerLog
from megatron_r1.types import RolloutGroup

SHOWN = {
    "loss": "loss",
    "reward/mean": "reward",
    "reward/accuracy": "accuracy",
    "reward/format": "format",
    "grad_norm": "grad_norm",
}


class Run:
    """One run of one command. All ranks open it and call its methods; rank 0 alone writes, except into checkpoints."""

    def __init__(self, folder: Path, config: Config) -> None:
        """Use `Run.open`."""
        self.folder = folder
        self.step = 0  #: last step in the newest complete checkpoint; 0 where there is none
        self.resumed_from: Path | None = None  #: the verified checkpoint to load from
        self.state: dict[str, Any] | None = None  #: what was saved with it
        self._config = config
        self._pending: PendingCheckpoint | None = None
        self._last_step = 0
        self._stopping = False  # a signal has asked some rank to stop, and all know
        self._problem: OSError | None = None  # rank 0 could not write something; told to all at the end of the step
        self._heartbeat: Heartbeat | None = None
        self._stragglers: StragglerLog | None = None
        self._lock: TextIO | None = None
        self._metrics: MetricsWriter | None = None
        self._progress: Progress | None = None
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._tokens: defaultdict[str, int] = defaultdict(int)
        self._step_started = time.perf_counter()

    @classmethod
    def open(cls, folder: Path, config: Config, command: str) -> Run:
        """Create the run, or resume it where `folder` holds one. All ranks call this.

        Raises ConfigError where another process writes there, where the run was made by another command, or where a setting
        that changes the result differs from the run's; CheckpointError where all its checkpoints are corrupt.
        """
        run = cls(folder, config)
        try:
            on_rank_zero(lambda: run._or_tell(lambda: run._prepare_folder(command)))
            run._heartbeat = Heartbeat(folder / HEALTH, config.runtime.heartbeat, rank(), world_size())
            run._heartbeat.start()
            interrupt.listen()
            run.resumed_from = newest_intact(folder / "checkpoints")
            if run.resumed_from is not None:
                run.step = step_of(run.resumed_from)
                run.state = on_rank_zero(lambda: read_state(run.resumed_from))
            on_rank_zero(lambda: run._or_tell(lambda: run._cut_back(command)))
            run._stragglers = StragglerLog(folder, last_step=run.step)
        except BaseException:
            run.close()
            raise
        return run

    def close(self) -> None:
        """Close the files and let another process have the folder. A checkpoint that is still being written is given up."""
        if self._pending is not None:
            self._pending.abandon()
            self._pending = None
        if self._progress is not None:
            self._progress.close()
        if self._metrics is not None:
            with suppress(OSError):  # a full disk, of which `record` has told
                self._metrics.close()
        if self._heartbeat is not None:
            self._heartbeat.close()
            self._heartbeat = None
            interrupt.unlisten()
        if self._lock is not None:
            self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                self._seal_pending()
            record_error(error)
        finally:
            self.close()

    def steps(self, total: int, description: str) -> Iterator[int]:
        """The steps that are left, from `self.step + 1` to `total`, behind a progress bar.

        Raises StopRequested, on every rank, after the step that was saved because a signal asked for it.
        """
        self._progress = Progress(total, description, initial=min(self.step, total), enabled=is_rank_zero())
        self._step_started = time.perf_counter()
        self._last_step = total
        for step in range(self.step + 1, total + 1):
            self._heartbeat.begin("step", step, total)
            yield step
            self._progress.advance()
            if self._stopping and step < total:
                raise StopRequested(
                    f"{interrupt.forget()}: stopped after step {step} of {total}, which is saved; the same command resumes"
                )
            if self._pending is not None:
                with self.timer("checkpoint"):
                    if self._pending.is_written():
                        self._seal_pending()
        self._progress.close()

    @contextmanager
    def timer(self, name: str) -> Iterator[None]:
        """Add the seconds of the block to `seconds/<name>` of the next `record`."""
        started = time.perf_counter()
        self._heartbeat.begin(name)
        try:
            yield
        finally:
            self._seconds[f"seconds/{name}"] += time.perf_counter() - started

    def count_tokens(self, name: str, tokens: int) -> None:
        """Let the next `record` write `tokens_per_second/<name>`: tokens over the seconds of the timer of that name."""
        self._tokens[name] += tokens

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one step's metrics, with the timers and the whole time (`seconds/step`) since the last record.

        Call it once a step, and before the step's checkpoint: a resumed run keeps the lines up to its checkpoint.
        """
        now = time.perf_counter()
        self._heartbeat.end_step(self._seconds)
        ranks: dict[str, float] = {}
        if self._stragglers.due:
            with self._keeping_problem():
                ranks = self._stragglers.measure(step, self._seconds)
        self._stragglers.due = False
        if self._metrics is not None:
            numbers = {name: value if isinstance(value, int) else float(value) for name, value in {**metrics, **ranks}.items()}
            rates = {f"tokens_per_second/{n}": t / self._seconds[f"seconds/{n}"] for n, t in self._tokens.items()}
            with self._keeping_problem():
                self._metrics.write(step, numbers | self._seconds | rates | {"seconds/step": now - self._step_started})
        if self._progress is not None:
            self._progress.show({short: float(metrics[name]) for name, short in SHOWN.items() if name in metrics})
        self._seconds.clear()
        self._tokens.clear()
        self._step_started = now

    def save_rollouts(self, step: int, groups: list[RolloutGroup]) -> None:
        """Write every response of the step, one JSON object a line, into `rollouts/`. Call it before the step's checkpoint."""
        if is_rank_zero():
            lines = [json.dumps(line, ensure_ascii=False) + "\n" for group in groups for line in _rollout_lines(step, group)]
            with self._keeping_problem():
                write_atomically(self.folder / "rollouts" / f"step_{step:06d}.jsonl", "".join(lines))

    def checkpoint_due(self, step: int, total: int) -> bool:
        """Whether `checkpoint.interval`, the end of the run or a signal asks for a checkpoint after this step. Collective.

        Raises CheckpointError, on every rank, where metrics or rollouts of the step could not be written.
        """
        self._stopping, self._stragglers.due, broken = any_rank(
            interrupt.stop_asked() is not None, self._stragglers.wants_to_measure(), self._problem is not None
        )
        if broken:
            raise self._unwritable(broadcast_object(self._problem))
        return step % self._config.checkpoint.interval == 0 or step == total or self._stopping

    def checkpoint(self, step: int, write: Write, state: dict[str, Any]) -> None:
        """Take a checkpoint; once complete it counts, and those beyond `checkpoint.keep` are dropped. All ranks call this.

        With `checkpoint.asynchronous` the files are written beside the next steps, except after the last step. A checkpoint that
        is still being written is waited for. `write` is described at `runtime.saving.Write`; `state` must survive JSON.
        Raises CheckpointError where files cannot be written: here, or in a later step.
        """
        with self.timer("checkpoint"):
            self._seal_pending()
            later = self._config.checkpoint.asynchronous and step < self._last_step and not self._stopping
            self._pending = PendingCheckpoint(self.folder / "checkpoints", step, write, state, asynchronous=later)
            if not later:
                self._seal_pending()

    def _seal_pending(self) -> None:
        """Wait for the checkpoint that is being written, if there is one."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        sealed = pending.seal()
        on_rank_zero(lambda: prune_checkpoints(sealed.parent, self._config.checkpoint.keep))
        self.step = step_of(sealed)
        if is_rank_zero():
            record_progress(self.folder, self.step)

    @contextmanager
    def _keeping_problem(self) -> Iterator[None]:
        """A rank that raised alone would leave the others waiting in the next collective."""
        try:
            yield
        except OSError as error:
            self._problem = error

    def _or_tell(self, work: Callable[[], None]) -> None:
        try:
            work()
        except OSError as error:
            raise self._unwritable(error) from None

    def _unwritable(self, error: OSError) -> CheckpointError:
        return CheckpointError(f"{self.folder} cannot be written: {error.strerror}; the same command resumes when it can be")

    def _prepare_folder(self, command: str) -> None:
        """Lock the folder, check that the run may go on here, and remove what a kill left half-written. Rank 0 only."""
        self._lock = lock_folder(self.folder)
        _check_resumes(self.folder, self._config, command)
        save_config(self._config, self.folder / "config.yaml")
        if not (self.folder / "run.json").exists():
            started = datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds")
            write_atomically(self.folder / "run.json", json.dumps({"command": command, "started": started}) + "\n")
        rollouts, checkpoints = self.folder / "rollouts", self.folder / "checkpoints"
        rollouts.mkdir(exist_ok=True)
        checkpoints.mkdir(exist_ok=True)
        remove_leftovers(checkpoints)
        clear_signs(self.folder / HEALTH)
        for path in [*self.folder.glob(f"*{TEMPORARY}*"), *rollouts.glob(f"*{TEMPORARY}*")]:
            if path.is_file():
                path.unlink()

    def _cut_back(self, command: str) -> None:
        """Drop what was recorded after the checkpoint: it will be done again. Rank 0 only."""
        for path in (self.folder / "rollouts").glob("step_*.jsonl"):
            if int(path.stem.removeprefix("step_")) > self.step:
                path.unlink()
        # step 0 is recorded before the first update, so only a run with a checkpoint has it to keep
        self._metrics = MetricsWriter(self.folder, last_step=self.step if self.resumed_from else -1)
        if self.step:
            print(f"{command}: resuming {self.folder} after step {self.step}", file=sys.stderr, flush=True)


def lock_folder(folder: Path) -> TextIO:
    """Make the folder and lock it. The kernel lets go of the lock when the process ends, however it ends.

    Raises:
        ConfigError: it cannot be written.
        FolderBusy: another process has it.
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


def _check_resumes(folder: Path, config: Config, command: str) -> None:
    metrics = folder / "metrics.jsonl"
    if not (folder / "run.json").exists() or not metrics.exists() or metrics.stat().st_size == 0:
        return  # a run that stopped before its first step holds nothing that another setting could contradict
    try:
        made_by = json.loads((folder / "run.json").read_text(encoding="utf-8"))["command"]
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(
            f"{folder / 'run.json'} does not name the command that made the run: choose another run_dir"
        ) from None
    if made_by != command:
        raise ConfigError(f"run_dir {folder} holds a run of '{made_by}', not of '{command}': choose another run_dir")
    before, now = flatten_config(load_config(folder / "config.yaml")), flatten_config(config)
    free = keys_that_may_change()
    for key, value in before.items():
        if value != now[key] and key not in free:
            raise ConfigError(
                f"run_dir {folder} was started with {key}={value}, now it is {now[key]}: keep the value, or choose another run_dir"
            )


def _rollout_lines(step: int, group: RolloutGroup) -> Iterator[dict[str, Any]]:
    for index, rollout in enumerate(group.rollouts):
        yield {
            "step": step,
            "prompt_id": group.prompt.id,
            "question": group.prompt.question,
            "answer": group.prompt.answer,
            "response": rollout.text,
            "reward": None if group.rewards_G is None else float(group.rewards_G[index]),
            "reward_parts": {name: values[index] for name, values in group.reward_parts.items()},
            "reward_outcomes": {name: values[index] for name, values in group.reward_outcomes.items()},
            "reward_details": {name: values[index] for name, values in group.reward_details.items() if values[index]},
            "advantage": None if group.advantages_G is None else float(group.advantages_G[index]),
            "finished": rollout.finished,
            "length": len(rollout.token_ids),
            "weights_version": group.weights_version,
        }
