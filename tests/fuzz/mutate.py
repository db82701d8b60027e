"""Small changes that turn a good input into one that somebody might really hand over: by accident, or to do harm.

Own code beside a library such as Hypothesis: the inputs are whole files and command lines that forked processes read, so there is
nothing to shrink in this process, and a case is found again by its number alone.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator, MutableMapping, MutableSequence
from typing import Any

#: values that a reader does not expect where it finds them
ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3.5, -0.0, 1e-320, 1e308, float("nan"), float("inf"), float("-inf"), 2**31, 2**63, 2**64,
    -(2**63), 10**20, 10**400, "", " ", "0", "1", "-1", "nan", "null", "true", "1e9", "∞", "\u200b", "\ufeff", "\u202e", "\x00",
    "\ud800", "\n", "a\nb", "~", "~nobody/x", "..", "/", "/dev/null", "/dev/zero", "/proc/self/mem", "x" * 5000, "9" * 5000,
    "%s%n", "{}", "${HOME}", "$(id)", "`id`", "'; --", "<script>alert(1)</script>", "{{ 7*7 }}", "!!python/object:os.system",
    "<think>", "</think>", "<|endoftext|>", [], {}, [[]], [None], {"": None}, {"a": {"b": {}}}, [1, "a", None], [[1], [2, [3]]],
)  # fmt: skip
ODD_WORDS = (
    "[", "{", "]", "}", ":", "- ", "&a ", "*a", "!!python/object/apply:os.system ['id']", "!!binary x", "<<: *a", "? ", "\t", "#",
    "---\n", "...\n", "%YAML 9\n", "'", '"', "\\", "\\u0000", "\\ud800", "\x00", "\r", "\r\n", "\u2028", "\x85", "\ufeff", "é",
    "NaN", "Infinity", "-Infinity", "1e999", "0x10", "0o7", "1_000", "12:30:45", "2026-01-01", "yes", "no", "on", "~", "null",
    "[" * 20_000, '{"a":' * 20_000, "- " * 5_000, "=", ",", ",,", "//", "/*", "\x1b[31m",
)  # fmt: skip


def deep(levels: int) -> Any:
    """Lists in lists: more than a recursive reader survives."""
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


def odd_value(rng: random.Random) -> Any:
    """A value of any type, most often a plain one that is wrong here."""
    if rng.random() < 0.03:
        return deep(rng.choice((50, 400)))
    return copy.deepcopy(rng.choice(ODD_VALUES))


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    """One to three changes of bytes: cut, flipped, doubled, filled in, or another file's beginning."""
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(data) + 1)
        length = min(len(data) - at, rng.choice((1, 2, 8, 64, 1024)))
        data = rng.choice(_BYTE_CHANGES)(rng, data, at, length)
    return data


def _flip(rng: random.Random, data: bytes, at: int, length: int) -> bytes:
    return data[:at] + bytes(byte ^ (1 << rng.randrange(8)) for byte in data[at : at + length]) + data[at + length :]


def _fill(rng: random.Random, data: bytes, at: int, length: int) -> bytes:
    return data[:at] + bytes([rng.choice((0, 0xFF, 0x20, 0x0A, 0x80))]) * length + data[at + length :]


def _word(rng: random.Random, data: bytes, at: int, length: int) -> bytes:
    return data[:at] + rng.choice(ODD_WORDS).encode("utf-8", "surrogatepass") + data[at + rng.choice((0, length)) :]


_OTHER_BEGINNINGS = (b"", b"\x1f\x8b\x08\x00", b"PK\x03\x04", b"PAR1", b"\x28\xb5\x2f\xfd", b"\xff\xfe")
_BYTE_CHANGES: tuple[Callable[[random.Random, bytes, int, int], bytes], ...] = (
    lambda rng, data, at, length: data[:at],  # a copy that stopped half-way
    lambda rng, data, at, length: data[:at] + data[at + length :],
    lambda rng, data, at, length: data[: at + length] + data[at:],
    lambda rng, data, at, length: rng.choice(_OTHER_BEGINNINGS) + data[at:],
    lambda rng, data, at, length: data.replace(b"\n", rng.choice((b"\r\n", b"\r", b"", b"\n\n"))),
    lambda rng, data, at, length: b"\xef\xbb\xbf" + data,
    _flip,
    _fill,
    _word,
    _word,
)  # fmt: skip


def mutate_tree(rng: random.Random, tree: Any) -> Any:
    """One to three changes in a tree of dicts and lists: a value replaced, a key removed, renamed, doubled or added."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.randint(1, 3)):
        places = list(_places(tree))
        if not places:
            return odd_value(rng)
        leaves = [(holder, key) for holder, key in places if not isinstance(holder[key], (dict, list))]
        holder, key = rng.choice(leaves if leaves and rng.random() < 0.7 else places)
        change = rng.random()
        if change < 0.65:
            holder[key] = odd_value(rng)
        elif change < 0.75:
            del holder[key]
        elif change < 0.85:
            holder[key] = rng.choice(([holder[key]], {"value": holder[key]}, str(holder[key]), json.dumps(str(holder[key]))))
        elif isinstance(holder, MutableMapping):
            name = rng.choice((f"{key}s", str(key).upper(), f" {key}", "", "__class__", "a.b", "x" * 300, "é", "\x00", key))
            holder[name] = odd_value(rng) if rng.random() < 0.5 else holder[key]
        else:
            holder.extend([holder[key]] * rng.choice((1, 3, 50)))
    return tree


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of every value below the root."""
    if isinstance(tree, MutableMapping):
        for key in list(tree):
            yield tree, key
            yield from _places(tree[key])
    elif isinstance(tree, MutableSequence):
        for index, value in enumerate(tree):
            yield tree, index
            yield from _places(value)


def write_json(value: Any) -> bytes:
    """JSON as Python writes it, NaN and lone surrogates included; what JSON cannot hold becomes text."""
    return json.dumps(value, default=str).encode()
