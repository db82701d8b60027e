"""A sandbox: runs untrusted programs, once per test, in processes that see nothing, reach nothing and leave nothing behind.

Layers, each of which would hold by itself against most of the attacks in tests/unit/rewards/sandbox/test_attacks.py:
  namespaces   bubblewrap: own users, processes, network (none), IPC, host name; nothing mounted but libraries, read-only
  seccomp      an allow-list of system calls (`seccomp.py`); a test cannot start a process
  limits       CPU and wall time, address space, output, files, threads, stack; /tmp is a tmpfs of fixed size
  supervision  process 1 inside (`runner.py`) ends each test; the kernel ends all when process 1, bwrap or the trainer ends
  secrecy      a test's input goes in as a sealed descriptor, its output comes back in another; expected outputs never go in

A sandbox serves the tests of ONE program, each in a process forked or executed afresh. As soon as a test has touched /tmp, the next
one gets a new sandbox. A program can take at most `memory_bytes` (its page tables with it, which are looked at from outside: no
limit of the kernel counts them without a cgroup, which most jobs may not make), `temporary_bytes` and three outputs of memory.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import socket
import struct
import subprocess
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from megatron_r1.errors import RewardError
from megatron_r1.rewards.sandbox import bubblewrap
from megatron_r1.rewards.sandbox.kernel import memory_of, read_output, sealed_file
from megatron_r1.rewards.sandbox.seccomp import build_filter, own_pid_bytes

Isolation = Literal["bubblewrap", "none_i_accept_untrusted_code_on_this_machine"]
NO_ISOLATION: Isolation = "none_i_accept_untrusted_code_on_this_machine"

START_SECONDS = 30.0  #: for the sandbox to come up on a busy machine
GRACE_SECONDS = 10.0  #: over the wall limit, until the sandbox itself is given up
WATCH_SECONDS = 0.05  #: between looks at the memory of a test
_WATCH_SLACK = 1 / 128  #: of the limit: page tables of memory that is in use
_CREDENTIALS = struct.Struct("3i")  #: process, user, group, as the kernel adds them to a message
_ENVIRONMENT = {
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTHONINTMAXSTRDIGITS": "0",
    "MALLOC_ARENA_MAX": "1",  # glibc reserves up to 128 MiB of address space, which is what is limited, for a thread's allocations
}
SOURCE = "{source}"  #: stands for the path of the source in a compiler's command
_HERE = Path(__file__).parent


class SandboxError(RewardError):
    """The sandbox could not start or stopped answering. The grader failed, not the program."""


@dataclass(frozen=True)
class SandboxLimits:
    """What one test may take."""

    cpu_seconds: float = 5.0
    wall_seconds: float = 15.0
    memory_bytes: int = 512 << 20  #: address space of the one process of a test
    output_bytes: int = 1 << 20  #: each of standard output, error, result, and any file in /tmp
    temporary_bytes: int = 16 << 20  #: /tmp
    stack_bytes: int = 64 << 20
    open_files: int = 64
    threads: int = 32
    recursion_depth: int = 50_000  #: of a Python function; a Python program that is run as a whole has its own, see `Program.start`


@dataclass(frozen=True)
class SandboxSettings:
    """How untrusted code is held on this machine."""

    isolation: Isolation = "bubblewrap"
    python: str = ""  #: interpreter for untrusted code; "": the trainer's own, or /usr/bin/python3 if that is out of reach
    packages: tuple[str, ...] = ()  #: folders of packages, e.g. .../site-packages/numpy, that programs may import


@dataclass(frozen=True)
class Program:
    """What a sandbox runs."""

    kind: Literal["function", "command", "check"]  #: call a Python function, execute a file, or run the tests' own code
    source: bytes  #: Python text, or an executable; read-only inside
    executable: bool = False  #: `source` is a compiled program
    prelude: str = ""  #: Python that runs before `source` (function, check): what the tests' platform has imported
    check_prelude: str = ""  #: check: what `source` needs, run before the candidate's names are set
    modules: Mapping[str, bytes] = field(default_factory=dict)  #: that it may import: path in the folder of packages -> source
    files: Mapping[str, str] = field(default_factory=dict)  #: path inside -> file of the machine that it sees, read-only
    data: Mapping[str, bytes] = field(default_factory=dict)  #: path inside -> content of a further read-only file
    before: str = ""  #: function: Python that runs in the test's own process, before `source`
    start: str = ""  #: command: Python that is run with the path of `source`, in place of it
    candidate_names: tuple[str, ...] = ()  #: check: under these names the candidate is called
    #: the command to run in place of the program, with `SOURCE` replaced; it sees the toolchain and may start processes
    compiler: tuple[str, ...] = ()
    collect: str = ""  #: file inside that becomes `Ending.result` if the command succeeds


@dataclass(frozen=True)
class Ending:
    """How one test ended, and what it wrote, each at most `output_bytes` long."""

    exit_code: int | None  #: None: ended by a signal
    signal: int | None
    ended_by: Literal["time", "files", "memory"] | None  #: the sandbox ended it: wall time, too many files, or page tables
    cpu_seconds: float
    wall_seconds: float
    peak_bytes: int  #: resident
    touched: bool  #: something changed in /tmp
    stdout: bytes = b""
    stderr: bytes = b""
    result: bytes = b""  #: function: the encoded value
    overflow: bool = False  #: one of the three came to its limit


class Sandbox:
    """Use as a context manager, one test at a time. Starts when the first test comes.

    Call it from a thread that outlives it: the sandbox dies with the thread that started it.
    """

    def __init__(self, program: Program, limits: SandboxLimits, settings: SandboxSettings):
        self._program, self._limits, self._settings = program, limits, settings
        self._process: subprocess.Popen | None = None
        self._control: socket.socket | None = None
        self._messages = -1  #: what bwrap and process 1 say on standard error
        self._folder: tempfile.TemporaryDirectory | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, stdin: bytes) -> Ending:
        """Run the program once.

        Args:
            stdin: standard input of a command; for a function its request, see `runner.call_function`.

        Raises:
            SandboxError: see there.
        """
        descriptor = sealed_file(stdin)
        try:
            return self.start(descriptor).finish()
        finally:
            os.close(descriptor)

    def start(self, stdin: int) -> RunningTest:
        """Start the program with a descriptor as its standard input. The caller closes the descriptor."""
        if self._process is None:
            self._start()
        outputs = [os.memfd_create(name, os.MFD_CLOEXEC) for name in ("stdout", "stderr", "result")]
        try:
            request = json.dumps({"wall_seconds": self._limits.wall_seconds}).encode()
            socket.send_fds(self._control, [request], [stdin, *outputs])
        except OSError as error:
            for descriptor in outputs:
                os.close(descriptor)
            raise self._failure("no longer answers") from error
        return RunningTest(self, outputs)

    def close(self) -> None:
        """End every process of the sandbox and wait until they are gone."""
        if self._control is not None:
            self._control.close()  # process 1 ends, the kernel ends its whole namespace, and then bwrap ends
        if self._process is not None:
            try:
                self._process.wait(GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                self._kill()
        if self._messages >= 0:
            os.close(self._messages)
        if self._folder is not None:
            self._folder.cleanup()
        self._process, self._control, self._messages, self._folder = None, None, -1, None

    def _kill(self) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _start(self) -> None:
        bubblewrap.require_host()
        self._messages = os.memfd_create("messages", os.MFD_CLOEXEC)
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)  # of the message that a test has started
        files = {
            "runner": (_HERE / "runner.py").read_bytes(),
            "values": (_HERE / "values.py").read_bytes(),
            "remote": (_HERE / "remote.py").read_bytes(),
            "source": self._program.source,
            "seccomp": build_filter(platform.machine(), supervisor=True),
        }
        files |= {"start": self._program.start.encode()} if self._program.start else {}
        parts = (*files.items(), *self._program.modules.items(), *self._program.data.items())
        descriptors = {name: sealed_file(content) for name, content in parts}
        try:
            command = self._command(descriptors) if self._settings.isolation == "bubblewrap" else self._bare_command(files)
            self._process = subprocess.Popen(
                command,
                stdin=theirs,
                stdout=self._messages,
                stderr=self._messages,
                env=_ENVIRONMENT,
                cwd="/",
                pass_fds=tuple(descriptors.values()),
                start_new_session=True,
                **({"user": bubblewrap.NOBODY, "group": bubblewrap.NOBODY, "extra_groups": []} if os.geteuid() == 0 else {}),
            )
        finally:
            theirs.close()
            for descriptor in descriptors.values():
                os.close(descriptor)
        self._control.settimeout(START_SECONDS)
        config = sealed_file(json.dumps(self._config()).encode())
        try:
            socket.send_fds(self._control, [b'{"config": true}'], [config])  # a descriptor: a message has a bound
            ready = self._control.recv(1 << 16)
        except OSError as error:
            raise self._failure("did not start") from error
        finally:
            os.close(config)
        if not ready:
            raise self._failure("did not start")

    def _command(self, descriptors: Mapping[str, int]) -> list[str]:
        python, prefix = bubblewrap.find_python(self._settings.python)
        data = {"/runner/main.py": descriptors["runner"]}
        data |= {f"/runner/sandbox_{name}.py": descriptors[name] for name in ("values", "remote")}
        data |= {path: descriptors[path] for path in self._program.data}
        data |= {"/runner/start.py": descriptors["start"]} if self._program.start else {}
        data |= {f"{bubblewrap.PACKAGES}/{path}": descriptors[path] for path in self._program.modules}
        executables = {}
        (executables if self._program.executable else data)[self._source] = descriptors["source"]
        outer = bubblewrap.bubblewrap_command(
            bubblewrap.find_bubblewrap(),
            python=python,
            prefix=prefix,
            packages=self._settings.packages,
            toolchain=bool(self._program.compiler),
            temporary_bytes=self._limits.temporary_bytes,
            data=data,
            executables=executables,
            files=self._program.files,
            seccomp=descriptors["seccomp"],
        )
        return [*outer, python, "-sS", "/runner/main.py"]

    def _bare_command(self, files: Mapping[str, bytes]) -> list[str]:
        """Without namespaces: limits and the filter of system calls only, in a temporary folder."""
        if self._settings.isolation != NO_ISOLATION:
            raise SandboxError(f"unknown isolation {self._settings.isolation!r}: bubblewrap or {NO_ISOLATION}")
        self._folder = tempfile.TemporaryDirectory(prefix="megatron-r1-")
        folder = Path(self._folder.name)
        folder.chmod(0o755)
        (folder / "tmp").mkdir()
        (folder / "tmp").chmod(0o777)
        written = {"main.py": files["runner"], "source": files["source"]}
        written |= {f"sandbox_{name}.py": files[name] for name in ("values", "remote")}
        written |= {f"packages/{path}": content for path, content in self._program.modules.items()}
        written |= {"start.py": files["start"]} if self._program.start else {}
        for name, content in written.items():
            (folder / name).parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
            (folder / name).chmod(0o755)
        return [bubblewrap.find_python(self._settings.python)[0], "-sS", str(folder / "main.py")]

    @property
    def _source(self) -> str:
        if self._folder is not None:
            return f"{self._folder.name}/source"
        return (
            "/program/main" if self._program.executable else "/program/main.cpp" if self._program.compiler else "/program/main.py"
        )

    @property
    def _start_file(self) -> tuple[str, ...]:
        """The path of `Program.start`, if there is one."""
        folder = self._folder.name if self._folder is not None else "/runner"
        return (f"{folder}/start.py",) if self._program.start else ()

    def _config(self) -> dict[str, Any]:
        program = self._program
        python = bubblewrap.find_python(self._settings.python)[0]
        command = (self._source,) if program.executable else (python, "-s", *self._start_file, self._source)
        if program.compiler:
            command = tuple(self._source if word == SOURCE else word for word in program.compiler)
        packages = [bubblewrap.PACKAGES] if self._settings.packages or program.modules else []
        if self._folder is not None:
            packages = [f"{self._folder.name}/packages", *sorted({str(Path(folder).parent) for folder in self._settings.packages})]
        return {
            "kind": program.kind,
            "source": self._source,
            "folder": f"{self._folder.name}/tmp" if self._folder is not None else bubblewrap.TEMPORARY,
            "command": command,
            "environment": {**_ENVIRONMENT, "PATH": "/usr/bin", "PYTHONPATH": ":".join(packages)},
            "packages": packages,
            "collect": program.collect,
            "prelude": program.prelude,
            "before": program.before,
            "recursion_depth": self._limits.recursion_depth,
            "check_prelude": program.check_prelude,
            "candidate_names": program.candidate_names,
            "filter": "" if program.compiler else build_filter(platform.machine(), supervisor=False).hex(),
            "own_pid": own_pid_bytes().hex(),
            "limits": asdict(self._limits),
        }

    def _failure(self, what: str) -> SandboxError:
        said = read_output(self._messages, 4096).decode(errors="replace").strip().splitlines()
        self.close()
        reason = said[-1] if said else "it said nothing"
        if "namespace" in reason or "uid map" in reason:
            reason += (
                " (bubblewrap needs user namespaces: see the sysctls kernel.unprivileged_userns_clone, user.max_user_namespaces"
            )
            reason += " and kernel.apparmor_restrict_unprivileged_userns, and the seccomp profile of a surrounding container)"
        return SandboxError(f"the sandbox {what}: {reason}")


@dataclass
class RunningTest:
    """A test under way."""

    _sandbox: Sandbox
    _outputs: list[int] = field(repr=False)
    _process: int = 0  #: as the machine counts; 0: not known yet
    _answer: dict[str, Any] | None = None  #: the ending; {}: the sandbox is gone

    def finish(self) -> Ending:
        """Wait for the end. If the test has touched /tmp, the sandbox is closed and the next test gets a new one."""
        sandbox = self._sandbox
        try:
            deadline = time.monotonic() + sandbox._limits.wall_seconds + GRACE_SECONDS
            while not self.watch(WATCH_SECONDS):
                if time.monotonic() > deadline:
                    sandbox._kill()
                    raise sandbox._failure("no longer answers")
            if not self._answer:
                raise sandbox._failure("ended")
            limit = sandbox._limits.output_bytes
            contents = [read_output(descriptor, limit) for descriptor in self._outputs]
        finally:
            for descriptor in self._outputs:
                os.close(descriptor)
        overflow = any(len(content) >= limit for content in contents)
        ending = Ending(**self._answer, **dict(zip(("stdout", "stderr", "result"), contents, strict=True)), overflow=overflow)
        if ending.touched:
            sandbox.close()
        return ending

    def watch(self, seconds: float) -> bool:
        """Wait so long for the end; whether it came. If it did not, the test is ended if its memory and page tables, together, are
        above the limit. Call it about every `WATCH_SECONDS`.
        """
        if self._answer is not None:
            return True
        sandbox = self._sandbox
        sandbox._control.settimeout(seconds)
        try:
            message, ancillary, _, _ = sandbox._control.recvmsg(1 << 16, socket.CMSG_LEN(_CREDENTIALS.size))
        except TimeoutError:
            limit = sandbox._limits.memory_bytes * (1 + _WATCH_SLACK)
            if self._process and not sandbox._program.compiler and memory_of(self._process) > limit:
                with suppress(OSError):  # the sandbox is gone, which the next call says
                    sandbox._control.send(b'{"end": "memory"}')
            return False
        except OSError:
            message = b""
        answer = json.loads(message or b"{}")
        if "started" in answer:
            self._process = _CREDENTIALS.unpack(ancillary[0][2])[0]
        else:
            self._answer = answer
        return self._answer is not None
