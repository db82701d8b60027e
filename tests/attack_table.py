"""Attacks on the sandbox as a table (tests/attacks/table.txt): kinds, each with its variations, as the bodies of Python functions.

A body that gets what it must not have returns or prints BREACH. Whatever else it does, three things must hold: it is not accepted,
nothing of it is left when its test has ended, and the program after it finds the sandbox as the first one did (`state`).

`python -m tests.attack_table --count 5000 --seed 1` runs that many programs made of three random attacks each, by hand.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product

from megatron_r1.rewards.code.cases import CallTest
from megatron_r1.rewards.code.run_test import TestRunner
from megatron_r1.rewards.code.verdicts import TestResult
from megatron_r1.rewards.sandbox.supervisor import Ending, Program, Sandbox, SandboxLimits, SandboxSettings
from tests.paths import ROOT
from tests.patience import patient

SECRET = "R1EXPECTED"  #: what a right program would return; it is never inside
LIMITS = SandboxLimits(
    cpu_seconds=1, wall_seconds=patient(30), memory_bytes=128 << 20, output_bytes=64 << 10, temporary_bytes=2 << 20, threads=16
)

#: what the program imports, once for all: process 1 has it
IMPORTS = """import ctypes, decimal, fcntl, gc, io, json, locale, mmap, os, random, re, resource, select, signal, socket, subprocess
import sys, threading, time, warnings
"""
TABLE = ROOT / "tests/attacks/table.txt"


@dataclass(frozen=True)
class Attack:
    """One program: the body of the function `attack`."""

    kind: str
    body: str
    sleeps: bool  #: only the clock ends it


@dataclass
class Finding:
    """What went wrong with one attack."""

    attack: Attack
    what: str


@dataclass
class Ran:
    """All attacks of a run."""

    verdicts: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)


class _Watched(Sandbox):
    """Remembers the last ending."""

    last: Ending | None = None

    def run(self, stdin: bytes) -> Ending:
        self.last = super().run(stdin)
        return self.last


def read_table() -> tuple[str, list[Attack]]:
    """(the helpers of all attacks, every attack that this machine can make), from the file."""
    _, common, *sections = re.split(r"^=== ", TABLE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    attacks = []
    for section in sections:
        title, _, rest = section.partition("\n")
        kind, _, flags = title.partition(": ")
        if "x86" in flags and platform.machine() != "x86_64":
            continue
        body, *lists = re.split(r"^--- [01]\n", rest.rstrip("\n"), flags=re.MULTILINE)
        places = [[part.rstrip("\n") for part in re.split(r"^---\n", parts, flags=re.MULTILINE)] for parts in lists]
        for parts in product(*places):
            text = body.rstrip("\n")
            for index, part in enumerate(parts):
                text = text.replace(f"{{{index}}}", part)
            attacks.append(Attack(kind, text, "sleeps" in flags))
    return common.partition("\n")[2], attacks


def combined(count: int, seed: int) -> Iterator[Attack]:
    """Programs of three random attacks each, of which the last may sleep."""
    rng, attacks = random.Random(seed), read_table()[1]
    for _ in range(count):
        chosen = rng.sample([attack for attack in attacks if not attack.sleeps], 2) + [rng.choice(attacks)]
        parts = []
        for index, attack in enumerate(chosen):
            parts.append(f"def part{index}():\n    {indented(attack.body)}")
            parts.append(f"try: part{index}()\nexcept Exception: pass")
        yield Attack(" + ".join(attack.kind for attack in chosen), "\n".join(parts), chosen[-1].sleeps)


def indented(body: str) -> str:
    return body.replace("\n", "\n    ")


def run_attacks(attacks: Sequence[Attack]) -> Ran:
    """Run them in one sandbox after the other, and the program that looks for what is left of each after it."""
    ran, common = Ran(), read_table()[0]
    for sleeps, limits in ((False, LIMITS), (True, replace(LIMITS, wall_seconds=0.3))):
        program = Program("function", common.encode(), prelude=IMPORTS)
        with _Watched(program, limits, SandboxSettings()) as sandbox:
            runner = TestRunner(sandbox, "python", limits, SandboxSettings(), None, None)
            first = [] if sleeps else _state(sandbox)
            for attack in [attack for attack in attacks if attack.sleeps is sleeps]:
                source = f"def attack():\n    {indented(attack.body)}"
                (result,) = runner.run([CallTest("attack()", SECRET, setup=source)], time.monotonic() + patient(600))
                ran.verdicts.append(result.verdict)
                ran.findings += [Finding(attack, what) for what in _wrongs(result, sandbox.last)]
                if not sleeps and (state := _state(sandbox)) != first:
                    different = [f"{a} -> {b}"[:300] for a, b in zip(first, state, strict=False) if a != b]
                    ran.findings.append(Finding(attack, f"left behind: {different}"[:2000]))
    return ran


def _wrongs(result: TestResult, ending: Ending | None) -> Iterator[str]:
    if result.verdict not in ("wrong", "runtime_error", "time_limit", "memory_limit", "output_limit"):
        yield f"verdict {result.verdict}: {result.reason}"
    for text in (ending.stdout, ending.stderr, ending.result) if ending else ():
        at = text.find(b"BREACH")
        if at >= 0:
            yield text[at : at + 200].decode(errors="replace")
            return


def _state(sandbox: Sandbox) -> list[object]:
    request = {"expression": "json.dumps(state())", "setup": "", "arguments": None, "steps": None}
    ending = sandbox.run(json.dumps(request).encode())
    if ending.exit_code != 0 or not ending.result:
        return [f"no state: {ending}"]
    return json.loads(json.loads(ending.result))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    started = time.monotonic()
    ran = run_attacks(list(combined(arguments.count, arguments.seed)))
    for finding in ran.findings:
        print(f"{finding.attack.kind}: {finding.what}\n{finding.attack.body}\n")
    counts = ", ".join(f"{verdict} {ran.verdicts.count(verdict)}" for verdict in sorted(set(ran.verdicts)))
    print(f"{len(ran.verdicts)} attacks in {time.monotonic() - started:.0f} s: {counts}; {len(ran.findings)} findings")
    raise SystemExit(bool(ran.findings))


if __name__ == "__main__":
    main()
