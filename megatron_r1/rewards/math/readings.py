r"""Second readings of an answer, tried after the first one disagreed: `t = 2s` may be two seconds, `2 and 1/2` a mixed number.

Each takes a text and what it is held against, and returns the text in its other reading, or None. A reading says what nobody would
write who means the first one and gives a wrong answer by it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from math import factorial

from megatron_r1.rewards.math.numerals import with_selections
from megatron_r1.rewards.math.spelling import plain_words
from megatron_r1.rewards.math.spoken import spoken_ordinal
from megatron_r1.rewards.math.units import SHORT_UNITS, NotAUnit, split_words

_FRACTION = r"\\[dt]?frac\s*\{?[0-9]{1,9}\}?\s*\{?[0-9]{1,9}\}?"
_MIXED = re.compile(rf"([0-9]{{1,9}})\s*(?:\\text\s*\{{\s*)?and\s*\}}?\s*([0-9]{{1,9}}/[0-9]{{1,9}}|{_FRACTION})")
_OF_LETTERS = re.compile(
    r"(.*[0-9}])\s*(?:\\[,;: ])?\s*\\[dt]?frac\s*\{\s*([A-Za-z]{1,3})\s*\}\s*\{\s*([A-Za-z]{1,3})\s*(?:\^\s*\{?([23])\}?)?\s*\}"
)
_WITH_LETTERS = re.compile(r"(-?[0-9.]{1,20}(?:\s*\\times\s*10\s*\^\s*\{-?[0-9]{1,3}\})?)\s*([A-Za-z][A-Za-z*^/(){} 0-9-]{0,40})")
_BETWEEN_PARTS = re.compile(r";|,? (?:\\text\s*\{\s*)?or\s*\}? ")
_OHMS = re.compile(r"(-?[0-9.]{1,20})(?: |\\[,;: ]|~)*\\Omega")
_LABELLED_CURVE = re.compile(r"(?:[lLCE]|\\Gamma|\\odot ?[A-Z])(?:_[0-9])?\s*:\s*([^:]*[xy][^:]*=[^:]*)")
_FACTORIAL = re.compile(r"([kmn]|[0-9]{1,2})!=([0-9]{2,30})")
_FACTORIALS = frozenset(factorial(n) for n in range(4, 26))
_MEASURED = re.compile(
    rf"([A-Za-z])(?:_\{{?\w\}}?)?\s*=\s*(-?[0-9]{{1,20}}(?:\.[0-9]{{1,20}})?|-?{_FRACTION})\s*([A-Za-z]{{1,3}}(?:/[A-Za-z]{{1,3}}(?:\^\{{?2\}}?)?)?)"
)
_CONDITION_SIGNS = ("\\ne", "!=", "\\ge", "\\le", "\\in", "<", ">")
_CONDITION = re.compile(
    r"(.+?)(?:[,;(]|\s|\\text\s*\{|\\q?quad(?![A-Za-z])|\\[,;: ])\s*(?:\\text\s*\{\s*[,(]?\s*)?"
    r"(?:(?:for|where|when|if|with|provided|and)(?: that)?)?[\s},(]*"
    r"([A-Za-z]\s*(?:\\(?:n|l|g)eq?(?:slant)?(?![A-Za-z])|!=|[<>]=?|\\in(?![A-Za-z]))[^,;()<>=]{1,60})(\))?(?:\\text\s*\{\s*\)\s*\})?"
)
_NUMBER = rf"-?(?:[0-9]{{1,9}}(?:/[0-9]{{1,9}})?|{_FRACTION})"
#: excludes a number, or says that an index counts
_HARMLESS = re.compile(
    rf"[A-Za-z]\s*(?:\\neq?|!=)\s*(?:\\pm\s*)?{_NUMBER}|[kmn]\s*(?:(?:\\geq?(?:slant)?|>=)\s*[01]|>\s*0"
    r"|\\in\s*(?:\\mathbb\s*\{?\s*[NZ]\s*\}?|N)(?:\s*[\^_]\s*\{?[*+0]\}?|[*+])*)"
)
#: the quantities that letters stand for, each with its units
_QUANTITIES = {
    "t T": "s h min ms", "m M": "g kg mg t", "d h l L r R s w x y": "m cm mm km ft in", "v u": "m/s km/h", "a g": "m/s^2 m/s^{2}",
    "F N": "N kN", "E W K U": "J kJ eV", "P": "W kW", "V": "L mL V", "I": "A mA", "f": "Hz",
}  # fmt: skip
_UNITS = {letter: frozenset(units.split()) for letters, units in _QUANTITIES.items() for letter in letters.split()}


def _with_mixed_number(text: str, other: str) -> str | None:
    found = _MIXED.fullmatch(text) if "and" in text else None
    return f"{found[1]} {found[2]}" if found else None


def _with_fraction_of_units(text: str, other: str) -> str | None:
    r"""`15\frac{m}{s}`, only against what has a unit, too."""
    found = _OF_LETTERS.fullmatch(text) if "frac" in text and re.search(r"[A-Za-z\u4e00-\u9fff]", other) else None
    if not found:
        return None
    try:
        split_words(f"{found[2]} / {found[3]}")
    except NotAUnit:
        return None
    return f"{found[1]} \\text{{{found[2]}/{found[3]}}}" + (f"^{found[4]}" if found[4] else "")


def _with_units(text: str, other: str) -> str | None:
    """`9.81 m*s^(-2)`, all of whose letters are units, only against what has a unit, too."""
    found = _WITH_LETTERS.fullmatch(text) if re.search(r"[A-Za-z]", other) else None
    letters = re.findall(r"[A-Za-z]+", found[2]) if found else []
    if not found or not all(letter in SHORT_UNITS for letter in letters):
        return None
    return f"{found[1]} \\text{{{re.sub(r'[(){}]', '', found[2])}}}"


def _with_ohms(text: str, other: str) -> str | None:
    """`5 \\Omega`: no answer has that letter for a factor behind a number."""
    found = _OHMS.fullmatch(text)
    return f"{found[1]} ohms" if found else None


def _with_tuples(text: str, other: str) -> str | None:
    """`p=5,q=2; p=7,q=2` as (5,2),(7,2), if each part names the same letters in their order."""
    if "," not in text or "=" not in text or not (";" in text or "or" in text):
        return None
    parts = [[equation.split("=") for equation in part.split(",")] for part in _BETWEEN_PARTS.split(text)]
    names = {tuple(sides[0].strip() for sides in part) for part in parts}
    letters = next(iter(names))
    if len(names) != 1 or len(parts) < 2 or len(letters) < 2 or list(letters) != sorted(set(letters)):
        return None
    if any(len(sides) != 2 for part in parts for sides in part):
        return None
    return ",".join(f"({','.join(value for _, value in part)})" for part in parts)


def _without_label(text: str, other: str) -> str | None:
    """`l: x-y+1=0`: the equation of a line or curve behind its name."""
    found = _LABELLED_CURVE.fullmatch(text)
    return found[1] if found else None


def _with_factorial(text: str, other: str) -> str | None:
    """`n!=120`, which says n != 120 as well; but of a factorial nobody says that."""
    found = _FACTORIAL.fullmatch(text)
    if not found:
        return None
    value = int(found[2])
    return found[2] if (value == factorial(int(found[1])) if found[1].isdigit() else value in _FACTORIALS) else None


def _with_unit(text: str, other: str) -> str | None:
    """`t = 2s`: the letter behind the number is a unit of what the name before it measures."""
    found = _MEASURED.fullmatch(text) if "=" in text else None
    return f"{found[2]} \\text{{ {found[3]}}}" if found and found[3] in _UNITS.get(found[1], ()) else None


def _with_ordinal(text: str, other: str) -> str | None:
    if not (text[-1:].isalpha() or text[-1:] == "}"):
        return None
    words = plain_words(text)
    place = spoken_ordinal(words)
    return f"{place}th" if place else words[4:] if words[:4].lower() == "the " and words[4:5].isdigit() else None


def has_condition(text: str) -> bool:
    """Whether a reference may say for which values it holds."""
    return any(sign in text for sign in (*_CONDITION_SIGNS, "∈", "≠", "≥", "≤"))


def split_condition(text: str) -> tuple[str, str] | None:
    r"""The value and the condition of `x+1, x \ne 1`, whose letter must be in the value; None if there is none."""
    found = _CONDITION.fullmatch(text) if any(sign in text for sign in _CONDITION_SIGNS) else None
    if not found:
        return None
    value, condition = found[1].rstrip(" ,;").removesuffix("\\quad").rstrip(" ,;"), found[2].strip(" }")
    named = re.sub(r"\\[A-Za-z]+", " ", value)
    if condition[0] not in named or value.count("(") != value.count(")") or re.search(r"[<>,]|!=|\\(?:[nlg]e|in)(?![a-z])", value):
        return None
    return value, condition + "}" * (condition.count("{") - condition.count("}"))


def is_harmless(condition: str) -> bool:
    """Whether an answer may have a condition that its reference leaves out."""
    return bool(_HARMLESS.fullmatch(condition))


READINGS: tuple[Callable[[str, str], str | None], ...] = (
    lambda text, other: with_selections(text),
    _with_mixed_number,
    _with_fraction_of_units,
    _with_units,
    _with_ohms,
    _with_tuples,
    _without_label,
    _with_factorial,
    _with_unit,
    _with_ordinal,
)
