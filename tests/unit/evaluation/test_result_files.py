"""Votes, intervals and tables."""

from __future__ import annotations

import json
from itertools import permutations

import numpy as np
import pytest

from megatron_r1.config.rewards import RewardConfig
from megatron_r1.errors import DataError
from megatron_r1.evaluation.benchmark_problems import BenchmarkProblem
from megatron_r1.evaluation.benchmarks import BENCHMARKS
from megatron_r1.evaluation.measure import bootstrap_interval, measure_benchmark
from megatron_r1.evaluation.published import METRICS, PUBLISHED, STAGES
from megatron_r1.evaluation.recipe_table import render_recipe_table
from megatron_r1.evaluation.result_files import ModelResults, named_results, read_results, write_results
from megatron_r1.evaluation.sample_ledger import open_samples
from megatron_r1.evaluation.score_responses import evaluation_specs, judge_votes, score_responses, vote_classes
from megatron_r1.evaluation.vote import majority_score, sort_into_classes
from megatron_r1.rewards.scorers import build_scorer

PROBLEMS = [
    BenchmarkProblem("a", "", "1/2", "easy"),
    BenchmarkProblem("b", "", "7", "hard"),
    BenchmarkProblem("c", "", "7", "hard"),
]
ANSWERS = {"a": ["0.5", "\\frac{1}{2}", "3", "3"], "b": ["7", "7.0", "8", None], "c": ["8", "8", "7", "..."]}


class DirectScoring:
    """The scorers of a benchmark in this process."""

    def __init__(self) -> None:
        specs = evaluation_specs(BENCHMARKS["math500"], RewardConfig())
        self._scorers = {name: build_scorer(spec.target, spec.settings) for name, spec in specs.items()}

    def stream(self, items):
        """See `Scoring`."""
        return (self._scorers[name].score(response, reference) for name, response, reference in items)


@pytest.fixture
def measured(tmp_path):
    """Three problems, four samples each; the last of problem c is cut, the last of b has no box."""
    with open_samples(tmp_path / "r.jsonl", {}) as responses, open_samples(tmp_path / "s.jsonl", {}) as scores:
        responses.append(
            {"problem": id, "sample": n, "response": f"So \\boxed{{{x}}}" if x else "7", "finished": x != "...", "tokens": 10 * n}
            for id, row in ANSWERS.items()
            for n, x in enumerate(row)
        )
        benchmark, scoring, told = BENCHMARKS["math500"], DirectScoring(), []
        score_responses(benchmark, PROBLEMS, responses, scores, scoring, told.append)
        assert sum(told) == 12
        score_responses(benchmark, PROBLEMS, responses, scores, scoring, told.append)
        assert sum(told) == 12, "nothing is scored twice"
        classes, failed = vote_classes(benchmark, PROBLEMS, 4, scores, scoring)
        assert classes == {"a": [0, 0, 1, 1], "b": [0, 0, 1, None], "c": [0, 0, 1, None]} and failed == 0
        assert scores.records["c", 3]["detail"] == "cut at the length limit" and scores.records["a", 1]["answer"] == "\\frac{1}{2}"
        yield measure_benchmark(
            PROBLEMS, 4, responses, scores, classes=classes, greedy_scores=None, resamples=2000, seed=0, notes=["three problems"]
        )


def test_shares_are_means_over_samples_and_problems(measured):
    assert measured.pass_at_1.value == pytest.approx((2 / 4 + 2 / 4 + 1 / 4) / 3)
    assert measured.cons.value == pytest.approx((0.5 + 1 + 0) / 3), "a tie counts half where one of two is right"
    assert measured.pass_at[2].value == pytest.approx((1 - 1 / 6 + 1 - 1 / 6 + 1 - 3 / 6) / 3) and measured.pass_at[4].value == 1.0
    assert list(measured.pass_at) == [2, 4] and measured.greedy is None
    assert (measured.length, measured.cut, measured.unscorable) == (15.0, pytest.approx(1 / 12), 0.0)
    assert measured.categories == {"easy": (1, 0.5), "hard": (2, 0.375)}
    assert measured.pass_at_1.low == 0.25 and measured.pass_at_1.high == 0.5


@pytest.mark.parametrize(
    ("classes", "correct", "score"),
    [
        ([0, 0, 1], [True, True, False], 1.0),
        ([0, 1, 1], [True, False, False], 0.0),
        ([0, 1], [True, False], 0.5),
        ([0, 1, 2], [False, True, False], 1 / 3),
        ([None, 0, None], [False, True, False], 1.0),
        ([None, None], [False, False], 0.0),
        ([0, 0, 0], [False, True, True], 1.0),  # the first member shows a second, wrong box
        ([0, 0, 1, 1], [True, False, False, False], 0.5),
        ([], [], 0.0),
    ],
)
def test_majority_vote(classes, correct, score):
    assert majority_score(classes, correct) == pytest.approx(score)


@pytest.mark.parametrize("answers", [["5", "5.0", "6", None, "6"], ["1/3", "0.333", "0.3333", "0.33333"], ["a", "b", "ab", "b"]])
def test_the_order_of_samples_does_not_change_the_vote(answers):
    def agree(left, right):  # not transitive, as rounding is
        return left[:4] == right[:4] or {left, right} == {"5", "5.0"} or {left, right} == {"1/3", "0.333"}

    found = set()
    for order in permutations(range(len(answers))):
        row = [answers[index] for index in order if answers[index] is not None]
        classes = sort_into_classes(row, agree)
        assert [classes.index(number) for number in sorted(set(classes))] == sorted(map(classes.index, set(classes)))
        groups = {frozenset(text for text, own in zip(row, classes, strict=True) if own == number) for number in classes}
        found.add((frozenset(groups), majority_score(classes, [text in ("5", "1/3", "b") for text in row])))
    assert len(found) == 1


BOXES = {  # the responses' boxes, and the right vote
    "all members show a second box": ([["4", "5"], ["4", "5"], ["7"]], 1.0),
    "one member shows a second box": ([["4", "5"], ["5"], ["5.0"]], 1.0),
    "the voted answer is wrong": ([["5", "4"], ["5", "4"], ["5"]], 0.0),
    "a tie": ([["4", "5"], ["4"]], 0.5),
    "no answer": ([[], []], 0.0),
    "right and right": ([["5"], ["5"], ["6"]], 1.0),
}


@pytest.mark.parametrize("kind", BOXES)
def test_the_voted_answer_itself_is_judged(kind, tmp_path):
    rows, score = BOXES[kind]
    problem = BenchmarkProblem("a", "", "5", "")
    for number, order in enumerate(permutations(rows)):
        with open_samples(tmp_path / f"r{number}", {}) as responses, open_samples(tmp_path / f"s{number}", {}) as scores:
            responses.append(
                {"problem": "a", "sample": n, "response": " ".join(f"\\boxed{{{x}}}" for x in row), "finished": True, "tokens": 1}
                for n, row in enumerate(order)
            )
            benchmark, scoring = BENCHMARKS["math500"], DirectScoring()
            score_responses(benchmark, [problem], responses, scores, scoring, lambda _: None)
            classes, _ = vote_classes(benchmark, [problem], len(rows), scores, scoring)
            result = measure_benchmark(
                [problem],
                len(rows),
                responses,
                scores,
                classes=classes,
                right_votes=judge_votes(benchmark, [problem], classes, scores, scoring),
                greedy_scores=None,
                resamples=10,
                seed=0,
            )
        assert result.cons.value == score, order


def test_bootstrap_interval_is_the_normal_one_for_many_problems():
    values = np.random.default_rng(1).random(400) ** 2
    low, high = bootstrap_interval(values.tolist(), 4000, seed=0)
    half = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.003)
    assert bootstrap_interval(values.tolist(), 4000, seed=0) == (low, high) != bootstrap_interval(values.tolist(), 4000, seed=1)
    assert bootstrap_interval([0.0] * 30, 100, seed=0) == (0.0, 0.0)


def results(name: str, benchmark: str, result) -> ModelResults:
    sampling = {"temperature": 0.6, "top_p": 0.95, "max_tokens": 32768, "seed": 0, "template": "r1_chat"}
    return ModelResults(name, f"runs/{name}", sampling, {benchmark: result})


def test_results_are_read_back_and_shown(measured, tmp_path):
    table = write_results(tmp_path, results("mine", "math500", measured))
    assert read_results(tmp_path) == results("mine", "math500", measured)
    assert (tmp_path / "results.md").read_text() == f"# mine\n\n{table}\n"
    cells = [cell.strip() for cell in table.splitlines()[2].split("|")[1:-1]]
    assert cells == ["MATH-500", "3", "4", "41.7 [25.0, 50.0]", "50.0 [0.0, 100.0]", "100.0 [100.0, 100.0]", "15", "8.3%", "0.0%"]
    assert "MATH-500: three problems." in table and "pass@1 by category: easy 50.0% of 1, hard 37.5% of 2." in table
    assert named_results([("other", tmp_path)])[0].name == "other"
    (tmp_path / "results.json").write_text(json.dumps({"name": "x"}))
    with pytest.raises(DataError, match="results.json: not the results of an evaluation"):
        read_results(tmp_path)
    with pytest.raises(DataError, match="results.json: no such file"):
        read_results(tmp_path / "none")


def rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]


def test_measured_numbers_stand_apart_from_published_ones(measured):
    table = render_recipe_table(
        [results("deepseek-r1-distill-qwen-7b", "math500", measured), results("Dev1", "aime2024", measured)]
    )
    stages, reasoning = (rows(part) for part in table.split("## Reasoning benchmarks"))
    assert stages[0] == ["benchmark", "", *STAGES]
    at = next(n for n, row in enumerate(stages) if row[0] == "AIME 2024")
    assert stages[at] == ["AIME 2024", "published, R1 v2 Table 3", "77.9", "59.0", "74.0", "78.1", "79.8"]
    assert stages[at + 1] == ["", "**measured**", "", "**41.7** [25.0, 50.0]", "", "", ""]
    assert stages[at + 3] == ["", "**measured**", "", "**50.0** [0.0, 100.0] cons@4", "", "", ""]
    assert sum("measured" in row[1] for row in stages) == 2
    at = next(n for n, row in enumerate(reasoning) if row[0] == "Distill-Qwen-7B")
    assert reasoning[at] == ["Distill-Qwen-7B", "published, R1 v1 Table 5", "55.5", "83.3", "92.8", "49.1", "37.6", "1189"]
    assert reasoning[at + 1] == ["", "**measured**", "", "", "**41.7** [25.0, 50.0]", "", "", ""]
    assert all("**" not in "".join(row[2:]) for row in stages[1:] + reasoning[1:] if row[1].startswith("published"))


def test_other_models_and_benchmarks_get_rows_of_their_own(measured):
    table = render_recipe_table([results("tiny", "gsm8k", measured)])
    assert ["GSM8K", "**measured**", "", "", "", "", ""] not in rows(table), "no stage was measured"
    assert rows(table)[-1] == ["tiny", "**measured**", *[""] * 6, "**41.7** [25.0, 50.0]"]
    with pytest.raises(DataError, match="two results are named 'R1'"):
        render_recipe_table([results("r1", "gsm8k", measured), results("DeepSeek-R1", "gsm8k", measured)])


def test_published_numbers():
    assert set(PUBLISHED) >= {*STAGES, "Distill-Qwen-32B", "Zero-Qwen-32B", "QwQ-32B-Preview", "Distill-Llama-70B"}
    assert PUBLISHED["R1"].numbers["aime"] == 79.8 and PUBLISHED["Dev2"].numbers["if_eval"] == 72.0
    assert PUBLISHED["Zero-Qwen-32B"].numbers == {"aime": 47.0, "aime_cons": 60.0, "math500": 91.6, "gpqa": 55.0, "lcb": 40.2}
    assert all(set(model.numbers) <= set(METRICS) for model in PUBLISHED.values())
    assert {metric.benchmark for metric in METRICS.values()} - {None} == set(BENCHMARKS)
