"""The limit of open files: what a rank needs, and what is said where it cannot have it."""

from __future__ import annotations

import subprocess
import sys

from megatron_r1.mcore.layout import Layout, group_sizes
from megatron_r1.runtime import open_files
from megatron_r1.runtime.launch import child_environment

LIMITED = """
import resource, sys
soft, hard = int(sys.argv[1]), int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
"""


def under_limits(code: str, soft: int, hard: int) -> list[str]:
    command = [sys.executable, "-c", LIMITED + code, str(soft), str(hard)]
    return subprocess.run(command, env=child_environment(), capture_output=True, text=True, check=True).stdout.splitlines()


def test_512_ranks_need_more_than_a_shell_gives():
    sizes = group_sizes(Layout(tp=8, pp=16, ep=32, dp=4, world_size=512))
    connections = sum(size - 1 for size in sizes)
    assert connections == 1315  # what Megatron-Core makes: see tests/unit/mcore/test_parallel.py
    needed = open_files.needed_file_descriptors(512, sizes, engines=1)
    assert needed > 1024 and connections + 511 < needed < 3 * (connections + 511)
    assert open_files.needed_file_descriptors(512, sizes, engines=3) > needed
    assert needed <= open_files.most_file_descriptors(512) < 10 * 512 + 2048
    # data-parallel ranks alone have the most groups of the whole world
    widest = group_sizes(Layout(dp=512, world_size=512))
    assert open_files.most_file_descriptors(512) == open_files.needed_file_descriptors(512, widest)


def test_the_soft_limit_is_raised_as_far_as_the_hard_one_and_what_is_missing_is_said():
    code = """
from megatron_r1.errors import DeviceError
from megatron_r1.runtime.open_files import describe_open_files, raise_open_files, require_open_files
print(describe_open_files())
raise_open_files()
print(resource.getrlimit(resource.RLIMIT_NOFILE))
require_open_files(900)
try:
    require_open_files(3000)
except DeviceError as error:
    print(error)
"""
    before, raised, refusal = under_limits(code, 256, 1600)
    assert before == "up to 256, hard limit 1600 -> enough for 8 ranks in any layout"
    assert raised == "(1600, 1600)"
    assert "needs up to 3000 open files and connections, the hard limit is 1600: raise it" in refusal


def test_every_command_raises_it():
    code = """
from megatron_r1 import cli
assert cli.main(["config", "seed"]) == 0
print(resource.getrlimit(resource.RLIMIT_NOFILE))
"""
    assert under_limits(code, 256, 4096)[-1] == "(4096, 4096)"
