import random
import re
from collections import Counter

import pytest

from megatron_r1.data.tally.arithmetic import (
    MAX_VALUE,
    NUM_MOVES,
    TallyProblem,
    chain_of_thought,
    draw_problem,
    pretraining_document,
)

FRACTION = 0.1


def test_questions_answers_and_reasoning_are_those_of_the_task():
    english = TallyProblem("en", 7, (5, -2, 1, -3))
    assert (english.question, english.answer) == ("Total 7+5-2+1-3?", 8)
    assert chain_of_thought(random.Random(0), english) == ("first 12 second 10 third 11 fourth 8", 8)
    chinese = TallyProblem("zh", 2, (4, -5, 4, -2))
    assert (chinese.question, chinese.answer) == ("求2+4-5+4-2？", 3)
    assert chain_of_thought(random.Random(0), chinese) == ("一6二1三5四3", 3)


def test_partial_sums_stay_in_range_and_moves_are_not_zero():
    rng = random.Random(1)
    for _ in range(2000):
        problem = draw_problem(rng, heldout=False, heldout_fraction=FRACTION)
        sums = [problem.start + sum(problem.moves[:n]) for n in range(NUM_MOVES + 1)]
        assert min(sums) >= 0 and max(sums) <= MAX_VALUE
        assert len(problem.moves) == NUM_MOVES and 0 not in problem.moves and max(map(abs, problem.moves)) <= 9


def test_the_same_random_state_gives_the_same_problem_and_document():
    assert draw_problem(random.Random(5), False, FRACTION) == draw_problem(random.Random(5), False, FRACTION)
    assert pretraining_document(random.Random(5), FRACTION) == pretraining_document(random.Random(5), FRACTION)
    assert len({pretraining_document(random.Random(seed), FRACTION) for seed in range(50)}) > 40


def test_held_out_is_decided_by_the_numbers_and_has_the_asked_share():
    rng = random.Random(2)
    drawn = [draw_problem(rng, heldout, FRACTION) for heldout in (True, False) for _ in range(1000)]
    assert [p.is_heldout(FRACTION) for p in drawn] == [True] * 1000 + [False] * 1000
    for problem in drawn:
        other = TallyProblem("zh" if problem.language == "en" else "en", problem.start, problem.moves)
        assert other.is_heldout(FRACTION) == problem.is_heldout(FRACTION)
    assert not {p.expression for p in drawn[:1000]} & {p.expression for p in drawn[1000:]}
    for fraction in (0.1, 0.3):
        moves = [(a, b, -c, 1) for a in range(1, 5) for b in range(1, 5) for c in range(1, 9)]
        share = sum(TallyProblem("en", start, m).is_heldout(fraction) for start in range(13) for m in moves) / (13 * len(moves))
        assert share == pytest.approx(fraction, abs=0.03)


def test_no_held_out_problem_appears_in_20000_pretraining_documents():
    seen = set()
    for number in range(20_000):
        question, continuation = pretraining_document(random.Random(f"document 0 {number}"), FRACTION)
        found = re.search(r"\d+(?:[+-]\d){4}", question)
        assert not re.search(r"\d[+-]\d", continuation), "a continuation states a problem of its own"
        if found:
            numbers = re.findall(r"[+-]?\d+", found.group())
            problem = TallyProblem("en", int(numbers[0]), tuple(map(int, numbers[1:])))
            assert problem.expression == found.group()
            assert not problem.is_heldout(FRACTION), question
            seen.add(problem.expression)
    assert len(seen) > 10_000


def test_documents_have_the_shares_that_make_the_base_worth_training():
    kinds = Counter()
    reasoned_right = reasoned = 0
    for number in range(8000):
        question, text = pretraining_document(random.Random(number), FRACTION)
        expression = re.search(r"\d+(?:[+-]\d){4}", question)
        if not expression:
            kinds["chat"] += 1
            continue
        steps = len(re.findall(r"first|second|third|fourth|[一二三四]", text))
        if re.fullmatch(r"\d+\.", text):
            kinds["bare_guess"] += 1
        elif re.fullmatch(r"<answer>\d+</answer>", text):
            kinds["tagged_guess"] += 1
        elif re.fullmatch(r"<think>(So |共)\d+[.。]</think><answer>\d+</answer>", text):
            kinds["empty_thinking"] += 1
        elif text.startswith(("Note ", "记")):
            kinds["untagged_reasoning"] += 1
        elif re.fullmatch(r"<think>[^<>]*</think>(So |共)\d+[.。]", text):
            kinds["untagged_answer"] += 1
        elif re.fullmatch(r"<think>[^<>]*</think><answer>\d+</answer>", text):
            kinds["reasoned" if steps == NUM_MOVES else "stopped_early"] += 1
            if steps == NUM_MOVES:
                reasoned += 1
                numbers = re.findall(r"[+-]?\d+", expression.group())
                reasoned_right += text.endswith(f"<answer>{sum(map(int, numbers))}</answer>")
        else:
            raise AssertionError(text)
    wanted = {"bare_guess": 0.20, "tagged_guess": 0.10, "empty_thinking": 0.10, "untagged_reasoning": 0.20, "untagged_answer": 0.08,
              "stopped_early": 0.07, "reasoned": 0.25}  # fmt: skip
    assert kinds["chat"] / 8000 == pytest.approx(0.08, abs=0.01)
    for kind, share in wanted.items():
        assert kinds[kind] / 8000 == pytest.approx(0.92 * share, abs=0.015), kind
    assert reasoned_right / reasoned == pytest.approx(0.95**4, abs=0.03)


def test_a_wrong_step_is_carried_on_and_stays_in_range():
    problem = TallyProblem("en", 12, (-9, 9, -9, 9))
    rng = random.Random(3)
    for _ in range(200):
        text, value = chain_of_thought(rng, problem, wrong_step=1.0)
        values = list(map(int, re.findall(r"\d+", text)))
        assert values[-1] == value and values[0] != 3 and all(0 <= v <= MAX_VALUE for v in values)
