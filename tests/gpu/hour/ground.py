"""Where a part of the first hour runs, and how it reports: a line of JSON for every figure and every check, as it is known."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "tests/gpu/first_hour.py"


@dataclass
class Ground:
    """One part's share of the run. Its child processes are given the same."""

    part: int
    kind: str  #: "cpu" or "cuda"
    results: str  #: file of JSON lines
    folder: str  #: for what the part writes; exists
    is_part: bool = False  #: a part, or a process of one
    is_child: bool = False  #: a process that a part started: it is in the part's group and ends with it
    failed: list[str] = field(default_factory=list)  #: checks of this process that failed

    @property
    def is_small(self) -> bool:
        """On the CPU everything is as small as it can be: what counts there is that it runs."""
        return self.kind == "cpu"

    @property
    def device(self) -> Any:
        """The torch device."""
        import torch

        return torch.device(self.kind)

    def pick(self, full: Any, small: Any) -> Any:
        """The size for this ground."""
        return small if self.is_small else full

    def say(self, name: str, value: float | str | None, unit: str = "") -> None:
        """Report a figure."""
        shown = float(f"{value:.5g}") if isinstance(value, float) else value
        self._write({"part": self.part, "name": name, "value": shown, "unit": unit})

    def check(self, name: str, is_right: bool, found: float | str = "") -> None:
        """Report whether something holds. The part goes on; at its end it counts as failed."""
        if not is_right:
            self.failed.append(name)
        self._write({"part": self.part, "name": name, "ok": bool(is_right), "value": found, "unit": ""})

    def attempt(self, name: str, work: Callable[[], None]) -> None:
        """Run what may not exist on this machine: its error is reported, and the part goes on."""
        try:
            work()
        except Exception as error:  # noqa: BLE001 - what a kernel raises that does not take these sizes is not known
            self.say(name, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")

    def finish(self) -> None:
        """Wait for the device, so that a clock read afterwards counts its work."""
        if self.kind == "cuda":
            import torch

            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], object], times: int = 3) -> float:
        """The best of some runs, after one that is not counted."""
        work()
        best = float("inf")
        for _ in range(1 if self.is_small else times):
            self.finish()
            started = time.perf_counter()
            work()
            self.finish()
            best = min(best, time.perf_counter() - started)
        return best

    def peak(self, work: Callable[[], object]) -> int | None:
        """Bytes of the device that the work takes beyond what is there; None on the CPU, where nothing counts them."""
        import torch

        if self.kind != "cuda":
            work()
            return None
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        self.finish()
        return torch.cuda.max_memory_allocated() - before

    def say_peak(self, name: str, work: Callable[[], object]) -> None:
        """Report the peak of some work in GB."""
        peak = self.peak(work)
        self.say(name, None if peak is None else peak / 1e9, "GB")

    def start(self, target: str, **environment: str) -> Child:
        """Run `target`, a "module:function" that takes a `Ground`, in a process of its own."""
        return Child(replace(self, is_child=self.is_part, is_part=True, failed=[]), target, environment)

    def _write(self, line: Mapping[str, Any]) -> None:
        with open(self.results, "a", encoding="utf-8") as file:  # one write a line: several processes append
            file.write(json.dumps(line) + "\n")


class Child:
    """A process of a part. On the CPU it is forked, which imports nothing again; a process that may use CUDA starts fresh."""

    def __init__(self, ground: Ground, target: str, environment: Mapping[str, str]) -> None:
        self._leads = not ground.is_child
        self._forked = self._fresh = None
        if ground.kind == "cpu":
            self._forked = multiprocessing.get_context("fork").Process(target=call, args=(target, asdict(ground), environment))
            self._forked.start()
        else:
            command = [sys.executable, str(SCRIPT), "--child", target, "--ground", json.dumps(asdict(ground))]
            own = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
            self._fresh = subprocess.Popen(command, env=own | environment, start_new_session=self._leads)

    def wait(self, limit: float) -> int | None:
        """Its exit code; None if it ran beyond the limit in seconds and was killed, with the processes that it started."""
        if self._forked is not None:
            self._forked.join(limit)
            code = self._forked.exitcode
            if code is None:
                self._kill(self._forked.pid)
                self._forked.join()
            return code
        try:
            return self._fresh.wait(limit)
        except subprocess.TimeoutExpired:
            self._kill(self._fresh.pid)
            self._fresh.wait()
            return None

    def _kill(self, process: int) -> None:
        if self._leads:
            with suppress(ProcessLookupError):  # it has not become the leader of its group yet
                return os.killpg(process, signal.SIGKILL)
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def call(target: str, ground: Mapping[str, Any], environment: Mapping[str, str]) -> None:
    """What a child does. It ends with exit code 1 if a check failed."""
    own = Ground(**ground)
    if not own.is_child and os.getsid(0) != os.getpid():
        os.setsid()
    os.environ.update(environment)
    module, _, function = target.partition(":")
    getattr(importlib.import_module(module), function)(own)
    if own.failed:
        sys.exit(1)
