"""Score the responses of one ledger into another."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megatron_r1.config.rewards import RewardConfig
from megatron_r1.evaluation.benchmark_problems import BenchmarkProblem
from megatron_r1.evaluation.benchmarks import Benchmark
from megatron_r1.evaluation.models import OnResponses
from megatron_r1.evaluation.sample_ledger import SampleKey
from megatron_r1.evaluation.vote import sort_into_classes, voted_answer, winning_classes
from megatron_r1.rewards.protocol import Verdict
from megatron_r1.rewards.rules.choice import find_letter
from megatron_r1.rewards.scorers import SCORERS, ScorerSpec
from megatron_r1.rewards.workers.pool import ScoringPool
from megatron_r1.runtime.ledger import Ledger
from megatron_r1.tags import find_answers

PLACE = "boxed"  #: the place in which benchmarks of mathematics ask for the answer
_WRITTEN_TOGETHER = 64


def evaluation_specs(benchmark: Benchmark, config: RewardConfig) -> dict[str, ScorerSpec]:
    """The scorers that a benchmark needs, with the settings of `reward`."""
    policy = config.math.model_dump()
    if benchmark.scorer == "code":
        return {"code": ScorerSpec(SCORERS["code"], config.code_time_limit_seconds, config.code.model_dump())}
    limit = config.time_limit_seconds
    if benchmark.scorer == "choice":
        return {"choice": ScorerSpec(SCORERS["choice"], limit)}
    return {
        "math": ScorerSpec(SCORERS["math"], limit, {"answer_location": PLACE, "policy": policy}),
        "classes": ScorerSpec("megatron_r1.evaluation.vote:AnswerClasses", limit, {"policy": policy}),
    }


def score_responses(
    benchmark: Benchmark,
    problems: Sequence[BenchmarkProblem],
    responses: Ledger,
    scores: Ledger,
    scoring: ScoringPool,
    on_responses: OnResponses,
) -> None:
    """Append a line for every response of `problems` that `scores` does not have: problem, sample, score, outcome, detail, answer.

    A response that was cut at the limit is wrong without being scored.

    Raises:
        RewardError: the scorer cannot work here.
    """
    references = {problem.id: problem.reference for problem in problems}
    left = [key for key in responses.records if key[0] in references and key not in scores.records]
    finished = [key for key in left if responses.records[key]["finished"]]
    in_order: deque[SampleKey] = deque()
    lines: list[dict[str, Any]] = []

    def keep(key: SampleKey, verdict: Verdict, answer: str | None) -> None:
        line = {"problem": key[0], "sample": key[1], "score": verdict.score, "outcome": verdict.outcome, "detail": verdict.detail}
        lines.append(line | ({"answer": answer} if benchmark.votes else {}))
        if len(lines) >= _WRITTEN_TOGETHER:
            write()

    def write() -> None:
        scores.append(lines)
        on_responses(len(lines))
        lines.clear()

    def to_score() -> Iterator[tuple[str, str, Any]]:
        for key in finished:
            in_order.append(key)
            yield benchmark.scorer, responses.records[key]["response"], references[key[0]]

    for key in set(left).difference(finished):
        keep(key, Verdict(0.0, "wrong", "cut at the length limit"), None)
    for verdict in scoring.stream(to_score()):
        key = in_order.popleft()
        keep(key, verdict, _find_answer(benchmark, responses.records[key]["response"]))
    write()


def _find_answer(benchmark: Benchmark, response: str) -> str | None:
    """What a response votes for."""
    if benchmark.scorer == "choice":
        return find_letter(response)
    answers = find_answers(response, PLACE) if benchmark.scorer == "math" else []
    return answers[-1] if answers else None


def vote_classes(
    benchmark: Benchmark, problems: Sequence[BenchmarkProblem], samples: int, scores: Ledger, scoring: ScoringPool
) -> tuple[Mapping[str, list[int | None]], int]:
    """Every problem's classes of answers, by sample (None: no answer), and for how many problems the comparison failed.

    For those, two answers are the same if they are written the same.
    """
    answers = {p.id: [scores.records[p.id, sample]["answer"] for sample in range(samples)] for p in problems}
    given = {id: [answer for answer in row if answer is not None] for id, row in answers.items()}
    failed = 0
    if benchmark.scorer == "math":
        verdicts = scoring.stream(("classes", json.dumps(row), None) for row in given.values())
    else:
        verdicts = iter([None] * len(given))
    classes = {}
    for (id, row), verdict in zip(given.items(), verdicts, strict=True):
        if verdict is not None and verdict.parts is not None:
            numbers = list(verdict.parts["classes"])
        else:
            failed += verdict is not None
            numbers = sort_into_classes(row, lambda a, b: a == b)
        rest = iter(numbers)
        classes[id] = [None if answer is None else next(rest) for answer in answers[id]]
    return classes, failed


def judge_votes(
    benchmark: Benchmark,
    problems: Sequence[BenchmarkProblem],
    classes: Mapping[str, Sequence[int | None]],
    scores: Ledger,
    scoring: ScoringPool,
) -> Mapping[str, list[bool]]:
    """Whether the answer that each sample votes for is right, by problem, as far as the vote depends on it.

    The answers of the classes with the most votes are judged by themselves: a response with a second box may be wrong and vote for
    the right answer. Other samples, and those whose answer cannot be judged, keep the scores of their responses.
    """
    right = {p.id: [scores.records[p.id, sample]["score"] == 1.0 for sample in range(len(classes[p.id]))] for p in problems}
    if benchmark.scorer != "math":
        return right
    asked: deque[tuple[str, int]] = deque()

    def to_judge() -> Iterator[tuple[str, str, Any]]:
        for problem in problems:
            answers = [scores.records[problem.id, sample]["answer"] for sample in range(len(classes[problem.id]))]
            for winner in winning_classes(classes[problem.id]):
                asked.append((problem.id, winner))
                yield "math", f"\\boxed{{{voted_answer(classes[problem.id], answers, winner)}}}", problem.reference

    for verdict in scoring.stream(to_judge()):
        id, winner = asked.popleft()
        if verdict.score is not None:
            row = zip(classes[id], right[id], strict=True)
            right[id] = [verdict.score == 1.0 if number == winner else is_right for number, is_right in row]
    return right
