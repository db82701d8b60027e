"""One finished small GRPO run that several tests look at."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location("grpo_runs", Path(__file__).with_name("grpo_runs.py"))
grpo_runs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(grpo_runs)


@pytest.fixture(scope="session")
def runs():
    """The functions of grpo_runs.py."""
    return grpo_runs


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("grpo") / "undisturbed"
    grpo_runs.finish(grpo_runs.grpo_command(folder), folder.with_suffix(".log"))
    return folder
