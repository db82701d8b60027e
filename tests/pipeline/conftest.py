"""A base model and a finished small GRPO run that several tests look at."""

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
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of `pretrain`: its model sometimes keeps the format."""
    folder = tmp_path_factory.mktemp("base") / "run"
    grpo_runs.finish(grpo_runs.pretrain_command(folder), folder.with_suffix(".log"))
    return folder


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """A GRPO run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("grpo") / "undisturbed"
    grpo_runs.finish(grpo_runs.grpo_command(folder, base), folder.with_suffix(".log"))
    return folder
