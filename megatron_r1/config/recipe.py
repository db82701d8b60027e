"""Settings of the R1 pipeline: the section `recipe`. "R1 v2" is DeepSeek-R1 (arXiv 2501.12948v2)."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from megatron_r1.config.section import Section


class RecipeConfig(Section):
    """The pipeline from a base model to R1 and its students.

    All other sections hold for every stage, unless `stages` says otherwise.
    """

    stages: dict[str, dict[str, Any]] = Field(
        {},
        description="Settings of a stage that replace those of the rest of the file, by the stage's name, e.g. stage2: {grpo: "
        "{clip_eps: 10}}. `megatron-r1 pipeline r1 --dry-run` lists the stages.",
    )
    gates: dict[str, dict[str, float]] = Field(
        {},
        description="Least values that a stage must reach, by the stage's name: a stage below them stops the pipeline. Measures "
        "are pass_at_1, format, language, readable, helpful and safe. Ours.",
    )
    cold_start_prompts: int = Field(
        1024,
        gt=0,
        description='Number of problems that R1-Zero is sampled on for cold-start data. The paper says "thousands" (R1 v2 B.3.2).',
    )
    cold_start_problems: int = Field(
        256,
        ge=0,
        description="Number of problems that the served model answers for cold-start data, by few_shot and by direct. The paper "
        "does not state it.",
    )
    review: bool = Field(
        False,
        description="Whether the pipeline stops after the cold-start data until people have left their decisions in "
        "<run_dir>/stage1/review/decisions.jsonl (R1 v2 B.3.2: human verification).",
    )
    rejection_prompts: int = Field(
        4096,
        gt=0,
        description="Number of problems that the stage-2 model is sampled on for supervised data. The paper does not state it.",
    )
    judged_share: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of the rejection prompts that the judge grades in place of a rule. The paper says some, and states no "
        "number (R1 v1 section 2.3.3).",
    )
    non_reasoning: str | None = Field(
        None, description="A .jsonl file of conversations for the non-reasoning part of stage 3. null: there is no such part."
    )
    measured_problems: int = Field(128, gt=0, description="Number of held-out problems that every stage is measured on.")
    requests: str | None = Field(
        None,
        description="General prompts in the form of data.general_source; every stage's helpfulness and safety is measured on "
        "their held-out part. null: neither is measured.",
    )
    measured_requests: int = Field(
        64, ge=0, description="Number of held-out prompts of recipe.requests that every stage is measured on."
    )
    measured_samples: int = Field(4, gt=0, description="Responses to each measured problem and to each measured request.")
