"""Pools of scorers, and evaluations as metrics.jsonl keeps them."""

from __future__ import annotations

import json

from megatron_r1.config.load import load_config
from megatron_r1.config.rewards import RewardConfig
from megatron_r1.data.problems import load_problems
from megatron_r1.evaluation.heldout import EvaluationResult
from megatron_r1.pipeline.builders.rewards import build_evaluation, evaluation_metrics, open_scoring, read_evaluation
from megatron_r1.rewards.scorers import scorer_specs


def test_an_evaluation_comes_back_from_its_metrics():
    shares = {"pass_at_1": 0.5, "pass_at_k": 0.75, "greedy": 0.25, "format": 1.0, "format_greedy": 0.0}
    intervals = {name: (value / 2, (1 + value) / 2) for name, value in shares.items()}
    result = EvaluationResult(4, 2, 1.0, response_length=7.5, finished=1.0, unscored=0.0, intervals=intervals, **shares)
    metrics = evaluation_metrics(result)
    assert metrics["eval/pass@1"] == 0.5 and metrics["eval/pass@k/high"] == 0.875 and metrics["eval/greedy/low"] == 0.125
    assert read_evaluation(json.loads(json.dumps(metrics | {"step": 3, "loss": 1.0}))) == result


def test_a_pool_makes_the_folder_of_its_log(tmp_path):
    rewards = RewardConfig(workers=1)
    log = tmp_path / "run" / "scoring.log"
    with open_scoring(rewards, scorer_specs(rewards, ["format"], "r1_zero"), log) as scoring:
        verdict = scoring.submit("format", "<think>a</think><answer>b</answer>").result()
    assert log.is_file()
    assert verdict.score == 1.0


def test_without_problems_there_is_no_evaluation():
    config = load_config(None, ["evaluate.problems=0", "evaluate.interval=1", "data.heldout_fraction=0"])
    measure = build_evaluation(config, None, None, load_problems(config.data), None)
    assert [measure(step, 3, 8) for step in range(4)] == [{}] * 4
