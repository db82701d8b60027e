"""Where the answer of a response is taken from, and what becomes of it."""

import pytest

from megatron_r1.rewards.math.scorer import MathScorer
from megatron_r1.tags import find_boxed_answers, find_hash_answers, find_tagged_answer


def accuracy(text: str, answer: str = "8", location: str = "answer_tag") -> float:
    return MathScorer(location).score(text, answer).score


@pytest.mark.parametrize(
    "text",
    [
        "<answer>8</answer>",
        "<think>a</think>So 8.<answer>8</answer>",
        "first 12 fourth 8</think><answer>8</answer>",  # the prompt ended in a forced <think>
        "<think>a</think><think>b</think><answer> 8. </answer> bye",
        "<think>a</think><answer>８</answer>",
    ],
)
def test_accuracy_needs_the_answer_element_but_not_the_whole_format(text):
    assert accuracy(text) == 1.0


@pytest.mark.parametrize(
    "text",
    [
        "8",
        "<think>8</think>8",
        "<think><answer>8</answer></think>",
        "<think>a <answer>8</answer>",
        "<think>a</think>b<think>c<answer>8</answer>",
        "<answer>8</answer><think>a</think>",
        "<answer></think>8</answer>",
        "<think>a</think><answer>8</answer><answer>8</answer>",
        "<think>a</think><answer>7</answer><answer>8</answer>",
        "<think><answer>7</answer></think><answer>8</answer>",
        "<think>a</think><answer><answer>8</answer>",
        "<think>a</think></answer>8<answer>",
        "<think>a</think><answer>8",
        "<think>a</think><answer></answer>",
        "<think>a</think><answer>7 or 8</answer>",
        "<think>a</think><answer>7=8</answer>",
        "<think>a</think><answer>88</answer>",
        "<think>a</think><answer>-8</answer>",
        "<think>a</think><answer>٨</answer>",
        "<think>a</think><answer>⑧</answer>",
        "<think>a</think><answer>8</answer>".replace("<", "&lt;"),
        "<think>a</think><answer>0b1000</answer>",
        "<think>a</think><answer>2**4</answer>",
        "<think>a</think><answer>__import__('os')</answer>",
    ],
)
def test_accuracy_takes_the_answer_from_its_place_only(text):
    assert accuracy(text) == 0.0


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("<think>\\boxed{1}</think> so \\boxed{2} no, \\boxed{ \\frac{1}{2} }", ["2", "\\frac{1}{2}"]),
        ("\\boxed{8}", ["8"]),
        ("a</think>\\boxed{8}", ["8"]),
        ("\\boxed{\\boxed{8}}", ["\\boxed{8}"]),
        ("<think>\\boxed{8}</think>", []),
        ("<think>\\boxed{8}", []),
        ("\\boxed{8}<think>", []),
        ("\\boxed{7}\\boxed{8", []),
        ("\\boxed{{{8}}", []),
        ("\\boxed 8", []),
        ("\\boxed {8}", ["8"]),
        ("boxed{8}", []),
        ("", []),
        ("\\boxed{" + "8" * 2000 + "}", []),
        ("\\boxed{8}" * 17, []),
    ],
)
def test_boxed_answers_stand_after_the_reasoning_and_are_whole(text, found):
    assert find_boxed_answers(text) == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("48/2 = 24\n#### 24", ["24"]),
        ("<think>#### 1</think>#### 24\nbye", ["24"]),
        ("<think>#### 1</think>", []),
        ("#### 1\n#### 2", ["1", "2"]),
        ("### 24", []),
        ("#### " + "8" * 2000, []),
        ("#### 8\n" * 17, []),
    ],
)
def test_hash_answers_stand_on_their_line_after_the_reasoning(text, found):
    assert find_hash_answers(text) == found


def test_an_unknown_place_is_told_when_the_scorer_is_built():
    with pytest.raises(ValueError, match="answer_tag, boxed, hash"):
        MathScorer("the end")


@pytest.mark.parametrize(
    ("boxes", "right"),
    [
        ("\\boxed{0.5}", True),
        ("\\boxed{\\frac12} that is \\boxed{0.5}", True),
        ("\\boxed{0.4} or \\boxed{0.5}", False),
        ("\\boxed{0.5} or \\boxed{0.4}", False),
        ("\\boxed{0.5} \\boxed{", False),
    ],
)
def test_several_boxes_must_all_be_right(boxes, right):
    response = f"<think>\\boxed{{7}}</think>{boxes}"
    assert MathScorer("boxed").score(response, "1/2").outcome == ("correct" if right else "wrong")


def test_the_last_box_counts_where_the_policy_says_so():
    scorer = MathScorer("boxed", {"several_answers": "last"})
    assert scorer.score("\\boxed{0.4} no: \\boxed{0.5}", "1/2").outcome == "correct"
    assert scorer.score("\\boxed{0.5} no: \\boxed{0.4}", "1/2").outcome == "wrong"


@pytest.mark.parametrize("reference", [None, "", " ", 8, "$.$", "a solution without an answer ####"])
def test_without_a_reference_answer_a_response_cannot_be_scored(reference):
    verdict = MathScorer().score("<answer>8</answer>", reference)
    assert verdict.outcome == "unscorable" and verdict.score is None


def test_a_whole_gsm8k_solution_is_a_reference():
    assert MathScorer().score("<answer>$1,072</answer>", "2 * 536 = 1072\n#### 1,072").outcome == "correct"
    assert MathScorer("hash").score("so\n#### 1072", "2 * 536 = 1072\n#### 1,072").outcome == "correct"


def test_the_config_says_where_the_answer_stands():
    assert accuracy("<think>a</think>\\boxed{8}<answer>7</answer>", location="boxed") == 1.0
    assert accuracy("<think>a</think>\\boxed{8}<answer>7</answer>", location="answer_tag") == 0.0


def test_only_an_answer_element_is_found():
    assert find_tagged_answer("<think>a</think><answer> 8 </answer>") == "8"
    assert find_tagged_answer("<answer>" + "8" * 1001 + "</answer>") is None


@pytest.mark.parametrize(
    ("response", "reference", "right"),
    [
        ("I put it within \\boxed{}. The answer is \\boxed{5}", "5", True),
        ("\\boxed{}", "5", False),
        ("\\boxed{1} and \\boxed{2}", "1,2", True),
        ("\\boxed{1} and \\boxed{2}", "1", False),
        ("\\boxed{1} and \\boxed{3}", "1,2", False),
        ("\\boxed{1} or \\boxed{2}", "(1,2)", False),
        ("\\boxed{x=1} and \\boxed{y=2}", "(1,2)", True),
        ("\\boxed{y=1} and \\boxed{x=2}", "(1,2)", False),
    ],
)
def test_empty_boxes_and_parts_in_several_boxes(response, reference, right):
    assert MathScorer("boxed").score(response, reference).outcome == ("correct" if right else "wrong")


@pytest.mark.parametrize(
    ("answer", "alone", "in_a_sentence"),
    [
        ("We get \\boxed{5} in the end.", False, True),
        ("So $x = 7 - 2$, hence $\\boxed{5}$.", False, True),
        ("We get \\boxed{6}, no, \\boxed{5}.", False, True),
        ("We get \\boxed{5}, no, \\boxed{6}.", False, False),
        ("We get 5 in the end.", False, False),
        ("\\boxed{5}", True, True),
        ("The answer is \\boxed{5}.", True, True),
    ],
)
def test_a_sentence_around_the_box_counts_only_if_the_setting_allows_it(answer, alone, in_a_sentence):
    response = f"<think>a</think><answer>{answer}</answer>"
    assert MathScorer().score(response, "5").score == float(alone)
    assert MathScorer(policy={"sentences": True}).score(response, "5").score == float(in_a_sentence)


def test_of_a_worked_solution_the_last_box_is_the_reference():
    solution = "Since $2^3 = 8$, adding $\\boxed{1}$ to it gives $8 + 1 = \\boxed{9}$."
    assert MathScorer().score("<answer>9</answer>", solution).outcome == "correct"
    assert MathScorer().score("<answer>8</answer>", solution).outcome == "wrong"


@pytest.mark.parametrize(
    "reference", ["???", "\\frac{1}{", "The proof is by induction over the number of edges of the graph, which we omit here."]
)
def test_a_reference_that_nothing_can_read_is_unscorable(reference):
    verdict = MathScorer().score("<answer>8</answer>", reference)
    assert (verdict.outcome, verdict.detail) == ("unscorable", "the reference answer cannot be read")


def test_rollouts_with_plain_answers_score_as_they_look():
    """Whole numbers, as the toy world's: right is the number itself, whatever the rest of the response says."""
    for reference in ("0", "7", "-3", "15", "110"):
        for answer in ("0", "7", "-3", "15", "110", "1", "8", "", "1 5", "7三"):
            expected = float(answer == reference)
            assert MathScorer().score(f"<think>1+7=8</think><answer>{answer}</answer>", reference).score == expected
