"""A job is what a config asks for, or one line that says what does not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_r1.config.load import load_config
from megatron_r1.config.schema import Config
from megatron_r1.errors import R1Error
from megatron_r1.model.presets import PRESETS
from megatron_r1.plan.job import STAGES, read_job
from tests.paths import ROOT

EXAMPLES = ROOT / "examples"
V3 = EXAMPLES / "v3_671b"


def config(*settings: str) -> Config:
    return load_config(None, list(settings))


def test_the_published_stage_is_read() -> None:
    job = read_job(load_config(V3 / "r1_zero.yaml"), "grpo", "h800", 64)
    assert (job.layout.tp, job.layout.pp, job.layout.ep, job.layout.dp, job.world_size) == (8, 16, 32, 4, 512)
    assert (job.device_name, job.nodes, job.devices_per_node, job.width) == ("H800", 64, 8, 2)
    assert job.section is job.config.grpo and job.optimizer is job.config.grpo.optimizer and not job.trains_mtp
    assert job.switches.moments == (4, 4) and job.arch.num_hidden_layers == 61


def test_what_is_not_said_follows_from_the_layout() -> None:
    job = read_job(config("parallel.tp=2", "parallel.pp=3"), "sft")
    assert (job.world_size, job.nodes, job.devices_per_node, job.device_name) == (6, 1, 6, "H800")
    job = read_job(config("runtime.device=cpu"), "grpo", world_size=2)
    assert (job.device, job.device_name, job.world_size, job.nodes) == (None, "cpu", 2, 1)


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_has_its_section(stage: str) -> None:
    job = read_job(config(), stage)  # type: ignore[arg-type]
    assert (job.section is None) == (stage == "convert")
    assert (job.optimizer is None) == (stage in ("rejection", "convert"))
    assert job.arch.is_reward_model == (stage == "reward-model")


@pytest.mark.parametrize(
    ("settings", "asked", "said"),
    [
        ([], {"gpu": "H900"}, "--gpu H900: there is no such device in the table; it has A100"),
        (["parallel.tp=3"], {}, "parallel.tp=3 does not divide num_attention_heads=4"),
        (["parallel.tp=2"], {"world_size": 3}, "does not divide the 3 processes"),
        ([], {"nodes": 1, "world_size": 16}, "16 ranks need 2 nodes of 8, --nodes is 1"),
        (["model.weights={nowhere}"], {}, "config.json"),
        (["model.preset=671c"], {}, "671c"),
    ],
)
def test_what_does_not_fit_is_one_line(settings: list[str], asked: dict, said: str, tmp_path: Path) -> None:
    settings = [text.replace("{nowhere}", str(tmp_path)) for text in settings]
    with pytest.raises(R1Error) as caught:
        read_job(config(*settings), "sft", **asked)
    assert said in str(caught.value) and "\n" not in str(caught.value) and caught.value.exit_code == 2


def test_a_config_alone_is_enough_and_an_absent_folder_falls_back(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PRESETS["small"].to_hf_config(0, 1, "float32")))
    assert read_job(config(f"model.weights={tmp_path}"), "sft").arch.hidden_size == PRESETS["small"].hidden_size
    assert "for want of" in read_job(config("model.weights=/nowhere/model"), "sft").shape_from
    with pytest.raises(R1Error, match="the shape is that of model.preset=tiny, for want of model.weights"):
        read_job(config("model.weights=/nowhere/model", "parallel.tp=3"), "sft")
