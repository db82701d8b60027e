"""Accuracy reward for mathematics: is the final answer, in the required place, exactly the reference answer?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_r1.rewards.math.agree import answers_agree, clean_answer, is_readable
from megatron_r1.rewards.math.policy import MathPolicy
from megatron_r1.rewards.protocol import Verdict
from megatron_r1.tags import AnswerPlace, find_answers, last_box


class MathScorer:
    """1 if the response gives the reference answer in the required place, else 0 (R1 v2 (arXiv) section 2.2).

    Settings: `answer_location`, "answer_tag" (the one <answer> element), "boxed" (the boxes after the reasoning) or "hash" (the
    line after ####); `policy`, the fields of `MathPolicy` by name. Of a whole GSM8K solution as
    the reference, what follows its #### counts.
    """

    name = "math"

    def __init__(self, answer_location: AnswerPlace = "answer_tag", policy: Mapping[str, Any] | MathPolicy | None = None):
        self._place = answer_location
        self._policy = policy if isinstance(policy, MathPolicy) else MathPolicy(**(policy or {}))
        find_answers("", answer_location)  # an unknown place fails here, not at the first response

    def score(self, response: str, reference: Any) -> Verdict:
        """See `Scorer`."""
        if not isinstance(reference, str) or not clean_answer(target := reference_answer(reference)):
            return Verdict(None, "unscorable", "there is no reference answer")
        if not is_readable(target):
            return Verdict(None, "unscorable", "the reference answer cannot be read")
        answers = find_answers(response, self._place)
        answers = [answer for answer in answers if clean_answer(answer)] or answers  # \boxed{} may be quoted before the answer
        if not answers:
            return Verdict(0.0, "wrong", "no answer in the required place")
        if self._policy.several_answers == "last":
            answers = answers[-1:]
        answers = list(dict.fromkeys(answers))
        wrong = [answer for answer in answers if not self._is_right(answer, target)]
        if not wrong:
            return Verdict(1.0, "correct")
        if len(answers) > 1 and len(wrong) == len(answers) and answers_agree(", ".join(answers), target, self._policy):
            return Verdict(1.0, "correct", "the parts of the answer stand in several boxes")
        several = " of several" if len(answers) > 1 else ""
        return Verdict(0.0, "wrong", f"an answer{several} is not the reference")

    def _is_right(self, answer: str, target: str) -> bool:
        if answers_agree(answer, target, self._policy):
            return True
        boxed = last_box(answer) if self._policy.sentences and self._place == "answer_tag" else None
        return boxed is not None and answers_agree(boxed, target, self._policy)


def reference_answer(reference: str) -> str:
    """The answer of a reference: behind the last #### of a GSM8K solution or in the last box of a worked one, else all of it."""
    _, marked, answer = reference.rpartition("####")
    if marked:
        return answer
    boxed = last_box(reference)
    return answer if boxed is None else boxed
