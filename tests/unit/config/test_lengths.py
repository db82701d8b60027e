"""A forward pass holds every response that a round may bring, in the examples and wherever responses become longer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from megatron_r1.config.grpo import GrpoConfig, LengthPhase
from megatron_r1.config.lengths import Lengths, check_lengths, for_longest_response, length_phases, lengths_after
from megatron_r1.config.load import load_config
from megatron_r1.config.rollout import RolloutConfig
from megatron_r1.config.schema import Config
from megatron_r1.data.packing import pack_samples
from megatron_r1.errors import ConfigError
from megatron_r1.pipeline.recipe.folder import Recipe
from megatron_r1.pipeline.recipe.stages import STAGES
from megatron_r1.pipeline.stages.grpo import check_grpo
from megatron_r1.training.samples import to_training_samples
from megatron_r1.types import Prompt, Rollout, RolloutGroup
from tests.paths import ROOT


def grpo_configs(path: Path) -> list[Config]:
    """The configs with which grpo would run this file: of a recipe, one a stage."""
    sections = yaml.safe_load(path.read_text())
    if "grpo" not in sections:
        return []
    config = load_config(path)
    if "recipe" not in sections:
        return [config]
    return [Recipe(config).config_of(name) for name, stage in STAGES.items() if stage.command == "grpo"]


EXAMPLES = [path for path in sorted((ROOT / "examples").rglob("*.yaml")) if grpo_configs(path)]


def test_examples_are_found():
    assert {f"{path.parent.name}/{path.name}" for path in EXAMPLES} >= {
        "v3_671b/r1.yaml", "v3_671b/r1_zero.yaml", "v3_671b/stage2.yaml", "v3_671b/stage4.yaml", "v2_lite_16b/r1_zero.yaml",
        "distill_qwen/zero_qwen_32b.yaml", "gsm8k/grpo.yaml", "tiny_cpu/r1_zero.yaml", "tiny_cpu/r1.yaml", "tiny_cpu/stage4.yaml",
    }  # fmt: skip


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_response_cut_at_its_limit_packs(path):
    for config in grpo_configs(path):
        check_grpo(config)
        for lengths in length_phases(config.grpo, config.rollout):
            prompt = Prompt("p", "q", "a", "t", (1,) * config.data.max_prompt_tokens)
            cut, short = (Rollout([2] * n, [0.0] * n, "", n == 1) for n in (lengths.max_response_tokens, 1))
            group = RolloutGroup(prompt, [cut, short], 0, torch.zeros(2), advantages_G=torch.zeros(2))
            multiple = 2 * config.parallel.tp
            (batches,) = pack_samples(
                to_training_samples([group]), max_tokens=lengths.micro_batch_tokens, dp_size=1, pad_multiple=multiple
            )
            targets = config.data.max_prompt_tokens + lengths.max_response_tokens - 1
            assert max(batch.cu_seqlens[1].item() for batch in batches) >= targets


def test_the_published_lengths_are_a_schedule():
    for config in (
        load_config(ROOT / "examples/v3_671b/r1_zero.yaml"),
        Recipe(load_config(ROOT / "examples/v3_671b/r1.yaml")).config_of("zero"),
    ):
        limits = [lengths_after(config.grpo, config.rollout, updates) for updates in (0, 8199, 8200, 8208, 10_400)]
        assert [(l.max_response_tokens, l.micro_batch_tokens) for l in limits] == [(32768, 34816)] * 2 + [(65536, 67584)] * 3
        assert for_longest_response(config).rollout.max_response_tokens == 65536


def test_limits_follow_from_the_updates_alone():
    later, latest = {"after_updates": 4, "max_response_tokens": 9}, {"after_updates": 8, "max_response_tokens": 5}
    schedule = [LengthPhase(**later), LengthPhase(**latest, micro_batch_tokens=30)]
    stage = GrpoConfig(micro_batch_tokens=20, length_schedule=schedule)
    rollout = RolloutConfig(max_response_tokens=7)
    found = {updates: lengths_after(stage, rollout, updates) for updates in (0, 3, 4, 7, 8, 99)}
    assert {u: (l.max_response_tokens, l.micro_batch_tokens) for u, l in found.items()} == {
        0: (7, 20), 3: (7, 20), 4: (9, 20), 7: (9, 20), 8: (5, 30), 99: (5, 30),
    }  # fmt: skip
    assert found[4].micro_batch_key == "grpo.micro_batch_tokens"
    assert length_phases(GrpoConfig(), RolloutConfig()) == [
        Lengths(0, 32768, 34816, "rollout.max_response_tokens", "grpo.micro_batch_tokens")
    ]
    check_lengths(Config())


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (["grpo.micro_batch_tokens=32768"], "micro_batch_tokens=32768 is less than the 34815 .*=2048 .*=32768 - 1.* to 34815"),
        (["grpo.micro_batch_tokens=34814"], "grpo.micro_batch_tokens=34814 is less than the 34815"),
        (
            ["grpo.length_schedule=[{after_updates: 5, max_response_tokens: 40000}]"],
            r"grpo\.micro_batch_tokens=34816 is less than the 42047 .*grpo\.length_schedule\.0\.max_response_tokens=40000",
        ),
        (
            ["grpo.length_schedule=[{after_updates: 5, max_response_tokens: 40000, micro_batch_tokens: 42046}]"],
            r"grpo\.length_schedule\.0\.micro_batch_tokens=42046 is less than the 42047",
        ),
        (
            [
                "grpo.length_schedule=[{after_updates: 5, max_response_tokens: 9}, {after_updates: 5, max_response_tokens: 10}]",
            ],
            "after_updates=5 does not come after 5",
        ),
    ],
)  # fmt: skip
def test_a_limit_that_does_not_fit_is_told_with_both_numbers(settings, told):
    with pytest.raises(ConfigError, match=told) as caught:
        check_lengths(load_config(None, ["data.max_prompt_tokens=2048", *settings]))
    assert "\n" not in str(caught.value)


def test_what_just_fits_is_taken():
    fitting = ["data.max_prompt_tokens=2048", "grpo.micro_batch_tokens=34815"]
    check_lengths(load_config(None, fitting))
    later = "grpo.length_schedule=[{after_updates: 5, max_response_tokens: 40000, micro_batch_tokens: 42047}]"
    check_lengths(load_config(None, [*fitting, later]))
