"""One finished small pipeline that several tests look at."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.pipeline import grpo_runs


@pytest.fixture(scope="session")
def runs():
    """The functions of grpo_runs.py."""
    return grpo_runs


@pytest.fixture(scope="session")
def pipeline_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished `pipeline r1-zero` that nothing disturbed."""
    folder = tmp_path_factory.mktemp("pipeline") / "run"
    grpo_runs.finish(grpo_runs.command("pipeline r1-zero", folder), folder.with_suffix(".log"))
    return folder


@pytest.fixture(scope="session")
def base(pipeline_run: Path) -> Path:
    """Its pretraining run."""
    return pipeline_run / "base"


@pytest.fixture(scope="session")
def finished_run(pipeline_run: Path) -> Path:
    """Its GRPO run."""
    return pipeline_run / "r1_zero"
