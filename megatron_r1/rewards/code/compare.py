"""Whether a program's result is what a test expects. Runs outside the sandbox, on hostile data."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Any

_NUMBER = re.compile(rb"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,4})?")
_WHOLE_NUMBER = re.compile(rb"[+-]?[0-9]+")
_MAX_NUMBER_BYTES = 400
_SCALARS = ("plain", "int", "complex", "bytes", "fraction", "decimal")
_MAX_DIGITS = 4000  #: of a Fraction or Decimal
_MAX_KEY_DEPTH = 20  #: of a tuple within a set, or as a key
#: what reading a forged result raises: it is no value, and equals nothing
_FORGED = (ValueError, TypeError, ArithmeticError, LookupError, AttributeError, RecursionError, MemoryError)


@dataclass(frozen=True)
class LinkedList:
    """Expected: LeetCode's ListNode with these values; without any, None."""

    values: list[Any]


@dataclass(frozen=True)
class BinaryTree:
    """Expected: LeetCode's TreeNode with these values level by level, None for a missing child; without any, None."""

    values: list[Any]


def output_agrees(output: bytes, expected: bytes, float_tolerance: float | None) -> bool:
    """Compare what two programs printed.

    Lines are compared in order as sequences of words; the space between words, at the ends of lines and empty lines at the start
    and the end do not matter. Bytes, not text: invalid UTF-8 equals only itself. As LiveCodeBench does, lines that hold nothing but
    decimal numbers agree if the numbers have the same values (1.50 and 1.5), except that two whole numbers must be written the same
    (010 may be a word). With a tolerance, a word agrees with an expected one that is a decimal number with a point or an exponent
    if they differ by at most that, absolutely or relative to the expected one. Whole numbers stay exact.
    """
    output, expected = output.strip(), expected.strip()
    if output.count(b"\n") != expected.count(b"\n"):  # before it is split, which takes fifty times its size
        return False
    return all(_line_agrees(*pair, float_tolerance) for pair in zip(output.split(b"\n"), expected.split(b"\n"), strict=True))


def _line_agrees(line: bytes, expected_line: bytes, float_tolerance: float | None) -> bool:
    expected = expected_line.split()
    words = line.split(None, len(expected) + 1)
    if words == expected:
        return True
    if len(words) != len(expected):
        return False
    pairs = list(zip(words, expected, strict=True))
    if all(_is_number(a) and _is_number(b) for a, b in pairs) and all(a == b or _same_value(a, b) for a, b in pairs):
        return True
    return float_tolerance is not None and all(a == b or _is_close(a, b, float_tolerance) for a, b in pairs)


def agrees(encoded: Any, expected: Any, *, strict: bool, float_tolerance: float | None) -> bool:
    """Whether a result, as `values.encode_value` wrote it, equals an expected value.

    Equality is Python's (1 == 1.0 == True; a set in any order; nan equals nothing). Nothing is built from the result that hostile
    keys could make slow: elements and keys are looked up in the expected value, and recursion goes as deep as that one.

    Args:
        encoded: from `json.loads`; any JSON at all.
        expected: None, bool, int, float, complex, str, bytes, list, tuple, set, frozenset, dict, `LinkedList`, `BinaryTree`.
        strict: a tuple does not equal a list, nor a key that is a number its text. False if the expected values were JSON, which
            has no tuples, and only texts as keys.
        float_tolerance: two floats agree if they differ by at most that, absolutely or relative to the expected; None: exactly.
    """

    def same(encoded: Any, expected: Any) -> bool:
        kind, content = _kind(encoded)
        if isinstance(expected, (LinkedList, BinaryTree)):
            wanted = "linked_list" if isinstance(expected, LinkedList) else "binary_tree"
            if not expected.values:
                return kind == "plain" and content is None
            return kind == wanted and same_items(content, expected.values)
        if isinstance(expected, (list, tuple)):
            kinds = {"tuple" if isinstance(expected, tuple) else "list"} if strict else {"tuple", "list"}
            return kind in kinds and same_items(content, expected)
        if isinstance(expected, (set, frozenset)):
            return kind == "set" and _same_keys(content, expected)
        if isinstance(expected, dict):
            return kind == "dict" and same_entries(content, expected)
        if kind not in _SCALARS:
            return False
        value = _scalar(kind, content)
        if float_tolerance is not None and isinstance(expected, float) and isinstance(value, (int, float, Fraction, Decimal)):
            return value == expected or _within(float(value), expected, float_tolerance)
        return bool(value == expected)

    def same_items(content: Any, expected: Any) -> bool:
        return isinstance(content, list) and len(content) == len(expected) and all(map(same, content, expected))

    def same_entries(content: Any, expected: dict) -> bool:
        if not isinstance(content, list) or len(content) != len(expected):
            return False
        seen = set()
        for entry in content:
            if not isinstance(entry, list) or len(entry) != 2:
                return False
            key = _comparison_key(entry[0])
            if not strict and key not in expected:
                key = _json_key(key)
            if key not in expected or not same(entry[1], expected[key]):
                return False
            seen.add(key)
        return len(seen) == len(expected)

    try:
        return same(encoded, expected)
    except _FORGED:
        return False


def is_data(encoded: Any) -> bool:
    """Whether a result, which may be any JSON at all, is a plain value that `values.decode_value` can build."""
    kind, content = _kind(encoded)
    try:
        if kind in ("list", "tuple"):
            return isinstance(content, list) and all(map(is_data, content))
        if kind == "set":
            return isinstance(content, list) and len({_comparison_key(item) for item in content}) >= 0
        if kind == "dict":
            return all(len(entry) == 2 and is_data(entry[1]) and hash(_comparison_key(entry[0])) is not None for entry in content)
        if kind in _SCALARS:
            _scalar(kind, content)
            return True
        return False
    except _FORGED:
        return False


def is_true(encoded: Any) -> bool:
    """Python's truth of a result; an object of an unknown class is true."""
    kind, content = _kind(encoded)
    if kind in ("plain", "list", "tuple", "set", "dict", "bytes"):
        return bool(content)
    try:
        return bool(_scalar(kind, content)) if kind in _SCALARS else True
    except _FORGED:
        return True


def _same_keys(content: Any, expected: set | frozenset) -> bool:
    if not isinstance(content, list) or len(content) != len(expected):
        return False
    keys = [_comparison_key(item) for item in content]
    return all(key in expected for key in keys) and len(set(keys)) == len(expected)


def _kind(encoded: Any) -> tuple[str, Any]:
    if isinstance(encoded, list):
        return "list", encoded
    if isinstance(encoded, dict):
        return next(iter(encoded.items())) if len(encoded) == 1 else ("object", None)
    return "plain", encoded


def _scalar(kind: str, content: Any) -> Any:
    """Raises ValueError, TypeError or ArithmeticError if the result is forged."""
    if kind in ("fraction", "decimal") and len(str(content)) > _MAX_DIGITS:
        raise ValueError("an exact number is too long")  # what it takes to read one grows with the square
    if kind == "int":
        return int(content, 16)
    if kind == "complex":
        return complex(*content)
    if kind == "fraction":
        return Fraction(*(int(part, 16) for part in content))
    if kind == "decimal":
        return Decimal(content)
    return bytes.fromhex(content) if kind == "bytes" else content


def _comparison_key(encoded: Any, depth: int = 0) -> Any:
    """A hashable value. Raises ValueError or TypeError if the result has none."""
    kind, content = _kind(encoded)
    if kind in ("tuple", "set") and depth < _MAX_KEY_DEPTH:
        items = [_comparison_key(item, depth + 1) for item in content]
        return tuple(items) if kind == "tuple" else frozenset(items)
    if kind not in _SCALARS:
        raise TypeError(f"a {kind} is no key")
    return _scalar(kind, content)


def _json_key(key: Any) -> Any:
    """The text that a key has become in JSON, as `json.dumps` writes it."""
    if key is None or isinstance(key, bool):
        return {None: "null", True: "true", False: "false"}[key]
    return repr(key) if isinstance(key, (int, float)) else key


def _is_number(word: bytes) -> bool:
    return len(word) <= _MAX_NUMBER_BYTES and _NUMBER.fullmatch(word) is not None


def _same_value(word: bytes, expected: bytes) -> bool:
    """Whether two numbers, of which at most one is whole, are equal. Nothing is rounded."""
    if _WHOLE_NUMBER.fullmatch(word) and _WHOLE_NUMBER.fullmatch(expected):
        return False
    return Decimal(word.decode()) == Decimal(expected.decode())


def _is_close(word: bytes, expected: bytes, tolerance: float) -> bool:
    if not _is_number(word) or not _is_number(expected) or _WHOLE_NUMBER.fullmatch(expected):
        return False
    return _within(float(word), float(expected), tolerance)


def _within(value: float, expected: float, tolerance: float) -> bool:
    return math.isfinite(value) and math.isclose(value, expected, rel_tol=0, abs_tol=tolerance * max(1.0, abs(expected)))
