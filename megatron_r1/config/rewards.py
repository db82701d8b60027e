"""Settings of the rewards: the section `reward`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from megatron_r1.config.endpoint import EndpointConfig
from megatron_r1.config.section import MAY_CHANGE, Section


class JudgeConfig(EndpointConfig):
    """A served model that grades answers (v2 Listing 4)."""

    url: str | None = Field(
        None, description="base URL, e.g. http://localhost:8000/v1; needed where a judge is used", json_schema_extra=MAY_CHANGE
    )
    timeout_seconds: float = Field(120.0, gt=0, description="for one request", json_schema_extra=MAY_CHANGE)
    retries: int = Field(
        4, ge=0, description="further requests after one that failed or gave no valid verdict", json_schema_extra=MAY_CHANGE
    )
    concurrency: int = Field(16, gt=0, description="requests at a time", json_schema_extra=MAY_CHANGE)
    api_key_file: str | None = Field(
        None, description="file with the endpoint's key; null: none is sent", json_schema_extra=MAY_CHANGE
    )
    temperature: float = Field(0.0, ge=0, description="not stated; at 0, two of the four pairwise votes repeat the other two")
    max_tokens: int = Field(4096, gt=0, description="of the judge's answer; one cut at the limit gives no verdict")
    seed: int = Field(0, description="sent with every request; pairwise votes also draw their order from it")
    json_schema: bool = Field(
        False,
        description="have the endpoint constrain its answer to the JSON of a verdict; not for models that reason in the answer",
    )
    cache: str | None = Field(
        None, description="file that keeps verdicts over runs; null: none are kept", json_schema_extra=MAY_CHANGE
    )


class MathRewardConfig(Section):
    """What counts as the same answer where mathematics leaves it open; the recipe says only that the answer must be correct."""

    percent: Literal["unit", "hundredth", "either"] = Field("unit", description="50% is 50 (as in GSM8K), 0.5, or either")
    units: Literal["optional", "required", "ignored"] = Field(
        "optional", description="optional: may be missing on one side, but two different ones disagree"
    )
    rounding: int = Field(
        0, ge=0, description="digits from which a rounded decimal agrees with a reference like 1/3 or pi; 0: never"
    )
    list_order: Literal["any", "same"] = Field("any", description="of bare lists; sets never have one")
    several_answers: Literal["agree", "last"] = Field(
        "agree", description="several boxes: each must be correct, or the last counts"
    )


class CodeRewardConfig(Section):
    """How programs are run against their tests."""

    isolation: Literal["bubblewrap", "none_i_accept_untrusted_code_on_this_machine"] = Field(
        "bubblewrap",
        description="without namespaces programs are refused, unless the other value says in so many words to run them",
    )
    language: Literal["python", "cpp"] = Field("python", description="of a block of code without a tag")
    python: str = Field("", description="interpreter for programs; empty: the trainer's own")
    packages: list[str] = Field([], description="folders of packages that programs may import")
    cpu_seconds: float = Field(5.0, gt=0, description="of one test")
    wall_seconds: float = Field(15.0, gt=0, description="of one test")
    memory_mb: int = Field(512, gt=0, description="of one test")
    program_seconds: float = Field(60.0, gt=0, description="of all tests of a program; later ones are not run, and it fails")
    float_tolerance: float | None = Field(None, description="within which numbers agree; null: exactly")
    stop_at_first_failure: bool = Field(False, description="do not run the tests after it; the score is the same")


class RewardConfig(Section):
    """reasoning prompts: accuracy + format + language (v2 eq 4, 7); general ones: model + format + language (v2 eq 8, 10)."""

    accuracy_weight: float = 1.0
    format_weight: float = 1.0
    language_weight: float = Field(0.0, description='0: not measured; R1\'s RL stages: 1, "directly adding it"')
    model_weight: float = Field(1.0, description="of the model's reward on general prompts")
    model: Literal["none", "judge", "reward_models"] = Field(
        "none", description="what scores general prompts; judge: see reward.judge; reward_models: the two below"
    )
    helpful_model: str | None = Field(None, description="folder of the reward model for helpfulness, which reads the final summary")
    safety_model: str | None = Field(None, description="folder of the reward model for safety, which reads the whole response")
    answer_location: Literal["answer_tag", "boxed", "hash"] = Field(
        "answer_tag", description="the only place where an answer counts; hash: after ####"
    )
    length_penalty_weight: float = Field(0.0, ge=0, description="0: off; times 0 to -1 over the last cache tokens before the limit")
    length_penalty_max_tokens: int = Field(32768, gt=0, description="length from which the whole penalty applies")
    length_penalty_cache_tokens: int = Field(4096, gt=0, description="tokens before that over which it grows")
    repetition_penalty_weight: float = Field(0.0, ge=0, description="0: off; times minus the share of n-grams that are repeated")
    repetition_ngram: int = Field(20, gt=0, description="tokens of such an n-gram")
    unscored_value: float = Field(
        0.0, description="counts as the score where a grader failed (error, timeout, unscorable); such cases are logged apart"
    )
    workers: int = Field(2, gt=0, description="scoring processes, beside rank 0", json_schema_extra=MAY_CHANGE)
    time_limit_seconds: float = Field(20.0, gt=0, description="for one response by one scorer; then its worker is killed")
    code_time_limit_seconds: float = Field(300.0, gt=0, description="the same for all tests of one program")
    worker_memory_bytes: int = Field(4 << 30, gt=0, description="address space of a scoring process, and of each of its children")
    worker_recycle_bytes: int = Field(1 << 30, gt=0, description="resident memory above which a scoring process is replaced")
    math: MathRewardConfig = MathRewardConfig()
    code: CodeRewardConfig = CodeRewardConfig()
    judge: JudgeConfig = JudgeConfig()
