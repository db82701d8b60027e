"""Settings of evaluation: the section `evaluate`."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field

from megatron_r1.config.endpoint import EndpointConfig
from megatron_r1.config.section import Section

Day = Annotated[str, BeforeValidator(str), Field(pattern=r"^\d{4}-\d{2}-\d{2}$")]  #: YAML reads 2024-08-01 as a date


class MeasuredEndpointConfig(EndpointConfig):
    """A served model to measure, in place of `model.weights`."""

    url: str | None = Field(None, description="base URL, e.g. http://localhost:8000/v1; null: model.weights is measured")
    timeout_seconds: float = Field(3600.0, gt=0, description="for one response")
    concurrency: int = Field(32, gt=0, description="requests at a time")


class BenchmarksConfig(Section):
    """Evaluation on published benchmarks with the recipe's sampling (v2 D.1: temperature 0.6, top-p 0.95, 32,768 tokens)."""

    files: dict[str, str] = Field(
        {},
        description="benchmark -> its file or folder, e.g. evaluate.benchmarks.files.aime2024=aime.jsonl; one of aime2024, math500, "
        "gpqa_diamond, livecodebench, gsm8k, humaneval, mbpp, cmath; without any, `evaluate` measures held-out problems of data.source",
    )
    name: str | None = Field(None, description="of the model in tables, e.g. Dev1; default: the folder's or the endpoint's model")
    samples: dict[str, Annotated[int, Field(gt=0)]] = Field(
        {}, description="benchmark -> k; default: the recipe's, 64 for aime2024 and gpqa_diamond, 16 math500, 8 livecodebench"
    )
    temperature: float = Field(0.6, gt=0)
    top_p: float = Field(0.95, gt=0, le=1)
    max_tokens: int = Field(32768, gt=0, description="response tokens; what is longer is cut, and wrong")
    greedy: bool = Field(False, description="also one response at temperature 0")
    problems: int | None = Field(None, gt=0, description="only this many of each benchmark, drawn by the seed; null: all")
    seed: int = Field(0, description="of the samples, of the order of choices, of the bootstrap")
    contests_from: Day = Field("2024-08-01", description="livecodebench: first contest day, as in the paper")
    contests_to: Day = Field("2025-01-31", description="livecodebench: last contest day")
    responses_per_call: int = Field(
        1024, gt=0, description="asked of the engine at a time; more keeps it busier, fewer are sampled again after a kill"
    )
    resamples: int = Field(10000, gt=0, description="of the bootstrap over problems")
    endpoint: MeasuredEndpointConfig = MeasuredEndpointConfig()


class EvaluateConfig(Section):
    """Held-out evaluation, and in `benchmarks` that on published ones."""

    interval: int = Field(0, ge=0, description="rollouts between evaluations during training; 0: only at the end")
    problems: int = Field(64, gt=0)
    samples: int = Field(8, gt=0, description="k: samples per problem for pass@1 and pass@k")
    temperature: float = Field(1.0, gt=0)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int = 99
    benchmarks: BenchmarksConfig = BenchmarksConfig()
