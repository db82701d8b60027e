"""Pools of scorers, and evaluations as metrics.jsonl keeps them."""

from __future__ import annotations

import json

import pytest

from megatron_r1.config.load import load_config
from megatron_r1.config.rewards import JudgeConfig, RewardConfig
from megatron_r1.data.problems import load_problems
from megatron_r1.evaluation.heldout import EvaluationResult
from megatron_r1.pipeline.builders.rewards import (
    build_evaluation,
    evaluation_metrics,
    judge_of_rank,
    open_scoring,
    pool_workers,
    read_evaluation,
)
from megatron_r1.rewards.scorers import scorer_specs
from megatron_r1.runtime.cores import SharedCores


def test_an_evaluation_comes_back_from_its_metrics():
    shares = {"pass_at_1": 0.5, "pass_at_k": 0.75, "greedy": 0.25, "format": 1.0, "format_greedy": 0.0}
    custom = {"loose": {"pass_at_1": 0.25, "pass_at_k": 0.5, "greedy": 0.125}}
    bounded = shares | {f"loose/{name}": value for name, value in custom["loose"].items()}
    intervals = {name: (value / 2, (1 + value) / 2) for name, value in bounded.items()}
    result = EvaluationResult(
        4, 2, 1.0, response_length=7.5, finished=1.0, unscored=0.0, intervals=intervals, custom=custom, **shares
    )
    metrics = evaluation_metrics(result)
    assert metrics["eval/pass@1"] == 0.5 and metrics["eval/pass@k/high"] == 0.875 and metrics["eval/greedy/low"] == 0.125
    assert metrics["eval/loose/pass@k"] == 0.5 and metrics["eval/loose/greedy/high"] == 0.5625
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


@pytest.mark.parametrize(
    ("cores", "ranks", "pools", "threads", "workers"),
    [
        (128, 8, 1, 1, 64),  # one engine of a node, ranks not bound: 120 cores are free, and one thread feeds 64 processes
        (128, 8, 8, 1, 15),  # an engine for each GPU
        (16, 1, 1, 1, 15),  # the same node, ranks bound to 16 cores each
        (128, 8, 8, 8, 8),
        (2, 1, 1, 1, 1),
        (2, 2, 2, 1, 1),  # never none
        (128, 8, 8, 16, 4),  # threads take all cores
        (16, 1, 1, 16, 4),
    ],
)
def test_a_pool_takes_its_part_of_the_cores_that_ranks_leave_free(cores, ranks, pools, threads, workers):
    assert pool_workers(None, SharedCores(cores, ranks, pools), threads) == workers
    assert pool_workers(3, SharedCores(cores, ranks, pools), threads) == 3, "a number is that of each pool"


def test_ranks_divide_the_judge_and_write_a_cache_each():
    judge = JudgeConfig(concurrency=17, cache="kept/judge.sqlite")
    owners = [0, 64, 128, 192, 256, 320, 384, 448]
    shares = [judge_of_rank(judge, owners, rank) for rank in owners]
    assert [share.concurrency for share in shares] == [3] + [2] * 7
    assert [share.cache for share in shares[:2]] == ["kept/judge.sqlite", "kept/judge_00064.sqlite"]
    assert judge_of_rank(judge, [0], 0) == judge
    assert [judge_of_rank(JudgeConfig(concurrency=1), [0, 1], rank).concurrency for rank in (0, 1)] == [1, 1]
