"""Start the ranks of a test's script as processes of their own, and let the test fail with what a failed one printed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.paths import ROOT
from tests.patience import patient


def run_ranks(script: Path, world_size: int, *arguments: object, timeout: float) -> list[str]:
    """Run `script RANK WORLD_SIZE ARGUMENTS...` on every rank, with one thread each; what each printed.

    Args:
        timeout: in seconds of an idle machine.
    """
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(world_size), *map(str, arguments)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(world_size)
    ]  # fmt: skip
    limit = patient(timeout)
    outputs = [rank.communicate(timeout=limit)[0] for rank in ranks]
    failed = [output[-3000:] for rank, output in zip(ranks, outputs, strict=True) if rank.returncode]
    assert not failed, "\n".join(failed)
    return outputs
