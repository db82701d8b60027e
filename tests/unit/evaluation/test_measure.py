import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, replace

import pytest
import torch

from megatron_r1.config.evaluation import EvaluateConfig
from megatron_r1.config.rewards import RewardConfig
from megatron_r1.errors import DataError
from megatron_r1.evaluation.heldout import EvaluationResult, evaluate_heldout
from megatron_r1.evaluation.heldout_table import render_heldout, render_table
from megatron_r1.evaluation.measure import bootstrap_interval
from megatron_r1.evaluation.passk import pass_at_k, wilson_interval
from megatron_r1.types import Prompt, Rollout, RolloutGroup, Sampling
from tests.direct_scoring import score_groups


def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample():
    for samples in range(1, 8):
        for correct in range(samples + 1):
            right = [True] * correct + [False] * (samples - correct)
            for k in range(1, samples + 1):
                subsets = list(itertools.combinations(right, k))
                assert pass_at_k(samples, correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


@pytest.mark.parametrize(("samples", "correct", "k"), [(4, 5, 1), (4, -1, 1), (4, 2, 5), (4, 2, 0)])
def test_pass_at_k_refuses_what_cannot_be(samples, correct, k):
    with pytest.raises(ValueError, match="cannot be estimated"):
        pass_at_k(samples, correct, k)


def test_wilson_interval_against_published_values():
    # Newcombe 1998 (Statistics in Medicine 17:857), Table I, method 3.
    for correct, problems, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert wilson_interval(correct / problems, problems) == pytest.approx((low, high), abs=5e-5)
    assert wilson_interval(1.0, 20) == pytest.approx((1 - 0.1611, 1.0), abs=5e-5)


def test_wilson_interval_covers_clustered_scores():
    """Problems differ in difficulty and are sampled 8 times: the interval over problems covers the mean 95% of the time or more."""
    generator = torch.Generator().manual_seed(0)
    trials, problems, samples = 2000, 64, 8
    difficulty = torch.rand(trials, problems, generator=generator) ** 2  # mean 1/3
    counts = torch.rand(trials, problems, samples, generator=generator).lt(difficulty[..., None]).double().mean(dim=(1, 2))
    covered = sum(low <= 1 / 3 <= high for low, high in (wilson_interval(p, problems) for p in counts.tolist()))
    assert covered / trials >= 0.95


class ScriptedEngine:
    """Answers every prompt with given texts; the greedy answer is the last of them."""

    def __init__(self, texts: list[list[str]]):
        self.texts, self.calls = texts, []

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, seed: int, on_group: object) -> list[RolloutGroup]:
        self.calls.append((sampling, seed))
        groups = []
        for prompt, texts in zip(prompts, self.texts, strict=True):
            chosen = [*texts, texts[-1]]
            rollouts = [Rollout([7] * len(text), [0.0] * len(text), text, not text.endswith("...")) for text in chosen]
            groups.append(RolloutGroup(prompt, rollouts, 3))
        return groups


RIGHT, WRONG, LOOSE = "<think>a</think><answer>8</answer>", "<think>a</think><answer>7</answer>", "<answer>8</answer>"


def run(texts: list[list[str]]) -> tuple[EvaluationResult, ScriptedEngine]:
    prompts = [Prompt(f"p{n}", "q", "8", "text", (1,)) for n in range(len(texts))]
    engine = ScriptedEngine(texts)
    config = EvaluateConfig(samples=len(texts[0]), temperature=0.7, top_p=0.9, seed=11)
    return evaluate_heldout(engine, prompts, lambda groups, _: score_groups(RewardConfig(), groups), config, max_tokens=50), engine


def test_evaluation_counts_sampled_and_greedy_apart():
    result, engine = run([[RIGHT, WRONG, WRONG, RIGHT], [LOOSE, WRONG, "8...", WRONG], [WRONG, WRONG, WRONG, LOOSE], ["8"] * 4])
    assert engine.calls == [(Sampling(4, 0.7, 0.9, 50, greedy=1), 11)]
    assert (result.problems, result.k, result.temperature) == (4, 4, 0.7)
    assert result.pass_at_1 == pytest.approx((2 + 1 + 1 + 0) / 16)
    assert result.pass_at_k == pytest.approx(3 / 4)
    assert result.greedy == pytest.approx(2 / 4)
    assert result.format == pytest.approx((4 + 2 + 3 + 0) / 16)
    assert result.format_greedy == pytest.approx(2 / 4)
    assert result.finished == pytest.approx(15 / 16)
    lengths = [34] * 4 + [18, 34, 4, 34] + [34, 34, 34, 18] + [1] * 4
    assert result.response_length == pytest.approx(sum(lengths) / 16)
    for name in ("pass_at_1", "pass_at_k", "greedy", "format", "format_greedy"):
        low, high = result.intervals[name]
        assert low < getattr(result, name) < high


def test_the_table_shows_results_side_by_side():
    base, _ = run([[WRONG, WRONG, RIGHT]] * 4)
    zero, _ = run([[RIGHT] * 3] * 4)
    lines = render_table({"base": base, "R1-Zero": zero}).splitlines()
    assert [cell.strip() for cell in lines[0].split("|")[1:-1]] == ["4 held-out problems", "base", "R1-Zero"]
    assert len({len(line) for line in lines[:-2]}) == 1, "columns are aligned"
    cells = {row[0]: row[1:] for row in ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:-2])}
    assert list(cells) == [
        "pass@1",
        "pass@3",
        "greedy accuracy",
        "format",
        "format, greedy",
        "response length (tokens)",
        "finished",
    ]
    assert cells["pass@1"][0].startswith("33.3% [") and cells["pass@1"][1].startswith("100.0% [51.0%, 100.0%]")
    assert cells["pass@3"][0].startswith("100.0%") and cells["response length (tokens)"] == ["34.0", "34.0"]
    assert "temperature 0.7, 3 samples" in lines[-1]


def test_rewards_of_ones_own_are_measured_beside_the_accuracy():
    def reward_fn(groups: Sequence[RolloutGroup], prompts: Sequence[Prompt]) -> list[RolloutGroup]:
        for group in groups:
            group.reward_parts = {
                "accuracy": [float(rollout.text == RIGHT) for rollout in group.rollouts],
                "length": [-1.0] * len(group.rollouts),
                "loose": [{RIGHT: 1.0, LOOSE: 2.0, "...": None}.get(rollout.text, 0.5) for rollout in group.rollouts],
            }
        groups[0].reward_parts["elsewhere"] = [1.0] * len(groups[0].rollouts)
        return list(groups)

    prompts = [Prompt(f"p{n}", "q", "8", "text", (1,)) for n in range(2)]
    engine = ScriptedEngine([[RIGHT, LOOSE, WRONG], ["...", WRONG, LOOSE]])
    result = evaluate_heldout(engine, prompts, reward_fn, EvaluateConfig(samples=3), max_tokens=50)
    assert (result.pass_at_1, result.greedy) == (pytest.approx(1 / 6), 0.0)
    assert result.custom == {"loose": {"pass_at_1": pytest.approx(3 / 6), "pass_at_k": 1.0, "greedy": 0.5}}
    assert result.intervals["loose/greedy"] == wilson_interval(0.5, 2)
    lines = render_table({"plain": run([[RIGHT] * 3] * 2)[0], "loose": replace(result, temperature=0.7)}).splitlines()
    row = next(line for line in lines if line.startswith("| loose: pass@3"))
    assert [cell.strip() for cell in row.split("|")[2:-1]] == ["-", "100.0% [34.2%, 100.0%]"]


def test_kept_results_are_compared_by_name(tmp_path):
    for name, text in (("before", WRONG), ("after", RIGHT)):
        (tmp_path / f"{name}.json").write_text(json.dumps(asdict(run([[text] * 3] * 4)[0])))
    files = {name: tmp_path / f"{name}.json" for name in ("before", "after")}
    assert render_heldout(files) == render_table({name: run([[text] * 3] * 4)[0] for name, text in zip(files, (WRONG, RIGHT))})
    (tmp_path / "other.json").write_text(json.dumps(asdict(run([[RIGHT]])[0])))
    with pytest.raises(DataError, match="cannot be compared"):
        render_heldout(files | {"other": tmp_path / "other.json"})
    (tmp_path / "other.json").write_text('{"problems": 3}')
    for name, said in (("other", "not the result of an evaluation"), ("none", "no such file")):
        with pytest.raises(DataError, match=f"{name}.json: {said}"):
            render_heldout(files | {name: tmp_path / f"{name}.json"})


def test_results_of_different_settings_do_not_stand_side_by_side():
    with pytest.raises(ValueError, match="cannot be compared"):
        render_table({"a": run([[RIGHT, RIGHT]])[0], "b": run([[RIGHT]])[0]})


def test_what_could_not_be_scored_is_named():
    def reward_fn(groups: Sequence[RolloutGroup], prompts: Sequence[Prompt]) -> list[RolloutGroup]:
        for group in groups:
            scores = [None if rollout.text == LOOSE else 1.0 for rollout in group.rollouts]
            group.reward_parts = {"accuracy": scores, "format": [0.0] * len(scores)}
        return list(groups)

    prompts = [Prompt("p", "q", "8", "text", (1,))]
    result = evaluate_heldout(ScriptedEngine([[RIGHT, LOOSE, RIGHT]]), prompts, reward_fn, EvaluateConfig(samples=3), max_tokens=50)
    assert (result.unscored, result.pass_at_1) == (0.25, pytest.approx(2 / 3))
    assert "| accuracy not scored      | 25.0%" in render_table({"base": result})
    assert "not scored" not in render_table({"base": run([[RIGHT]])[0]})


@pytest.mark.parametrize("seed", [0, -1, 2**62])
def test_any_seed_of_the_settings_draws_an_interval(seed):
    low, high = bootstrap_interval([0.0, 1.0, 1.0, 0.0, 1.0], 200, seed)
    assert 0 <= low < 0.6 < high <= 1
