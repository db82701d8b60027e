"""Multiple choice: is the letter that a response ends with the right one?"""

from __future__ import annotations

import re
from typing import Any

from megatron_r1.rewards.protocol import Verdict
from megatron_r1.tags import THINK_CLOSE, THINK_OPEN

# 'ANSWER: $LETTER' as simple-evals asks for it, in any case, also in bold, in brackets, as a formula or in a box
_ANSWER = re.compile(r"answer[*_ \t]*[:：][*_ \t]*(?:\$|\\\(|\\boxed\{|\\text\{|\(|\[)*[*_ \t]*([A-Z])(?![\w'’])", re.IGNORECASE)


class ChoiceScorer:
    """1 if the last 'ANSWER: X' after the reasoning is the reference letter, else 0. See `protocol.Scorer`."""

    name = "choice"

    def score(self, response: str, reference: Any) -> Verdict:
        """See `Scorer`; the reference is a letter."""
        if not isinstance(reference, str) or not re.fullmatch("[A-Z]", reference):
            return Verdict(None, "unscorable", "the reference is no letter")
        letter = find_letter(response)
        if letter is None:
            return Verdict(0.0, "wrong", "no line 'ANSWER: X' after the reasoning")
        if letter != reference:
            return Verdict(0.0, "wrong", f"{letter} is not the right choice")
        return Verdict(1.0, "correct")


def find_letter(response: str) -> str | None:
    """The letter of the last 'ANSWER: X' after the reasoning, in upper case; None if there is none."""
    start = response.rfind(THINK_CLOSE)
    if response.rfind(THINK_OPEN) > start:
        return None
    letters = _ANSWER.findall(response, start + len(THINK_CLOSE) if start >= 0 else 0)
    return letters[-1].upper() if letters else None
