"""What all stages share: a finished stage is not run again, and a changed one is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_r1.config.model import ParallelConfig
from megatron_r1.config.schema import Config
from megatron_r1.errors import CheckpointError, ConfigError
from megatron_r1.pipeline.artifact import Artifact
from megatron_r1.pipeline.stages.common import require_no_context_parallel, stage_artifact, unless_finished


@pytest.fixture
def stage(tmp_path):
    """A stage that writes one file, its config, and how often it ran."""
    config, runs = Config(run_dir=str(tmp_path / "run")), []

    @unless_finished
    def run(config: Config, session: object) -> Artifact:
        """Docstring of the stage."""
        artifact = stage_artifact(config)
        artifact.folder.mkdir(parents=True, exist_ok=True)
        (artifact.folder / "model.safetensors").write_text("weights")
        runs.append(session)
        return artifact

    return run, config, runs


def test_a_stage_runs_until_its_model_is_sealed(stage, capsys):
    run, config, runs = stage
    for _ in range(2):
        artifact = run(config, "session")
    assert runs == ["session", "session"] and artifact.folder == Path(config.run_dir) / "hf"
    artifact.seal("sft", {}, {})
    assert run(config, "session") == artifact and len(runs) == 2
    assert f"{artifact.folder} is finished; remove {config.run_dir} to make it again" in capsys.readouterr().out
    assert run.__doc__ == "Docstring of the stage."


def test_a_model_that_changed_since_it_was_sealed_is_refused(stage):
    run, config, runs = stage
    artifact = run(config, "session")
    artifact.seal("sft", {}, {})
    (artifact.folder / "model.safetensors").write_text("other weights")
    with pytest.raises(CheckpointError, match="has changed since its stage finished"):
        run(config, "session")
    assert len(runs) == 1


def test_context_parallel_is_refused():
    require_no_context_parallel(ParallelConfig())
    with pytest.raises(ConfigError, match=r"parallel\.cp above 1 works for pretraining only"):
        require_no_context_parallel(ParallelConfig(cp=2))
