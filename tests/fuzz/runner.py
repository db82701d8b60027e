"""Runs cases in forked children and judges how they end."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tests.fuzz.targets import TARGETS, Case
from tests.fuzz.world import World
from tests.patience import patient

SECONDS = 60.0  # of one case, on an idle machine: none needs more than one
MEMORY_BYTES = 4 << 30  # beyond what the parent holds
LONGEST_LINE = 2000  # of an error


def fuzz(
    count: int, seed: int, targets: Sequence[str] | None = None, only: int | None = None, lines: Path | None = None
) -> list[str]:
    """Run `count` cases, shared out over the targets. Returns one line for each finding; `lines` gets how each case ended."""
    _import_everything()
    names = list(targets or TARGETS)
    shares = {name: TARGETS[name][1] for name in names}
    order = [name for name in names for _ in range(max(1, round(count * shares[name] / sum(shares.values()))))]
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        world = World(Path(folder))
        findings, ends = [], Counter[str]()
        for number, name in enumerate(order):
            if only is not None and number != only:
                continue
            case_folder = Path(folder) / f"case{number}"
            case_folder.mkdir()
            # by the target's name and the number within it: other targets do not change what a case is
            rng = random.Random(f"{seed} {name} {number - order.index(name)}")
            case = TARGETS[name][0](world, rng, case_folder)
            finding, end, told = run_case(case, case_folder, shows=only is not None)
            if lines is not None:
                with lines.open("a") as output:
                    print(name, number, end, told, sep="\t", file=output)
            ends[f"{name}: {end}"] += 1
            if finding:
                findings.append(f"{name} {number} (--count {count} --seed {seed} --only {number}): {finding}")
            if only is None:
                shutil.rmtree(case_folder, ignore_errors=True)
            else:
                shutil.copytree(case_folder, Path("fuzz-case"), dirs_exist_ok=True, symlinks=True)
        for end, times in sorted(ends.items()):
            print(f"{end}: {times}", file=sys.stderr)
    return findings


def run_case(case: Case, folder: Path, shows: bool = False) -> tuple[str, str, str]:
    """(what is wrong or "", how it ended, the line of error or the end of the output)."""
    log, code, seconds = _run_child(case, folder)
    text = log.read_text(encoding="utf-8", errors="replace")
    if shows:
        print(case.arguments, dict(case.environment), text, sep="\n")
    lines = [line for line in text.splitlines() if line.startswith("megatron-r1: ")]
    told = lines[0] if lines else text.strip()[-300:]
    if code is None:
        return f"hang: {seconds:.0f} s; {told}", "hang", told
    if "Traceback (most recent call last)" in text:
        return f"traceback: {text.strip().splitlines()[-1][:300]}", "traceback", told
    if code not in case.codes:
        return f"exit code {code}; {told[:300]}", f"exit {code}", told
    if code == 2:
        if len(lines) != 1 or not text.rstrip().endswith(lines[0]):
            return f"{len(lines)} lines of error; {text.strip()[-300:]}", "lines", told
        if len(lines[0]) > LONGEST_LINE:
            return f"a line of {len(lines[0])} characters; {lines[0][:100]}", "long", told
        left = [str(path) for path in case.outputs if path.exists()]
        if left:
            return f"left {left} after an error; {told[:200]}", "left", told
    return "", f"exit {code}", told


def _run_child(case: Case, folder: Path) -> tuple[Path, int | None, float]:
    log = folder / "fuzz.log"
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        _become_command(case, folder, log)
    limit = patient(SECONDS)
    watched = os.pidfd_open(child)
    try:
        ready, _, _ = select.select([watched], [], [], limit)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # with whatever it started
        _, status = os.waitpid(child, 0)
    finally:
        os.close(watched)
    code = os.waitstatus_to_exitcode(status) if ready else None
    return log, code, time.monotonic() - started


def _become_command(case: Case, folder: Path, log: Path) -> None:
    """In the child: run the command as a process of its own would, and never return."""
    code = 99
    try:
        os.setsid()
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(folder)
        for name in [
            name for name in os.environ if name.startswith(("SLURM", "OMPI", "PMI")) or name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        ]:
            del os.environ[name]
        os.environ.update(case.environment)
        memory = _virtual_bytes() + MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        from megatron_r1 import cli

        code = cli.main([text.encode("utf-8", "surrogatepass").decode("utf-8", "surrogateescape") for text in case.arguments])
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    finally:
        if sys.exc_info()[0] is not None:
            traceback.print_exc()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(code)


def _virtual_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")


def _import_everything() -> None:
    """Before the forks, so that a case costs milliseconds: what the commands import when they run."""
    from megatron_r1.mcore import host

    host.activate("cpu")
    import torch._dynamo  # noqa: F401  (with the first optimizer, half a second)

    import megatron_r1.conversion.commands
    import megatron_r1.curation.curate
    import megatron_r1.mcore.policy
    import megatron_r1.pipeline.commands
    import megatron_r1.pipeline.evaluate
    import megatron_r1.pipeline.recipe.r1_zero
    import megatron_r1.pipeline.score
    import megatron_r1.pipeline.stages.grpo
    import megatron_r1.pipeline.stages.pretrain
    import megatron_r1.pipeline.stages.reward_model
    import megatron_r1.pipeline.stages.sft
    import megatron_r1.report.html
    import megatron_r1.report.status  # noqa: F401
