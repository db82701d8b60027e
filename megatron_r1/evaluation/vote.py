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
    """The class of every answer: the first class with whose first member it agrees, otherwise a new class."""
    firsts: list[str] = []
    known: dict[str, int] = {}  # many samples write the same: compared once
    classes = []
    for answer in answers:
        text = clean_answer(answer)
        if text not in known:
            known[text] = next((number for number, first in enumerate(firsts) if agree(answer, first)), len(firsts))
            if known[text] == len(firsts):
                firsts.append(answer)
        classes.append(known[text])
    return classes


def majority_score(classes: Sequence[int | None], correct: Sequence[bool]) -> float:
    """Whether the answer given most often is right, in [0, 1].

    A response without an answer (class None) has no vote; without any vote the score is 0. If several answers tie for the most
    votes, the score is the share of right ones among them: the average of a fair draw. The recipe does not say how it breaks ties.
    A class is right if its first member was scored as right.
    """
    votes = Counter(number for number in classes if number is not None)
    if not votes:
        return 0.0
    most = max(votes.values())
    winners = [number for number, count in votes.items() if count == most]
    return sum(correct[list(classes).index(number)] for number in winners) / len(winners)
