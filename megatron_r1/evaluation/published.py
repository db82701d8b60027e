"""Published numbers of others, to show beside measured ones. In percent, except ratings.

Sources: R1 v1 is arXiv 2501.12948v1, R1 v2 is arXiv 2501.12948v2. If both have a number and the numbers differ, that of R1 v2
stands here and the table says so.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TableMetric:
    """One row or column of the recipe's tables."""

    title: str
    benchmark: str | None = None  #: in `BENCHMARKS`; None: this project does not measure it
    vote: bool = False  #: the majority vote, not pass@1


METRICS = {
    "aime": TableMetric("AIME 2024", "aime2024"),
    "aime_cons": TableMetric("AIME 2024 cons@64", "aime2024", vote=True),
    "math500": TableMetric("MATH-500", "math500"),
    "gpqa": TableMetric("GPQA Diamond", "gpqa_diamond"),
    "lcb": TableMetric("LiveCodeBench", "livecodebench"),
    "cf": TableMetric("Codeforces rating"),
    "mmlu": TableMetric("MMLU"),
    "mmlu_redux": TableMetric("MMLU-Redux"),
    "mmlu_pro": TableMetric("MMLU-Pro"),
    "drop": TableMetric("DROP"),
    "if_eval": TableMetric("IF-Eval"),
    "simpleqa": TableMetric("SimpleQA"),
    "frames": TableMetric("FRAMES"),
    "alpaca": TableMetric("AlpacaEval 2.0"),
    "arena": TableMetric("ArenaHard"),
    "cf_percentile": TableMetric("Codeforces percentile"),
    "swe": TableMetric("SWE-bench Verified"),
    "aider": TableMetric("Aider-Polyglot"),
    "cnmo": TableMetric("CNMO 2024"),
    "cluewsc": TableMetric("CLUEWSC"),
    "ceval": TableMetric("C-Eval"),
    "c_simpleqa": TableMetric("C-SimpleQA"),
    "gsm8k": TableMetric("GSM8K", "gsm8k"),
    "humaneval": TableMetric("HumanEval", "humaneval"),
    "mbpp": TableMetric("MBPP", "mbpp"),
    "cmath": TableMetric("CMATH", "cmath"),
}

#: R1 v2 Table 3, in its order: every stage of the recipe
STAGES = ("R1-Zero", "Dev1", "Dev2", "Dev3", "R1")
STAGE_SOURCE = "R1 v2 Table 3"
OTHER_STAGE_SOURCES = {"aime_cons": "R1 v1 Table 2, R1 v2 D"}  #: of metrics that are not in that table
_STAGE_ROWS: dict[str, tuple[float | None, ...]] = {
    "mmlu": (88.8, 89.1, 91.2, 91.0, 90.8),
    "mmlu_redux": (85.6, 90.0, 93.0, 93.1, 92.9),
    "mmlu_pro": (68.9, 74.1, 83.8, 83.1, 84.0),
    "drop": (89.1, 89.8, 91.1, 88.7, 92.2),
    "if_eval": (46.6, 71.7, 72.0, 78.1, 83.3),
    "gpqa": (75.8, 66.1, 70.7, 71.2, 71.5),
    "simpleqa": (30.3, 17.8, 28.2, 24.9, 30.1),
    "frames": (82.3, 78.5, 81.8, 81.9, 82.5),
    "alpaca": (24.7, 50.1, 55.8, 62.1, 87.6),
    "arena": (53.6, 77.0, 73.2, 75.6, 92.3),
    "lcb": (50.0, 57.5, 63.5, 64.6, 65.9),
    "cf_percentile": (80.4, 84.5, 90.5, 92.1, 96.3),
    "cf": (1444, 1534, 1687, 1746, 2029),
    "swe": (43.2, 39.6, 44.6, 45.6, 49.2),
    "aider": (12.2, 6.7, 25.6, 44.8, 53.3),
    "aime": (77.9, 59.0, 74.0, 78.1, 79.8),
    "aime_cons": (86.7, None, None, None, 86.7),
    "math500": (95.9, 94.2, 95.9, 95.4, 97.3),
    "cnmo": (88.1, 58.0, 73.9, 77.3, 78.8),
    "cluewsc": (93.1, 92.8, 92.6, 91.6, 92.8),
    "ceval": (92.8, 85.7, 91.9, 86.4, 91.8),
    "c_simpleqa": (66.4, 58.8, 64.2, 66.9, 63.7),
}

#: The reasoning benchmarks of R1 v1 Tables 2, 5 and 6 (R1 v2 Tables 15 and 16), in their columns
REASONING = ("aime", "aime_cons", "math500", "gpqa", "lcb", "cf")
_V1_2, _V1_5, _V1_6 = "R1 v1 Table 2", "R1 v1 Table 5", "R1 v1 Table 6"
_REASONING_ROWS: dict[str, tuple[str, tuple[float | None, ...]]] = {
    "GPT-4o-0513": (_V1_5, (9.3, 13.4, 74.6, 49.9, 32.9, 759)),
    "Claude-3.5-Sonnet-1022": (_V1_5, (16.0, 26.7, 78.3, 65.0, 38.9, 717)),
    "o1-mini": (_V1_5, (63.6, 80.0, 90.0, 60.0, 53.8, 1820)),
    "o1-0912": (_V1_2, (74.4, 83.3, 94.8, 77.3, 63.4, 1843)),
    "QwQ-32B-Preview": (_V1_5, (50.0, 60.0, 90.6, 54.5, 41.9, 1316)),
    "Zero-Qwen-32B": (_V1_6, (47.0, 60.0, 91.6, 55.0, 40.2, None)),
    "Distill-Qwen-1.5B": (_V1_5, (28.9, 52.7, 83.9, 33.8, 16.9, 954)),
    "Distill-Qwen-7B": (_V1_5, (55.5, 83.3, 92.8, 49.1, 37.6, 1189)),
    "Distill-Qwen-14B": (_V1_5, (69.7, 80.0, 93.9, 59.1, 53.1, 1481)),
    "Distill-Qwen-32B": (_V1_5, (72.6, 83.3, 94.3, 62.1, 57.2, 1691)),
    "Distill-Llama-8B": (_V1_5, (50.4, 80.0, 89.1, 49.0, 39.6, 1205)),
    "Distill-Llama-70B": (_V1_5, (70.0, 86.7, 94.5, 65.2, 57.5, 1633)),
}

NOTES = (
    "R1-Zero: R1 v1 Table 2 has 71.0 on AIME 2024 and 73.3 on GPQA Diamond; its cons@64 is of R1 v1, that of R1 is of R1 v2.",
    "QwQ-32B-Preview: the DeepSeek-R1 repository's README has 44.0 on AIME 2024. Zero-Qwen-32B is Qwen2.5-32B-Zero in R1 v2.",
)


@dataclass(frozen=True)
class Published:
    """A model's published numbers."""

    source: str
    numbers: dict[str, float]  #: by the names of `METRICS`; what is not published is left out


def _collect_published() -> dict[str, Published]:
    stages = {
        stage: Published(STAGE_SOURCE, {m: row[i] for m, row in _STAGE_ROWS.items() if row[i] is not None})
        for i, stage in enumerate(STAGES)
    }
    others = {
        model: Published(source, {m: value for m, value in zip(REASONING, row, strict=True) if value is not None})
        for model, (source, row) in _REASONING_ROWS.items()
    }
    return stages | others


PUBLISHED = _collect_published()  #: by model, the stages first
