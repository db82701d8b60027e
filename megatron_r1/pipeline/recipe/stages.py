"""The stages of the R1 pipeline: which is made from which, and each as a short function over the parts that every command uses.

    base ── zero ──┐
      │            │ outputs
      ├── stage1 ◄─┘ cold-start SFT (Dev1)
      │     └── stage2  reasoning RL (Dev2) ── helpful, safety  reward models
      │            │ samples                        │
      └── stage3 ◄─┘ SFT from the base (Dev3)       │
              ├── stage4 ◄──────────────────────────┘ RL over all scenarios (R1)
              └── distill ◄── student ── student_rl

Source: DeepSeek-R1 (arXiv 2501.12948): "R1 v1" and "R1 v2" are its versions. The figure is R1 v2 figure 2, sections 2 and 3.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_r1.pipeline.recipe.data import cold_start_path, curated_path, make_cold_start, make_curated
from megatron_r1.pipeline.recipe.folder import Recipe
from megatron_r1.pipeline.session import Session
from megatron_r1.pipeline.stages.grpo import run_grpo
from megatron_r1.pipeline.stages.pretrain import run_pretrain
from megatron_r1.pipeline.stages.reward_model import run_reward_model
from megatron_r1.pipeline.stages.sft import run_sft
from megatron_r1.runtime.distributed import on_rank_zero


def run_base(recipe: Recipe, session: Session) -> None:
    """The model that everything starts from: pretrained here, unless `model.weights` names one."""
    _pretrain_base(recipe, "base", session)


def run_zero(recipe: Recipe, session: Session) -> None:
    """R1-Zero: reinforcement learning from the base, with accuracy and format alone (R1 v2 section 2)."""
    run_grpo(recipe.config_of("zero", _start_from(recipe, "base")), session)


def run_stage1(recipe: Recipe, session: Session) -> None:
    """Cold start: SFT of the base on a few thousand long chains of thought (R1 v2 section 3, B.3.2)."""
    _fine_tune_base(recipe, "stage1", make_cold_start, cold_start_path(recipe), session)


def run_stage2(recipe: Recipe, session: Session) -> None:
    """Reasoning RL from Dev1, with the language-consistency reward and a clip ratio of 10 (R1 v2 section 3.2.1)."""
    run_grpo(recipe.config_of("stage2", _start_from(recipe, "stage1")), session)


def run_helpful(recipe: Recipe, session: Session) -> None:
    """The reward model for helpfulness, from pairs (R1 v2 section 3.1, equation 5)."""
    run_reward_model(recipe.config_of("helpful", _start_from(recipe, "stage2") | {"reward_model.kind": "helpful"}), session)


def run_safety(recipe: Recipe, session: Session) -> None:
    """The reward model for safety, from labels (R1 v2 section 3.1, equation 6)."""
    run_reward_model(recipe.config_of("safety", _start_from(recipe, "stage2") | {"reward_model.kind": "safety"}), session)


def run_stage3(recipe: Recipe, session: Session) -> None:
    """Rejection sampling from Dev2, non-reasoning data, curation; then SFT of the base, not of Dev2 (R1 v1 section 2.3.3)."""
    _fine_tune_base(recipe, "stage3", make_curated, curated_path(recipe), session)


def run_stage4(recipe: Recipe, session: Session) -> None:
    """RL over all scenarios: rules for reasoning, reward models for general prompts in the last updates (R1 v2 section 3.2.2)."""
    models = {f"reward.{kind}_model": str(recipe.artifact(kind).folder) for kind in ("helpful", "safety")}
    run_grpo(recipe.config_of("stage4", _start_from(recipe, "stage3") | models), session)


def run_student(recipe: Recipe, session: Session) -> None:
    """The small dense model that learns by distillation."""
    _pretrain_base(recipe, "student", session)


def run_distill(recipe: Recipe, session: Session) -> None:
    """Distillation: SFT of the student on stage 3's curated set, no RL (R1 v1 section 2.4)."""
    run_sft(recipe.config_of("distill", _start_from(recipe, "student") | _train_on(curated_path(recipe))), session)


def run_student_rl(recipe: Recipe, session: Session) -> None:
    """R1-Zero's training of the student, which distillation is compared with (R1 v1 section 4.1)."""
    run_grpo(recipe.config_of("student_rl", _start_from(recipe, "student")), session)


def _pretrain_base(recipe: Recipe, stage: str, session: Session) -> None:
    config = recipe.config_of(stage)
    if config.model.weights is None:
        run_pretrain(config, session)


def _fine_tune_base(recipe: Recipe, stage: str, make_data: Callable[[Recipe, Session], Path], data: Path, session: Session) -> None:
    if not on_rank_zero(lambda: recipe.artifact(stage).exists):
        data = make_data(recipe, session)
    run_sft(recipe.config_of(stage, _start_from(recipe, "base") | _train_on(data)), session)


def _start_from(recipe: Recipe, stage: str) -> dict[str, Any]:
    """The settings that start a stage from the model of another one."""
    return {"model.weights": str(recipe.weights(stage)), "model.overrides": {}}


def _train_on(data: Path) -> dict[str, Any]:
    """The settings that fine-tune on one file."""
    return {"sft.sources": [{"path": str(data)}]}


@dataclass(frozen=True)
class Stage:
    """One step of the pipeline."""

    title: str
    needs: tuple[str, ...]  #: stages whose models or data it is made from
    run: Callable[[Recipe, Session], object]
    command: str  #: training command whose settings it takes
    is_language_model: bool = True  #: its model is measured and stands in the table


#: in the order in which they run
STAGES: dict[str, Stage] = {
    "base": Stage("base model", (), run_base, "pretrain"),
    "zero": Stage("R1-Zero: RL alone, no SFT", ("base",), run_zero, "grpo"),
    "stage1": Stage("Dev1: SFT of the base on cold-start data", ("base", "zero"), run_stage1, "sft"),
    "stage2": Stage("Dev2: reasoning RL with the language reward", ("stage1",), run_stage2, "grpo"),
    "helpful": Stage("reward model for helpfulness", ("stage2",), run_helpful, "reward-model", is_language_model=False),
    "safety": Stage("reward model for safety", ("stage2",), run_safety, "reward-model", is_language_model=False),
    "stage3": Stage("Dev3: SFT of the base on curated samples", ("base", "stage2"), run_stage3, "sft"),
    "stage4": Stage("R1: RL over all scenarios", ("stage3", "helpful", "safety"), run_stage4, "grpo"),
    "student": Stage("student's base model", (), run_student, "pretrain"),
    "distill": Stage("student, distilled", ("student", "stage3"), run_distill, "sft"),
    "student_rl": Stage("student, RL alone", ("student",), run_student_rl, "grpo"),
}
