"""Tokens and log-probs beside a step's responses: what they cost, which are kept, and that they say what was trained on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_r1.runtime.choose_responses import KINDS, Candidate, choose_responses
from megatron_r1.runtime.kept_tokens import BYTES_PER_TOKEN, TokenColumns, keep_tokens
from megatron_r1.runtime.rollout_files import list_rollouts, write_rollouts
from megatron_r1.types import Prompt, Rollout, RolloutGroup, TrainingSample

NAN = float("nan")


def round_of(lengths: list[int]) -> tuple[list[RolloutGroup], list[TrainingSample]]:
    """One group; the trainer is 0.01 * (number of the response) above the engine."""
    rollouts = [Rollout(np.arange(n) + 7, -np.linspace(0.1, 9, n), "x", True) for n in lengths]
    group = RolloutGroup(Prompt("p", "q", "a", "t", (1, 2, 3)), rollouts, 0, torch.arange(len(lengths), dtype=torch.float64))
    samples = []
    for number, rollout in enumerate(rollouts):
        before, trained = np.zeros(2, np.float32), slice(2, 2 + len(rollout.token_ids))
        engine = np.r_[before, rollout.rollout_logprobs]
        tokens = np.r_[1, 2, 3, rollout.token_ids]
        samples.append(TrainingSample(tokens, trained, rollout_logprobs=engine, old_logprobs=engine + np.float32(0.01 * number)))
    return [group], samples


def test_kept_tokens_come_back_from_the_file_of_the_step(tmp_path: Path) -> None:
    (tmp_path / "rollouts").mkdir()
    groups, samples = round_of([5, 9])
    write_rollouts(tmp_path, 1, groups, 10**6, 0, keep_tokens(groups, samples, 10**6, 0))
    lines = [json.loads(line) for line in list_rollouts(tmp_path)[0].read_text().splitlines()]
    for number, (line, rollout) in enumerate(zip(lines, groups[0].rollouts, strict=True)):
        found = TokenColumns.from_json(line["tokens"])
        assert found.ids.tolist() == rollout.token_ids.tolist()
        assert found.engine == pytest.approx(rollout.rollout_logprobs, rel=2**-11)
        assert found.difference == pytest.approx(np.full(len(rollout.token_ids), 0.01 * number), rel=2**-10, abs=1e-6)
    write_rollouts(tmp_path, 2, groups, 10**6, 0)
    plain = [json.loads(line) for line in list_rollouts(tmp_path)[1].read_text().splitlines()]
    assert plain == [{k: v for k, v in line.items() if k != "tokens"} | {"step": 2} for line in lines], "as older versions wrote it"


def test_a_token_costs_what_the_formula_says_and_a_budget_bounds_a_step() -> None:
    groups, samples = round_of([3000] * 8)
    kept = keep_tokens(groups, samples, 10**9, 0)
    assert len(kept) == 8
    text = json.dumps(kept[0, 0].to_json())
    assert len(text) == pytest.approx(3000 * BYTES_PER_TOKEN, rel=0.01) and pytest.approx(32 / 3) == BYTES_PER_TOKEN
    some = keep_tokens(groups, samples, int(4.5 * 3000 * BYTES_PER_TOKEN), 0)
    assert len(some) == 4 and {(0, 7), (0, 0)} <= some.keys(), "the best, which also differs most, and the worst"
    assert keep_tokens(groups, samples, 0, 0) == {} == keep_tokens(groups, [], 10**6, 0)
    # A round of R1: all tokens would take 2.9 GB, the default keeps 45 whole responses a step.
    assert 8192 * 32768 * BYTES_PER_TOKEN == pytest.approx(2.86e9, rel=0.01) and int(16e6 / (32768 * BYTES_PER_TOKEN)) == 45


def test_numbers_that_are_none_stay_none_and_a_trainer_may_be_unknown() -> None:
    groups, samples = round_of([3])
    samples[0].old_logprobs[3] = NAN
    columns = TokenColumns.from_json(keep_tokens(groups, samples, 10**6, 0)[0, 0].to_json())
    assert np.isnan(columns.difference[1]) and columns.largest_difference == np.inf
    samples[0].old_logprobs = None
    columns = TokenColumns.from_json(keep_tokens(groups, samples, 10**6, 0)[0, 0].to_json())
    assert columns.difference is None and np.isnan(columns.largest_difference)


def test_each_kind_takes_its_turn_and_a_prompt_is_chosen_in_every_step() -> None:
    def step(prompts: range) -> list[Candidate]:
        return [Candidate(f"p{n}", n % 5, NAN if n % 2 else n / 10, n, 10.0) for n in prompts]

    first, second = step(range(100)), step(range(99, -1, -1))
    chosen = choose_responses(first, 100, seed=1)
    assert list(chosen.values()) == list(KINDS) * 2
    assert [first[n].reward for n, kind in chosen.items() if kind in ("best", "worst")] == [4, 0, 4, 0]
    assert [n for n, kind in chosen.items() if kind in ("largest difference", "longest")] == [98, 99, 96, 97]
    assert {first[n].prompt_id for n in chosen} == {second[n].prompt_id for n in choose_responses(second, 100, seed=1)}
    assert choose_responses(first, 100, seed=2) != chosen
    assert choose_responses([], 100, 0) == {} and choose_responses(first, 5, 0) == {}
    assert set(choose_responses(first, 1000, 0).values()) == {"all"}
