"""Settings of the R1 pipeline: the section `recipe`."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from megatron_r1.config.section import Section


class RecipeConfig(Section):
    """The pipeline from a base model to R1 and its students. All other sections hold for every stage, unless `stages` says otherwise."""

    stages: dict[str, dict[str, Any]] = Field(
        {}, description="stage: settings that replace the rest of the file in it, e.g. stage2: {grpo: {clip_eps: 10}}"
    )
    gates: dict[str, dict[str, float]] = Field(
        {},
        description="stage: {measure: least value}; a stage below it stops the pipeline. Measures: pass_at_1, format, language, "
        "readable, helpful, safe",
    )
    cold_start_prompts: int = Field(1024, gt=0, description='problems that R1-Zero is sampled on ("thousands", v2 B.3.2)')
    cold_start_problems: int = Field(256, ge=0, description="problems that the served model answers (few_shot, direct)")
    review: bool = Field(False, description="stop after the cold-start data until <run_dir>/stage1/review/decisions.jsonl is there")
    rejection_prompts: int = Field(4096, gt=0, description="problems that the stage-2 model is sampled on")
    judged_share: float = Field(
        0.0, ge=0, le=1, description="of the rejection prompts, those that are given to the judge as if no rule could tell"
    )
    non_reasoning: str | None = Field(None, description="conversations for stage 3's non-reasoning part, .jsonl; null: none")
    measured_problems: int = Field(128, gt=0, description="held-out problems every stage is measured on")
    requests: str | None = Field(
        None,
        description="general prompts, as data.general_source, whose held-out part every stage's helpfulness and safety is measured on",
    )
    measured_requests: int = Field(64, ge=0, description="of them")
    measured_samples: int = Field(4, gt=0, description="samples of each")
