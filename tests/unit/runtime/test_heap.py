"""What a process keeps of freed memory. In a process of its own: the setting is for a whole process."""

from __future__ import annotations

import resource
import subprocess
import sys

PROGRAM = """
import ctypes, resource, sys
from megatron_r1.runtime.heap import keep_freed_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory()
malloc, free = ctypes.CDLL(None).malloc, ctypes.CDLL(None).free
malloc.restype, malloc.argtypes, free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]

def step():
    held = [malloc(8 << 20) for _ in range(16)]
    for block in held:
        ctypes.memset(block, 1, 8 << 20)
    for block in reversed(held):
        free(block)

step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(way: str) -> int:
    """Pages that the second of two equal steps, of 16 blocks of 8 MiB, has to fetch."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, way], capture_output=True, text=True, check=True)
    return int(done.stdout)


def test_a_step_finds_the_memory_of_the_one_before() -> None:
    pages = (16 * 8 << 20) // resource.getpagesize()
    assert faults("keep") < pages / 100 < pages / 2 < faults("as it is")
