"""The run folder: config, steps, timers, metrics, rollouts, checkpoints and resume.

    run_dir/
        config.yaml       the resolved config
        run.json          which command made the run, and when
        inputs.json       the data and models it is made from, by content, see inputs.py
        metrics.jsonl     one JSON object a step
        tensorboard/      the same numbers as events
        rollouts/         step_000001.jsonl(.zst): every response of the step with its rewards, see rollout_files.py
        checkpoints/      see checkpoints.py
        health/           signs of life of every rank, see heartbeat.py
        ranks.jsonl       times of every rank, see stragglers.py
        .lock             held while a process writes here, see run_folder.py

A run killed at any moment resumes with the same command: what was recorded after the newest intact checkpoint is dropped and
done again. The layout and the number of processes may differ from those before.
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from megatron_r1.config.resume import input_paths
from megatron_r1.config.schema import Config
from megatron_r1.errors import CheckpointError, ConfigError, NonFiniteUpdate, StopRequested, WeightSyncError
from megatron_r1.runtime import interrupt
from megatron_r1.runtime.checkpoints import newest_intact, prune_checkpoints, read_state, step_of
from megatron_r1.runtime.device import device_in_use
from megatron_r1.runtime.device_peaks import peak_of
from megatron_r1.runtime.distributed import (
    any_rank,
    broadcast_object,
    is_rank_zero,
    kept_on_rank_zero,
    on_rank_zero,
    rank,
    world_size,
)
from megatron_r1.runtime.heartbeat import FOLDER as HEALTH
from megatron_r1.runtime.heartbeat import Heartbeat
from megatron_r1.runtime.inputs import compare_inputs
from megatron_r1.runtime.job import record_error, record_progress
from megatron_r1.runtime.kept_tokens import keep_tokens
from megatron_r1.runtime.metrics import MetricsWriter
from megatron_r1.runtime.peak_memory import PeakMemory
from megatron_r1.runtime.progress import Progress
from megatron_r1.runtime.rollout_files import drop_rollouts_after, write_rollouts
from megatron_r1.runtime.run_folder import CHECKPOINTS, claim_folder, prepare_folder
from megatron_r1.runtime.saving import PendingCheckpoint, Write
from megatron_r1.runtime.stragglers import StragglerLog
from megatron_r1.types import RolloutGroup, TrainingSample

SHOWN = {
    "loss": "loss",
    "reward/mean": "reward",
    "reward/accuracy": "accuracy",
    "reward/format": "format",
    "grad_norm": "grad_norm",
}  # metric -> its name behind the progress bar


class Run:
    """One run of one command. All ranks open it and call its methods; rank 0 alone writes, except into checkpoints.

    Attributes:
        folder: the run folder.
        step: the last step in the newest complete checkpoint; 0 if there is none.
        resumed_from: the verified checkpoint to load from; None for a new run.
        state: what was saved with that checkpoint.
    """

    def __init__(
        self, folder: Path, config: Config, resumed_from: Path | None, heartbeat: Heartbeat, metrics: MetricsWriter | None
    ) -> None:
        """Use `Run.open`. `metrics` is rank 0's alone."""
        self.folder = folder
        self.resumed_from = resumed_from
        self.step = step_of(resumed_from) if resumed_from else 0
        self.state = on_rank_zero(lambda: read_state(resumed_from)) if resumed_from else None
        self._config = config
        self._heartbeat = heartbeat
        self._metrics = metrics
        self._stragglers = StragglerLog(folder, last_step=self.step)
        self._opened = ExitStack()  # what `close` closes
        self._progress: Progress | None = None  # of `steps`
        self._pending: PendingCheckpoint | None = None
        self._last_step = self._removed_rollouts = 0
        self._at = 0  # the step that is being made
        self._stopping = False  # a signal has asked some rank to stop, and all know
        self._problem: OSError | None = None  # rank 0 could not write something; all learn of it at the end of the step
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._tokens: defaultdict[str, int] = defaultdict(int)
        self._flops = 0.0
        self._memory = PeakMemory(lambda: device_in_use().peak_memory())
        self._step_started = time.perf_counter()

    @classmethod
    def open(cls, folder: Path, config: Config, command: str) -> Run:
        """Create the run, or resume it if `folder` holds one. All ranks call this.

        Raises:
            ConfigError: another process writes there, or another command or other settings began the run.
            DataError: its data or models are not those that it began with.
            CheckpointError: all its checkpoints are corrupt, or the folder cannot be written.
        """
        with ExitStack() as opened:
            claimed = kept_on_rank_zero(lambda: _writing(folder, lambda: claim_folder(folder, config, command)))
            before: Config | None = None
            if claimed is not None:
                lock, before = claimed
                opened.enter_context(lock)
            began_with = broadcast_object(input_paths(before, command) if before else None)
            _writing(folder, lambda: compare_inputs(folder, input_paths(config, command), began_with))
            on_rank_zero(lambda: _writing(folder, lambda: prepare_folder(folder, config, command)))
            heartbeat = Heartbeat(folder / HEALTH, config.runtime.heartbeat, rank(), world_size())
            opened.callback(interrupt.unlisten)
            opened.callback(heartbeat.close)
            heartbeat.start()
            interrupt.listen()
            resumed_from = newest_intact(folder / CHECKPOINTS)
            metrics = kept_on_rank_zero(lambda: _writing(folder, lambda: _cut_back(folder, resumed_from, command)))
            if metrics is not None:
                opened.callback(_close_quietly, metrics)
            run = cls(folder, config, resumed_from, heartbeat, metrics)
            run._opened = opened.pop_all()
        return run

    def close(self) -> None:
        """Close the files and release the folder. A checkpoint that is being written is finished first; Ctrl-C gives it up."""
        try:
            if self._pending is not None and self._pending.finish(self._say_it_waits):
                self.step = self._pending.step
                record_progress(self.folder, self.step)
        finally:
            self._pending = None
            if self._progress is not None:
                self._progress.close()
            self._opened.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                self._seal_pending()
            if isinstance(error, NonFiniteUpdate | WeightSyncError) and self._at:
                error.args = (f"step {self._at}: {error}",)
            record_error(error)
        finally:
            self.close()

    def steps(self, total: int, description: str, *, end: int | None = None) -> Iterator[int]:
        """The steps that are left, from `self.step + 1` to `total`, behind a progress bar.

        Args:
            end: the last step of the run, if `total` is that of a part of it: the bar and `status` count to it, through all parts.

        Raises StopRequested, on every rank, after the step that was saved because a signal asked for it; ConfigError if the run
        is past `total`.
        """
        if self.step > total:
            raise ConfigError(f"{self.folder} is at step {self.step} already, and is to end at step {total}: let it end later")
        end = max(total, end or 0)
        progress = self._progress
        if progress is None or (progress.total, progress.done, progress.description) != (end, self.step, description):
            progress = self._progress = Progress(end, description, initial=self.step, enabled=is_rank_zero())
        self._step_started = time.perf_counter()
        self._last_step = total
        for step in range(self.step + 1, total + 1):
            self._heartbeat.begin("step", step, end)
            self._at = step
            yield step
            progress.advance()
            if self._stopping and step < total:
                raise StopRequested(
                    f"{interrupt.forget()}: stopped after step {step} of {end}, which is saved; the same command resumes"
                )
            if self._pending is not None:
                with self.timer("checkpoint"):
                    if self._pending.is_written():
                        self._seal_pending()
        if total == end:
            progress.close()

    def go_on(self) -> None:
        """Let what follows begin from the newest checkpoint, the one at the end of a part of the run. All ranks call this.

        Raises StopRequested, on every rank, if a signal asked to stop in the meantime.
        """
        if self._stopping:
            raise StopRequested(f"{interrupt.forget()}: stopped after step {self.step}, which is saved; the same command resumes")
        self.resumed_from = newest = newest_intact(self.folder / CHECKPOINTS)
        self.step = step_of(newest) if newest else 0
        self.state = on_rank_zero(lambda: read_state(newest)) if newest else None

    @contextmanager
    def timer(self, name: str) -> Iterator[None]:
        """Add the seconds of the block to `seconds/<name>` of the next `record`, which on a GPU gets `memory/<name>`, too."""
        started = time.perf_counter()
        self._heartbeat.begin(name)
        try:
            with self._memory.part(name):
                yield
        finally:
            self._seconds[f"seconds/{name}"] += time.perf_counter() - started

    def count_tokens(self, name: str, tokens: int) -> None:
        """Let the next `record` write `tokens_per_second/<name>`: tokens over the seconds of the timer of that name."""
        self._tokens[name] += tokens

    def count_flops(self, flops: float) -> None:
        """Let the next `record` write `flops_per_second/*` and, of a device whose peak is known, `mfu/*`: see `_describe_speed`.

        Args:
            flops: model FLOPs (`model.flops`) of updates made under the timer "train", of all ranks together.
        """
        self._flops += flops

    def _describe_speed(self, seconds: float) -> dict[str, float]:
        """How fast each device trained, in a step of so many seconds: `train` over the time in the timer "train", `step` over all.

        MFU is a share of the device's dense BF16 peak.
        """
        if not self._flops:
            return {}
        times = {"train": self._seconds["seconds/train"], "step": seconds}
        speed = {f"flops_per_second/{name}": self._flops / world_size() / time for name, time in times.items()}
        peak = peak_of(device_in_use(), self._config.runtime.dtype)
        if peak is not None:
            speed |= {f"mfu/{name}": speed[f"flops_per_second/{name}"] / peak for name in times}
        return speed

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
            if self._tokens["train"]:
                rates["tokens_per_second/device"] = self._tokens["train"] / world_size() / (now - self._step_started)
            rates |= self._describe_speed(now - self._step_started) | self._memory.take()
            with self._keeping_problem():
                self._metrics.write(step, numbers | self._seconds | rates | {"seconds/step": now - self._step_started})
        if self._progress is not None:
            self._progress.show({short: float(metrics[name]) for name, short in SHOWN.items() if name in metrics})
        self._seconds.clear()
        self._tokens.clear()
        self._flops = 0.0
        self._step_started = now

    def save_rollouts(self, step: int, groups: list[RolloutGroup], samples: Sequence[TrainingSample] = ()) -> None:
        """Write every response of the step into `rollouts/`. Call it before the step's checkpoint.

        All ranks call it with the groups of the whole step, other ranks' as outlines, and with the samples made of them, whose
        tokens and log-probs are kept within `checkpoint.rollouts_tokens_mb`.
        """
        kept = self._config.checkpoint
        tokens = keep_tokens(groups, samples, kept.rollouts_tokens_mb * 10**6, self._config.seed)
        with self._keeping_problem():
            plain, most = kept.rollouts_plain_mb * 10**6, kept.rollouts_most_mb * 10**6
            removed = write_rollouts(self.folder, step, groups, plain, most, tokens)
            if removed and not self._removed_rollouts:
                limit = f"checkpoint.rollouts_most_mb={kept.rollouts_most_mb}"
                print(f"{self.folder}/rollouts has reached {limit}: the oldest steps are removed", file=sys.stderr, flush=True)
            self._removed_rollouts += removed

    def checkpoint_due(self, step: int, total: int) -> bool:
        """Whether `checkpoint.interval`, the end of the run or a signal asks for a checkpoint after this step. Collective.

        Raises CheckpointError, on every rank, if metrics or rollouts of the step could not be written.
        """
        self._stopping, self._stragglers.due, broken = any_rank(
            interrupt.stop_asked() is not None, self._stragglers.wants_to_measure(), self._problem is not None
        )
        if broken:
            raise _unwritable(self.folder, broadcast_object(self._problem))
        return step % self._config.checkpoint.interval == 0 or step == total or self._stopping

    def checkpoint(self, step: int, write: Write, state: dict[str, Any]) -> None:
        """Take a checkpoint. Once it is complete, those beyond `checkpoint.keep` are removed. All ranks call this.

        With `checkpoint.asynchronous` the files are written during the next steps, except after the last step, and the checkpoint
        counts as soon as they are. One that is still being written is waited for. `write` is described at
        `runtime.saving.Write`; `state` must survive JSON. Raises CheckpointError if files cannot be written: here, or in a later
        step.
        """
        with self.timer("checkpoint"):
            self._seal_pending()
            later = self._config.checkpoint.asynchronous and step < self._last_step and not self._stopping
            self._pending = PendingCheckpoint(self.folder / CHECKPOINTS, step, write, state, asynchronous=later)
            if not later:
                self._seal_pending()

    def _seal_pending(self) -> None:
        """Wait for the checkpoint that is being written, if there is one."""
        if self._pending is None:
            return
        try:
            sealed = self._pending.seal()
        except Exception:  # after KeyboardInterrupt `close` finishes it
            self._pending = None
            raise
        self._pending = None
        on_rank_zero(lambda: prune_checkpoints(sealed.parent, self._config.checkpoint.keep))
        self.step = step_of(sealed)
        if is_rank_zero():
            record_progress(self.folder, self.step)

    def _say_it_waits(self) -> None:
        self._heartbeat.begin("checkpoint")
        if is_rank_zero() and self._pending is not None:
            when = f"when the checkpoint of step {self._pending.step} is written"
            print(f"{self.folder}: the run ends {when}; Ctrl-C gives it up", file=sys.stderr, flush=True)

    @contextmanager
    def _keeping_problem(self) -> Iterator[None]:
        """A rank that raised alone would leave the others waiting in the next collective."""
        try:
            yield
        except OSError as error:
            self._problem = error


def _cut_back(folder: Path, resumed_from: Path | None, command: str) -> MetricsWriter:
    """Drop what was recorded after the checkpoint, which will be done again, and open the metrics. Rank 0 only."""
    step = step_of(resumed_from) if resumed_from else 0
    drop_rollouts_after(folder, step)
    # step 0 is recorded before the first update, so only a run with a checkpoint has it to keep
    metrics = MetricsWriter(folder, last_step=step if resumed_from else -1)
    if step:
        print(f"{command}: resuming {folder} after step {step}", file=sys.stderr, flush=True)
    return metrics


def _close_quietly(metrics: MetricsWriter) -> None:
    with suppress(OSError):  # a full disk, which the run has reported before
        metrics.close()


def _writing(folder: Path, work: Callable[[], Any]) -> Any:
    """Do the work; an error of the operating system becomes the run's."""
    try:
        return work()
    except OSError as error:
        raise _unwritable(folder, error) from None


def _unwritable(folder: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"{folder} cannot be written: {error.strerror}; the same command resumes when it can be")
