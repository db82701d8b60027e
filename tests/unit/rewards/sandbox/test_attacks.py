"""Hostile programs are contained: the right verdict, nothing read, nothing written, nothing left, the host as before."""

from __future__ import annotations

import ctypes
import os
import platform
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_r1.rewards.code.cpp_compile import compile_cpp
from megatron_r1.rewards.code.scorer import CodeScorer
from megatron_r1.rewards.code.verdicts import VERDICTS, TestResult, failure_of
from megatron_r1.rewards.sandbox.probe import probe_sandbox
from megatron_r1.rewards.sandbox.supervisor import Program, Sandbox, SandboxLimits, SandboxSettings
from tests.attack_programs import read_programs
from tests.patience import patient, slowness, wait_until

PROBE = probe_sandbox(SandboxSettings())
pytestmark = [pytest.mark.alone, pytest.mark.skipif(not PROBE.available, reason=PROBE.reason)]

LIMITS = SandboxLimits(
    cpu_seconds=4, wall_seconds=patient(40), memory_bytes=256 << 20, output_bytes=64 << 10, temporary_bytes=4 << 20
)
SHORT_CPU, SHORT_WALL = replace(LIMITS, cpu_seconds=1), replace(LIMITS, wall_seconds=1)
COMPILE = SandboxLimits(
    cpu_seconds=2, wall_seconds=patient(60), memory_bytes=512 << 20, output_bytes=16 << 20, temporary_bytes=32 << 20, threads=16
)
SLEEPING = {"sleeping", "stopping itself"}  #: no CPU time ends these
# fmt: off
X86_NUMBERS = {"fork by system call", "ptrace", "kernel interfaces", "namespaces and mounts", "shared memory", "becoming root",
               "pipes with names and watches", "killing everyone"}  #: these make system calls by x86_64's numbers
# fmt: on
ON_X86 = platform.machine() == "x86_64"
MARKER = "r1-attack"
SLACK_BYTES = 1 << 30  #: the kernel's own, and what others hold in ways that no process shows
PR_SET_CHILD_SUBREAPER = 36


PYTHON, CPP, CHEATS = (read_programs(name) for name in ("python.txt", "cpp.txt", "cheats.txt"))
COMMON, REMEMBERING = PYTHON.pop("common")[1], CHEATS.pop("remembering")[1]
HONEST = "def f(x): return [f'R1EXPECTED-{x}'] if x == 2 else f'R1EXPECTED-{x}'"
TESTS = [
    "assert f(1) == 'R1EXPECTED-1'",
    "assert f(2) == ['R1EXPECTED-2']",
    "assert f(3)[:11] == 'R1EXPECTED-' and len(f(3)) == 12",
]


def test_there_are_attacks():
    assert len(PYTHON) > 50 and len(CPP) > 15 and len(CHEATS) > 20
    assert all(verdicts <= set(VERDICTS) - {"accepted"} and verdicts for verdicts, _ in (*PYTHON.values(), *CPP.values()))


def descendants() -> set[int]:
    """Every process that this one started, directly or not: orphans come back to it, see `host`."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, ProcessLookupError):
                continue
    found, row = set(), {os.getpid()}
    while row:
        row = {child for child, parent in parents.items() if parent in row}
        found |= row
    return found


def unowned_memory() -> int:
    """Bytes in use that are no pages of a running program, as what an attack leaves behind would be. Other programs come and go."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    used = sum(sign * int(fields[name].split()[0]) for name, sign in (("MemTotal", 1), ("MemAvailable", -1)))
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            lines = status.read_text(errors="replace").splitlines()
        except (OSError, ProcessLookupError):
            continue  # it ended meanwhile
        used -= sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon:", "RssShmem:")))
    return used << 10


def marked_files() -> list[str]:
    return [
        str(path) for folder in ("/tmp", "/var/tmp", "/dev/shm", "/", "/usr/lib", ".") for path in Path(folder).glob(f"*{MARKER}*")
    ]


@pytest.fixture(scope="module", autouse=True)
def host(tmp_path_factory) -> Iterator[Path]:
    """The file that every attack knows by name; and the host compared before and after all of them."""
    os.environ["R1_ATTACK_SECRET"] = "secret"
    prctl = ctypes.CDLL(None).prctl
    prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    canary = tmp_path_factory.mktemp("host") / "canary"
    canary.write_text("alive")
    canary.chmod(0o666)
    folder = [str(path) for path in canary.parent.iterdir()]
    processes, mounts, name = descendants(), Path("/proc/self/mounts").read_text(), socket.gethostname()
    descriptors, unowned = len(os.listdir("/proc/self/fd")), unowned_memory()
    yield canary
    prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
    del os.environ["R1_ATTACK_SECRET"]
    assert descendants() <= processes
    assert canary.read_text() == "alive" and [str(path) for path in canary.parent.iterdir()] == folder
    assert marked_files() == []
    assert (Path("/proc/self/mounts").read_text(), socket.gethostname()) == (mounts, name)
    assert len(os.listdir("/proc/self/fd")) <= descriptors
    wait_until(lambda: unowned_memory() < unowned + SLACK_BYTES, 20, "return of the memory", pause=0.2)


@pytest.fixture(autouse=True)
def nothing_survives() -> Iterator[None]:
    slowness()  # a measurement is a process of its own: have it now
    before = descendants()
    yield
    assert descendants() <= before


def run(program: Program, canary: Path, limits: SandboxLimits) -> tuple[TestResult, bytes]:
    with Sandbox(program, limits, SandboxSettings()) as sandbox:
        ending = sandbox.run(f"{canary}\n".encode())
    return failure_of(ending, limits) or TestResult("wrong"), ending.stdout + ending.stderr


@pytest.mark.parametrize("name", PYTHON)
def test_python_attack(name, host):
    if name in X86_NUMBERS and not ON_X86:
        pytest.skip("the numbers of its system calls are those of x86_64")
    verdicts, source = PYTHON[name]
    limits = SHORT_WALL if name in SLEEPING else SHORT_CPU if "time_limit" in verdicts or verdicts == {"output_limit"} else LIMITS
    result, output = run(Program("command", f"{COMMON}\n{source}\nprint('contained')\n".encode()), host, limits)
    assert b"BREACH" not in output
    assert result.verdict in verdicts, (result, output[-500:])
    assert verdicts != {"wrong"} or b"contained" in output, output[-500:]
    assert result.reason.isprintable()


@pytest.mark.parametrize("name", CPP)
def test_cpp_attack(name, host):
    if "x86_64" in name and not ON_X86:
        pytest.skip("it is written in the machine code of x86_64")
    verdicts, source = CPP[name]
    compiled = compile_cpp(source, SandboxSettings(), COMPILE)
    if isinstance(compiled, TestResult):
        result, output = compiled, b""
    else:
        result, output = run(Program("command", compiled, executable=True), host, LIMITS)
    assert b"BREACH" not in output
    assert result.verdict in verdicts, (result, output[-500:])
    assert verdicts != {"wrong"} or b"contained" in output, output[-500:]
    assert "root:" not in result.reason


@pytest.fixture(scope="module")
def scorer() -> CodeScorer:
    return CodeScorer(cpu_seconds=2, wall_seconds=patient(60), memory_mb=256, program_seconds=patient(600))


@pytest.mark.parametrize("name", CHEATS)
def test_cheat(name, scorer):
    verdict = scorer.score(f"```python\n{CHEATS[name][1]}\n```", TESTS)
    assert (verdict.outcome, verdict.score) == ("wrong", 0)
    assert "accepted" not in verdict.parts["counts"], verdict
    assert "R1EXPECTED" not in verdict.detail and verdict.detail.isprintable()


def test_the_same_tests_accept_an_honest_program(scorer):
    assert scorer.score(f"```python\n{HONEST}\n```", TESTS).parts["tests"] == ["accepted"] * 3


def test_a_test_knows_nothing_of_the_one_before(scorer):
    tests = [f"assert f({x}) == (0, False, False, [], None)" for x in (1, 2, 3, 4)]
    assert scorer.score(f"```python\n{REMEMBERING}\n```", tests).parts["tests"] == ["accepted"] * 4


def test_what_a_killed_trainer_leaves_behind_dies_with_it():
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            sandbox = Sandbox(
                Program("command", b"import time; time.sleep(600)"), SandboxLimits(wall_seconds=600), SandboxSettings()
            )
            sandbox.start(os.open("/dev/null", os.O_RDONLY))
            os.write(write, b"started")
            time.sleep(600)
        finally:
            os._exit(1)
    os.close(write)
    assert os.read(read, 7) == b"started"
    os.close(read)
    left = descendants()
    assert len(left) >= 3  # the child, bwrap, process 1 (and the test)
    os.kill(child, 9)
    os.waitpid(child, 0)

    def all_gone() -> bool:
        try:
            os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            pass
        return not descendants() & left

    wait_until(all_gone, 20, "end of what was left behind", pause=0.05)
