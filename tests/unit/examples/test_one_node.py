"""`examples/one_node`: every model and number of GPUs is planned, and the settings are the baselines'."""

from __future__ import annotations

import re
import shlex

import pytest

from examples.plans import ONE_NODE, OneNode
from megatron_r1.config.load import flatten_config, load_config
from megatron_r1.errors import ConfigError
from megatron_r1.pipeline.dry_run import found
from megatron_r1.pipeline.dry_run.plan import plan_training
from tests.paths import ROOT

FOLDER = ROOT / "examples/one_node"
README = (FOLDER / "README.md").read_text(encoding="utf-8")
TOO_LARGE = {"Qwen2.5-7B", "Qwen3-8B"}  # for one GPU of 80 GB
STATED = {
    "gsm8k": {  # verl's logs of Qwen2.5-0.5B-Instruct, 0.567 and 0.543
        "grpo.prompts_per_rollout": 256, "grpo.minibatch_size": 64 * 5, "grpo.group_size": 5, "grpo.optimizer.lr": 1e-6,
        "grpo.rollouts": 15 * (7473 // 256), "grpo.kl_coef": 0.001, "grpo.clip_eps": 0.2, "data.max_prompt_tokens": 512,
        "rollout.max_response_tokens": 1024, "rollout.temperature": 1.0, "rollout.max_num_seqs": 512,
        "grpo.optimizer.weight_decay": 0.01, "grpo.normalization": "token", "evaluate.problems": 1319,
        "data.question_suffix": ' Let\'s think step by step and output the final answer after "####".',
    },
    "math": {  # SimpleRL-Zoo's README and train_grpo_math_tune_ray.sh
        "grpo.prompts_per_rollout": 1024, "grpo.minibatch_size": 256 * 8, "grpo.group_size": 8, "grpo.optimizer.lr": 5e-7,
        "grpo.rollouts": 100, "grpo.kl_coef": 1e-4, "grpo.clip_eps": 0.2, "data.max_prompt_tokens": 1024,
        "rollout.max_response_tokens": 8192, "rollout.temperature": 1.0, "rollout.gpu_memory_utilization": 0.6,
        "evaluate.problems": 500, "evaluate.temperature": 1.0, "evaluate.top_p": 0.95,
        "data.question_suffix": "\nPlease reason step by step, and put your final answer within \\boxed{}.",
    },
}  # fmt: skip


@pytest.mark.parametrize("job", ONE_NODE, ids=lambda job: f"{job.model}-{job.gpus}")
def test_a_job_is_planned_and_fits_or_says_that_it_does_not(job: OneNode) -> None:
    for name in STATED:
        config = load_config(FOLDER / f"{name}.yaml", job.settings())
        if job.gpus == 1 and job.model in TOO_LARGE:
            with pytest.raises(ConfigError, match="grpo does not fit: update needs"):
                plan_training("grpo", config, found.DryRun(job.gpus))
            config = load_config(FOLDER / f"{name}.yaml", [*job.settings(), "runtime.plan=off"])
        planned = plan_training("grpo", config, found.DryRun(job.gpus))
        assert f"dry run of grpo: {job.gpus} rank(s) on 1 node(s)" in planned and f"engines     {job.gpus}, beside" in planned
        assert f"shape from model.preset={job.preset}" in planned
        assert bool(job.plan(name).shortfalls()) is (job.gpus == 1 and job.model in TOO_LARGE)


def test_every_model_is_there_for_one_gpu_and_for_eight() -> None:
    models = {job.model for job in ONE_NODE}
    assert {"Qwen2.5-0.5B", "Qwen2.5-1.5B", "Qwen2.5-7B"} < models and any(model.startswith("Qwen3") for model in models)
    assert sorted((job.model, job.gpus) for job in ONE_NODE) == sorted((model, gpus) for model in models for gpus in (1, 8))


def test_memory_by_hand() -> None:
    """0.5B on one GPU: 18 bytes a parameter, 24 inputs of 896 numbers, one layer again; of logits there are tiles."""
    parameters, tokens = 494_032_768, 18_432
    layer = 4 * 896 + 64 * (14 + 2 + 4 + (14 + 2 * 2) + 14) + 5 * 4864
    passing = 2 * tokens * (24 * 896 + layer - 896)
    update = next(phase for phase in ONE_NODE[0].plan("math").phases if phase.name == "update")
    beside = sum(term.amount for term in update.device if term.name in ("CUDA, NCCL", "engine that sleeps"))
    assert update.device_bytes - beside == pytest.approx(18 * parameters + 1.05 * passing, rel=1e-3)


@pytest.mark.parametrize("name", STATED)
def test_settings_are_the_baselines(name: str) -> None:
    settings = flatten_config(load_config(FOLDER / f"{name}.yaml"))
    assert {key: settings[key] for key in STATED[name]} == STATED[name]


def test_commands_of_the_readme_take_their_settings() -> None:
    lines = [line for line in README.splitlines() if re.match(r"    (megatron-r1|torchrun) .*--config examples/", line)]
    assert len(lines) == 6
    for line in lines:
        words = shlex.split(line)
        config = words[words.index("--config") + 1]
        assert load_config(ROOT / config, [word for word in words if re.match(r"[a-z_]+\.[a-z_.]+=", word)])
