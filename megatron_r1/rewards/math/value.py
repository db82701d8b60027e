"""Whether two expressions are equal: exact fractions where possible, else numbers of 50 and of 400 digits.

Equal means that the difference shrinks with the precision, as the rounding of a true zero does: 1/2^99 and 1/2^98 differ by less
than any fixed tolerance, and so do 1/2004! and 1/2006!. Expressions with variables are compared at fixed points, of either sign and
several sizes, where both are defined. Nothing is expanded or simplified, and what would be too large is refused before it is
computed.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping
from fractions import Fraction
from functools import lru_cache, partial, reduce

from mpmath import MPContext

from megatron_r1.rewards.math.tree import Apply, Name, Node, Number, TooLarge, Unreadable

_MAX_EXACT_BITS = 8000  #: of a numerator or denominator; beyond it numbers are rounded
_MAX_EXPONENT = 10**7  #: of a power
_MAX_FACTORIAL = 10**5
_MAX_ANGLE = 10**6
_LOW, _HIGH = MPContext(), MPContext()
_LOW.dps, _HIGH.dps = 50, 400
_CONSTANTS = frozenset({"\\pi", "e", "i", "\\infty"})
_IDENTITIES = ("pow", "sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh", "ln", "log", "lg", "exp", "root")
_UNKNOWN_BASE = "log base"  #: log without a base: 10, e or 2, so it is a variable

# Sizes and signs of the points at which expressions with variables are compared. Whole numbers are for factorials.
_SCALES = tuple(map(Fraction, ["1", "-1", "7", "-7", "60", "-60", "5000", "1/9", "1/2", "-1/2", "1/4", "-1/4", "1/20", "-1/9"]))
_FURTHER = tuple(Fraction(step, 5) for step in range(-60, 61) if step)  #: for what is real on a short interval only
_WHOLE_POINTS = 5
_MIN_POINTS = 3
_USUAL_POINTS = len(_SCALES) + _WHOLE_POINTS

Value = object  # Fraction, or mpf or mpc of the context at hand


class Undefined(Exception):
    """No value at this point, e.g. a division by zero."""


def equal_values(first: Node, second: Node) -> bool:
    """Whether two scalars of the same variables are equal wherever both are real and defined.

    Raises:
        Unreadable: one is no scalar, is defined nowhere, or is too large to compute.
    """
    infinite = infinity(first), infinity(second)
    if any(infinite):
        return infinite[0] == infinite[1]
    first, second = _with_natural_base(first, second), _with_natural_base(second, first)
    more = (names_of(first) ^ names_of(second)) - {_UNKNOWN_BASE}
    if more and not all(_may_cancel(name, first) or _may_cancel(name, second) for name in more):
        return False  # a name that has no influence is still a different answer: 0 m is not 0 km; sin^2 x + cos^2 x is 1
    points = _points(names_of(first) | names_of(second))
    enough = min(_MIN_POINTS, len(points))
    complex_too = _mentions_i(first) or _mentions_i(second)
    compared = 0
    for index, point in enumerate(points):
        if index >= _USUAL_POINTS and compared >= enough:
            break  # the further ones are for what is real on a short interval only
        try:
            low = _evaluate(first, point, _LOW), _evaluate(second, point, _LOW)
            if not complex_too and len(points) > 1 and not (_is_real(low[0]) and _is_real(low[1])):
                continue
            if not _nearly_equal(*low):
                return False
            if not all(isinstance(value, Fraction) for value in low) and compared < 2:
                high = _evaluate(first, point, _HIGH), _evaluate(second, point, _HIGH)
                if not _shrinks(_difference(*low, _LOW), _difference(*high, _HIGH), low):
                    return False
            compared += 1
        except Undefined:
            continue
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
    for point in _points(names)[:_USUAL_POINTS]:
        try:
            pair = tuple(_evaluate(node, point, _HIGH) for node in (first, second))
        except Undefined:
            continue
        if all(_is_real(value) for value in pair):
            pairs.append(tuple(_rounded(value, _HIGH).real for value in pair))
    if len(pairs) < _MIN_POINTS:
        raise Unreadable("defined nowhere")
    reference = max(pairs, key=lambda pair: abs(pair[1]))
    if not reference[0] or not reference[1]:
        return None
    tolerance = _HIGH.mpf(10) ** -300
    for a, b in pairs:
        left, right = a * reference[1], b * reference[0]
        if abs(left - right) > tolerance * max(abs(left), abs(right), abs(reference[0] * reference[1]) * tolerance):
            return None
    return Fraction(1 if reference[0] * reference[1] > 0 else -1)


def real_value(node: Node) -> Value | None:
    """The value of an expression without variables to 400 digits, plus and minus infinity included; None if it has none."""
    if infinite := infinity(node):
        return _HIGH.inf * infinite
    try:
        value = _evaluate(node, {}, _HIGH)
    except (Undefined, Unreadable):
        return None
    return _rounded(value, _HIGH).real if _is_real(value) else None


def order(a: Value, b: Value) -> int:
    """-1, 0 or 1: how two values of `real_value` compare. What differs in the last hundred digits only is equal."""
    if a == b or (_HIGH.isfinite(a) and _HIGH.isfinite(b) and abs(a - b) <= max(abs(a), abs(b)) * _HIGH.mpf(10) ** -300):
        return 0
    return -1 if a < b else 1


def exact_value(node: Node) -> Fraction | None:
    """The value of an expression without variables as an exact fraction, None if it has none."""
    try:
        value = _evaluate(node, {}, _LOW)
    except (Undefined, Unreadable):
        return None
    return value if isinstance(value, Fraction) else None


def rounds_to(exact: Node, rounded: Number) -> bool:
    """Whether a decimal is an exact value correctly rounded to its digits."""
    try:
        value = _evaluate(exact, {}, _HIGH)
    except (Undefined, Unreadable):
        return False
    if not _is_real(value):
        return False
    error = abs(_rounded(value, _HIGH).real - _rounded(rounded.value, _HIGH))
    return bool(2 * error <= _HIGH.mpf(10) ** -max(rounded.decimals, 0))


def names_of(node: Node) -> frozenset[str]:
    """The variables of an expression."""
    if isinstance(node, Name):
        return frozenset() if node.text in _CONSTANTS else frozenset({node.text})
    if isinstance(node, Apply):
        own = {_UNKNOWN_BASE} if node.op == "log" and len(node.args) == 1 else set()
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


def _with_natural_base(node: Node, other: Node) -> Node:
    r"""`\log x` beside `\ln x` as the natural one; of numbers it may be the one to 10."""
    if _UNKNOWN_BASE not in names_of(node) or _UNKNOWN_BASE in names_of(other) or len(names_of(node)) < 2:
        return node
    return _renamed(node) if _has_op("ln", other) else node


def _renamed(node: Node) -> Node:
    if not isinstance(node, Apply):
        return node
    op = "ln" if node.op == "log" and len(node.args) == 1 else node.op
    return Apply(op, tuple(map(_renamed, node.args)))


def _has_op(op: str, node: Node) -> bool:
    return any(isinstance(one, Apply) and one.op == op for one in _nodes(node))


def infinity(node: Node) -> int:
    """1 or -1 for plus or minus infinity, 0 for anything else."""
    if isinstance(node, Apply) and node.op == "neg":
        return -infinity(node.args[0])
    return int(isinstance(node, Name) and node.text == "\\infty")


def _mentions_i(node: Node) -> bool:
    if isinstance(node, Apply):
        return any(_mentions_i(arg) for arg in node.args)
    return isinstance(node, Name) and node.text == "i"


@lru_cache(maxsize=256)
def _points(names: frozenset[str]) -> list[Mapping[str, Fraction]]:
    """Values for the variables, the same in every run."""
    if not names:
        return [{}]
    numbers = {name: [zlib.crc32(f"{name} {index}".encode()) for index in range(len(_SCALES))] for name in names}
    points = [
        {name: scale * (1 + Fraction(numbers[name][index] % 997, 1009)) for name in names} for index, scale in enumerate(_SCALES)
    ]
    points += [{name: Fraction(1 + (numbers[name][0] + index * 5) % 23) for name in names} for index in range(_WHOLE_POINTS)]
    points += [{name: value + Fraction(numbers[name][0] % 97, 1009) for name in names} for value in _FURTHER]
    for point in points:
        if _UNKNOWN_BASE in point:
            point[_UNKNOWN_BASE] = 2 + abs(point[_UNKNOWN_BASE])
    return points


def _nearly_equal(a: Value, b: Value) -> bool:
    """False only where two values surely differ: at 50 digits, with room for what cancels."""
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return a == b
    a, b = _rounded(a, _LOW), _rounded(b, _LOW)
    size = max(abs(a), abs(b))
    return not size or size < _LOW.mpf(10) ** -10 or abs(a - b) <= size * _LOW.mpf(10) ** -10


def _difference(a: Value, b: Value, context: MPContext) -> Value:
    return abs(_rounded(a, context) - _rounded(b, context))


def _shrinks(low: Value, high: Value, values: tuple[Value, Value]) -> bool:
    """Whether a difference is rounding: it must fall by 300 of the 350 digits that the precision rose by."""
    size = max(abs(_rounded(value, _LOW)) for value in values)
    start = max(_HIGH.mpf(low), _HIGH.mpf(size) * _HIGH.mpf(10) ** -50)
    return not high or bool(high <= start * _HIGH.mpf(10) ** -300)


def _is_real(value: Value) -> bool:
    if isinstance(value, Fraction):
        return True
    return abs(value.imag) <= abs(value.real) * _LOW.mpf(10) ** -40


def _rounded(value: Value, context: MPContext) -> Value:
    return context.mpf(value.numerator) / value.denominator if isinstance(value, Fraction) else value


def _evaluate(node: Node, point: Mapping[str, Fraction], context: MPContext) -> Value:
    """The value at a point: a Fraction while it stays exact and small, else a rounded number."""
    if isinstance(node, Number):
        return node.value
    if isinstance(node, Name):
        if node.text in point:
            return point[node.text]
        constants = {"\\pi": context.pi, "e": context.e, "i": context.j}
        if node.text not in constants:
            raise Unreadable(f"no value for {node.text}")
        return +constants[node.text]
    if not isinstance(node, Apply):
        raise Unreadable("no scalar")
    args = [_evaluate(arg, point, context) for arg in node.args]
    if node.op == "log" and len(args) == 1:
        args.append(point[_UNKNOWN_BASE])
    try:
        value = _OPERATIONS[node.op](context, *args)
    except KeyError:
        raise Unreadable(f"{node.op} has no value") from None
    except (ZeroDivisionError, ValueError, OverflowError):
        raise Undefined from None
    if isinstance(value, Fraction):
        bits = max(value.numerator.bit_length(), value.denominator.bit_length())
        return value if bits <= _MAX_EXACT_BITS else _rounded(value, context)
    if not context.isfinite(value):
        raise Undefined
    return value


def _add_values(context: MPContext, *terms: Value) -> Value:
    total = terms[0]
    for term in terms[1:]:
        if isinstance(total, Fraction) and isinstance(term, Fraction):
            total += term
            continue
        total, term = _rounded(total, context), _rounded(term, context)
        if context is _HIGH and total and term and abs(context.mag(total) - context.mag(term)) > context.prec:
            raise TooLarge("terms of too different size")  # the smaller one would vanish without a trace
        total += term
    return total


def _multiply(context: MPContext, a: Value, b: Value) -> Value:
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return a * b
    return _rounded(a, context) * _rounded(b, context)


def _divide(context: MPContext, a: Value, b: Value) -> Value:
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return a / b
    return _rounded(a, context) / _rounded(b, context)


def _power(context: MPContext, base: Value, exponent: Value) -> Value:
    if not base:
        if isinstance(exponent, Fraction) and exponent > 0:
            return Fraction(0)
        raise ZeroDivisionError
    if isinstance(exponent, Fraction) and exponent.denominator == 1:
        count = int(exponent)
        if abs(count) > _MAX_EXPONENT:
            raise TooLarge("power too large")
        if isinstance(base, Fraction):
            bits = max(base.numerator.bit_length(), base.denominator.bit_length())
            if bits * abs(count) <= _MAX_EXACT_BITS:
                return base**count
        return _rounded(base, context) ** count
    base, exponent = _rounded(base, context), _rounded(exponent, context)
    if abs(exponent) * (1 + abs(context.ln(base))) > _MAX_EXPONENT:
        raise TooLarge("power too large")
    return context.power(base, exponent)


def _root(context: MPContext, radicand: Value, degree: Value) -> Value:
    """The real root if there is one: the cube root of -8 is -2."""
    if not isinstance(degree, Fraction) or not 2 <= degree <= 1000 or degree.denominator != 1:
        raise Unreadable("degree of a root")
    if _is_real(radicand) and degree % 2 and _rounded(radicand, context).real < 0:
        return -_power(context, -radicand, 1 / degree)
    if degree == 2:
        return context.sqrt(_rounded(radicand, context))
    return _power(context, radicand, 1 / degree)


def _factorial(context: MPContext, n: Value) -> Value:
    if not isinstance(n, Fraction) or n.denominator != 1 or n < 0:
        raise ValueError
    if n > _MAX_FACTORIAL:
        raise TooLarge("factorial too large")
    return Fraction(math.factorial(int(n))) if n <= 300 else context.factorial(int(n))


def _binomial(context: MPContext, n: Value, k: Value) -> Value:
    if not all(isinstance(value, Fraction) and value.denominator == 1 and value >= 0 for value in (n, k)):
        raise ValueError
    if max(n, k) > _MAX_FACTORIAL:
        raise TooLarge("binomial too large")
    return Fraction(math.comb(int(n), int(k))) if n <= 1000 else context.binomial(int(n), int(k))


def _logarithm(context: MPContext, value: Value, base: Value) -> Value:
    if not value or not base or base == 1:
        raise ZeroDivisionError
    return context.ln(_rounded(value, context)) / context.ln(_rounded(base, context))


def _function(name: str, limit: int = _MAX_ANGLE):
    def apply(context: MPContext, value: Value) -> Value:
        if abs(value) > limit:
            raise TooLarge(f"argument of {name} too large")
        return getattr(context, name)(_rounded(value, context))

    return apply


_OPERATIONS = {
    "add": _add_values,
    "mul": _multiply,
    "call": _multiply,
    "letters": lambda context, *factors: reduce(partial(_multiply, context), factors),
    "div": _divide,
    "pow": _power,
    "root": _root,
    "factorial": _factorial,
    "binom": _binomial,
    "neg": lambda context, value: -value,
    "abs": lambda context, value: abs(value),
    "floor": lambda context, value: Fraction(math.floor(value)) if isinstance(value, Fraction) else context.floor(value),
    "ceil": lambda context, value: Fraction(math.ceil(value)) if isinstance(value, Fraction) else context.ceil(value),
    "percent": lambda context, value: _divide(context, value, Fraction(100)),
    "degree": lambda context, value: _rounded(value, context) * context.pi / 180,
    "log": _logarithm,
    "ln": lambda context, value: _logarithm(context, value, context.e),
    "lg": lambda context, value: _logarithm(context, value, Fraction(10)),
    "exp": _function("exp"),
    "arccot": lambda context, value: context.pi / 2 - context.atan(_rounded(value, context)),
}
_TRIGONOMETRY = "sin cos tan cot sec csc sinh cosh tanh arcsin arccos arctan arcsec arccsc"
_OPERATIONS |= {name: _function(name.replace("arc", "a")) for name in _TRIGONOMETRY.split()}
