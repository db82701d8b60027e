"""Numbers written in ways of their own: Chinese numerals, decimals that repeat, choices as `C_5^2`."""

from __future__ import annotations

import re
from math import comb, perm

from megatron_r1.rewards.math.spelling import plain_words
from megatron_r1.rewards.math.spoken import spoken_number
from megatron_r1.rewards.math.units import names_a_unit

_DIGITS = {digit: value for value, digit in enumerate("零一二三四五六七八九")} | {"〇": 0, "两": 2}
_TENS = {"十": 10, "百": 100, "千": 1000}
_MYRIADS = {"亿": 10**8, "万": 10**4}
_NUMERAL = "[零〇一二两三四五六七八九十百千万亿]{1,20}"
_CHINESE = re.compile(
    rf"(负)?(?:(?:(?P<ones>{_NUMERAL})又)?(?P<below>{_NUMERAL})分之(?P<above>{_NUMERAL})|(?P<whole>{_NUMERAL})(?:点(?P<part>[零〇一二三四五六七八九]{{1,20}}))?)"
    r"(?P<unit>[个人名种次只件条本张棵支辆袋瓶箱][\u4e00-\u9fff]{0,3}|[元米克天岁年]|厘米|千米|千克|小时|分钟|公里|公斤|平方米|平方厘米)?"
)
_ROUND_BRACKETS = re.compile(r"(-?[0-9]{0,20}\.[0-9]{0,20})\(([0-9]{1,20})\)")
_ENDLESS = re.compile(r"(-?[0-9]{0,20}\.)([0-9]{3,40})\s*(?:\.\.\.+|\\[lcd]?dots(?![A-Za-z]))")
_ENTIRE = re.compile(
    r"(.+?)[,;]?(?:\s|\\[ ,;:]|\\q?quad(?![A-Za-z]))*[(（]?\s*"
    r"(?:\\text\s*\{\s*(?:where|for|with|for all|for any)?\s*\}|where|for|其中)?"
    r"\s*(?<![A-Za-z\\])([kmn])\s*"
    r"(?:\\in\s*(?:\\mathbb\s*\{?\s*Z\s*\}?|Z)|(?:\\text\s*\{\s*)?is an(?:y)? integer(?:\s*\})?)\s*[)）]?"
)
_FOR_ALL = re.compile(
    r"(.+?),?(?:\s|\\[ ,;:]|\\q?quad(?![A-Za-z]))*(?:\\text\s*\{\s*)?(?<![A-Za-z])(?:where [a-zA-Z] is an arbitrary constant\s*\}?"
    r"|for (?:all|any|every|each)(?: real| arbitrary)?(?: numbers?| constants?)?\s*\}?\s*[a-zA-Z]?\s*\}?)"
)
_DIGITS_OR_BRACED = r"(?:\{\s*([0-9]{1,3})\s*\}|([0-9]))"
_SELECTION = re.compile(
    rf"(?<![A-Za-z_\\])(?:\\(?:mathrm|text|rm)\s*\{{\s*([CAP])\s*\}}|([CAP]))\s*_\s*{_DIGITS_OR_BRACED}\s*\^\s*{_DIGITS_OR_BRACED}"
)
_CALLED = re.compile(r"([CP])\s*\(\s*([0-9]{1,3})\s*,\s*([0-9]{1,3})\s*\)")
_BETWEEN = re.compile(r"(?:\{\}\s*)?(?:_|\^)?\s*\{?([0-9]{1,3})\}?\s*([CP])\s*_?\s*\{?([0-9]{1,3})\}?")
_CHOOSE = re.compile(r"(?<![0-9.])([0-9]{1,3})\s*(?:\\(?:text|mathrm)\s*\{\s*choose\s*\}|choose)\s*([0-9]{1,3})(?![0-9.])")
_MOST = 200
_MOST_NUMBER_WORDS = 8
_ARTICLE = re.compile(r"^(?:of )?an? ")


def with_plain_numerals(text: str) -> str:
    """The text with Arabic digits if it is one Chinese numeral, and with a period over the digits that repeat for ever.

    `k \\in \\mathbb{Z}` behind a family of numbers says only what everyone takes k for, so it goes.
    """
    if (text[:1].isalpha() or text.startswith("\\text")) and (spoken := _spoken(plain_words(text))):
        return spoken
    if not text.isascii() and (found := _CHINESE.fullmatch(text.replace(" ", ""))):
        return _from_chinese(found) or text
    if "(" in text and (found := _ROUND_BRACKETS.fullmatch(text)):
        return f"{found[1]}\\overline{{{found[2]}}}"
    if "." in text and (found := _ENDLESS.fullmatch(text)):
        repeating = _repeating(found[2])
        return f"{found[1]}{repeating}" if repeating else text
    if ("Z" in text or "integer" in text) and (found := _ENTIRE.fullmatch(text)):
        return found[1].strip() if re.search(rf"(?<![A-Za-z\\]){found[2]}(?![A-Za-z])|(?<=[0-9]){found[2]}", found[1]) else text
    if (" for " in text or "{for " in text or "where" in text) and (found := _FOR_ALL.fullmatch(text)):
        return found[1].strip()
    return _CHOOSE.sub(r"\\binom{\1}{\2}", text) if "choose" in text else text


def _spoken(words: str) -> str | None:
    """The number that words say, with the unit behind it: "three and a half hours", "half an hour"."""
    if (number := spoken_number(words)) is not None:
        return str(number)
    pieces = words.split(" ")
    for cut in range(min(len(pieces) - 1, _MOST_NUMBER_WORDS), 0, -1):
        number = spoken_number(" ".join(pieces[:cut]))
        if number is None:
            continue
        unit = _ARTICLE.sub("", " ".join(pieces[cut:]))
        return f"{number} {unit}" if all(map(names_a_unit, unit.split(" "))) else None
    return None


def with_selections(text: str) -> str | None:
    """The text with the numbers of choices or arrangements that it names, as `C_5^2` does; None if it names none."""
    if not any(letter in text for letter in "CAP"):
        return None
    found = _CALLED.fullmatch(text)
    if found:
        return _selection(found[1], int(found[2]), int(found[3]))
    found = _BETWEEN.fullmatch(text)
    if found:
        return _selection(found[2], int(found[1]), int(found[3]))
    values: list[str | None] = []

    def put(match: re.Match[str]) -> str:
        values.append(_selection(match[1] or match[2], int(match[3] or match[4]), int(match[5] or match[6])))
        return f"({values[-1]})"

    counted = _SELECTION.sub(put, text)
    return counted if values and None not in values else None


def _selection(letter: str, whole: int, part: int) -> str | None:
    if not 0 <= part <= whole <= _MOST:
        return None
    return str(comb(whole, part) if letter == "C" else perm(whole, part))


def _from_chinese(found: re.Match[str]) -> str | None:
    sign = "-" if found[1] else ""
    unit = found["unit"] or ""
    if found["below"]:
        above, below = _chinese_value(found["above"]), _chinese_value(found["below"])
        if above is None or not below:
            return None
        if found["ones"]:
            ones = _chinese_value(found["ones"])
            return None if ones is None or above >= below else f"{sign}\\frac{{{ones * below + above}}}{{{below}}}{unit}"
        return f"{sign}{above}%" if found["below"] == "百" and not unit else f"{sign}\\frac{{{above}}}{{{below}}}{unit}"
    whole = _chinese_value(found["whole"])
    if whole is None:
        return None
    part = "".join(str(_DIGITS[digit]) for digit in found["part"] or "")
    return f"{sign}{whole}{'.' if part else ''}{part}{unit}"


def _chinese_value(numeral: str) -> int | None:
    """The value of a numeral as 一百零五, or of digits in a row as 二〇二四; None if it is neither."""
    if len(numeral) > 1 and all(digit in _DIGITS for digit in numeral):
        return int("".join(str(_DIGITS[digit]) for digit in numeral)) if "两" not in numeral else None
    for sign, size in _MYRIADS.items():
        if sign in numeral:
            above, _, below = numeral.partition(sign)
            head, tail = _chinese_value(above) if above else None, _chinese_value(below) if below else 0
            if head is None or tail is None or tail >= size or (below in _DIGITS and below):
                return None
            return head * size + tail
    if numeral in _TENS:
        return {"十": 10, "百": 100}.get(numeral)
    total, digit, last, has_zero = 0, None, 10_000, False
    for sign in numeral:
        if sign in "零〇":
            if digit is not None:
                return None
            has_zero = True
            if len(numeral) == 1:
                return 0
        elif sign in _DIGITS:
            if digit is not None:
                return None
            digit = _DIGITS[sign]
        elif sign in _TENS and _TENS[sign] < last and (digit is not None or (sign == "十" and not total)):
            last = _TENS[sign]
            total, digit, has_zero = total + (1 if digit is None else digit) * last, None, False
        else:
            return None
    if digit is not None and last > 10 and total and not has_zero:
        return None  # 一百五 is 150, which takes a rule of its own
    return total + (digit or 0)


def _repeating(digits: str) -> str | None:
    r"""Digits with `\overline` over the shortest period that they end in, if they show it often enough."""
    for length in range(1, len(digits) // 2 + 1):
        times = 3 if length == 1 else 2
        period = digits[-length:]
        if len(digits) >= length * times and digits.endswith(period * times):
            head = digits
            while head.endswith(period):
                head = head[:-length]
            return f"{head}\\overline{{{period}}}"
    return None
