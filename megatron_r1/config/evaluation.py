"""Settings of evaluation: the section `evaluate`. "R1 v2" is DeepSeek-R1 (arXiv 2501.12948v2)."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field

from megatron_r1.config.endpoint import EndpointConfig
from megatron_r1.config.section import MAY_CHANGE, MOST_SEED, Section

Day = Annotated[str, BeforeValidator(str), Field(pattern=r"^\d{4}-\d{2}-\d{2}$")]  #: YAML reads 2024-08-01 as a date


class MeasuredEndpointConfig(EndpointConfig):
    """A served model to measure, in place of `model.weights`."""

    url: str | None = Field(
        None,
        description="Base URL of the endpoint of the model to measure, e.g. http://localhost:8000/v1. null: model.weights is "
        "measured.",
    )
    timeout_seconds: float = Field(3600.0, gt=0, description="Seconds that one response may take as a whole.")
    retries: int = Field(
        4, ge=0, description="Further requests after one that failed. Then the evaluation stops; started again, it goes on."
    )
    concurrency: int = Field(32, gt=0, description="Most responses that are asked for at the same time.")


class BenchmarksConfig(Section):
    """Evaluation on published benchmarks, with the sampling of R1 v2 D.1."""

    files: dict[str, str] = Field(
        {},
        description="File or folder of each benchmark, e.g. evaluate.benchmarks.files.aime2024=aime.jsonl. There are aime2024, "
        "math500, gpqa_diamond, livecodebench, gsm8k, humaneval, mbpp and cmath. Empty: `evaluate` measures held-out problems of "
        "data.source.",
    )
    name: str | None = Field(
        None, description="Name of the model in tables, e.g. Dev1. null: the endpoint's model, or the name of the folder."
    )
    samples: dict[str, Annotated[int, Field(gt=0)]] = Field(
        {},
        description="Responses to each problem of a benchmark, k. Benchmarks that are not named take the published k: 64 for "
        "aime2024 and gpqa_diamond, 16 for math500, 8 for livecodebench (R1 v2 D.1).",
    )
    temperature: float = Field(0.6, gt=0, description="Sampling temperature of responses to benchmarks. R1 v2 D.1 states 0.6.")
    top_p: float = Field(
        0.95, gt=0, le=1, description="Probability mass that tokens of responses are sampled from. R1 v2 D.1 states 0.95."
    )
    max_tokens: int = Field(
        32768, gt=0, description="Most tokens of a response; a longer one is cut, and is wrong. R1 v2 D.1 states 32,768."
    )
    greedy: bool = Field(
        False, description="Whether each problem is also answered once at temperature 0, which the tables show apart. Ours."
    )
    problems: int | None = Field(
        None, gt=0, description="Number of problems of each benchmark, drawn by the seed. null: all of them, as published."
    )
    seed: int = Field(
        0, ge=-MOST_SEED, le=MOST_SEED, description="Seed of the responses, of the order of choices and of the bootstrap."
    )
    contests_from: Day = Field(
        "2024-08-01",
        description="First day of contests whose livecodebench problems are taken, as year-month-day. R1 v2 D.1 begins in 2024-08.",
    )
    contests_to: Day = Field(
        "2025-01-31",
        description="Last day of contests whose livecodebench problems are taken, as year-month-day. R1 v2 D.1 ends in 2025-01.",
    )
    responses_per_call: int = Field(
        1024,
        gt=0,
        description="Responses asked of the engine in one call. More keep it busier; fewer are lost by a kill, and sampled again.",
    )
    resamples: int = Field(
        10000, gt=0, description="Resamples of the problems in the bootstrap that gives confidence intervals. Ours."
    )
    endpoint: MeasuredEndpointConfig = MeasuredEndpointConfig()


class EvaluateConfig(Section):
    """Held-out evaluation, and in `benchmarks` that on published ones."""

    interval: int = Field(
        0,
        ge=0,
        description="Rounds of rollouts between two evaluations during training. 0: only before the first and after the last.",
        json_schema_extra=MAY_CHANGE,
    )
    problems: int = Field(
        64,
        ge=0,
        description="Number of held-out problems that are answered in an evaluation. 0: training runs without evaluation.",
        json_schema_extra=MAY_CHANGE,
    )
    samples: int = Field(
        8, gt=0, description="Responses to each held-out problem, the k of pass@1 and pass@k.", json_schema_extra=MAY_CHANGE
    )
    temperature: float = Field(
        1.0,
        gt=0,
        description="Sampling temperature of responses to held-out problems. R1 v2 states it for benchmarks only: 0.6.",
        json_schema_extra=MAY_CHANGE,
    )
    top_p: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Probability mass that tokens of responses to held-out problems are sampled from. R1 v2 states it for "
        "benchmarks only: 0.95.",
        json_schema_extra=MAY_CHANGE,
    )
    seed: int = Field(
        99,
        ge=-MOST_SEED,
        le=MOST_SEED,
        description="Seed of the choice of held-out problems and of the responses to them.",
        json_schema_extra=MAY_CHANGE,
    )
    benchmarks: BenchmarksConfig = BenchmarksConfig()
