"""Whether a program's result is what a test expects. Runs outside the sandbox, on hostile data."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

_FLOAT = re.compile(rb"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_MAX_FLOAT_BYTES = 400
_MAX_KEY_DEPTH = 20  #: of a tuple within a set, or as a key


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

    Lines are compared in order as sequences of words; the space between words, at the ends of lines and empty lines at the end do
    not matter. Bytes, not text: invalid UTF-8 equals only itself. With a tolerance, two words that are decimal numbers agree if
    they differ by at most that, absolutely or relative to the expected one.
    """
    lines, expected_lines = _words_by_line(output), _words_by_line(expected)
    if len(lines) != len(expected_lines):
        return False
    for words, expected_words in zip(lines, expected_lines, strict=True):
        if words == expected_words:
            continue
        if float_tolerance is None or len(words) != len(expected_words):
            return False
        if not all(a == b or _is_close(a, b, float_tolerance) for a, b in zip(words, expected_words, strict=True)):
            return False
    return True


def agrees(encoded: Any, expected: Any, *, strict: bool, float_tolerance: float | None) -> bool:
    """Whether a result, as `values.encode_value` wrote it, equals an expected value.

    Equality is Python's (1 == 1.0 == True; a set in any order; nan equals nothing). Nothing is built from the result that hostile
    keys could make slow: elements and keys are looked up in the expected value, and recursion goes as deep as that one.

    Args:
        encoded: from `json.loads`; any JSON at all.
        expected: None, bool, int, float, complex, str, bytes, list, tuple, set, frozenset, dict, `LinkedList`, `BinaryTree`.
        strict: a tuple does not equal a list. False if the expected values were JSON, which has no tuples.
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
        if kind not in ("plain", "int", "complex", "bytes"):
            return False
        value = _scalar(kind, content)
        if float_tolerance is not None and isinstance(expected, float) and isinstance(value, (int, float)):
            return value == expected or _within(value, expected, float_tolerance)
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
            if key not in expected or not same(entry[1], expected[key]):
                return False
            seen.add(key)
        return len(seen) == len(expected)

    try:
        return same(encoded, expected)
    except (ValueError, TypeError, OverflowError):
        return False


def is_true(encoded: Any) -> bool:
    """Python's truth of a result; an object of an unknown class is true."""
    kind, content = _kind(encoded)
    return (
        bool(content) if kind in ("plain", "list", "tuple", "set", "dict", "bytes") else True if kind != "complex" else any(content)
    )


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
    if kind == "int":
        return int(content, 16)
    if kind == "complex":
        return complex(*content)
    return bytes.fromhex(content) if kind == "bytes" else content


def _comparison_key(encoded: Any, depth: int = 0) -> Any:
    """A hashable value. Raises ValueError or TypeError if the result has none."""
    kind, content = _kind(encoded)
    if kind in ("tuple", "set") and depth < _MAX_KEY_DEPTH:
        items = [_comparison_key(item, depth + 1) for item in content]
        return tuple(items) if kind == "tuple" else frozenset(items)
    if kind not in ("plain", "int", "complex", "bytes"):
        raise TypeError(f"a {kind} is no key")
    return _scalar(kind, content)


def _words_by_line(output: bytes) -> list[list[bytes]]:
    return [line.split() for line in output.rstrip().split(b"\n")]


def _is_close(word: bytes, expected: bytes, tolerance: float) -> bool:
    if max(len(word), len(expected)) > _MAX_FLOAT_BYTES or not _FLOAT.fullmatch(word) or not _FLOAT.fullmatch(expected):
        return False
    return _within(float(word), float(expected), tolerance)


def _within(value: float, expected: float, tolerance: float) -> bool:
    return math.isfinite(value) and math.isclose(value, expected, rel_tol=0, abs_tol=tolerance * max(1.0, abs(expected)))
