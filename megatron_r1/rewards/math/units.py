"""The words behind a number: an amount that multiplies it, a unit of measure, or the name of what is counted.

`measures.py` holds their sizes. A word that is none of these makes the answer unreadable: `5 quadrillion`, `5 incorrect` and
`5 tens` are not 5.
"""

from __future__ import annotations

import re

_ALIASES = {
    "meter": "m metre 米", "centimeter": "centimetre 厘米 公分",
    "millimeter": "millimetre 毫米", "kilometer": "kilometre 千米 公里",
    "decimeter": "dm decimetre 分米", "inch": "in inches", "foot": "ft feet", "yard": "yd", "mile": "mi",
    "gram": "g gm gramme 克", "kilogram": "千克 公斤", "milligram": "毫克", "ton": "tonne t 吨", "pound": "lb lbs",
    "ounce": "oz", "liter": "l L litre 升", "milliliter": "ml millilitre 毫升", "second": "s sec 秒", "minute": "min 分钟 分",
    "hour": "h hr 小时 时", "day": "天 日", "week": "周 星期", "month": "月 个月", "year": "yr 年 岁",
    "dollar": "$ USD usd 美元", "cent": "¢", "yuan": "元 块 RMB CNY 人民币", "euro": "€ EUR 欧元", "rupee": "INR 卢比",
    "yen": "JPY 日元",
    "pound sterling": "GBP 英镑", "degree": "deg 度",
    "unit": "个 人 名 种 次 只 件 条 本 张 棵 支 辆 袋 瓶 箱", "square": "sq 平方", "cubic": "cu 立方", "acre": "",
    "hectare": "ha 公顷",
    "mile per hour": "mph", "kilometer per hour": "kph kmh", "newton": "N 牛 牛顿", "joule": "J 焦 焦耳", "watt": "W 瓦",
    "volt": "V 伏", "ampere": "A amp 安", "ohm": "\\Omega 欧 欧姆", "hertz": "Hz 赫兹", "pascal": "Pa 帕", "farad": "",
    "radian": "rad 弧度", "kelvin": "K", "mole": "mol 摩尔", "celsius": "摄氏度", "fahrenheit": "华氏度",
    "gallon": "gal", "pint": "pt",
    "quart": "qt", "cup": "", "calorie": "cal", "byte": "", "bit": "", "atmosphere": "atm", "coulomb": "C 库仑", "tesla": "T",
    "electronvolt": "eV", "kilowatthour": "kWh 千瓦时 度电",
}  # fmt: skip
PREFIXES = {"kilo": ("k", 3), "mega": ("M", 6), "giga": ("G", 9), "centi": ("c", -2), "milli": ("m", -3), "micro": ("\\mu ", -6),
            "nano": ("n", -9), "pico": ("p", -12)}  # fmt: skip
#: the units that take a prefix, and those they are met with; a letter more is a factor more often than a unit
PREFIXED = {
    "meter": ("m", "k c m \\mu n p"), "gram": ("g", "k m \\mu"), "liter": ("L", "m \\mu"), "second": ("s", "m \\mu n"),
    "joule": ("J", "k M m"), "watt": ("W", "k M G m"), "volt": ("V", "k m"), "ampere": ("A", "m \\mu"), "newton": ("N", "k m"),
    "pascal": ("Pa", "k M G"), "hertz": ("Hz", "k M G"), "ohm": ("\\Omega", "k M"), "farad": ("F", "\\mu n p"),
    "coulomb": ("C", "m \\mu n"), "tesla": ("T", "m"), "mole": ("mol", "m k"), "electronvolt": ("eV", "k M G m"),
    "calorie": ("cal", "k"), "byte": ("B", "k M G"),
}  # fmt: skip


def _canonical_names() -> dict[str, str]:
    """The unit that each spelling names."""
    names = {spelling: unit for unit, spellings in _ALIASES.items() for spelling in (unit, *spellings.split())}
    for unit, (letter, letters) in PREFIXED.items():
        for prefix, (short, _) in PREFIXES.items():
            if short.strip() in letters.split():
                names |= {f"{prefix}{unit}": f"{prefix}{unit}", f"{short.strip()}{letter}": f"{prefix}{unit}"}
    return names


_CANONICAL = _canonical_names()
SHORT_UNITS = frozenset(
    spelling for spelling in _CANONICAL if len(spelling) <= 4 and spelling.isascii() and spelling.isalpha()
) | {"kmh", "pct"}  # fmt: skip
_PERCENT = frozenset({"percent", "percents", "pct", "per cent", "percentage"})
ORDINALS = frozenset({"st", "nd", "rd", "th"})

#: amounts that multiply the number before them
_AMOUNTS = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12, "quadrillion": 10**15,
            "dozen": 12, "lakh": 10**5, "crore": 10**7, "万": 10**4, "亿": 10**8, "千": 1000, "百": 100}  # fmt: skip
#: what comes in numbers without the plural's s
_UNCOUNTABLE = frozenset(
    [
        "people",
        "children",
        "men",
        "women",
        "feet",
        "mice",
        "geese",
        "teeth",
        "fish",
        "sheep",
        "deer",
        "oxen",
        "cattle",
        "police",
        "money",
        "fruit",
        "furniture",
        "paper",
        "clothing",
        "candy",
        "cash",
        "water",
        "milk",
        "rice",
        "bread",
        "grain",
        "soil",
        "wine",
        "juice",
        "oil",
        "gas",
        "sugar",
        "flour",
        "chocolate",
    ]
)
#: names of single things, as in "1 apple"; most words without an s are no names of things: 1 odd, 1 wrong
_COUNTED_TEXT = """
    apple orange banana pear cookie cake pie pizza egg book page pencil pen student teacher child person man woman boy
    girl friend player team car bus train ticket tree flower ball toy marble card coin bag box bottle piece slice point
    time way solution root color colour letter word vote game round lap trip dog cat bird chicken cow horse pig rabbit
    duck triangle rectangle circle line side edge vertex face diagonal chair table room house shirt hat shoe sticker stamp
    candle crayon seat row column step block stone brick bead button plate glass sandwich muffin cupcake candy serving
    gift present photo picture song movie class lesson question problem test
    chance probability
"""
_COUNTED = frozenset(_COUNTED_TEXT.split())
#: what "of the" makes no whole of: 2/3 of the answer is another number
_NO_WHOLES_TEXT = "answer result value number sum product total above correct wrong rest difference original amount"
_NO_WHOLES = frozenset(_NO_WHOLES_TEXT.split())
_COUNTERS = frozenset("个人名种次只件条本张棵支辆袋瓶箱")
_CHANGING = frozenset("半百千万亿十分多几约不错零一二三四五六七八九倍")  #: signs that change the number before them
_LONGEST_UNIT = 5  #: words
_NAMED_WORDS = 3  #: words that name what is counted, the noun last: "red apples"

#: words after a number that change its value or are no unit
_VALUE_WORDS = """
    hundred thousand million billion trillion dozen score scores half halves percent percentage squared cubed root roots
    power powers factorial times plus minus over divided mod modulo more less fewer than not no if when where for only
    approximately about except without but to from either neither maybe is are was be equals equal wrong false true
    choose with base gross grosses myriad myriads pair pairs couple couples lots zero one two three four five six seven eight nine
    ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty
    ninety ones twos threes fours fives sixes sevens eights nines twenties thirties forties fifties sixties seventies eighties
    nineties halfs zeros zeroes wrongs
    kilo mega giga nano micro milli negative positive inverse reciprocal opposite double triple twice doubles triples
    unless nothing none below above under between and or nor also bc ad bce ce instead actually however possibly perhaps probably
    least most basis bps ppm ppb decimals quarter quarters third thirds exponents unknowns this that these those
"""
VALUE_WORDS = frozenset(_VALUE_WORDS.split())
#: amounts in any form: tens, hundreds, lakhs, quadrillions, dozens; fractions: sevenths, hundredths, halves
_AMOUNT = re.compile(r"(?:tens|hundreds?|thousands?|[a-z]*illions?|dozens?|lakhs?|crores?|[a-z]+ths?|[a-z]*thirds?|[a-z]*half)")
_NOT_FRACTIONS = frozenset(
    [
        "months",
        "births",
        "deaths",
        "moths",
        "cloths",
        "paths",
        "baths",
        "booths",
        "youths",
        "depths",
        "lengths",
        "widths",
        "truths",
        "myths",
    ]
)
_DENYING = re.compile(r"(?:in|un|im|ir|il|mis|non)[a-z]{4,}|[a-z]+(?:less|ly)")


_PIECE = re.compile(
    r"平方|立方|每|\\mu[A-Za-z]+|[kM]?\\Omega|[A-Za-z$€¢]+|(?:(?!平方|立方|每)[\u4e00-\u9fff])+|\^\{?-?[0-9]\}?|/|\S"
)
_MICRO = re.compile(r"\\mu\s+([A-Za-z])")


class NotAUnit(Exception):
    """The words behind a number are no unit."""


def split_words(words: str) -> tuple[int, str]:
    """What words behind a number mean: (factor, unit). The unit is in one spelling: singular, no abbreviation, powers as ^2.

    Raises:
        NotAUnit: they are no unit, e.g. "incorrect", or they change the value, e.g. "tenths".
    """
    pieces = _PIECE.findall(_MICRO.sub(r"\\mu\1", words.replace("\\$", "$")))
    factor = 1
    while pieces and pieces[0].lower() in _AMOUNTS:
        factor *= _AMOUNTS[pieces.pop(0).lower()]
        if len(pieces) > 1 and pieces[0].lower() == "of":
            pieces.pop(0)
    if not pieces:
        return factor, ""
    if " ".join(pieces).lower() in _PERCENT:
        return factor, "percent"
    if pieces[0].lower() == "of" and len(pieces) > 2:
        pieces = _whole_of(pieces)
    if len(pieces) > 1 and pieces[-1].lower() == "old":
        pieces.pop()  # 5 years old
    return factor, _unit(pieces)


def _whole_of(pieces: list[str]) -> list[str]:
    """Of what a number is a part: "of the cake", "of an hour"; its name is a unit like the name of what is counted."""
    article, *words = (piece.lower() for piece in pieces[1:])
    named = all(word.isalpha() and word not in VALUE_WORDS and word not in _NO_WHOLES for word in words)
    if article not in ("the", "a", "an", "his", "her", "their", "all", "my") or len(words) > _NAMED_WORDS or not named:
        raise NotAUnit("of")
    if any(_AMOUNT.fullmatch(word) and word not in _NOT_FRACTIONS for word in words):
        raise NotAUnit(words[-1])
    if article in ("a", "an") and (_CANONICAL.get(words[-1]) or len(words) != 1):
        return pieces[2:]
    return ["the", *words] if words[-1].endswith("s") else ["the", *words[:-1], f"{words[-1]}s"]


def _unit(pieces: list[str]) -> str:
    found: list[str] = []
    power = ""
    unknown: list[str] = []
    for piece in pieces:
        word = piece.lower()
        if word.isdigit() or len(found) == _LONGEST_UNIT:
            raise NotAUnit(piece)
        unit = _CANONICAL.get(piece) or _CANONICAL.get(word) or _singular(word) or _chinese_count(piece)
        if unit in ("square", "cubic"):
            power = {"square": "^2", "cubic": "^3"}[unit]
        elif piece[0] == "^":
            if not found:
                raise NotAUnit(piece)
            found[-1] += f"^{piece.strip('^{}')}"
        elif piece in ("/", "per", "每"):
            found.append("per")
        elif word == "us" and found == [] and len(pieces) > 1:
            continue  # US dollars
        elif piece not in (".", ",", "*", "-", "(", ")", "~"):
            if unit is None:
                unknown.append(word)
            found.append((unit or _without_s(word)) + power)
            power = ""
    if unknown and not _is_counted(unknown):
        raise NotAUnit(unknown[-1])
    if not found or (found[0] in ("c", "f") and len(found) == 1):
        raise NotAUnit(" ".join(pieces))
    name = " ".join(found)
    for scale, letter in (("celsius", "coulomb"), ("fahrenheit", "f")):
        if name in (scale, f"degree {scale}", f"degree {letter}", f"degree {scale[0]}"):
            return scale
    return name


def _is_counted(words: list[str]) -> bool:
    """Whether words that are no unit of measure name what is counted: "red apples", but not "tens" or "incorrect"."""
    if words == ["f"]:
        return True
    noun = words[-1]
    if len(words) > _NAMED_WORDS or any(word in VALUE_WORDS or not word.isalpha() for word in words):
        return False
    if any(_AMOUNT.fullmatch(word) and word not in _NOT_FRACTIONS for word in words):
        return False
    if any(_DENYING.fullmatch(word) for word in words[:-1]):
        return False
    return (
        noun in _UNCOUNTABLE or noun in _COUNTED or (len(noun) > 3 and noun.endswith("s") and not noun.endswith(("ss", "us", "is")))
    )


def _chinese_count(piece: str) -> str | None:
    """The unit of a Chinese count with its noun, as 名学生; None if the words may change the value, as 个半 does."""
    if piece[0] not in _COUNTERS or not 2 <= len(piece) <= 4 or set(piece) & _CHANGING:
        return None
    return _CANONICAL.get(piece[1:], "unit")


def _singular(word: str) -> str | None:
    """The unit of measure that a word names, None if it names none."""
    for plural in (word.removesuffix("s"), word.removesuffix("es")):
        if plural in _CANONICAL:
            return _CANONICAL[plural]
    return None


def _without_s(word: str) -> str:
    return word.removesuffix("s") if len(word) > 3 else word


def names_a_unit(word: str) -> bool:
    """Whether a word is the name of a unit of measure, in the singular or the plural."""
    return word in _CANONICAL or _singular(word) is not None


def unit_of_letter(letter: str) -> str | None:
    """The unit of measure that one letter is short for, e.g. "meter" for m; None if it is short for none."""
    return _CANONICAL.get(letter) if len(letter) == 1 or letter == "\\Omega" else None
