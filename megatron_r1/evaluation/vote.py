"""Majority vote over the answers to one problem (cons@k)."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megatron_r1.rewards.math.policy import MathPolicy
from megatron_r1.rewards.math.scorer import answers_agree, clean_answer
from megatron_r1.rewards.protocol import Verdict


class AnswerClasses:
    """Sorts answers into classes of equal ones. A scorer in form only, so that it runs in a worker process, which can be killed.

    `score` takes a JSON list of answers as the response; `parts["classes"]` has the number of each answer's class.
    """

    name = "classes"

    def __init__(self, policy: Mapping[str, Any]) -> None:
        self._policy = MathPolicy(**policy)

    def score(self, response: str, reference: Any) -> Verdict:
        """See `Scorer`."""
        classes = sort_into_classes(json.loads(response), lambda a, b: answers_agree(a, b, self._policy))
        return Verdict(1.0, "correct", parts={"classes": classes})


def sort_into_classes(answers: Sequence[str], agree: Callable[[str, str], bool]) -> list[int]:
    """The class of every answer; classes are numbered as they appear.

    The answers are compared from the most frequent one to the rarest, ties by their text: each joins the first class with whose
    first member it agrees. So the order of the samples changes the numbers of the classes only, even if `agree` is not transitive.
    """
    texts = [clean_answer(answer) for answer in answers]
    counts = Counter(texts)
    given: dict[str, str] = {}
    for text, answer in zip(texts, answers, strict=True):
        given[text] = min(answer, given.get(text, answer))
    firsts: list[str] = []
    known: dict[str, int] = {}  # many samples write the same: compared once
    for text in sorted(counts, key=lambda text: (-counts[text], text)):
        answer = given[text]
        known[text] = next((number for number, first in enumerate(firsts) if agree(answer, first)), len(firsts))
        if known[text] == len(firsts):
            firsts.append(answer)
    numbers: dict[int, int] = {}
    return [numbers.setdefault(known[text], len(numbers)) for text in texts]


def winning_classes(classes: Sequence[int | None]) -> list[int]:
    """The classes with the most votes; a response without an answer (None) has no vote."""
    votes = Counter(number for number in classes if number is not None)
    most = max(votes.values(), default=0)
    return [number for number, count in votes.items() if count == most]


def voted_answer(classes: Sequence[int | None], answers: Sequence[str | None], winner: int) -> str:
    """The answer of a class as it is written most often; ties by its text."""
    counts = Counter(answer for number, answer in zip(classes, answers, strict=True) if number == winner and answer is not None)
    return min(counts, key=lambda answer: (-counts[answer], answer))


def majority_score(classes: Sequence[int | None], correct: Sequence[bool]) -> float:
    """Whether the answer given most often is right, in [0, 1]. The order of the samples does not matter.

    A response without an answer (class None) has no vote; without any vote the score is 0. If several answers tie for the most
    votes, the score is the share of right ones among them: the average of a fair draw. The recipe does not say how it breaks ties.

    Args:
        correct: whether the answer that each response votes for is right. If these are the scores of the responses instead, a class
            is right if any member is: a response may give a right answer and lose its score otherwise, as by a second box.
    """
    winners = winning_classes(classes)
    if not winners:
        return 0.0
    right = {number for number, is_right in zip(classes, correct, strict=True) if is_right}
    return sum(number in right for number in winners) / len(winners)
