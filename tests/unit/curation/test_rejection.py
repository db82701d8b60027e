"""Rejection sampling with an engine that is a stand-in: what is kept, and that a kill at any moment changes nothing."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path

import pytest

from megatron_r1.config.curation import CurationConfig, FilterConfig
from megatron_r1.config.rewards import RewardConfig
from megatron_r1.curation.accept_samples import Check, answer_check, done
from megatron_r1.curation.rejection import Selection, sample_and_keep
from megatron_r1.errors import ConfigError, DataError
from megatron_r1.rewards.protocol import Verdict
from megatron_r1.runtime.ledger import Ledger
from megatron_r1.types import Prompt, Rollout, RolloutGroup, Sampling
from tests.direct_scoring import DirectScoring
from tests.patience import slowness

PROMPTS = [Prompt(f"p{n}", f"What is {n} and {n}?", str(2 * n), f"User: {n}", (1, 2), "en") for n in range(20)]


class RandomEngine:
    """Adds wrongly now and then. A response depends on the seed, the place of its prompt in the call, and its number."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.calls: list[list[str]] = []
        self._seconds = seconds

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, seed: int, on_group: Callable[[RolloutGroup], None]
    ) -> list[RolloutGroup]:
        self.calls.append([prompt.id for prompt in prompts])
        groups = [
            RolloutGroup(prompt, [_answer(prompt, seed, place, g) for g in range(sampling.n)], 0)
            for place, prompt in enumerate(prompts)
        ]
        for group in random.sample(groups, len(groups)):  # they are finished in any order
            time.sleep(self._seconds)
            on_group(group)
        return groups


def _answer(prompt: Prompt, seed: int, place: int, sample: int) -> Rollout:
    draw = random.Random(f"{seed} {place} {sample}")
    number = int(prompt.answer) + draw.choice([0, 1, 1])
    reasoning = f"I add them up {draw.randrange(1000)} times" + ", and again" * draw.randrange(3)
    text = f"<think>\n{reasoning}.\n</think>\n\nThe sum is {number}."
    return Rollout([7] * len(text), [0.0] * len(text), text, draw.random() < 0.9)


def check(asked: Prompt, response: str) -> Future[Verdict]:
    right = response.endswith(f" {asked.answer}.")
    return done(Verdict(1.0, "correct") if right else Verdict(0.0, "wrong", "another sum"))


def config(**rejection) -> CurationConfig:
    settings = {"samples_per_prompt": 4, "batch_prompts": 6, "max_tokens": 100} | rejection
    return CurationConfig(rejection=settings, filters=FilterConfig(names=["well_formed", "correct"]))


def run(folder: Path, engine: RandomEngine | None = None, check: Check = check, prompts=PROMPTS, seed=0, **rejection) -> Selection:
    return sample_and_keep(engine or RandomEngine(), check, prompts, folder, config(**rejection), seed, policy="abc")


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


RESULTS = ("conversations.jsonl", "rejected.jsonl", "manifest.json")


def test_correct_samples_are_kept_at_most_so_many_a_prompt_and_everything_is_counted(tmp_path):
    selection = run(tmp_path, keep_per_prompt=2)
    kept, dropped = lines(tmp_path / "conversations.jsonl"), lines(tmp_path / "rejected.jsonl")
    samples = [sample for path in sorted((tmp_path / "samples").iterdir()) for sample in lines(path)]
    assert [sample["id"] for sample in samples] == [f"p{n}/{g}" for n in range(20) for g in range(4)]
    right = {sample["id"] for sample in samples if sample["outcome"] == "correct"}
    assert all(line["id"] in right and line["outcome"] == "correct" for line in kept)
    per_prompt = [sum(id.startswith(f"p{n}/") for id in right) for n in range(20)]
    assert [sum(line["prompt_id"] == f"p{n}" for line in kept) for n in range(20)] == [min(2, count) for count in per_prompt]
    assert selection == Selection(20, 80, len(right), len(right), len(kept), per_prompt.count(0), 0) and per_prompt.count(0) > 0
    assert {line["id"] for line in dropped} == {sample["id"] for sample in samples} - {line["id"] for line in kept}
    assert {line["dropped_by"] for line in dropped} == {"correct", "surplus"}
    assert any(line["why"] == "the verdict is wrong" and line["detail"] == "cut at the length limit" for line in dropped)
    counts = json.loads((tmp_path / "manifest.json").read_text())["counts"]
    assert counts["read"] == {"math": 80} and counts["empty_prompts"] == per_prompt.count(0)
    for line in kept:
        prompt = PROMPTS[int(line["prompt_id"][1:])]
        question, answer = (message["content"] for message in line["messages"])
        assert (
            question == prompt.question
            and answer.startswith("<think>\nI add")
            and answer.endswith(f"</think>\n\nThe sum is {prompt.answer}.")
        )
        assert (line["language"], line["domain"], line["reference"]) == ("en", "math", prompt.answer)


def test_the_shortest_or_the_seed_s_are_chosen(tmp_path):
    run(tmp_path / "a", choose="shortest")
    kept = {line["prompt_id"]: line for line in lines(tmp_path / "a/conversations.jsonl")}
    for line in lines(tmp_path / "a/rejected.jsonl"):
        if line["dropped_by"] == "surplus":
            assert line["tokens"] >= kept[line["prompt_id"]]["tokens"]
    chosen = []
    for seed in (0, 0, 1):
        run(tmp_path / f"{len(chosen)}", seed=seed)
        chosen.append((tmp_path / f"{len(chosen)}/conversations.jsonl").read_bytes())
    assert chosen[0] == chosen[1] != chosen[2]


def test_a_finished_folder_samples_nothing_again_and_other_filters_only_select_again(tmp_path):
    run(tmp_path)
    engine = RandomEngine()
    assert run(tmp_path, engine, keep_per_prompt=4).kept > 15 and engine.calls == []
    with pytest.raises(ConfigError, match="was begun with temperature=1.0, now it is 0.6"):
        run(tmp_path, temperature=0.6)
    with pytest.raises(ConfigError, match="was begun with prompts="):
        run(tmp_path, prompts=PROMPTS[:-1])
    with pytest.raises(ConfigError, match="was begun with policy='abc', now it is 'other'"):
        sample_and_keep(RandomEngine(), check, PROMPTS, tmp_path, config(), 0, policy="other")


def test_no_accepted_sample_and_no_prompts_are_errors_that_say_why(tmp_path):
    never = done(Verdict(0.0, "wrong"))
    with pytest.raises(DataError, match="none of 80 samples is accepted: filter correct dropped 80"):
        run(tmp_path / "a", check=lambda *_: never)
    assert not (tmp_path / "a/manifest.json").exists()
    assert run(tmp_path / "b", check=lambda *_: done(Verdict(1.0, "correct"))).kept == 20
    with pytest.raises(DataError, match="no prompts"):
        run(tmp_path / "c", prompts=[])
    with pytest.raises(DataError, match="two prompts have the id 'p1'"):
        run(tmp_path / "d", prompts=[PROMPTS[1], PROMPTS[1]])


# Killed at any moment


def killed_run(folder: Path, seconds: float) -> bool:
    """Run in a forked process and kill it after so long, on an idle machine; whether it was faster."""
    factor = slowness()
    child = os.fork()
    if child == 0:
        try:
            run(folder, RandomEngine(seconds=0.01 * factor), keep_per_prompt=2)
            os._exit(0)
        finally:
            os._exit(1)
    time.sleep(seconds * factor)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def kept_samples(folder: Path) -> dict[str, str]:
    """Every whole line of every file of samples: id -> response."""
    found: dict[str, str] = {}
    for path in (folder / "samples").glob("*.jsonl"):
        for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
            record = json.loads(line)
            if "response" in record:
                assert found.setdefault(record["id"], record["response"]) == record["response"]
    return found


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.slow
def test_sigkill_at_random_moments_loses_nothing_and_ends_with_the_same_files(tmp_path, seed, capfd):
    run(tmp_path / "whole", keep_per_prompt=2)
    generator = random.Random(seed)
    folder, kills, before, longest = tmp_path / "killed", 0, {}, 0.05
    while not killed_run(folder, generator.uniform(0.0, longest)):
        kills += 1
        now = kept_samples(folder)
        assert before.items() <= now.items(), "what was kept stays as it was"
        # A busy machine may keep nothing new in this time, ever: then the next kill may come later.
        longest = longest if before.keys() < now.keys() else 1.1 * longest
        before = now
        assert kills < 200
    assert kills >= 3 and capfd.readouterr().out == ""
    for name in RESULTS:
        assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert sorted(path.name for path in (folder / "samples").iterdir()) == [f"{n:06d}.jsonl" for n in range(4)]
    assert not list(folder.glob("*.tmp-*"))


class Killed(BaseException):
    """In place of SIGKILL, at a chosen moment."""


def interrupted(folder: Path, groups: int, **rejection) -> None:
    """Stop after so many groups."""
    engine = RandomEngine()
    generate, left = engine.generate, [groups]

    def stop(prompts, sampling, seed, on_group):
        def count(group: RolloutGroup) -> None:
            on_group(group)
            left[0] -= 1
            if left[0] == 0:
                raise Killed

        return generate(prompts, sampling, seed, count)

    engine.generate = stop
    with pytest.raises(Killed):
        run(folder, engine, **rejection)


def test_an_unfinished_batch_is_sampled_again_as_a_whole_or_only_where_prompts_are_missing(tmp_path):
    interrupted(tmp_path / "a", 8)
    interrupted(tmp_path / "b", 8, resample_batch=False)
    whole, part = RandomEngine(), RandomEngine()
    run(tmp_path / "a", whole)
    there = kept_samples(tmp_path / "b")
    assert run(tmp_path / "b", part, resample_batch=False).samples == 80
    assert [len(call) for call in whole.calls] == [6, 6, 2] and [len(call) for call in part.calls] == [4, 6, 2]
    assert there.items() <= kept_samples(tmp_path / "b").items()


def test_a_torn_line_is_repaired_and_a_damaged_one_is_named(tmp_path):
    interrupted(tmp_path, 8)
    open_batch = tmp_path / "samples/000001.responses.jsonl"
    content = open_batch.read_bytes()
    run(tmp_path / "whole")
    open_batch.write_bytes(content + b'{"id": "p9/0", "prompt_id": "p9", "resp')
    first, rest = content.split(b"\n", 1)
    damaged = tmp_path / "damaged.jsonl"
    damaged.write_bytes(first[:20] + b"\n" + rest)
    with pytest.raises(DataError, match=r"damaged.jsonl:1: bad JSON .*; remove the line"):
        Ledger(damaged)
    run(tmp_path)
    assert (tmp_path / "conversations.jsonl").read_bytes() == (tmp_path / "whole/conversations.jsonl").read_bytes()


# Rules and judges


class Rules:
    """A scoring pool that gives the same verdict on everything."""

    def __init__(self, verdict: Verdict) -> None:
        self.asked: list[tuple] = []
        self._verdict = verdict

    def submit(self, scorer: str, response: str, reference=None) -> Future[Verdict]:
        self.asked.append((scorer, response, reference))
        return done(self._verdict)


class ZeroEngine(RandomEngine):
    """Answers in R1-Zero's template, right, wrong and out of form."""

    def generate(self, prompts, sampling, seed, on_group):
        for prompt in prompts:
            number = int(prompt.answer)
            texts = [f"<think> I add. </think> <answer> {n} </answer>" for n in (number, f"${number}.0$", number + 1)]
            group = RolloutGroup(prompt, [Rollout([1], [0.0], text, True) for text in [*texts, f"It is {number}."]], 0)
            on_group(group)
        return []


def test_outputs_of_r1_zero_judged_by_the_math_rule_become_reasoning_and_summary(tmp_path):
    settings = config(keep_per_prompt=4, answer_summary=r"So it is \boxed{{answer}}.")
    rule = answer_check(DirectScoring(RewardConfig(), "math"))
    selection = sample_and_keep(ZeroEngine(), rule, PROMPTS[3:5], tmp_path, settings, 0, policy="zero")
    assert (selection.samples, selection.correct, selection.kept) == (8, 4, 4)
    kept = [line["messages"][1]["content"] for line in lines(tmp_path / "conversations.jsonl")]
    assert kept[:2] == [f"<think>\nI add.\n</think>\n\nSo it is \\boxed{{{n}}}." for n in ("6", "$6.0$")]


class FakeJudge:
    """Takes everything for right."""

    def __init__(self) -> None:
        self.asked: list[tuple] = []

    def grade(self, question: str, reference: str, answer: str) -> Future[Verdict]:
        self.asked.append((question, reference, answer))
        return done(Verdict(1.0, "correct", "by the judge"))


RESPONSE = "<think>\nI think so.\n</think>\n\nIt is 4."


@pytest.mark.parametrize("outcome", ["error", "timeout", "unscorable"])
def test_the_judge_decides_where_the_rule_cannot_tell(outcome):
    rules, judge = Rules(Verdict(None, outcome)), FakeJudge()
    assert answer_check(rules, judge)(PROMPTS[2], RESPONSE).result().detail == "by the judge"
    assert rules.asked == [("math", RESPONSE, "4")] and judge.asked == [("What is 2 and 2?", "4", "It is 4.")]
    assert answer_check(rules)(PROMPTS[2], RESPONSE).result().outcome == outcome


def test_the_judge_does_not_overrule_a_rule_and_judges_what_has_none():
    judge = FakeJudge()
    wrong = answer_check(Rules(Verdict(0.0, "wrong")), judge)(PROMPTS[2], RESPONSE).result()
    assert wrong.outcome == "wrong" and judge.asked == []
    general = Prompt("g", "Who?", "Ann", "", (1,), "en", "math", "general")
    assert answer_check(None, judge)(general, RESPONSE).result().outcome == "correct"
    assert answer_check(None, judge)(general, "<think>\nnever ends").result().outcome == "wrong"
    assert answer_check(None)(general, RESPONSE).result().outcome == "unscorable"
    unknown = Prompt("g", "Who?", " ", "", (1,), "en", "math", "general")
    assert answer_check(None, judge)(unknown, RESPONSE).result().outcome == "unscorable"
    code = Prompt("c", "Add.", '[{"input": "1"}]', "", (1,), "en", "code")
    rules = Rules(Verdict(1.0, "correct"))
    answer_check(rules, judge)(code, RESPONSE)
    assert rules.asked == [("code", RESPONSE, [{"input": "1"}])]


def test_a_domain_of_ones_own_is_checked_by_the_scorer_that_the_settings_name():
    stem, rules = Prompt("s", "Which?", "B", "", (1,), "en", "stem"), Rules(Verdict(1.0, "correct"))
    assert answer_check(rules)(stem, RESPONSE).result().outcome == "unscorable" and rules.asked == []
    answer_check(rules, None, RewardConfig(domains={"stem": "choice"}))(stem, RESPONSE)
    assert rules.asked == [("choice", RESPONSE, "B")]
