"""The benchmarks: what is asked, where the answer is expected, which scorer scores it, and how often each problem is sampled.

Prompts are word for word those of their sources. k is the recipe's if it states one (R1 v2, arXiv 2501.12948v2, D.1: 64 for AIME
2024 and GPQA Diamond, 16 for MATH-500, 8 for LiveCodeBench). For the others R1 v1 (arXiv 2501.12948v1) section 3 says "typically
between 4 and 64"; a larger benchmark needs fewer samples for its mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_r1.data.coding_records import ASSERTS_PROMPT, COMPLETION_PROMPT
from megatron_r1.errors import ConfigError

Form = Literal["answer", "choices", "contest", "completion", "asserts"]
ScorerName = Literal["math", "choice", "code"]

# R1 v1 section 3, R1 v2 D.1
_BOXED = "{question}\nPlease reason step by step, and put your final answer within \\boxed{}."
# the same in Chinese, from DeepSeekMath's README
_BOXED_ZH = "{question}\n请通过逐步推理来解答问题，并把最终答案放置于\\boxed{}中。"
# simple-evals' prompt, with the answer's form as R1 v2 D.1 prints it for GPQA
_CHOICES = (
    "Answer the following multiple choice question. The last line of your response should be of the following format: "
    "'ANSWER: $LETTER' (without quotes) where LETTER is one of ABCD. Think step by step before answering.\n\n{question}"
)
# LiveCodeBench's prompt for chat models; what follows its "### Format:" depends on the problem
_CONTEST = "### Question:\n{question}\n\n### Format: {format}\n\n### Answer: (use the provided format with backticks)\n\n"
# ours: neither source has a prompt for models that chat


@dataclass(frozen=True)
class Benchmark:
    """One benchmark. Fields list every name that a published copy uses; the first name that a record has counts."""

    title: str
    size: int | None  #: problems as published; None: depends on the contest days chosen
    samples: int  #: k
    samples_source: str  #: who says so
    form: Form  #: how a row becomes a problem, see `problems.py`
    scorer: ScorerName
    prompt: str
    question: tuple[str, ...]
    answer: tuple[str, ...]
    id: tuple[str, ...]
    category: tuple[str, ...] = ()  #: results are also given by these, e.g. a level
    split: str = "test"  #: of a folder with several
    published: str = ""  #: the places of its published copies

    @property
    def votes(self) -> bool:
        """Whether answers can be counted: programs have no majority."""
        return self.scorer != "code"


_OURS = "not stated; of 4 to 64"

BENCHMARKS = {
    "aime2024": Benchmark(
        "AIME 2024", 30, 64, "R1 v2 D.1", "answer", "math", _BOXED,
        question=("problem", "Problem", "question"), answer=("answer", "Answer", "solution"), id=("id", "ID"), split="train",
        published="HuggingFaceH4/aime_2024, Maxwell-Jia/AIME_2024, math-ai/aime24",
    ),
    "math500": Benchmark(
        "MATH-500", 500, 16, "R1 v2 D.1", "answer", "math", _BOXED,
        question=("problem", "question"), answer=("answer", "solution"), id=("unique_id", "id"), category=("level",),
        published="HuggingFaceH4/MATH-500",
    ),
    "gpqa_diamond": Benchmark(
        "GPQA Diamond", 198, 64, "R1 v2 D.1", "choices", "choice", _CHOICES,
        question=("Question", "question"), answer=("Correct Answer",), id=("Record ID",),
        category=("High-level domain",), split="train",
        published="Idavidrein/gpqa, gpqa_diamond.csv",
    ),
    "livecodebench": Benchmark(
        "LiveCodeBench", None, 8, "R1 v2 D.1", "contest", "code", _CONTEST,
        question=("question_content",), answer=("public_test_cases", "private_test_cases"), id=("question_id",),
        category=("difficulty",),
        published="livecodebench/code_generation_lite, test*.jsonl",
    ),
    "gsm8k": Benchmark(
        "GSM8K", 1319, 4, _OURS, "answer", "math", _BOXED,
        question=("question",), answer=("answer",), id=("id",),
        published="openai/gsm8k, openai/grade-school-math",
    ),
    "humaneval": Benchmark(
        "HumanEval", 164, 8, _OURS, "completion", "code", COMPLETION_PROMPT,
        question=("prompt",), answer=("test",), id=("task_id",),
        published="openai/openai_humaneval, openai/human-eval",
    ),
    "mbpp": Benchmark(
        "MBPP", 500, 8, _OURS, "asserts", "code", ASSERTS_PROMPT,
        question=("text", "prompt"), answer=("test_list",), id=("task_id",),
        published="google-research-datasets/mbpp (full; its sanitized copy has 257 of the 500)",
    ),
    "cmath": Benchmark(
        "CMATH", 1098, 4, _OURS, "answer", "math", _BOXED_ZH,
        question=("question",), answer=("golden", "answer"), id=("id",), category=("grade",),
        published="weitianwen/cmath, test",
    ),
}  # fmt: skip


def find_benchmarks(names: Sequence[str]) -> dict[str, Benchmark]:
    """The named benchmarks, in the order of the table.

    Raises:
        ConfigError: an unknown name.
    """
    for name in names:
        if name not in BENCHMARKS:
            raise ConfigError(f"evaluate.benchmarks: {name!r} is no benchmark; choose of {', '.join(BENCHMARKS)}")
    return {name: benchmark for name, benchmark in BENCHMARKS.items() if name in names}
