"""What all stages share: a finished stage is not run again, and a changed one is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from megatron_r1.config.load import load_config
from megatron_r1.config.resume import input_paths
from megatron_r1.config.schema import Config
from megatron_r1.errors import CheckpointError, ConfigError, DataError
from megatron_r1.pipeline.artifact import Artifact
from megatron_r1.pipeline.stages.common import stage_artifact, unless_finished
from megatron_r1.runtime.inputs import compare_inputs


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


@pytest.fixture
def finished(tmp_path):
    """A finished GRPO run from a model and problems: the stage, its settings, what it was made from, and how often it ran."""
    weights, problems, runs = tmp_path / "base", tmp_path / "problems.jsonl", []
    weights.mkdir()
    (weights / "config.json").write_text("{}")
    problems.write_text("{}\n")
    settings = [f"run_dir={tmp_path / 'run'}", f"model.weights={weights}", f"data.source={problems}", "grpo.rollouts=4"]

    @unless_finished
    def run(config: Config, session: object) -> Artifact:
        runs.append(config)
        return stage_artifact(config)

    config = load_config(None, settings)
    artifact = stage_artifact(config)
    artifact.folder.mkdir(parents=True)
    compare_inputs(tmp_path / "run", input_paths(config, "grpo"), None)
    artifact.seal("grpo", config.model_dump(), {"model.weights": weights, "data.source": problems})
    return run, settings, tmp_path, runs


def start(finished, *changed: str) -> None:
    run, settings, _, _ = finished
    run(load_config(None, [*settings, *changed]), "session")


def test_a_finished_run_takes_settings_that_do_not_define_its_result(finished, capsys):
    start(finished, "grpo.micro_batch_tokens=512", "evaluate.problems=3", "sft.epochs=7")
    assert not finished[3] and "is finished" in capsys.readouterr().out


def test_a_finished_run_that_is_given_other_settings_names_them(finished):
    with pytest.raises(ConfigError) as caught:
        start(finished, "grpo.clip_eps=10", "seed=3")
    assert "hf is finished, and was made with seed=0, now it is 3, and grpo.clip_eps=0.2, now it is 10.0" in str(caught.value)
    with pytest.raises(ConfigError, match=r"grpo\.rollouts=4, now it is 2: keep the value, raise it"):
        start(finished, "grpo.rollouts=2")
    assert not finished[3]


def test_a_finished_run_that_is_to_be_longer_goes_on_from_its_checkpoint(finished):
    with pytest.raises(ConfigError, match=r"holds no checkpoint .* start another run_dir from model\.weights=.*/run/hf"):
        start(finished, "grpo.rollouts=8")
    checkpoint = finished[2] / "run" / "checkpoints" / "step_000004"
    checkpoint.mkdir(parents=True)
    (checkpoint / "COMPLETE").write_text("")
    start(finished, "grpo.rollouts=8")
    assert [config.grpo.rollouts for config in finished[3]] == [8]


@pytest.mark.parametrize("has_notes", [True, False])
def test_what_a_finished_run_was_made_from_may_move_but_not_change(finished, has_notes, capsys):
    folder = finished[2]
    moved = (folder / "problems.jsonl").rename(folder / "moved" if has_notes else folder / "problems2.jsonl")
    if not has_notes:  # of an older run: the manifest has the hash of a file under its name
        (folder / "run" / "inputs.json").unlink()
        (folder / "sub").mkdir()
        moved = moved.rename(folder / "sub" / "problems.jsonl")
    start(finished, f"data.source={moved}")
    assert "is finished" in capsys.readouterr().out
    moved.write_text("[]\n")
    with pytest.raises(DataError, match=r"data\.source: .* (has other content|is not what)"):
        start(finished, f"data.source={moved}")
    moved.unlink()
    (folder / "base" / "config.json").unlink()
    shutil.rmtree(folder / "base")
    start(finished)  # what it was made from may be gone
    assert not finished[3]


def test_a_damaged_manifest_is_named(finished):
    (finished[2] / "run/hf/artifact.json").write_text('{"stage": "grpo"}')
    with pytest.raises(CheckpointError, match=r"artifact\.json cannot be read .* remove .*/run/hf to make it again"):
        start(finished)
