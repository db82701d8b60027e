"""The sandbox's parts one by one: the filter of system calls, refusals, limits, and what is said where it cannot run."""

from __future__ import annotations

import errno
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from megatron_r1.errors import RewardError
from megatron_r1.rewards.code.scorer import CodeScorer
from megatron_r1.rewards.sandbox import bubblewrap as sandbox_host
from megatron_r1.rewards.sandbox.probe import probe_sandbox
from megatron_r1.rewards.sandbox.seccomp import build_filter, own_pid_bytes
from megatron_r1.rewards.sandbox.supervisor import NO_ISOLATION, Program, Sandbox, SandboxError, SandboxLimits, SandboxSettings
from tests.paths import ROOT

X86, ARM = 0xC000003E, 0xC00000B7
ALLOW, KILL, DONE, EPERM, ENOSYS = 0x7FFF0000, 0x80000000, 0x50000, 0x50000 | errno.EPERM, 0x50000 | errno.ENOSYS
ECHO = Program("command", b"import sys\nsys.stdout.write(sys.stdin.read()[::-1])")
PROBE = probe_sandbox(SandboxSettings())
needs_sandbox = pytest.mark.skipif(not PROBE.available, reason=PROBE.reason)


def verdict_of_kernel(code: bytes, arch: int, number: int, *arguments: int) -> int:
    """Interpret a filter as the kernel does."""
    data = struct.pack("=IIQ6Q", number, arch, 0, *arguments, *[0] * (6 - len(arguments)))
    program = list(struct.iter_unpack("=HBBI", code))
    at, accumulator = 0, 0
    while True:
        operation, if_true, if_false, value = program[at]
        at += 1
        if operation == 0x06:
            return value
        if operation == 0x20:
            (accumulator,) = struct.unpack_from("=I", data, value)
        else:
            holds = {0x15: accumulator == value, 0x35: accumulator >= value, 0x45: bool(accumulator & value)}[operation]
            at += if_true if holds else if_false


@pytest.mark.parametrize(
    ("machine", "arch", "calls"),
    [
        (
            "x86_64",
            X86,
            {
                "read": 0,
                "clone": 56,
                "fork": 57,
                "socket": 41,
                "ptrace": 101,
                "ioctl": 16,
                "prctl": 157,
                "prlimit64": 302,
                "mmap": 9,
                "close_range": 436,
                "kill": 62,
                "tgkill": 234,
                "fsync": 74,
                "fdatasync": 75,
                "msync": 26,
                "utimensat": 280,
            },
        ),
        (
            "aarch64",
            ARM,
            {
                "read": 63,
                "clone": 220,
                "socket": 198,
                "ptrace": 117,
                "ioctl": 29,
                "prctl": 167,
                "prlimit64": 261,
                "mmap": 222,
                "close_range": 436,
                "kill": 129,
                "tgkill": 131,
                "fsync": 82,
                "fdatasync": 83,
                "msync": 227,
                "utimensat": 88,
            },
        ),
    ],
)
def test_filter(machine, arch, calls):
    test, supervisor = build_filter(machine, supervisor=False), build_filter(machine, supervisor=True)

    def answers(name, *arguments):
        return tuple(verdict_of_kernel(code, arch, calls[name], *arguments) for code in (test, supervisor))

    assert answers("read") == (ALLOW, ALLOW)
    assert answers("socket") == answers("ptrace") == (ENOSYS, ENOSYS)
    assert answers("clone", 0x10000 | 0x400 | 0x100) == (ALLOW, ALLOW)  # a thread
    assert answers("clone", 0x10000 | 0x100) == (EPERM, ALLOW)  # a thread with descriptors of its own
    assert answers("clone", 17) == (EPERM, ALLOW)  # a process
    assert answers("clone", 0x10000000 | 0x10000) == answers("clone", 0x20000 | 17) == (EPERM, EPERM)  # namespaces
    assert answers("ioctl", 0, 0x5412) == (EPERM, EPERM) and answers("ioctl", 0, 0x5401) == (ALLOW, ALLOW)
    assert answers("prctl", 22) == (EPERM, ALLOW)
    assert answers("prlimit64", 1) == (EPERM, EPERM) and answers("prlimit64", 0) == (ALLOW, ALLOW)
    assert verdict_of_kernel(test, 0x40000003, calls["read"]) == KILL  # the 32-bit table
    assert verdict_of_kernel(test, arch, 0x40000000) == KILL  # x32
    for flags, answer in ((0x22, ALLOW), (0x02, ALLOW), (0x01, ALLOW), (0x21, EPERM), (0x23, EPERM), (0x8021, EPERM)):
        assert answers("mmap", 0, 4096, 3, flags) == (answer, answer)  # shared and anonymous at once, or not
    assert [answers("close_range", 3, 9, flags)[0] for flags in (0, 4, 2, 6)] == [ALLOW, ALLOW, EPERM, EPERM]
    own = int.from_bytes(own_pid_bytes(), sys.byteorder)
    for call in ("kill", "tgkill"):
        assert answers(call, own) == (ALLOW, ALLOW) and answers(call, 1) == (EPERM, ALLOW)
        assert [answers(call, pid & 0xFFFFFFFFFFFFFFFF)[0] for pid in (0, -1, -own)] == [EPERM] * 3
    assert {answers(call) for call in ("fsync", "fdatasync", "msync")} == {(DONE, DONE)} and answers("utimensat") == (
        ENOSYS,
        ENOSYS,
    )
    assert test.count(own_pid_bytes()) == 2 and supervisor.count(own_pid_bytes()) == 0
    if "fork" in calls:
        assert answers("fork") == (ENOSYS, ALLOW)
    later = [number for number in range(445, 1000) if verdict_of_kernel(supervisor, arch, number) != ENOSYS]
    assert later == []


def test_a_filter_fits_the_kernels_bound():
    assert all(len(build_filter(machine, True)) // 8 < 4096 for machine in ("x86_64", "aarch64"))


@pytest.mark.parametrize(
    ("where", "name", "value", "said"),
    [
        (shutil, "which", lambda *_, **__: None, "apt-get install bubblewrap"),
        (sandbox_host.platform, "release", lambda: "5.10.0-8-amd64", "needs Linux 5.14 or newer"),
        (sandbox_host.platform, "machine", lambda: "riscv64", "no seccomp filter for riscv64"),
        (sandbox_host, "find_bubblewrap", lambda: "/bin/false", "the sandbox did not start"),
    ],
)
def test_without_isolation_nothing_runs(monkeypatch, where, name, value, said):
    monkeypatch.setattr(where, name, value)
    with pytest.raises(RewardError, match=said) as caught:
        CodeScorer()
    assert "\n" not in str(caught.value)
    with Sandbox(ECHO, SandboxLimits(), SandboxSettings()) as sandbox, pytest.raises(RewardError, match=said):
        sandbox.run(b"")
    probe = probe_sandbox(SandboxSettings())
    assert not probe.available and said in probe.reason


def test_an_unknown_isolation_is_refused():
    with Sandbox(ECHO, SandboxLimits(), SandboxSettings("none")) as sandbox, pytest.raises(SandboxError, match="none_i_accept"):
        sandbox.run(b"")


def test_an_interpreter_out_of_reach_is_named():
    with pytest.raises(RewardError, match=r"reward\.code\.python"):
        sandbox_host.find_python("/no/such/python")


@pytest.mark.skipif(sys.platform != "linux", reason="Linux only")
def test_with_isolation_given_up_in_so_many_words_limits_and_filter_still_hold():
    settings = SandboxSettings(NO_ISOLATION)
    source = b"import os, socket\nfor action in (os.fork, socket.socket):\n    try: action()\n    except OSError: print('refused')"
    with Sandbox(Program("command", source), SandboxLimits(), settings) as sandbox:
        assert sandbox.run(b"").stdout == b"refused\nrefused\n"
    assert not probe_sandbox(settings).available


@needs_sandbox
def test_tests_share_a_sandbox_until_one_touches_tmp():
    source = b"import os\nif input() == 'write': open('/tmp/x', 'w').close()\nprint(os.getpid(), os.listdir('/tmp'))"
    with Sandbox(Program("command", source), SandboxLimits(), SandboxSettings()) as sandbox:
        endings = [sandbox.run(text) for text in (b"read", b"write", b"read")]
    assert [ending.touched for ending in endings] == [False, True, False]
    pids = [int(ending.stdout.split()[0]) for ending in endings]
    assert pids[1] > pids[0] and pids[2] == pids[0]  # the third is the first of a new sandbox
    assert endings[2].stdout.endswith(b"[]\n")


@needs_sandbox
def test_packages_that_the_settings_name_can_be_imported():
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "r1_package"
        package.mkdir()
        (package / "__init__.py").write_text("value = 5")
        Path(folder).chmod(0o755)
        settings = SandboxSettings(packages=(str(package),))
        with Sandbox(
            Program("command", b"import r1_package as p; print(p.value, p.__file__)"), SandboxLimits(), settings
        ) as sandbox:
            assert sandbox.run(b"").stdout == b"5 /packages/r1_package/__init__.py\n"


@needs_sandbox
def test_outputs_and_exit_codes_come_back():
    source = b"import sys\nsys.stderr.write('bad')\nsys.stdout.write(sys.stdin.read()[::-1])\nsys.exit(7)"
    with Sandbox(Program("command", source), SandboxLimits(), SandboxSettings()) as sandbox:
        ending = sandbox.run("aß\n".encode())
    assert (ending.exit_code, ending.stdout.decode(), ending.stderr, ending.overflow) == (7, "\nßa", b"bad", False)


@needs_sandbox
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_an_unprivileged_trainer_has_the_same_sandbox():
    program = "from megatron_r1.rewards.sandbox.probe import *; p = probe_sandbox(SandboxSettings()); print(p.available, p.layers)"
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT / "megatron_r1/rewards", f"{folder}/megatron_r1/rewards", ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("__init__.py", "errors.py"):
            shutil.copy(ROOT / "megatron_r1" / name, f"{folder}/megatron_r1/{name}")
        for path in (Path(folder), *Path(folder).rglob("*")):
            path.chmod(0o755)
        found = subprocess.run(
            [PROBE.python, "-B", "-c", program], cwd=folder, user=1234, group=1234, extra_groups=[], capture_output=True, text=True,
            env={"PYTHONPATH": folder, "PATH": "/usr/bin"}, check=False,
        )  # fmt: skip
    assert found.stdout == f"True {PROBE.layers}\n", found.stderr


SPARSE = b"""
import ctypes
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
for number in range(%d):
    ctypes.memset(libc.mmap(0x100000000000 + (number << 30), 4096, 3, 0x22, -1, 0), 1, 1)
print("mapped", end="")
"""


@needs_sandbox
@pytest.mark.parametrize(("pages", "ended_by"), [(50_000, "memory"), (1000, None)])
def test_page_tables_count_as_memory(pages, ended_by):
    """A page in every gibibyte takes two pages of tables, which no limit of the kernel counts."""
    limits = SandboxLimits(memory_bytes=256 << 20)
    with Sandbox(Program("command", SPARSE % pages), limits, SandboxSettings()) as sandbox:
        ending = sandbox.run(b"")
        assert ending.ended_by == ended_by and (ending.stdout == b"mapped") == (ended_by is None)
        assert sandbox.run(b"").ended_by == ended_by  # an end that comes too late ends no other test


@needs_sandbox
def test_a_message_that_came_too_late_means_nothing():
    with Sandbox(ECHO, SandboxLimits(), SandboxSettings()) as sandbox:
        for text in (b"abc", b"def"):
            assert sandbox.run(text).stdout == text[::-1]
            sandbox._control.send(b'{"end": "memory"}')
        assert sandbox.run(b"xyz").stdout == b"zyx"
