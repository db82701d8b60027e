"""Units of one dimension against each other, exactly: 3 km is 3000 m, 2 hours 30 minutes is 2.5 hours.

Only what is exact by definition is here. A ton is the metric one; months and years are no days, and no currency is another.
"""

from __future__ import annotations

import re
from collections import Counter
from fractions import Fraction

from megatron_r1.rewards.math.spelling import plain_words
from megatron_r1.rewards.math.units import PREFIXED, PREFIXES, NotAUnit, split_words

_SIZES = """
    inch 127/5000 meter, foot 381/1250 meter, yard 1143/1250 meter, mile 201168/125 meter, decimeter 1/10 meter,
    ton 1000000 gram, pound 45359237/100000 gram, ounce 45359237/1600000 gram,
    minute 60 second, hour 3600 second, day 86400 second, week 604800 second, year 12 month,
    quart 2 pint, gallon 8 pint, cup 1/2 pint, cent 1/100 dollar, liter 1/1000 meter^3, hectare 10000 meter^2,
    newton 1000 gram meter second^-2, joule 1000 gram meter^2 second^-2, watt 1000 gram meter^2 second^-3,
    pascal 1000 gram meter^-1 second^-2, coulomb 1 ampere second, volt 1000 gram meter^2 second^-3 ampere^-1,
    ohm 1000 gram meter^2 second^-3 ampere^-2, tesla 1000 gram second^-2 ampere^-1,
    kilowatthour 3600000000 gram meter^2 second^-2
"""
_EITHER = {"yen sign": ("yen", "yuan")}  #: one sign for two currencies
_PIECE = re.compile(r"([^\s^]+)(?:\^(-?[0-9]))?")


def _sizes() -> dict[str, tuple[Fraction, dict[str, int]]]:
    """The size of each unit, and the powers of base units that it is in."""
    found: dict[str, tuple[Fraction, dict[str, int]]] = {}
    for entry in _SIZES.split(","):
        unit, size, base = entry.split(maxsplit=2)
        found[unit] = Fraction(size), {name: int(power or 1) for name, power in _PIECE.findall(base)}
    for unit in PREFIXED:
        size, base = found.get(unit, (Fraction(1), {unit: 1}))
        found |= {f"{prefix}{unit}": (size * Fraction(10) ** power, base) for prefix, (_, power) in PREFIXES.items()}
    return found


_IN_BASE = _sizes()
_JOINABLE = frozenset(_IN_BASE) | {name for _, base in _IN_BASE.values() for name in base}
#: what people give in two units; of the others "3 m and 20 cm" may be two answers
_ARC = re.compile(r"([0-9]{1,4}) ?\^\{? ?\\circ ?\}? ?([0-9]{1,2}) ?(?:'|\^\{?\\prime\}?)(?: ?([0-9]{1,2}) ?(?:''|\"))?")
_JOINED = re.compile(
    r"([0-9]{1,9}) ?([a-z]+|[\u4e00-\u9fff]{1,2}?)\.?(?:,| and|, and)? ?"
    r"([0-9]{1,9}(?:\.[0-9]{1,9})?) ?([a-z]+|[\u4e00-\u9fff]{1,2})\.?",
    re.IGNORECASE,
)


def times_as_large(unit: str, other: str) -> Fraction | None:
    """How many times a unit is as large as another, None if they measure different things. Both are in `split_words`' spelling."""
    for sign, currencies in _EITHER.items():
        if (unit == sign and other in currencies) or (other == sign and unit in currencies):
            return Fraction(1)
    (size, dimension), (other_size, other_dimension) = _measure(unit), _measure(other)
    return size / other_size if dimension == other_dimension else None


def with_one_unit(text: str) -> str:
    """`2 hours 30 minutes` in the first of its units; any other text as it is."""
    if not text[:1].isdigit() and not text.startswith("\\text"):
        return text
    if arc := _ARC.fullmatch(text):
        degrees = int(arc[1]) + Fraction(int(arc[2]), 60) + Fraction(int(arc[3] or 0), 3600)
        return f"\\frac{{{degrees.numerator}}}{{{degrees.denominator}}}^\\circ"
    found = _JOINED.fullmatch(plain_words(text))
    if not found:
        return text
    try:
        units = [split_words(found[group]) for group in (2, 4)]
    except NotAUnit:
        return text
    (factor, first), (other_factor, second) = units
    if factor != 1 or other_factor != 1 or first not in _JOINABLE or second == first:
        return text
    smaller = times_as_large(second, first)
    if smaller is None or smaller >= 1:
        return text
    value = Fraction(found[1]) + Fraction(found[3]) * smaller
    return f"\\frac{{{value.numerator}}}{{{value.denominator}}} {first}"


def _measure(unit: str) -> tuple[Fraction, dict[str, int]]:
    size, dimension, sign = Fraction(1), Counter(), 1
    for name, power in _PIECE.findall(unit):
        if name == "per":
            sign = -1
            continue
        times = sign * int(power or 1)
        factor, base = _IN_BASE.get(name, (Fraction(1), {name: 1}))
        size *= factor**times
        for part, exponent in base.items():
            dimension[part] += exponent * times
    return size, {base: power for base, power in dimension.items() if power}
