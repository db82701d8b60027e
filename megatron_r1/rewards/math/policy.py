"""What counts as the same answer if mathematics leaves it open."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args, get_type_hints


@dataclass(frozen=True)
class MathPolicy:
    """The recipe says only that the final answer must be correct (R1 v2 (arXiv) section 2.2); these questions it leaves open.

    Raises:
        ValueError: a value that is none of the field's.
    """

    #: unit: the sign is dropped, 50% is 50 (as GSM8K's references do). hundredth: 50% is 0.5 and not 50. either: both, but 0.5%
    #: is never 0.5, nor 1% 1
    percent: Literal["unit", "hundredth", "either"] = "either"
    #: optional: a unit may be missing on one side, but two different units disagree. required: the same on both sides, or on none.
    #: ignored: units do not count. Degrees, currencies and the base of a numeral count as units; units of one
    #: dimension are converted, exactly, if both sides have one
    units: Literal["optional", "required", "ignored"] = "optional"
    #: significant digits from which a decimal may be the correctly rounded value of a reference that no decimal writes exactly,
    #: e.g. 1/3 or pi. 0: never, a decimal is exactly the number that it writes
    rounding: int = 0
    #: any: bare lists, like sets, have no order. same: they have; sets still have none
    list_order: Literal["any", "same"] = "any"
    #: several boxes (or #### lines) after the reasoning. agree: each must be correct. last: the last one counts
    several_answers: Literal["agree", "last"] = "agree"
    #: whether the last box within a sentence in the answer element is the answer; off, as R1's format wants the answer alone there
    sentences: bool = False

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            value, allowed = getattr(self, name), get_args(hint)
            if allowed and value not in allowed:
                raise ValueError(f"{name} is {value!r}, expected one of {', '.join(allowed)}")
        if not isinstance(self.rounding, int) or self.rounding < 0:
            raise ValueError(f"rounding is {self.rounding!r}, expected a number of digits, or 0")


DEFAULT_POLICY = MathPolicy()
