"""Finds out whether this machine can contain untrusted code, by running some."""

from __future__ import annotations

import ast
from dataclasses import dataclass, field

from megatron_r1.errors import RewardError
from megatron_r1.rewards.sandbox.bubblewrap import find_compiler, find_python
from megatron_r1.rewards.sandbox.supervisor import NO_ISOLATION, Program, Sandbox, SandboxLimits, SandboxSettings

_PROGRAM = b"""
import os, socket
def works(action, *arguments):
    try:
        action(*arguments)
        return True
    except OSError:
        return False
print({
    "no network": not works(socket.socket),
    "no new processes": not works(os.fork),
    "no /proc of others": not works(os.stat, "/proc/1/stat") and os.getppid() == 1,
    "read-only system": not works(open, "/usr/lib/x", "w") and not works(open, "/x", "w"),
    "an unprivileged user": os.getuid() != 0 and not works(os.setuid, 0),
    "a /tmp of its own": os.listdir("/tmp") == [],
})
"""


@dataclass(frozen=True)
class SandboxProbe:
    """What was found."""

    available: bool  #: untrusted Python is run, in full isolation
    reason: str  #: why not, and what to install or set; "" if available
    layers: dict[str, bool] = field(default_factory=dict)  #: what a program inside found to hold
    python: str = ""  #: interpreter for untrusted code
    compiler: str = ""  #: g++, or "" if C++ programs cannot be compiled


def probe_sandbox(settings: SandboxSettings) -> SandboxProbe:
    """Run a small program in a sandbox; it reports what it can reach. Never raises; takes a tenth of a second.

    If the settings switch isolation off, the layers are still those that were found, and `available` is False.
    """
    try:
        python = find_python(settings.python)[0]
        with Sandbox(Program("command", _PROGRAM), SandboxLimits(), settings) as sandbox:
            ending = sandbox.run(b"")
        layers = ast.literal_eval(ending.stdout.decode()) if ending.exit_code == 0 else {}
    except (RewardError, OSError, ValueError, SyntaxError) as error:
        return SandboxProbe(False, str(error))
    try:
        compiler = find_compiler()
    except RewardError:
        compiler = ""
    missing = [name for name, holds in layers.items() if not holds]
    if not layers:
        reason = f"a program in the sandbox failed: {ending.stderr[-200:].decode(errors='replace')}"
    elif settings.isolation == NO_ISOLATION:
        reason = f"reward.code.isolation is {NO_ISOLATION}"
    else:
        reason = f"the sandbox does not hold: {', '.join(missing)}" if missing else ""
    return SandboxProbe(not reason, reason, layers, python, compiler)


def describe_sandbox() -> list[tuple[str, str]]:
    """The probe's findings for a person: (what, what was found, and what to do if it is missing)."""
    probe = probe_sandbox(SandboxSettings())
    if probe.available:
        sandbox = f"bubblewrap and seccomp hold ({', '.join(probe.layers)}) -> programs run under {probe.python}"
    else:
        sandbox = f"not usable -> the code reward refuses to start: {probe.reason}"
    try:
        compiler = f"{find_compiler()} -> C++ programs are compiled"
    except RewardError as error:
        compiler = f"not installed -> a response in C++ has the outcome error: {error}"
    return [("Code sandbox", sandbox), ("C++ compiler", compiler)]


def require_sandbox(settings: SandboxSettings) -> None:
    """Stop a run at its start, not at its first program, if code cannot be contained as the settings ask.

    Raises:
        RewardError: why not, in one line.
    """
    probe = probe_sandbox(settings)
    if not (probe.layers if settings.isolation == NO_ISOLATION else probe.available):
        raise RewardError(f"untrusted code is not run here: {probe.reason}")
