"""Multiple choice: is the letter that a response ends with the right one?"""

from __future__ import annotations

import re
from typing import Any

from megatron_r1.rewards.protocol import Verdict
from megatron_r1.tags import THINK_CLOSE, THINK_OPEN

_SPACE = r"[*_ \t]{0,8}"
_QUOTES = "'\"`\u2018-\u201d\u00ab\u00bb\u300c\u300d\u300e\u300f"
#: what may stand around the letter: a formula, a box, a font, brackets, quotes, bold
_OPENING = rf"(?:\$|\\\(|\\\[|\\[a-z]{{2,12}} ?\{{|[(\[{{<{_QUOTES}*_ \t]){{0,12}}"
_CLOSING = rf"(?:\$|\\\)|\\\]|[)\]}}>{_QUOTES}*_ \t]){{0,12}}"
# 'ANSWER: $LETTER' as simple-evals asks for it, in any case; the letter may stand alone on the next line
_ANSWER = re.compile(
    rf"(?<![a-z])answer{_SPACE}[:\uff1a]{_SPACE}(?P<line>\n{{1,2}})?(?:option |choice )?{_OPENING}"
    r"(?P<letter>[A-Z])(?!['\u2019]?\w|-\w|[+#])",
    re.IGNORECASE,
)
_SECOND = re.compile(
    rf"{_CLOSING}(?:[,/&+;|\u3001\uff0c]| (?:and|or)\b|\u548c|\u6216){_SPACE}"
    rf"(?:and |or |maybe |perhaps |possibly )?{_OPENING}[A-Z](?!['\u2019]?\w)"
)
_ALONE = re.compile(rf"{_CLOSING}[.,:;)]?{_CLOSING}(?:\n|$)")
_SENTENCE = re.compile(r"[ \t]+(?!because\b|since\b|as\b|is\b|with\b|or\b|and\b)[a-z]")  #: after "a" or "I": an article, a pronoun


class ChoiceScorer:
    """1 if the last 'ANSWER: X' after the reasoning is the reference letter, else 0. See `protocol.Scorer`."""

    name = "choice"

    def score(self, response: str, reference: Any) -> Verdict:
        """See `Scorer`; the reference is a letter."""
        if not isinstance(reference, str) or not re.fullmatch("[A-Z]", reference):
            return Verdict(None, "unscorable", "the reference is no letter")
        letter = find_letter(response)
        if letter is None:
            return Verdict(0.0, "wrong", "no line 'ANSWER: X' with one letter after the reasoning")
        if letter != reference:
            return Verdict(0.0, "wrong", f"{letter} is not the right choice")
        return Verdict(1.0, "correct")


def find_letter(response: str) -> str | None:
    """The letter of the last 'ANSWER: X' after the reasoning, in upper case; None if there is none, or if it gives two letters.

    An "a" or "I" that begins a sentence is no letter.
    """
    start = response.rfind(THINK_CLOSE)
    if response.rfind(THINK_OPEN) > start:
        return None
    letter = None
    for found in _ANSWER.finditer(response, start + len(THINK_CLOSE) if start >= 0 else 0):
        if _SECOND.match(response, found.end()):
            letter = None
        elif _is_choice(response, found):
            letter = found["letter"].upper()
    return letter


def _is_choice(response: str, found: re.Match[str]) -> bool:
    if found["line"]:
        return _ALONE.match(response, found.end()) is not None
    may_be_a_word = found["letter"] in "AI" or found["letter"].islower()
    return not (may_be_a_word and _SENTENCE.match(response, found.end()))
