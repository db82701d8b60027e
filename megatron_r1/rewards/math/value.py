"""Whether two expressions are equal: exact fractions where possible, else numbers of 50 and of 400 digits.

Equal means that the difference shrinks with the precision, as the rounding of a true zero does: 1/2^99 and 1/2^98 differ by less
than any fixed tolerance, and so do 1/2004! and 1/2006!. Expressions with variables are compared at fixed points, of either sign and
several sizes, where both are defined. Nothing is expanded or simplified, and what would be too large is refused before it is
computed.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from fractions import Fraction
from functools import lru_cache

from mpmath import MPContext

from megatron_r1.rewards.math.evaluate import (
    HIGH,
    LOW,
    REAL_PARTS,
    SERIES,
    UNKNOWN_BASE,
    Undefined,
    Value,
    is_real,
    rounded,
    value_at,
)
from megatron_r1.rewards.math.tree import Apply, Name, Node, Number, TooLarge, Unreadable

_CONSTANTS = frozenset({"\\pi", "e", "i", "\\infty"})
_OF_EITHER_SIGN = frozenset(["x", "y", "z", "t", "u", "v", "w", "\\theta"])  #: other letters are taken for sizes where it matters
_TEN = Number(Fraction(10))
_IDENTITIES = ("pow", "sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh", "ln", "log", "lg", "exp", "root")

# Sizes and signs of the points at which expressions with variables are compared. Whole numbers are for factorials.
_SCALES = tuple(map(Fraction, ["1", "-1", "7", "-7", "60", "-60", "5000", "1/9", "1/2", "-1/2", "1/4", "-1/4", "1/20", "-1/9"]))
_FURTHER = tuple(Fraction(step, 5) for step in range(-60, 61) if step)  #: for what is real on a short interval only
_WHOLE_POINTS = 5
_MIN_POINTS = 3
_USUAL_POINTS = len(_SCALES) + _WHOLE_POINTS


def equal_values(first: Node, second: Node) -> bool:
    """Whether two scalars of the same variables are equal wherever both are real and defined.

    Raises:
        Unreadable: one is no scalar, is defined nowhere, or is too large to compute.
    """
    infinite = infinity(first), infinity(second)
    if any(infinite):
        return infinite[0] == infinite[1]
    if (same := _agree_in_some_base(first, second)) is not None:
        return same
    first, second = _with_base_of(second, first), _with_base_of(first, second)
    more = (names_of(first) ^ names_of(second)) - {UNKNOWN_BASE}
    if more and not all(_may_cancel(name, first) or _may_cancel(name, second) for name in more):
        return False  # a name that has no influence is still a different answer: 0 m is not 0 km; sin^2 x + cos^2 x is 1
    names = names_of(first) | names_of(second)
    complex_too = _mentions_i(first) or _mentions_i(second)
    points = _points(names, not complex_too and not names & _OF_EITHER_SIGN)
    enough = min(_MIN_POINTS, len(points))
    compared, too_large = 0, None
    for index, point in enumerate(points):
        if index >= _USUAL_POINTS and compared >= enough:
            break  # the further ones are for what is real on a short interval only
        try:
            low = value_at(first, point, LOW), value_at(second, point, LOW)
            if not complex_too and len(points) > 1 and not (is_real(low[0]) and is_real(low[1])):
                continue
            if not _nearly_equal(*low):
                return False
            if not all(isinstance(value, Fraction) for value in low) and compared < 2:
                high = value_at(first, point, HIGH), value_at(second, point, HIGH)
                if not _shrinks(_difference(*low, LOW), _difference(*high, HIGH), low):
                    return False
            compared += 1
        except Undefined:
            continue
        except TooLarge as error:
            too_large = error
    if too_large and compared < enough:
        raise too_large
    if not compared and len(points) == 1:
        return False  # 1/0 and 0^0 are equal to nothing
    if compared < enough:
        raise Unreadable("defined nowhere")
    return True


def proportional(first: Node, second: Node) -> Fraction | None:
    """The sign (1 or -1) of the constant c for which first = c * second at every point; None if there is no such c.

    Used for equations and inequalities brought to one side; neither side may vanish everywhere.

    Raises:
        Unreadable: as `equal_values`, or there is no variable.
    """
    names = names_of(first) | names_of(second)
    if not names or names_of(first) != names_of(second):
        return None
    pairs = []
    for point in _points(names, False)[:_USUAL_POINTS]:
        try:
            pair = tuple(value_at(node, point, HIGH) for node in (first, second))
        except Undefined:
            continue
        if all(is_real(value) for value in pair):
            pairs.append(tuple(rounded(value, HIGH).real for value in pair))
    pairs = [pair for pair in pairs if max(map(abs, pair)) > HIGH.mpf(10) ** -300]  # less is the rounding of a zero
    if len(pairs) < _MIN_POINTS:
        raise Unreadable("defined nowhere")
    reference = max(pairs, key=lambda pair: abs(pair[1]))
    for a, b in pairs:
        left, right = a * reference[1], b * reference[0]
        if abs(left - right) > HIGH.mpf(10) ** -300 * max(abs(left), abs(right)):
            return None
    return Fraction(1 if reference[0] * reference[1] > 0 else -1)


def real_value(node: Node) -> Value | None:
    """The value of an expression without variables to 400 digits, plus and minus infinity included; None if it has none."""
    if infinite := infinity(node):
        return HIGH.inf * infinite
    try:
        value = value_at(node, {}, HIGH)
    except (Undefined, Unreadable):
        return None
    return rounded(value, HIGH).real if is_real(value) else None


def order(a: Value, b: Value) -> int:
    """-1, 0 or 1: how two values of `real_value` compare. What differs in the last hundred digits only is equal."""
    if a == b or (HIGH.isfinite(a) and HIGH.isfinite(b) and abs(a - b) <= max(abs(a), abs(b)) * HIGH.mpf(10) ** -300):
        return 0
    return -1 if a < b else 1


def exact_value(node: Node) -> Fraction | None:
    """The value of an expression without variables as an exact fraction, None if it has none."""
    try:
        value = value_at(node, {}, LOW)
    except (Undefined, Unreadable):
        return None
    return value if isinstance(value, Fraction) else None


def rounds_to(exact: Node, decimal: Number) -> bool:
    """Whether a decimal is an exact value correctly rounded to its digits."""
    try:
        value = value_at(exact, {}, HIGH)
    except (Undefined, Unreadable):
        return False
    if not is_real(value):
        return False
    error = abs(rounded(value, HIGH).real - rounded(decimal.value, HIGH))
    return bool(2 * error <= HIGH.mpf(10) ** -max(decimal.decimals, 0))


def names_of(node: Node) -> frozenset[str]:
    """The variables of an expression."""
    if isinstance(node, Name):
        return frozenset() if node.text in _CONSTANTS else frozenset({node.text})
    if isinstance(node, Apply):
        if node.op in SERIES:
            index, *ends, term = node.args
            return names_of(ends[0]) | names_of(ends[1]) | (names_of(term) - {index.text})
        own = {UNKNOWN_BASE} if node.op == "log" and len(node.args) == 1 else set()
        return frozenset(own).union(*(names_of(arg) for arg in node.args))
    return frozenset()


def _may_cancel(name: str, node: Node) -> bool:
    """Whether a variable stands twice in an expression that is more than x - x or x/x, as in an identity."""
    return list(_nodes(node)).count(Name(name)) > 1 and any(_has_op(op, node) for op in _IDENTITIES)


def _nodes(node: Node) -> Iterator[Node]:
    """An expression and all in it, without recursion: a product of many factors is deep."""
    left = [node]
    while left:
        yield (one := left.pop())
        left += one.args if isinstance(one, Apply) else ()


def _agree_in_some_base(first: Node, second: Node) -> bool | None:
    r"""Whether `\log 100` is 2 or `\log e^2` is: in no two bases does a logarithm of a number have two rational values.

    None if this is no such question.
    """
    for node, other in ((first, second), (second, first)):
        if names_of(node) == {UNKNOWN_BASE} and not names_of(other) and exact_value(other) is not None:
            return any(equal_values(_renamed(node, op), other) for op in ("lg", "ln"))
    return None


def _with_base_of(other: Node, node: Node) -> Node:
    r"""`\log x` beside `\ln x` as the natural one, beside `\lg x` as that to 10; of numbers it may be any."""
    if UNKNOWN_BASE not in names_of(node) or UNKNOWN_BASE in names_of(other) or len(names_of(node)) < 2:
        return node
    if _has_op("ln", other):
        return _renamed(node, "ln")
    to_ten = any(isinstance(one, Apply) and (one.op == "lg" or (one.op == "log" and one.args[1] == _TEN)) for one in _nodes(other))
    return _renamed(node, "lg") if to_ten else node


def _renamed(node: Node, base: str) -> Node:
    if not isinstance(node, Apply):
        return node
    op = base if node.op == "log" and len(node.args) == 1 else node.op
    return Apply(op, tuple(_renamed(arg, base) for arg in node.args))


def substituted(node: Node, name: Name, value: Node) -> Node:
    """An expression with a value in the place of a name, but for the index of a sum, which is another name."""
    if isinstance(node, Apply) and node.op in SERIES and node.args[0] == name:
        index, *ends, term = node.args
        return Apply(node.op, (index, *(substituted(end, name, value) for end in ends), term))
    if isinstance(node, Apply):
        return Apply(node.op, tuple(substituted(arg, name, value) for arg in node.args))
    return value if node == name else node


def _has_op(op: str, node: Node) -> bool:
    return any(isinstance(one, Apply) and one.op == op for one in _nodes(node))


def infinity(node: Node) -> int:
    """1 or -1 for plus or minus infinity, 0 for anything else."""
    if isinstance(node, Apply) and node.op == "neg":
        return -infinity(node.args[0])
    return int(isinstance(node, Name) and node.text == "\\infty")


def _mentions_i(node: Node) -> bool:
    if isinstance(node, Apply) and node.op in SERIES and node.args[0] == Name("i"):
        return False
    if isinstance(node, Apply):
        return any(_mentions_i(arg) for arg in node.args)
    return isinstance(node, Name) and node.text == "i"


@lru_cache(maxsize=256)
def _points(names: frozenset[str], real_parts: bool) -> list[Mapping[str, Fraction]]:
    """Values for the variables, the same in every run; with `real_parts` no part of an expression may be complex on the way."""
    if not names:
        return [{}]
    numbers = {name: [zlib.crc32(f"{name} {index}".encode()) for index in range(len(_SCALES))] for name in names}
    points = [
        {name: scale * (1 + Fraction(numbers[name][index] % 997, 1009)) for name in names} for index, scale in enumerate(_SCALES)
    ]
    points += [{name: Fraction(1 + (numbers[name][0] + index * 5) % 23) for name in names} for index in range(_WHOLE_POINTS)]
    points += [{name: value + Fraction(numbers[name][0] % 97, 1009) for name in names} for value in _FURTHER]
    for point in points:
        if UNKNOWN_BASE in point:
            point[UNKNOWN_BASE] = 2 + abs(point[UNKNOWN_BASE])
        if real_parts:
            point[REAL_PARTS] = Fraction(1)
    return points


def _nearly_equal(a: Value, b: Value) -> bool:
    """False only where two values surely differ: at 50 digits, with room for what cancels."""
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return a == b
    a, b = rounded(a, LOW), rounded(b, LOW)
    size = max(abs(a), abs(b))
    return not size or size < LOW.mpf(10) ** -10 or abs(a - b) <= size * LOW.mpf(10) ** -10


def _difference(a: Value, b: Value, context: MPContext) -> Value:
    return abs(rounded(a, context) - rounded(b, context))


def _shrinks(low: Value, high: Value, values: tuple[Value, Value]) -> bool:
    """Whether a difference is rounding: it must fall by 300 of the 350 digits that the precision rose by."""
    size = max(abs(rounded(value, LOW)) for value in values)
    start = max(HIGH.mpf(low), HIGH.mpf(size) * HIGH.mpf(10) ** -50)
    return not high or bool(high <= start * HIGH.mpf(10) ** -300)
