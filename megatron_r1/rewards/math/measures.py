"""Units of one dimension against each other, exactly: 3 km is 3000 m, 2 hours 30 minutes is 2.5 hours.

Only what is exact by definition is here. A ton is the metric one; months and years are no days, and no currency is another.
"""

from __future__ import annotations

import re
from collections import Counter
from fractions import Fraction

from megatron_r1.rewards.math.spelling import plain_words
from megatron_r1.rewards.math.units import NotAUnit, split_words

_SIZES = """
    kilometer 1000 meter, decimeter 1/10 meter, centimeter 1/100 meter, millimeter 1/1000 meter, nanometer 1/1000000000 meter,
    inch 127/5000 meter, foot 381/1250 meter, yard 1143/1250 meter, mile 201168/125 meter,
    kilogram 1000 gram, milligram 1/1000 gram, ton 1000000 gram, pound 45359237/100000 gram, ounce 45359237/1600000 gram,
    minute 60 second, hour 3600 second, day 86400 second, week 604800 second, millisecond 1/1000 second, year 12 month,
    milliliter 1/1000 liter, quart 2 pint, gallon 8 pint, cup 1/2 pint, cent 1/100 dollar,
    kilojoule 1000 joule, kilowatt 1000 watt, kilopascal 1000 pascal
"""
_IN_BASE = {unit: (Fraction(size), base) for unit, size, base in (entry.split() for entry in _SIZES.split(","))}
_JOINABLE = frozenset(_IN_BASE) | {base for _, base in _IN_BASE.values()}
_POWERS_OF_METER = {"liter": (Fraction(1, 1000), 3), "hectare": (Fraction(10_000), 2)}
_PIECE = re.compile(r"([^\s^]+)(?:\^(-?[0-9]))?")
#: what people give in two units; of the others "3 m and 20 cm" may be two answers
_JOINED = re.compile(r"([0-9]{1,9}) ?([a-z]+)\.?(?:,| and|, and)? ([0-9]{1,9}(?:\.[0-9]{1,9})?) ?([a-z]+)\.?", re.IGNORECASE)


def times_as_large(unit: str, other: str) -> Fraction | None:
    """How many times a unit is as large as another, None if they measure different things. Both are in `split_words`' spelling."""
    (size, dimension), (other_size, other_dimension) = _measure(unit), _measure(other)
    return size / other_size if dimension == other_dimension else None


def with_one_unit(text: str) -> str:
    """`2 hours 30 minutes` in the first of its units; any other text as it is."""
    if not text[:1].isdigit() and not text.startswith("\\text"):
        return text
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
        factor, base = _IN_BASE.get(name, (Fraction(1), name))
        size *= factor**times
        if base in _POWERS_OF_METER:
            factor, power = _POWERS_OF_METER[base]
            size, base, times = size * factor**times, "meter", power * times
        dimension[base] += times
    return size, {base: power for base, power in dimension.items() if power}
