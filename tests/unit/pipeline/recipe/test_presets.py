"""The presets hold what the paper states, field by field, load and can be built."""

from __future__ import annotations

import pytest

from megatron_r1.config.load import flatten_config, load_config
from megatron_r1.pipeline.recipe.folder import Recipe
from tests.paths import ROOT

EXAMPLES = ROOT / "examples"

RL = {  # R1 v2 sections 2.1, 3.2.1, 3.2.2
    "grpo.prompts_per_rollout": 512, "grpo.group_size": 16, "grpo.minibatch_size": 512, "grpo.kl_coef": 0.001,
    "grpo.reference_update_interval": 400, "grpo.optimizer.lr": 3e-6, "rollout.max_response_tokens": 32768,
    "rollout.temperature": 1.0, "rollout.top_p": 1.0, "reward.accuracy_weight": 1.0, "reward.format_weight": 1.0,
}  # fmt: skip
SFT = {  # R1 v2 B.4.2
    "sft.epochs": 2, "sft.batch_size": 64, "sft.max_tokens": 32768, "sft.optimizer.lr": 5e-6, "sft.optimizer.schedule": "cosine",
    "sft.optimizer.min_lr_ratio": 0.1,
}  # fmt: skip
REWARD_MODEL = {  # R1 v2 section 3.1
    "reward_model.epochs": 1, "reward_model.batch_size": 256, "reward_model.max_tokens": 8192, "reward_model.optimizer.lr": 6e-6,
}  # fmt: skip
STATED = {
    "v3_671b/r1_zero.yaml": RL | {"grpo.rollouts": 650, "data.template": "r1_zero", "reward.language_weight": 0.0},
    "v3_671b/stage1.yaml": SFT | {"data.template": "r1_chat"},
    "v3_671b/stage2.yaml": RL | {"grpo.clip_eps": 10.0, "reward.language_weight": 1.0, "data.template": "r1_chat"},
    "v3_671b/stage3.yaml": SFT | {"data.template": "r1_chat"},
    "v3_671b/stage4.yaml": RL
    | {
        "rollout.temperature": 0.7, "grpo.clip_eps": 10.0, "grpo.general_updates": 400, "reward.language_weight": 1.0,
        "reward.model": "reward_models",
    },
    "v3_671b/reward_helpful.yaml": REWARD_MODEL | {"reward_model.kind": "helpful"},
    "v3_671b/reward_safety.yaml": REWARD_MODEL | {"reward_model.kind": "safety"},
    "distill_qwen/zero_qwen_32b.yaml": RL | {"grpo.optimizer.lr": 2e-6, "data.template": "r1_zero"},
    # R1 v2 B.4.3, table 6
    **{
        f"distill_qwen/{name}.yaml": SFT | {"sft.optimizer.lr": lr}
        for name, lr in {
            "qwen_1_5b": 1e-4, "qwen_7b": 8e-5, "qwen_14b": 7e-5, "qwen_32b": 6e-5, "llama_8b": 5e-5, "llama_70b": 2e-5,
        }.items()
    },
}  # fmt: skip
PROPORTIONS = {"math": 395285, "code": 211129, "stem": 10124, "logic": 10395, "general": 177812}  # R1 v2 B.3.3


@pytest.mark.parametrize("name", STATED)
def test_a_preset_holds_what_the_paper_states(name):
    settings = flatten_config(load_config(EXAMPLES / name))
    assert {key: settings[key] for key in STATED[name]} == STATED[name]


def test_every_recipe_preset_is_looked_at():
    files = {
        f"{path.parent.name}/{path.name}" for folder in ("v3_671b", "distill_qwen") for path in (EXAMPLES / folder).glob("*.yaml")
    }
    elsewhere = {"v3_671b/pretrain.yaml"}  # field by field in tests/unit/training/test_pretrain_plan.py
    assert files == set(STATED) | elsewhere | {"v3_671b/stage3_data.yaml", "v3_671b/r1.yaml"}


@pytest.mark.parametrize(
    ("stage", "name"),
    [
        ("zero", "v3_671b/r1_zero"), ("stage1", "v3_671b/stage1"), ("stage2", "v3_671b/stage2"), ("stage3", "v3_671b/stage3"),
        ("stage4", "v3_671b/stage4"), ("helpful", "v3_671b/reward_helpful"), ("safety", "v3_671b/reward_safety"),
        ("distill", "distill_qwen/qwen_7b"),
    ],
)  # fmt: skip
def test_the_recipe_as_one_file_says_what_the_single_files_say(stage, name):
    of_recipe = flatten_config(Recipe(load_config(EXAMPLES / "v3_671b/r1.yaml")).config_of(stage))
    single = flatten_config(load_config(EXAMPLES / f"{name}.yaml"))
    sections = {"v3_671b/stage3": ("sft",), "v3_671b/stage1": ("sft",), "distill_qwen/qwen_7b": ("sft",)}.get(
        name, ("reward_model",) if "reward_" in name else ("grpo", "rollout", "reward")
    )
    # folders that an earlier stage fills, and how the data are read, are the pipeline's
    ignored = ("reward.helpful_model", "reward.safety_model", "sft.workers", "sft.validation_fraction", "sft.validation_interval")
    read = {key: value for key, value in single.items() if key.startswith(("parallel.", *(f"{s}." for s in sections)))}
    assert {key: of_recipe[key] for key in read if key not in ignored} == {k: v for k, v in read.items() if k not in ignored}


def test_the_steps_of_rl_are_those_of_the_paper():
    zero, last = (load_config(EXAMPLES / f"v3_671b/{name}.yaml").grpo for name in ("r1_zero", "stage4"))
    updates = [stage.rollouts * stage.prompts_per_rollout * stage.group_size // stage.minibatch_size for stage in (zero, last)]
    assert updates[0] == 10_400 and 1_700 <= updates[1] < 1_716


@pytest.mark.parametrize("name", ["r1", "stage3_data"])
def test_the_mix_is_the_published_one(name):
    mix = load_config(EXAMPLES / f"v3_671b/{name}.yaml").curation.mix
    assert mix.proportions == PROPORTIONS and mix.total == sum(PROPORTIONS.values()) == 804_745
