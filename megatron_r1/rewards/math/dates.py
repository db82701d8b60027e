"""Times of day and dates, each in one form: 5 PM is 17:00, 2023-05-01 is May 1, 2023.

A date in slashes is read only where all countries read it alike: 12/25/2023, but not 6/3/2020.
"""

from __future__ import annotations

import datetime
import re

from megatron_r1.rewards.math.spelling import plain_words

_TIME = re.compile(
    r"(?:at )?(\d{1,2})(?:\s*:\s*(\d{2}))?(?:\s*:\s*(\d{2}))?\s*((?:[ap]\.?\s?m\.?)|o'clock|noon|midnight)?"
    r"(?: in the (morning|afternoon|evening))?",
    re.IGNORECASE,
)
_HOURS = {"noon": 12, "midnight": 0}
_TIME_ALONE = re.compile(r"\d{1,2} ?: ?\d{2}(?: ?: ?\d{2})?")
_MONTHS = ["january", "february", "march", "april", "may", "june", "july", "august", "september", "october", "november", "december"]
_MONTH = "|".join(f"{month[:3]}(?:{month[3:]})?" for month in _MONTHS)
_MONTH = _MONTH.replace("sep(?:tember)?", "sep(?:t(?:ember)?)?")
_DAYS = ["monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"]
_WEEKDAY = re.compile(rf"({'|'.join(_DAYS)}),? (?:the )?", re.IGNORECASE)
_WEEKDAY_BEHIND = re.compile(rf",? \(?({'|'.join(_DAYS)})\)?$", re.IGNORECASE)
_NTH = "(?:st|nd|rd|th)?"
_DATES = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        rf"(?P<month>{_MONTH})\.? (?:the )?(?P<day>\d{{1,2}}){_NTH}(?:,? (?P<year>\d{{4}}))?",
        rf"(?:the )?(?P<day>\d{{1,2}}){_NTH}(?: of|-)? ?(?P<month>{_MONTH})\.?,?(?:[ -](?P<year>\d{{4}}))?",
        rf"(?P<year>\d{{4}}),?[ -](?P<month>{_MONTH})\.?[ -](?P<day>\d{{1,2}}){_NTH}",
        r"(?:(?P<year>\d{4}) ?年 ?)?(?P<month>\d{1,2}) ?月 ?(?P<day>\d{1,2}) ?[日号]",
        r"(?P<year>[12]\d{3})-(?P<month>\d{1,2})-(?P<day>\d{1,2})",
        r"(?P<year>[12]\d{3})/(?P<month>\d{1,2})/(?P<day>\d{1,2})",
        r"(?P<day>\d{1,2})\.(?P<month>\d{1,2})\.(?P<year>[12]\d{3})",
    )
)
_SLASHED_DATE = re.compile(r"(\d{1,4})/(\d{1,2})/(\d{1,4})")
_HALVES = {"noon": "pm", "midnight": "am", "o'clock": ""}


def form_of(text: str) -> tuple | None:
    """What a time of day or a date says, None for everything else. Equal forms are equal answers."""
    if not any(character.isdigit() for character in text) and text.lower() not in _HOURS:
        return None
    words = plain_words(text)
    if words.lower() in _HOURS:
        return ("time", _HOURS[words.lower()], 0, 0)
    time = _TIME.fullmatch(words)
    if time and (time[2] or time[4] or time[5]):
        return _time_of(time)
    return _date_of(words)


def is_plain_clock(text: str) -> bool:
    """Whether a text like 3:00 may be a time or a ratio; with a zero before the minutes it is a time."""
    return bool(_TIME_ALONE.fullmatch(text))


def _date_of(words: str) -> tuple | None:
    weekday = _WEEKDAY.match(words) or _WEEKDAY_BEHIND.search(words)
    date = words[weekday.end() :] if weekday and not weekday.start() else words[: weekday.start()] if weekday else words
    found = next((one for pattern in _DATES if (one := pattern.fullmatch(date))), None)
    if found:
        month = found["month"]
        number = int(month) if month.isdigit() else 1 + next(i for i, m in enumerate(_MONTHS) if m[:3] == month[:3].lower())
        parts = found["year"], number, int(found["day"])
    elif slashed := _SLASHED_DATE.fullmatch(date):
        first, second, year = (int(part) for part in slashed.groups())
        if year < 1000 or not (first > 12 >= second or second > 12 >= first or first == second):
            return ("slashed date", first, second, year)
        parts = str(year), min(first, second), max(first, second)
    else:
        return None
    try:
        day = datetime.date(int(parts[0] or 2000), *parts[1:])
    except ValueError:
        return None
    if weekday and (parts[0] is None or _DAYS[day.weekday()] != weekday[1].lower()):
        return ("date of a wrong weekday", words.lower())
    return ("date", day.month, day.day, parts[0])


def _time_of(time: re.Match[str]) -> tuple:
    hour, minute, second = int(time[1]), int(time[2] or 0), int(time[3] or 0)
    half = (time[4] or "").replace(".", "").replace(" ", "").lower()
    half = _HALVES.get(half, half) or {"morning": "am", None: ""}.get(time[5], "pm")
    if half and 1 <= hour <= 12:
        hour = hour % 12 + 12 * (half == "pm")
        return ("time", hour, minute, second)
    if hour > 12 or (time[1].startswith("0") and len(time[1]) == 2):
        return ("time", hour, minute, second)
    return ("clock", hour, minute, second)
