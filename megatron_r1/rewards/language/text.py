"""The prose of a response: the reasoning without code, formulas, addresses and markup, and its words by script.

Every pattern is bounded or tried once per position: the cost is linear in the length of the response.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from typing import NamedTuple

from megatron_r1.tags import THINK_CLOSE, THINK_OPEN

_FENCE = "```"
#: a letter with its accents apart. The whole text is not normalised: that takes the square of a run of accents
_DECOMPOSED = re.compile("[^\\W\\d_][\u0300-\u036f\u3099\u309a]{1,4}")
_SPANS = (("$$", "$$"), ("\\[", "\\]"), ("\\(", "\\)"), ("\\begin{", "\\end{"))  #: formulas that may hold line breaks
_INLINE = re.compile(
    r"`[^`\n]{1,200}`"  # code
    r"|\$[^\s$](?:[^$\n]{0,300}[^\s$])?\$(?![0-9])"  # a formula: no space inside its dollars, so that `$5 and $6` stays
    r"|\\(?:begin|end)\{[A-Za-z*]{1,30}\}|\\[A-Za-z]+|<[^<>\n]{1,100}>|(?:https?://|www\.)\S+"
)
_SENTENCE_END = re.compile(r"[.!?;:](?=\s|$)|[\n。！？；：…]")
_WORD = re.compile(
    "(?P<cjk>[\u3005\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff]+)"
    "|(?P<hangul>[\u1100-\u11ff\u3130-\u318f\uac00-\ud7af]+)"
    "|(?P<cyrillic>[\u0400-\u052f\u0301]+)"
    "|(?P<latin>[A-Za-z\u00aa\u00ba\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f\u1e00-\u1eff]+"
    "(?:['\u2019][A-Za-z\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f]+)*)"
    "|(?P<broken>[\x00-\x08\x0e-\x1f\x7f\ud800-\udfff\ue000-\uf8ff\ufffd]+)"  # what decodes to no text: a word of no language
    r"|(?P<other>[^\W\d_])"
)
_MATH = "sin cos tan cot sec csc log ln lg exp sqrt mod gcd lcm max min lim det dx dy dt"
_FORMULA_WORDS = frozenset(_MATH.split())
_LONGEST_ACRONYM = 6
_LONGEST_ENVIRONMENT = 30


class Word(NamedTuple):
    """A run of letters of one script; Chinese and Japanese runs hold several words."""

    script: str  #: cjk, hangul, cyrillic, latin, broken or other
    text: str


def reasoning_of(response: str) -> str:
    """What stands between the think tags; before the closing one, if there is no other; a whole response without tags."""
    _, opened, rest = response.partition(THINK_OPEN)
    return (rest if opened else response).partition(THINK_CLOSE)[0]


def prose_of(text: str) -> str:
    """The text without code, formulas, LaTeX commands, tags and addresses. An opening without an end removes nothing."""
    text = _DECOMPOSED.sub(lambda found: unicodedata.normalize("NFC", found[0]), text)
    text = _without_spans(text, _FENCE, _FENCE)
    for opening, closing in _SPANS:
        text = _without_spans(text, opening, closing)
    return _INLINE.sub(" ", text)


def sentences_of(prose: str) -> Iterator[list[Word]]:
    """The words of each sentence, without what is no word of any language: names of variables, acronyms, identifiers."""
    for sentence in _SENTENCE_END.split(prose):
        words = [Word(found.lastgroup or "other", found[0]) for found in _WORD.finditer(sentence) if _is_word(sentence, found)]
        if words:
            yield words


def _is_word(sentence: str, found: re.Match[str]) -> bool:
    text = found[0]
    if found.lastgroup != "latin":
        return found.lastgroup != "other" or text.isalpha()  # a circled digit is none
    if len(text) == 1 or text in _FORMULA_WORDS or (text.isupper() and len(text) <= _LONGEST_ACRONYM):
        return False
    if not text[1:].islower() and not text.isupper():  # camelCase; an accented or title-case word is not
        return all(part[:1].isupper() or part.islower() for part in re.split("['\u2019]", text)) and _no_inner_capital(text)
    neighbours = sentence[found.start() - 1 : found.start()] + sentence[found.end() : found.end() + 1]
    return not any(character in "_0123456789" for character in neighbours)


def _no_inner_capital(text: str) -> bool:
    return all(part[1:] == part[1:].lower() for part in re.split("['\u2019]", text))


def _without_spans(text: str, opening: str, closing: str) -> str:
    """Cut every span out, in one pass."""
    kept, at = [], 0
    while (start := text.find(opening, at)) >= 0:
        end = text.find(closing, start + len(opening))
        if end < 0:
            break
        kept.append(text[at:start])
        at = end + len(closing)
        if closing.endswith("{"):  # the name of the environment
            at = text.find("}", at, at + _LONGEST_ENVIRONMENT) + 1 or at
    kept.append(text[at:])
    return " ".join(kept)
