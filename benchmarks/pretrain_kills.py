"""A pretraining run killed again and again, once with another layout after it: is it the run that nobody disturbed?

    python -m benchmarks.pretrain_kills --dir /scratch [--kills 10] [--seed 0] [--layout dp2|pp2|tp2|ep2] [--out FILE.json]

A tiny DeepSeek-V3 is pretrained on a blend of two sources with all that the recipe has: a batch ramp, three phases of which two
have YaRN and one a blend of its own, fill in the middle, multi-token prediction, validation and an average of the weights. Once
nothing disturbs it. Then it gets SIGKILL at moments that the seed chooses, and the same command again after each: in its start, in
a step, while a checkpoint is written, in a change of phase, in the export; after one of them the command has two ranks in another
layout, and from then on now and then one rank alone is killed. The end is compared

- with a run that nobody kills and that changes its layout at the same step: all its files and every checkpoint (weights,
  optimizer, average), byte for byte, and every line of metrics but for times;
- with the run that never changes it: all of this up to that step, losses behind it to 1e-4 of their size, and what
  `megatron-r1 show-samples` prints of every step.

What differs, a temporary file or a process that is left end the command with code 1.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.kills import NOT_COMPARED, differences, differing, hashes, last_line, start_command, wait_until_dead, working_in
from benchmarks.measure import Disagreement, describe_machine, positive, run, write_results
from benchmarks.pretrain_settings import LAYOUTS, RUN, SOURCES, phase_ends, write_settings, write_texts
from benchmarks.processes import CommandFailed, parent_of, python_command, with_descendants
from megatron_r1.errors import ConfigError
from megatron_r1.runtime.checkpoints import MANIFEST, complete_checkpoints, step_of
from megatron_r1.runtime.files import TEMPORARY
from megatron_r1.runtime.metrics import read_metrics
from tests.timed import TIMES

Kind = Literal["start", "step", "save", "phase", "export"]

CLOSE = 1e-4  #: of losses on another layout, which adds up in another order
METRICS, CHECKPOINTS = RUN / "metrics.jsonl", RUN / "checkpoints"
_RANDOM_ID = re.compile(rb"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_LOOK = 0.01  # seconds between two looks at the run
_STARTING = 6.0  # seconds of a start in which a kill may come
_BUILDING = 0.6  # of a change of phase
_EXPORTING = 0.3  # of an export


@dataclass(frozen=True)
class Moment:
    """When a kill comes."""

    kind: Kind
    step: int  #: the last line of metrics at that time, or the next one
    share: float  #: of how long what is hit takes, 0 to 1


def choose_moments(kills: int, ends: Sequence[int], rng: random.Random) -> list[Moment]:
    """Moments in the order of steps. One is in a change of phase and one in a save, as far as there are kills.

    Args:
        ends: the last step of every phase.
    """
    kinds: list[Kind] = ["phase", "save", "export", "start"]
    kinds = kinds[:kills] + ["step"] * (kills - len(kinds))
    moments = []
    for kind in kinds:
        step = {"phase": rng.choice(ends[:-1]), "export": ends[-1]}.get(kind, rng.randrange(1, ends[-1]))
        moments.append(Moment(kind, step, rng.random()))
    return sorted(moments, key=lambda moment: moment.step)


class Live:
    """What can be seen of a command that runs: its folder alone."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._before = self._written()
        self._sealed = set(self.sealed())

    def _written(self) -> int | None:
        """Each start writes the metrics anew, without the lines that it makes again."""
        try:
            return (self._folder / METRICS).stat().st_ino
        except FileNotFoundError:
            return None

    def last_step(self) -> int:
        """Of the lines in the metrics since this start; -1 while it has not come so far as to go on from a checkpoint."""
        if self._written() in (None, self._before):
            return -1
        lines = (self._folder / METRICS).read_text().split("\n")[:-1]  # one may be half written
        return json.loads(lines[-1])["step"] if lines else 0

    def sealed(self) -> list[int]:
        """Steps of complete checkpoints."""
        return [step_of(path) for path in complete_checkpoints(self._folder / CHECKPOINTS)]

    def saving(self) -> list[int]:
        """Steps of checkpoints that are being written."""
        found = (self._folder / CHECKPOINTS).glob(f"{TEMPORARY}step_*")
        return [int(path.name.rpartition("_")[2]) for path in found if self.last_step() >= 0]

    def has_come(self, moment: Moment) -> bool:
        """Whether what is to be hit has begun."""
        match moment.kind:
            case "start":
                return True
            case "step":
                return self.last_step() >= moment.step
            case "save":
                return any(step >= moment.step for step in self.saving())
            case "phase" if moment.share < 0.3:  # its checkpoint is not written yet
                return self.last_step() >= moment.step
        return self.last_step() >= moment.step and moment.step in self.sealed()

    def was_hit(self, moment: Moment) -> bool:
        """After a kill: whether it came in what it was meant for, and not behind it."""
        step = self.last_step()
        match moment.kind:
            case "start":
                return step <= max(self._sealed, default=0)
            case "save":
                return any(step not in self.sealed() for step in self.saving())
            case "phase":
                return step == moment.step
            case "export":
                return not (self._folder / RUN / "hf/artifact.json").exists()
        return True


class Killed:
    """A run that is killed at every moment and started again after each.

    Attributes:
        hits: what was hit, in words.
        changed_at: the step after which it went on in the other layout.
    """

    def __init__(self, folder: Path, log: Path, layout: str, step_seconds: float, rng: random.Random) -> None:
        self._folder, self._log, self._layout, self._rng = folder, log, layout, rng
        self._lengths = {"start": _STARTING, "step": step_seconds, "save": 0.02, "phase": _BUILDING, "export": _EXPORTING}
        self.hits: list[dict[str, Any]] = []
        self.changed_at: int | None = None

    def run(self, moments: Sequence[Moment], ends: Sequence[int]) -> None:
        """Raises CommandFailed if a command ends by itself with an error, or too early."""
        last = max(len(moments) - 1, 1)
        change = self._rng.randrange(min(len(moments) // 2, last - 1), last)  # the kill after which the layout is another
        waiting = list(moments)
        while waiting:
            moment = waiting.pop(0)
            if len(self.hits) == change + 1:
                self.changed_at = max(Live(self._folder).sealed(), default=0)
            hit = self._kill_at(moment)
            if not hit and moment.kind == "phase" and (later := [end for end in ends[:-1] if end > moment.step]):
                waiting = sorted([*waiting, Moment("phase", later[0], moment.share / 2)], key=lambda one: one.step)
        if self.changed_at is None:
            self.changed_at = max(Live(self._folder).sealed(), default=0)
        finish(self._folder, self._log, self._layout)

    def _kill_at(self, moment: Moment) -> bool:
        layout = None if self.changed_at is None else self._layout
        live = Live(self._folder)
        process = start_command(pretrain_command(layout), self._folder, self._log)
        while process.poll() is None and not live.has_come(moment):
            time.sleep(_LOOK)
        try:
            process.wait(moment.share * self._lengths[moment.kind])
        except subprocess.TimeoutExpired:
            pass
        if process.returncode is not None:
            raise CommandFailed(
                f"it ended with code {process.returncode} before kill {len(self.hits) + 1} ({moment.kind} {moment.step}): "
                f"{last_line(self._log)}"
            )
        alone = layout is not None and self._rng.random() < 0.5
        kill(process, self._rng if alone else None)
        wait_until_dead(process, self._folder)
        hit = live.was_hit(moment)
        step = live.last_step()
        told = {"kind": moment.kind, "hit": hit, "step": step, "layout": layout or "one rank", "one rank alone": alone}
        self.hits.append(told)
        print(f"kill {len(self.hits)}: {', '.join(f'{name} {value}' for name, value in told.items())}", flush=True)
        return hit


def kill(process: subprocess.Popen, one_of: random.Random | None) -> None:
    """SIGKILL to all processes of a command, whatever group they are in; or to one of the ranks that a launcher has started."""
    tree = with_descendants(process.pid)
    ranks = sorted(pid for pid in tree if parent_of(pid) == process.pid)
    for pid in [one_of.choice(ranks)] if one_of is not None and ranks else tree:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue  # ended meanwhile


def pretrain_command(layout: str | None) -> list[str]:
    """The command line, on one rank or with a layout of two."""
    overrides = [] if layout is None else LAYOUTS[layout]
    ranks = 1 if layout is None else 2
    return [*python_command("-m", ranks), "megatron_r1.cli", "pretrain", "--config", "pretrain.yaml", *overrides]


def finish(folder: Path, log: Path, layout: str | None) -> None:
    """Run the command to its end."""
    process = start_command(pretrain_command(layout), folder, log)
    if process.wait():
        raise CommandFailed(f"a run ended with code {process.returncode}: {last_line(log)}")
    end = time.monotonic() + 5
    while left := working_in(folder):
        if time.monotonic() > end:
            raise Disagreement(f"processes {left} outlive the run")
        time.sleep(0.1)


def cut_back(folder: Path, whole: Path, step: int) -> None:
    """Make the run what another one was after a step."""
    shutil.copytree(folder / whole, folder / RUN)
    shutil.rmtree(folder / RUN / "hf")
    for path in complete_checkpoints(folder / CHECKPOINTS):
        if step_of(path) > step:
            shutil.rmtree(path)


def print_samples(run_dir: Path, out: Path) -> None:
    """Write step -> checksum of what `show-samples` prints of it."""
    from megatron_r1.pipeline.commands import show_samples

    found = {}
    for record in read_metrics(run_dir / "metrics.jsonl"):
        printed = io.StringIO()
        with redirect_stdout(printed):
            show_samples(run_dir, record["step"])
        found[record["step"]] = hashlib.sha256(printed.getvalue().encode()).hexdigest()
    out.write_text(json.dumps(found))


@dataclass(frozen=True)
class Made:
    """What a run leaves."""

    files: dict[str, str]  #: name -> checksum, of what may not depend on kills
    names: set[str]  #: of all files but events, signs of life and checkpoints
    checkpoints: dict[int, dict[str, Any]]  #: step -> file -> size and checksum
    metrics: list[dict[str, float]]
    samples: dict[str, str]  #: step -> checksum of what `show-samples` prints


def look(folder: Path, log: Path) -> Made:
    """At the finished run in `folder / RUN`. Raises Disagreement for a file that should not be left."""
    run_dir = folder / RUN
    left = [str(path.relative_to(run_dir)) for path in run_dir.rglob(f"*{TEMPORARY}*")]
    if left:
        raise Disagreement(f"temporary files are left: {', '.join(left[:10])}")
    names = {path.relative_to(run_dir) for path in run_dir.rglob("*") if path.is_file()}
    names = {name for name in names if name.parts[0] not in (*NOT_COMPARED, "ranks.jsonl")}
    saved = {}
    for path in complete_checkpoints(folder / CHECKPOINTS):
        files = json.loads((path / MANIFEST).read_text())["files"]
        saved[step_of(path)] = files | {name: _without_id(path / name) for name in files if name.endswith(".metadata")}
    records = read_metrics(run_dir / "metrics.jsonl")
    metrics = [{name: value for name, value in record.items() if not name.startswith(TIMES)} for record in records]
    out = folder / "samples.json"
    command = [sys.executable, "-m", "benchmarks.pretrain_kills", "--samples", str(run_dir), str(out)]
    if start_command(command, folder, log).wait():
        raise CommandFailed(f"show-samples failed: {last_line(log)}")
    samples = json.loads(out.read_text())
    return Made(hashes(run_dir), set(map(str, names)), saved, metrics, samples)


def _without_id(path: Path) -> str:
    """Checksum of a file of torch's that names its save by a random number."""
    return hashlib.sha256(_RANDOM_ID.sub(b"", path.read_bytes())).hexdigest()


def compare(found: Made, whole: Made, changed: Made, at: int) -> list[str]:
    """What is not as it must be after the kills.

    Args:
        whole: the run that nobody disturbs.
        changed: the one that has another layout after step `at`.
    """
    problems = [f"{name} differs" for name in differing(changed.files, found.files)]
    problems += [f"{name} is in one run alone" for name in sorted(found.names ^ changed.names)]
    problems += differences(changed.metrics, found.metrics, 0.0)
    problems += [f"up to the change of layout, {text}" for text in differences(whole.metrics[:at], found.metrics[:at], 0.0)]
    numbers = [[{name: line[name] for name in ("step", "loss", "lr")} for line in made.metrics[at:]] for made in (whole, found)]
    problems += [f"in another layout, {text}" for text in differences(*numbers, CLOSE)]
    for step in sorted(changed.checkpoints.keys() | found.checkpoints.keys()):
        wanted = (whole if step <= at else changed).checkpoints.get(step, {})
        names = differing(wanted, found.checkpoints.get(step, {}))
        problems += [f"checkpoint {step}: {', '.join(names)}"] if names else []
    for name, other in (("undisturbed", whole), ("with the same layout", changed)):
        problems += [f"step {step} has other samples than the run {name}" for step in differing(other.samples, found.samples)]
    return problems


def benchmark(arguments: argparse.Namespace) -> None:
    """Make the three runs, compare."""
    if not arguments.dir.is_dir():
        raise ConfigError(f"--dir {arguments.dir}: there is no such folder")
    rng = random.Random(arguments.seed)
    layout = arguments.layout or rng.choice(list(LAYOUTS))
    log = arguments.dir.resolve() / "pretrain_kills.log"
    log.write_bytes(b"")
    machine = describe_machine("cpu")
    with tempfile.TemporaryDirectory(prefix="megatron_r1-kills-", dir=arguments.dir) as name:
        folder = Path(name).resolve()
        write_texts(folder)
        for source in SOURCES:
            command = ["-m", "megatron_r1.cli", "preprocess", "--input", f"{source}.jsonl", "--output-prefix", source]
            command += ["--tokenizer", "tokenizer", "--append-eod"]
            if start_command([sys.executable, *command], folder, log).wait():
                raise CommandFailed(f"the text cannot be made into tokens: {last_line(log)}")
        write_settings(folder / "pretrain.yaml")
        ends = phase_ends(folder / "pretrain.yaml")

        finish(folder, log, None)
        whole = look(folder, log)
        (folder / RUN).rename(folder / "undisturbed")
        seconds = sorted(record["seconds/step"] for record in read_metrics(folder / "undisturbed/metrics.jsonl"))
        print(f"undisturbed: {ends[-1]} steps, phases end at {ends}, {seconds[len(seconds) // 2]:.2f} s a step", flush=True)

        killed = Killed(folder, log, layout, seconds[len(seconds) // 2], rng)
        killed.run(choose_moments(arguments.kills, ends, rng), ends)
        assert killed.changed_at is not None
        found = look(folder, log)
        (folder / RUN).rename(folder / "killed")
        print(f"killed {len(killed.hits)} times; {layout} after step {killed.changed_at}", flush=True)

        cut_back(folder, Path("undisturbed"), killed.changed_at)
        finish(folder, log, layout)
        problems = compare(found, whole, look(folder, log), killed.changed_at)
        if arguments.keep:
            shutil.copytree(folder, arguments.keep, dirs_exist_ok=True)
    left_out, saved = found.metrics[-1]["updates/skipped"], len(found.checkpoints)
    told = f"{len(found.metrics)} steps, {left_out} of them left out as spikes, {saved} checkpoints and {len(found.files)} files"
    print(f"{told} compared: {len(problems)} differences", flush=True)
    if arguments.out is not None:
        results = {"layout": layout, "changed_at": killed.changed_at, "kills": killed.hits, "problems": problems}
        write_results(arguments.out, arguments, results, machine)
    missed = [kind for kind in ("phase", "save") if not any(hit["kind"] == kind and hit["hit"] for hit in killed.hits)]
    if problems:
        raise Disagreement(f"after {len(killed.hits)} kills: {'; '.join(problems[:20])}")
    if missed and arguments.kills > 1:
        raise CommandFailed(f"no kill came in a {' or '.join(missed)}: choose another --seed")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, required=True, help="where to work: a temporary folder and the log")
    parser.add_argument("--kills", type=positive, default=10, help="default: 10")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the layout")
    parser.add_argument("--layout", choices=list(LAYOUTS), help="of the two ranks; default: the seed chooses")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="copy the runs there")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="also write what was hit, with machine and versions")
    return parser.parse_args(argv)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--samples"]:
        print_samples(Path(sys.argv[2]), Path(sys.argv[3]))
        sys.exit(0)
    sys.exit(run(benchmark, parse_arguments()))
