"""What the sandbox asks of the kernel from outside: anonymous files, and what a process holds."""

from __future__ import annotations

import fcntl
import os

_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL


def memory_of(process: int) -> int:
    """Bytes that a process holds, with its page tables; 0 if it is gone."""
    try:
        with open(f"/proc/{process}/status", encoding="ascii", errors="replace") as file:
            lines = [line.split() for line in file if line.startswith(("VmRSS:", "VmSwap:", "VmPTE:"))]
    except OSError:
        return 0
    return sum(int(words[1]) for words in lines) << 10


def sealed_file(content: bytes) -> int:
    """A descriptor of an anonymous file that nobody can change."""
    descriptor = os.memfd_create("data", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with os.fdopen(os.dup(descriptor), "wb") as file:
        file.write(content)
    os.lseek(descriptor, 0, os.SEEK_SET)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
    return descriptor


def read_output(descriptor: int, limit: int) -> bytes:
    """What a program wrote to an anonymous file, at most `limit` bytes."""
    return os.pread(descriptor, limit, 0)
