"""Units of measure: what counts as one, and which spellings are the same unit. No unit is converted into another."""

from __future__ import annotations

import re

_ALIASES = {
    "meter": "m metre", "centimeter": "cm centimetre", "millimeter": "mm millimetre", "kilometer": "km kilometre",
    "inch": "in inches", "foot": "ft feet", "yard": "yd", "mile": "mi", "gram": "g gm", "kilogram": "kg", "milligram": "mg",
    "pound": "lb lbs", "ounce": "oz", "liter": "l L litre", "milliliter": "ml mL millilitre", "second": "s sec", "minute": "min",
    "hour": "h hr", "day": "", "year": "yr", "dollar": "$ USD usd", "cent": "", "degree": "deg", "unit": "", "square": "sq",
    "cubic": "cu", "mile per hour": "mph", "kilometer per hour": "kph kmh", "newton": "N", "joule": "J", "watt": "W", "volt": "V",
    "hertz": "Hz", "radian": "rad", "kelvin": "K",
}  # fmt: skip
_CANONICAL = {spelling: unit for unit, spellings in _ALIASES.items() for spelling in (unit, *spellings.split())}
SHORT_UNITS = frozenset(spelling for spelling in _CANONICAL if len(spelling) <= 4 and spelling.isalpha()) | {"kmh"}

_LONGEST_UNIT = 5  #: words

#: words after a number that change its value or are no unit
_VALUE_WORDS = """
    hundred thousand million billion trillion dozen score half halves third thirds quarter quarters fourths fifths sixths tenth
    tenths hundredth hundredths percent percentage squared cubed root power factorial times plus minus over divided mod modulo
    more less fewer than not no if when where for only approximately about except without but to from either neither maybe
    is are was be equals equal answer wrong false true choose with base
    seventh sevenths eighth eighths ninth ninths eleventh elevenths twelfth twelfths twentieth twentieths hundreds thousands
    millions thousandth thousandths millionth millionths sixth fifth fourth halve lakh crore gross myriad pair pairs couple couples
    dozens zero one two three four five six seven eight nine ten eleven twelve twenty thirty forty fifty sixty seventy eighty ninety
    kilo mega giga nano micro milli negative positive inverse reciprocal opposite double triple twice unless nothing none below
    above under between and or nor also bc ad bce ce instead actually however possibly perhaps probably least most
"""
VALUE_WORDS = frozenset(_VALUE_WORDS.split())


def canonical_unit(words: str) -> str:
    """One spelling of a unit: singular, without abbreviations, `square` and `cubic` as powers.

    Raises:
        ValueError: the words are no unit, e.g. "million".
    """
    found: list[str] = []
    power = ""
    for word in re.findall(r"[A-Za-z$]+|\^[0-9]|/|\S", words.replace("\\$", "$")):
        if word.lower() in VALUE_WORDS or word.isdigit() or len(found) == _LONGEST_UNIT:
            raise ValueError(words)
        unit = _CANONICAL.get(word) or _CANONICAL.get(word.lower()) or _singular(word.lower())
        if unit in ("square", "cubic"):
            power = {"square": "^2", "cubic": "^3"}[unit]
        elif unit == "/":
            found.append("per")
        elif unit not in (".", ","):
            found.append(unit + power)
            power = ""
    return re.sub(r" (\^[0-9])", r"\1", " ".join(found))


def _singular(word: str) -> str:
    for plural in (word.removesuffix("s"), word.removesuffix("es")):
        if plural in _CANONICAL:
            return _CANONICAL[plural]
    return word.removesuffix("s") if len(word) > 3 else word
