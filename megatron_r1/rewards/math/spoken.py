"""English words for numbers: twenty-five, two thirds, three and a half, third."""

from __future__ import annotations

import re
from fractions import Fraction

_ONES = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
    eighteen nineteen"""
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_VALUES = {word: value for value, word in enumerate(_ONES.split())}
_VALUES |= {word: 10 * value for value, word in enumerate(_TENS.split(), 2)}
_SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "dozen": 12}
_IRREGULAR = {"first": 1, "second": 2, "third": 3, "fifth": 5, "eighth": 8, "ninth": 9, "twelfth": 12}
_ORDINALS = {f"{word}th": value for word, value in _VALUES.items() if value} | _IRREGULAR
_ORDINALS |= {f"{word.removesuffix('y')}ieth": value for word, value in _VALUES.items() if word.endswith("ty")}
_ORDINALS |= {"hundredth": 100, "thousandth": 1000, "millionth": 10**6}
_PARTS = {"half": 2, "halve": 2, "quarter": 4, "fourth": 4} | {word: size for word, size in _ORDINALS.items() if size > 2}
_WORDS = re.compile(r"[a-z]+(?:[ -][a-z]+){0,11}")
_MOST = 10**12


def spoken_number(text: str) -> Fraction | None:
    """The number that a text is the words for, None if it is anything else: "one third" is 1/3, "third" is no number."""
    words = _split(text)
    if not words:
        return None
    if words[-1] in ("half", "quarter") or (len(words) > 1 and words[-1].removesuffix("s") in _PARTS):
        return _mixed(words)
    value = _whole(words)
    return None if value is None else Fraction(value)


def spoken_ordinal(text: str) -> int | None:
    """The place that an ordinal number names, as "third" or "the twenty-first" do; None if the text is no such word."""
    words = _split(text)
    if words[:1] == ["the"]:
        words = words[1:]
    if not words or words[-1] not in _ORDINALS:
        return None
    last = _ORDINALS[words[-1]]
    if len(words) == 1:
        return last
    tens = _VALUES.get(words[0], 0)
    return tens + last if len(words) == 2 and tens >= 20 and last < 10 else None


def _split(text: str) -> list[str]:
    text = text.lower()
    return re.split("[ -]", text) if _WORDS.fullmatch(text) else []


def _mixed(words: list[str]) -> Fraction | None:
    """Three quarters, a half, two and a half."""
    size = _PARTS[words[-1].removesuffix("s")] if words[-1] != "halves" else 2
    whole, above = [], words[:-1]
    if "and" in above:
        cut = len(above) - 1 - above[::-1].index("and")
        whole, above = above[:cut], above[cut + 1 :]
    count = 1 if above in ([], ["a"], ["an"], ["one"]) else _whole(above)
    base = _whole(whole) if whole else 0
    if count is None or base is None or (not above and len(words) > 1) or not 0 < count < size:
        return None
    return base + Fraction(count, size)


def _whole(words: list[str]) -> int | None:
    """A whole number in words, each scale smaller than the one before."""
    total = current = 0
    last, before = _MOST, ""
    for word in words:
        if word in _VALUES:
            value = _VALUES[word]
            fits = before in ("", "and", "hundred", "thousand", "million", "billion") or (
                before in _VALUES and _VALUES[before] >= 20 and 0 < value < 10
            )
            if not fits or (not value and len(words) > 1):
                return None
            current += value
        elif word == "hundred" and (0 < current < 100 or before == "a"):
            current = 100 * max(current, 1)
        elif word in _SCALES and word != "hundred" and _SCALES[word] < last and (current or before == "a"):
            total, current, last = total + max(current, 1) * _SCALES[word], 0, _SCALES[word]
        elif not (word == "and" and before in _SCALES) and not (word == "a" and not before):
            return None
        before = word
    return total + current if before not in ("and", "a", "") else None
