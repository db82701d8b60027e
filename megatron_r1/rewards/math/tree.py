"""The nodes of a parsed answer (`parse.py`)."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True, slots=True)
class Number:
    """An exact number; `decimals` is how many digits stood after the point, -1 if there was no point."""

    value: Fraction
    decimals: int = -1


@dataclass(frozen=True, slots=True)
class Name:
    r"""A variable, or a constant such as `\pi`, `e`, `i` and `\infty`."""

    text: str


@dataclass(frozen=True, slots=True)
class Apply:
    """An operation or function on scalars. "letters" is a product written as a word, such as xy."""

    op: str
    args: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Words:
    """An answer in words, or the name of a quantity."""

    text: str


@dataclass(frozen=True, slots=True)
class Quantity:
    """A value with its unit; also percent, degrees, currency and the base of a numeral."""

    value: Node
    unit: str


@dataclass(frozen=True, slots=True)
class Group:
    r"""Several answers. Kinds:

    "list", "or", "and"; "ratio"; "matrix", "row"; "union", "intersection", "difference"; "mod" (a value and its modulus); or two
    brackets such as "()", "[)" and "\{\}".
    """

    kind: str
    items: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Relation:
    """A chain such as 0 < x <= 5: one more side than signs."""

    signs: tuple[str, ...]
    sides: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Dots:
    """An ellipsis: what it leaves out cannot be compared."""


FLIPPED = {"<": ">", ">": "<", "<=": ">=", ">=": "<="}  #: the sign of an inequality read from right to left
UNNAMED = Name("?")  #: what `>= 5` bounds

Node = Number | Name | Apply | Words | Quantity | Group | Relation | Dots


class Unreadable(Exception):
    """The text is no answer that this reader understands. The message says why, in a few words."""


class TooLarge(Unreadable):
    """The text is understood, but it cannot be computed within bounds: nothing else should try."""
