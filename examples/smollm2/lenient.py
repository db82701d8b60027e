"""The lenient score: whether the last number of a response is the answer, whatever its form. It is measured, never rewarded."""

from __future__ import annotations

import re
from typing import Any

_NUMBER = re.compile(r"\d(?:[\d,]*\d)?")


def last_number(prompt: Any, response: str, reference: str, cut: bool) -> float:
    """1 if the last whole number of the response is the reference, else 0. A response that was cut counts like any other."""
    numbers = _NUMBER.findall(response)
    return float(bool(numbers) and numbers[-1].replace(",", "") == reference)
