"""What counts as the same output and the same value, where data sets and tolerances leave it open."""

from __future__ import annotations

import json
import random
import tracemalloc
from decimal import Decimal
from fractions import Fraction

import pytest

from megatron_r1.rewards.code.compare import BinaryTree, LinkedList, agrees, is_data, is_true, output_agrees
from megatron_r1.rewards.sandbox.values import decode_value, encode_value


@pytest.mark.parametrize(
    ("output", "expected", "same"),
    [
        # values of decimal numbers, as LiveCodeBench compares them
        ("1.50", "1.5", True), ("1.5", "1.50", True), ("3.0", "3", True), ("3", "3.0", True), ("1e3", "1000", True), ("-0.0",
         "0", True),
        (".5", "0.5", True), ("2.", "2", True), ("+1.0", "1", True), ("1.50 2\n3.0", "1.5 2\n3", True), ("1.51", "1.5", False),
        ("0.1000000000000000055511151231257827", "0.1", False), ("100000000000000000000.0", "100000000000000000001", False),
        ("1e400", "1e401", False), ("1 2.0 3", "1 2 4", False), ("1.0 2", "1", False),
        # whole numbers are words: their zeros may mean something
        ("007", "7", False), ("0010", "10", False), ("+5", "5", False), ("-0", "0", False), ("00", "0", False),
        # a line with anything else is compared as words
        ("x 1.50", "x 1.5", False), ("version 1.10", "version 1.1", False), ("1.5x", "1.5", False), ("0x10", "16", False),
        ("1,5", "1.5", False), ("nan", "nan", True), ("inf", "Infinity", False), ("1.0.0", "1.0", False), ("1_0.0", "10", False),
        # empty lines at both ends
        ("\n1", "1", True), ("\n\n 1\n2", "1\n2\n", True), ("1", "\n1", True), ("1\n\n2", "1\n2", False), ("1\n2",
         "1\n\n2", False),
        ("", "", True), ("\n", "", True), ("", "0", False), ("0", "", False), ("1\r\n2\r\n", "1\n2", True),
    ],
)  # fmt: skip
def test_outputs_without_a_tolerance(output, expected, same):
    assert output_agrees(output.encode(), expected.encode(), None) is same


@pytest.mark.parametrize(
    ("output", "expected", "same"),
    [
        # a tolerance is for numbers with a point or an exponent
        ("1000000008", "1000000007", False), ("5000003", "5000000", False), ("50000000000000001", "50000000000000000", False),
        ("n 2000001", "n 2000000", False), ("5000000.1", "5000000", False), ("0.9999999", "1", False), ("-1", "1", False),
        ("5000003", "5000000.0", True), ("5000006", "5000000.0", False), ("0.3333333", "0.33333334", True), ("1e-7", "0.0", True),
        ("1000001", "1e6", True), ("1000003", "1e6", False), ("1", "1.0000001", True), ("1.0", "1", True), ("3 0.5",
         "3 0.5000001", True),
        ("4 0.5", "3 0.5000001", False), ("area 0.5", "area 0.5000001", True), ("0.5 area", "0.5000001 Area", False),
        ("nan", "1.0", False), ("inf", "1.0", False), ("1e999", "1.0", False), ("1.0", "1e999", False), ("1" * 500, "1.0", False),
    ],
)  # fmt: skip
def test_outputs_with_a_tolerance_of_a_millionth(output, expected, same):
    assert output_agrees(output.encode(), expected.encode(), 1e-6) is same


def agree(value, expected, *, strict=False, tolerance=None):
    return agrees(json.loads(json.dumps(encode_value(value))), expected, strict=strict, float_tolerance=tolerance)


@pytest.mark.parametrize(
    ("value", "expected", "same"),
    [
        ({3: 1}, {"3": 1}, True), ({"3": 1}, {"3": 1}, True), ({-3: [1]}, {"-3": [1]}, True), ({1.5: 1}, {"1.5": 1}, True),
        ({True: 1}, {"true": 1}, True), ({None: 1}, {"null": 1}, True), ({3: {4: 5}}, {"3": {"4": 5}}, True),
        ({3: 1}, {"3": 2}, False), ({3: 1}, {"4": 1}, False), ({3: 1}, {"03": 1}, False), ({True: 1}, {"1": 1}, False),
        ({3: 1, "3": 1}, {"3": 1}, False), ({3: 1, 4: 1}, {"3": 1}, False), ({(3,): 1}, {"3": 1}, False), (3, "3", False),
        ([3], ["3"], False),
    ],
)  # fmt: skip
def test_keys_that_were_numbers_before_they_were_json(value, expected, same):
    assert agree(value, expected) is same
    assert agree(value, expected, strict=True) is (same and all(isinstance(key, str) for key in value))


@pytest.mark.parametrize(
    ("value", "expected", "tolerance", "same"),
    [
        (Fraction(1, 2), 0.5, None, True), (Fraction(4, 2), 2, None, True), (Fraction(1, 3), 0.5, None, False),
        (Fraction(1, 3), 0.333333333, 1e-6, True), (Fraction(1, 3), 0.3, 1e-6, False), (Decimal("0.5"), 0.5, None, True),
        (Decimal("0.1"), 0.1, None, False), (Decimal("0.1"), 0.1, 1e-9, True), (Decimal(7), 7, None, True),
        (Decimal("NaN"), 0.5, 1e-6, False), ([Fraction(1, 2)], [0.5], None, True), ({Fraction(1): 2}, {1: 2}, None, True),
        (5000003, 5000000, 1e-6, False), (5000003, 5000000.0, 1e-6, True),
    ],
)  # fmt: skip
def test_exact_numbers_of_python(value, expected, tolerance, same):
    assert agree(value, expected, strict=True, tolerance=tolerance) is same


@pytest.mark.parametrize(
    "value", [Fraction(-1, 3), Decimal("1.50"), [1, (2, {3: {4}})], {"a": b"b"}, 2**70, 1j, None, frozenset([1])]
)
def test_data_of_a_program_can_be_built_again(value):
    encoded = json.loads(json.dumps(encode_value(value)))
    assert is_data(encoded) and decode_value(encoded) == value


@pytest.mark.parametrize(
    "forged",
    [{"int": "zz"}, {"int": 3}, {"set": [[]]}, {"set": 3}, {"dict": [[1]]}, {"dict": 3}, {"dict": [[[], 1]]}, {"complex": "ab"},
     {"bytes": 1}, {"object": "f"}, {"fraction": ["0x1", "0x0"]}, {"fraction": "zz"}, {"fraction": ["0x" + "1" * 9000, "0x2"]},
     {"decimal": "x"}, {"decimal": "1" * 9000}, {"tuple": None}, {"linked_list": [1]}, {}, {"a": 1, "b": 2}, [[{"object": 1}]],
     {"dict": [[{"object": 1}, 2]]}],
    ids=lambda forged: repr(forged)[:40],
)  # fmt: skip
def test_forged_results_are_no_data(forged):
    assert is_data(forged) is False
    assert not any(
        agrees(forged, expected, strict=False, float_tolerance=1.0) for expected in (1, 0.5, "f", [1], {1: 2}, {1}, None)
    )
    assert is_true(forged) in (True, False)


def forged_value(rng: random.Random, depth: int = 0) -> object:
    """JSON that looks like an encoded value now and then."""
    kinds = ["int", "tuple", "dict", "set", "complex", "bytes", "fraction", "decimal", "linked_list", "binary_tree", "object", "x"]
    plain = [None, True, 0, -1, 1.5, 1e308, "", "x", "0x1", "zz", "1e999999", "sNaN", "\ud800", 10**30, float("nan")]
    choice = rng.random()
    if depth > 4 or choice < 0.4:
        return rng.choice(plain)
    if choice < 0.6:
        return [forged_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {rng.choice(kinds): forged_value(rng, depth + 1) for _ in range(rng.choice([1, 1, 1, 0, 2]))}


def nested(kind: str, depth: int) -> object:
    value: object = []
    for _ in range(depth):
        value = {kind: [value]} if kind else [value]
    return {"decimal": value}


def test_no_forged_result_breaks_a_comparison():
    wanted = [1, 0.5, "f", [1], (1, [2]), {1: 2}, {"a": [1]}, {1}, {(1, 2)}, None, 1j, b"x", True, LinkedList([1]), BinaryTree([1])]
    results = [forged_value(random.Random(seed)) for seed in range(5000)]
    results += [nested(kind, depth) for kind in ("", "set", "tuple", "dict", "int") for depth in (100, 480, 900)]
    for index, result in enumerate(results):
        for expected in (wanted[index % len(wanted)], wanted[-index % len(wanted)]):
            agreed = agrees(result, expected, strict=index % 2 == 0, float_tolerance=None if index % 3 else 1e-6)
            assert not agreed or is_data(result) or isinstance(expected, (LinkedList, BinaryTree, type(None))), (result, expected)
        assert is_true(result) in (True, False) and is_data(result) in (True, False)


@pytest.mark.parametrize("line", [b"a ", b"a\n", b"\n", b"1 ", b"1.5\n"])
def test_an_output_of_many_words_takes_no_memory(line):
    """Of 40 MB of words, no list is made: it would take a gigabyte."""
    tracemalloc.start()
    assert not output_agrees(b"x\n" + line * (40_000_000 // len(line)) + b"x", b"x\ny\nz", None)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200 << 20
