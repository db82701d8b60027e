"""Groups over gloo share the thread of the world's group."""

from __future__ import annotations

import subprocess
import sys

from tests.patience import patient

WORLD_OF_ONE = """
import os, datetime
import torch, torch.distributed as dist
from torch.distributed import ProcessGroupGloo, distributed_c10d
from megatron_r1.runtime.gloo import sharing_the_worlds_thread

def threads():
    return len(os.listdir("/proc/self/task"))

with sharing_the_worlds_thread():  # before there is a world
    assert distributed_c10d.ProcessGroupGloo is ProcessGroupGloo
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
before = threads()
own = dist.new_group([0])  # as torch makes it: with a thread that listens beside those that work
working = threads() - before - 1
before = threads()
with sharing_the_worlds_thread():
    groups = [dist.new_group([0], timeout=datetime.timedelta(seconds=77), backend="gloo") for _ in range(5)]
assert working > 0 and threads() - before == 5 * working, (before, working, threads())
assert distributed_c10d.ProcessGroupGloo is ProcessGroupGloo
for group in groups:
    total = torch.ones(3)
    dist.all_reduce(total, group=group)
    assert total.sum() == 3 and dist.get_backend(group) == "gloo"
    assert group._get_backend(torch.device("cpu")).options._timeout == datetime.timedelta(seconds=77)
before = threads()
own = dist.new_group([0])
assert threads() - before == working + 1  # outside of the block as ever
try:
    with sharing_the_worlds_thread():
        raise ValueError
except ValueError:
    assert distributed_c10d.ProcessGroupGloo is ProcessGroupGloo
dist.destroy_process_group(groups[0])
dist.all_reduce(total, group=groups[1])
dist.destroy_process_group()
dist.init_process_group("fake", store=dist.HashStore(), rank=0, world_size=4)
with sharing_the_worlds_thread():  # a world without gloo
    assert distributed_c10d.ProcessGroupGloo is ProcessGroupGloo
"""


def test_groups_take_no_threads_of_their_own():
    code = "import torch.testing._internal.distributed.fake_pg\n" + WORLD_OF_ONE
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False, timeout=patient(120)
    )
    assert result.returncode == 0, result.stderr
