"""The stages of the R1 pipeline, each as a short script over the parts that every command uses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_r1.pipeline.recipe.data import curated_path, make_cold_start, make_curated
from megatron_r1.pipeline.recipe.folder import Recipe
from megatron_r1.pipeline.session import Session
from megatron_r1.pipeline.stages.grpo import run_grpo
from megatron_r1.pipeline.stages.pretrain import run_pretrain
from megatron_r1.pipeline.stages.reward_model import run_reward_model
from megatron_r1.pipeline.stages.sft import run_sft
from megatron_r1.runtime.distributed import on_rank_zero


def run_base(recipe: Recipe, session: Session) -> None:
    """The model that everything starts from: pretrained here, unless `model.weights` names one."""
    _base(recipe, "base", session)


def run_zero(recipe: Recipe, session: Session) -> None:
    """R1-Zero: reinforcement learning from the base, with accuracy and format alone (v2 section 2)."""
    run_grpo(recipe.config_of("zero", _weights(recipe, "base")), session)


def run_stage1(recipe: Recipe, session: Session) -> None:
    """Cold start: SFT of the base on a few thousand long chains of thought (v2 section 3, B.3.2)."""
    _fine_tune_base(recipe, "stage1", make_cold_start, session)


def run_stage2(recipe: Recipe, session: Session) -> None:
    """Reasoning RL from Dev1, with the language-consistency reward and a clip ratio of 10 (v2 section 3.2.1)."""
    run_grpo(recipe.config_of("stage2", _weights(recipe, "stage1")), session)


def run_helpful(recipe: Recipe, session: Session) -> None:
    """The reward model for helpfulness, from pairs (v2 section 3.1, equation 5)."""
    run_reward_model(recipe.config_of("helpful", _weights(recipe, "stage2") | {"reward_model.kind": "helpful"}), session)


def run_safety(recipe: Recipe, session: Session) -> None:
    """The reward model for safety, from labels (v2 section 3.1, equation 6)."""
    run_reward_model(recipe.config_of("safety", _weights(recipe, "stage2") | {"reward_model.kind": "safety"}), session)


def run_stage3(recipe: Recipe, session: Session) -> None:
    """Rejection sampling from Dev2, non-reasoning data, curation; then SFT of the base, not of Dev2 (v1 section 2.3.3)."""
    _fine_tune_base(recipe, "stage3", make_curated, session)


def run_stage4(recipe: Recipe, session: Session) -> None:
    """RL over all scenarios: rules for reasoning, reward models for general prompts in the last updates (v2 section 3.2.2)."""
    models = {f"reward.{kind}_model": str(recipe.artifact(kind).folder) for kind in ("helpful", "safety")}
    run_grpo(recipe.config_of("stage4", _weights(recipe, "stage3") | models), session)


def run_student(recipe: Recipe, session: Session) -> None:
    """The small dense model that is distilled into."""
    _base(recipe, "student", session)


def run_distill(recipe: Recipe, session: Session) -> None:
    """Distillation: SFT of the student on stage 3's curated set, no RL (v1 section 2.4)."""
    run_sft(recipe.config_of("distill", _weights(recipe, "student") | _sources(curated_path(recipe))), session)


def run_student_rl(recipe: Recipe, session: Session) -> None:
    """What the recipe compares distillation with: R1-Zero's training of the student (v1 section 4.1)."""
    run_grpo(recipe.config_of("student_rl", _weights(recipe, "student")), session)


def _base(recipe: Recipe, stage: str, session: Session) -> None:
    config = recipe.config_of(stage)
    if config.model.weights is None:
        run_pretrain(config, session)


def _fine_tune_base(recipe: Recipe, stage: str, make_data: Callable[[Recipe, Session], Path], session: Session) -> None:
    settings = _weights(recipe, "base")
    if not on_rank_zero(lambda: recipe.artifact(stage).exists):
        settings |= _sources(make_data(recipe, session))
    run_sft(recipe.config_of(stage, settings), session)


def _weights(recipe: Recipe, stage: str) -> dict[str, Any]:
    """Start from what a stage made."""
    return {"model.weights": str(recipe.weights(stage)), "model.overrides": {}}


def _sources(data: Path) -> dict[str, Any]:
    """Fine-tune on one file."""
    return {"sft.sources": [{"path": str(data)}]}
