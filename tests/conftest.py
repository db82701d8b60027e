"""What every test shares: the import path of children, one thread, Ctrl-C as in a terminal, and no GPU tests without a GPU."""

from __future__ import annotations

import os
import signal

import pytest
import torch

from megatron_r1.runtime import distributed
from tests.paths import ROOT

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a shell without job control starts `make test &` like this
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect `gpu` tests on a machine without CUDA, so that the count of tests is the count of tests that can run."""
    if torch.cuda.is_available():
        return
    without_gpu = [item for item in items if item.get_closest_marker("gpu") is None]
    if len(without_gpu) < len(items):
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("gpu") is not None])
        items[:] = without_gpu


@pytest.fixture(scope="module", autouse=True)
def no_process_group_is_left():
    """The process group that a test file or a command made ends with the file, whatever file comes next."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    distributed._STORE = None  # where ranks agree who tells an error
