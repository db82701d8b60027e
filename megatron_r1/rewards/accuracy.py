"""Accuracy reward for mathematics: the final answer by rule, from the required place only."""

from __future__ import annotations

import re
from fractions import Fraction

from megatron_r1.rewards.tags import find_boxed_answer, find_tagged_answer
from megatron_r1.types import Prompt, Rollout

_FINDERS = {"answer_tag": find_tagged_answer, "boxed": find_boxed_answer}

# ASCII digits only: int() also reads other scripts' digits. Commas only between groups of three: "1,2" is not 12. At most two
# digits of exponent: 1e999999999 as an exact fraction would fill the memory.
_NUMBER = re.compile(r"[+-]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)?(?:\.[0-9]*)?(?:[eE][+-]?[0-9]{1,2})?")
_RATIO = re.compile(r"([+-]?[0-9]+) ?/ ?([0-9]+)")
_MAX_NUMBER_CHARACTERS = 100


class AccuracyReward:
    """1 where a finished response gives the reference answer in the required place, else 0 (v2 section 2.2)."""

    name = "accuracy"

    def __init__(self, answer_location: str):
        """Args: `answer_location` is "answer_tag" (the one <answer> element) or "boxed" (the last \\boxed{})."""
        self._find_answer = _FINDERS[answer_location]

    def score(self, prompt: Prompt, rollout: Rollout) -> float:
        """See `Reward`."""
        if not rollout.finished:
            return 0.0
        answer = self._find_answer(rollout.text)
        return float(answer is not None and answers_agree(answer, prompt.answer))


def answers_agree(answer: str, reference: str) -> bool:
    """Whether two answers are the same number, exactly, or else the same text. Blank answers agree with nothing."""
    answer, reference = _normalise(answer), _normalise(reference)
    if not answer or not reference:
        return False
    number, reference_number = parse_number(answer), parse_number(reference)
    if number is not None and reference_number is not None:
        return number == reference_number
    return answer == reference


def parse_number(text: str) -> Fraction | None:
    """An integer, decimal or ratio, with or without $, % and thousands separators, as an exact fraction; else None.

    A percent sign is a unit and is dropped, as GSM8K's references do: "50%" is 50.
    """
    if re.match(r"-?\$", text):
        text = text.replace("$", "", 1)
    text = text.strip().removesuffix("%").rstrip()
    if len(text) > _MAX_NUMBER_CHARACTERS:
        return None
    ratio = _RATIO.fullmatch(text)
    if ratio:
        numerator, denominator = map(int, ratio.groups())
        return Fraction(numerator, denominator) if denominator else None
    if not _NUMBER.fullmatch(text) or not re.match(r"[+-]?\.?[0-9]", text):
        return None
    return Fraction(text.replace(",", ""))


def _normalise(text: str) -> str:
    """One form for spellings that mean the same: LaTeX dollars and percent signs, the typographic minus, space, a full stop."""
    text = text.replace("\\$", "$").replace("\\%", "%").replace("\u2212", "-")
    text = " ".join(text.split()).removesuffix(".").rstrip()
    if len(text) > 2 and text.startswith("$") and text.endswith("$"):
        text = text[1:-1].strip()
    return text
