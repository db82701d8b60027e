"""Multiple choice: which letter a response gives."""

from __future__ import annotations

import time

import pytest

from megatron_r1.rewards.rules.choice import ChoiceScorer, find_letter

FORMS = [
    ("ANSWER: $\\mathbf{C}$", "C"),
    ("ANSWER: \\textbf{C}", "C"),
    ("'ANSWER: C'", "C"),
    ('"ANSWER: C"', "C"),
    ("Answer: a good guess would be C", None),
    ("**Answer:** C", "C"),
    ("**Answer: C**", "C"),
    ("Answer:\nC", "C"),
    ("**ANSWER:**\n\nC", "C"),
    ("**Answer:**\n**(C)**", "C"),
    ("Answer: \\boxed{\\text{C}}", "C"),
    ("Answer: (C) Paris", "C"),
    ("Answer: C) Paris", "C"),
    ("Answer: C. Paris", "C"),
    ("Answer: “C”", "C"),
    ("ANSWER: `C`", "C"),
    ('ANSWER: "C".', "C"),
    ("ANSWER: A, B", None),
    ("ANSWER: A and B", None),
    ("ANSWER: A or C", None),
    ("ANSWER: A/B", None),
    ("ANSWER: (A) and (B)", None),
    ("ANSWER: **A**, **C**", None),
    ("ANSWER: $A$ or $B$", None),
    ("ANSWER: AB", None),
    ("ANSWER: A & B", None),
    ("ANSWER: A、B", None),
    ("ANSWER: C\nANSWER: A and B", None),
    ("ANSWER: A and B\nANSWER: C", "C"),
    ("answer: c", "C"),
    ("Answer: I think so", None),
    ("Answer: A good guess", None),
    ("Answer: A because it is", "A"),
    ("Answer: A", "A"),
    ("Answer: a", "A"),
    ("Answer: a.", "A"),
    ("Answer: C++", None),
    ("Answer: C is right", "C"),
    ("Answer: A is right", "A"),
    ("Answer: A's", None),
    ("Answer: it", None),
    ("ANSWER: $C$", "C"),
    ("ANSWER: \\(C\\)", "C"),
    ("ANSWER: [C]", "C"),
    ("Answer: option C", "C"),
    ("Answer: \\mathrm{C}", "C"),
    ("Answer: $\\boxed{\\mathbf{(C)}}$", "C"),
    ("Answer:\nI think", None),
    ("Answer:\nThe letter", None),
    ("Answer:\nB is wrong", None),
    ("Answer: B-side", None),
    ("Answer: D, because", "D"),
    ("Answer: D - Paris", "D"),
    ("Answer: D, A good reason", None),
    ("答案 Answer：C", "C"),
    ("Answer: b or not", "B"),
    ("Answer: A\nAnswer: see above", "A"),
    ("Answer: C, as A is wrong", "C"),
    ("My answer is C", None),
    ("Nonanswer: C", None),
    ("ANSWER: 「C」", "C"),
    ("ANSWER: <C>", "C"),
    ("ANSWER: {C}", "C"),
    ("ANSWER: A;B", None),
    ("ANSWER: both A and B", None),
    ("ANSWER: A or maybe B", None),
]


@pytest.mark.parametrize(("response", "letter"), FORMS)
def test_the_letter_of_an_answer(response, letter):
    assert find_letter(response) == letter
    assert find_letter(f"So it must be B.\n\n{response}\n") == letter
    assert find_letter(f"<think>ANSWER: D</think>\n{response}") == letter


@pytest.mark.parametrize(
    "response", ["", "C", "The answer is C.", "<think>ANSWER: C", "<think>ANSWER: C</think>", "ANSWER:\n\n\nC"]
)
def test_without_the_line_there_is_no_letter(response):
    assert find_letter(response) is None


def test_the_letter_is_compared_with_the_reference():
    scorer = ChoiceScorer()
    outcomes = [scorer.score(response, "C").outcome for response in ("ANSWER: C", "answer: $c$", "ANSWER: D", "ANSWER: C, D", "C")]
    assert outcomes == ["correct", "correct", "wrong", "wrong", "wrong"]
    assert [scorer.score("ANSWER: C", reference).outcome for reference in (None, "", "CD", "c", 3)] == ["unscorable"] * 5


@pytest.mark.parametrize("run", ["answer:", "answer:****", "answer: \\a{", "answer: A,", "answer: ((((", "answer:\n", "answer: a "])
def test_a_long_run_costs_no_more_than_its_length(run):
    start = time.process_time()
    find_letter(run * 20_000)
    assert time.process_time() - start < 2.0
