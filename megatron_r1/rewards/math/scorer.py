"""Accuracy reward for mathematics: is the final answer, in the required place, exactly the reference answer?"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from megatron_r1.rewards.math.compare import trees_agree
from megatron_r1.rewards.math.fallback import math_verify_agrees
from megatron_r1.rewards.math.parse import parse_answer
from megatron_r1.rewards.math.policy import DEFAULT_POLICY, MathPolicy
from megatron_r1.rewards.math.tokens import MAX_CHARACTERS, Unreadable, tokenize
from megatron_r1.rewards.math.tree import Node
from megatron_r1.rewards.protocol import Verdict
from megatron_r1.tags import AnswerPlace, find_answers

_WRAPPERS = (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"), ("\\boxed{", "}"))
_MAX_WRAPPERS = 4


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
        if not isinstance(reference, str) or not clean_answer(reference_answer(reference)):
            return Verdict(None, "unscorable", "there is no reference answer")
        answers = find_answers(response, self._place)
        if not answers:
            return Verdict(0.0, "wrong", "no answer in the required place")
        if self._policy.several_answers == "last":
            answers = answers[-1:]
        target = reference_answer(reference)
        for answer in dict.fromkeys(answers):
            if not answers_agree(answer, target, self._policy):
                several = " of several" if len(answers) > 1 else ""
                return Verdict(0.0, "wrong", f"an answer{several} is not the reference")
        return Verdict(1.0, "correct")


def answers_agree(answer: str, reference: str, policy: MathPolicy = DEFAULT_POLICY) -> bool:
    """Whether an answer is the reference. Never raises; a blank or unreadable answer agrees with nothing but its own text.

    The order matters: `x = 5` is a fine answer to `5`, as is `0 < x < 5` to `(0, 5)`.
    """
    answer, reference = clean_answer(answer), clean_answer(reference)
    if not answer or not reference or max(len(answer), len(reference)) > MAX_CHARACTERS:
        return False
    if answer == reference:
        return True
    if _has_letters_only(answer) and _has_letters_only(reference):
        return _same_word(answer, reference)
    trees = _parsed(answer), _parsed(reference)
    if trees[1] is None:
        return _same_tokens(answer, reference) or math_verify_agrees(answer, reference)
    if trees[0] is None:
        return False
    try:
        return trees_agree(*trees, policy)
    except Unreadable:
        return _same_tokens(answer, reference)


def reference_answer(reference: str) -> str:
    """The answer of a reference: what follows the last #### of a GSM8K solution, else all of it."""
    return reference.rpartition("####")[2]


def clean_answer(text: str) -> str:
    """An answer without its wrapping: space, dollars and brackets of a formula, a box, a full stop."""
    text = " ".join(text.split())
    for _ in range(_MAX_WRAPPERS):
        if text.endswith(".") and not text.endswith(".."):
            text = text[:-1].rstrip()
        for opening, closing in _WRAPPERS:
            inner = text[len(opening) : len(text) - len(closing)]
            if text.startswith(opening) and text.endswith(closing) and _is_one_piece(inner, opening):
                text = inner.strip()
                break
    return _without_dollar_pairs(text)


def _without_dollar_pairs(text: str) -> str:
    """`$x = 1$ or $x = 2$` without its dollars. Those of `$5 and $6`, which stand before a number and not after one, are money."""
    pieces = text.split("$")
    formulas, between = pieces[1::2], pieces[2:-1:2]
    if len(pieces) % 2 == 0 or len(pieces) < 3 or any(piece.endswith("\\") for piece in pieces):
        return text
    if all(piece and piece == piece.strip() for piece in formulas) and all(piece[:1] in " ,;" for piece in between):
        return "".join(pieces)
    return text


def _is_one_piece(inner: str, opening: str) -> bool:
    """Whether what stands between an opening and a closing belongs together: not the middle of `$1$ or $2$`."""
    if opening != "\\boxed{":
        return bool(inner) and opening.lstrip("\\") not in inner.replace("\\$", "")
    depth = 0
    for character in inner:
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth < 0:
            return False
    return depth == 0 and bool(inner)


def _has_letters_only(text: str) -> bool:
    return len(text) > 1 and text.isascii() and text.isalpha()


def _same_word(answer: str, reference: str) -> bool:
    """Letters alone are a word or the name of a thing, not a product: "no" is not "on". AB and ab may be two segments."""
    return answer.casefold() == reference.casefold() and (len(answer) > 2 or answer[1:] == reference[1:])


@lru_cache(maxsize=512)
def _parsed(text: str) -> Node | None:
    try:
        return parse_answer(text)
    except Unreadable:
        return None


def _same_tokens(answer: str, reference: str) -> bool:
    """Whether two texts differ in spacing and spelling of commands only."""
    try:
        tokens = [[token[:2] for token in tokenize(text)] for text in (answer, reference)]
    except Unreadable:
        return False
    return tokens[0] == tokens[1]
