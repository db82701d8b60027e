"""One cluster for all tests of this folder, where Slurm is installed."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, missing_programs
from tests.slurm.jobs import Jobs


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A running cluster of two nodes."""
    if missing := missing_programs():
        pytest.skip(f"no {', '.join(missing)} here (apt-get install slurm-wlm munge)")
    folder = Path(tempfile.mkdtemp(prefix="r1-slurm-"))
    try:
        with Cluster(folder) as running:
            yield running
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def jobs(cluster: Cluster, tmp_path: Path) -> Iterator[Jobs]:
    """Submits into it. What a test leaves behind, where it failed, is cancelled."""
    yield Jobs(cluster, tmp_path)
    cluster.cancel_all()
