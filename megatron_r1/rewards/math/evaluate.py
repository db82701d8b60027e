"""The value of an expression at a point: an exact fraction while it stays small, else a number of 50 or of 400 digits.

What would be too large is refused before it is computed. Nothing is expanded or simplified.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from fractions import Fraction
from functools import partial, reduce

from mpmath import MPContext

from megatron_r1.rewards.math.tree import Apply, Name, Node, Number, TooLarge, Unreadable

_MAX_EXACT_BITS = 8000  #: of a numerator or denominator; beyond it numbers are rounded
_MAX_EXPONENT = 10**7  #: of a power
_MAX_FACTORIAL = 10**5
_MAX_ANGLE = 10**6
_MAX_TERMS = 400  #: of a sum or product, with those in it, of numbers
_MAX_TERMS_AT_POINT = 100  #: the same with a variable end
_MAX_STEPS = 4000  #: terms times the operations in each
_LARGE_BITS, _GUARD_BITS = 100, 30
LOW, HIGH = MPContext(), MPContext()
LOW.dps, HIGH.dps = 50, 400
UNKNOWN_BASE = "log base"  #: log without a base: 10, e or 2, so it is a variable
REAL_PARTS = "real parts"  #: in a point: whatever is not real on the way has no value
SERIES = {"sum": "add", "prod": "mul"}  #: with index, first and last value, and term
_TERMS = "terms"  #: in a point: how many terms the series around have

Value = object  # Fraction, or mpf or mpc of the context at hand


class Undefined(Exception):
    """No value at this point, e.g. a division by zero."""


def is_real(value: Value) -> bool:
    if isinstance(value, Fraction):
        return True
    return abs(value.imag) <= abs(value.real) * LOW.mpf(10) ** -40


def rounded(value: Value, context: MPContext) -> Value:
    return context.mpf(value.numerator) / value.denominator if isinstance(value, Fraction) else value


def value_at(node: Node, point: Mapping[str, Fraction], context: MPContext) -> Value:
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
    if node.op in SERIES:
        return _series(node, point, context)
    args = [value_at(arg, point, context) for arg in node.args]
    if node.op == "log" and len(args) == 1:
        args.append(point[UNKNOWN_BASE])
    try:
        value = _OPERATIONS[node.op](context, *args)
    except KeyError:
        raise Unreadable(f"{node.op} has no value") from None
    except (ZeroDivisionError, ValueError, OverflowError):
        raise Undefined from None
    if isinstance(value, Fraction):
        bits = max(value.numerator.bit_length(), value.denominator.bit_length())
        return value if bits <= _MAX_EXACT_BITS else rounded(value, context)
    if not context.isfinite(value) or (REAL_PARTS in point and not is_real(value)):
        raise Undefined
    return value


def _series(node: Apply, point: Mapping[str, Fraction], context: MPContext) -> Value:
    """A sum or product, term by term."""
    index, *ends, term = node.args
    first, last = (value_at(end, point, context) for end in ends)
    if not all(isinstance(end, Fraction) and end.denominator == 1 for end in (first, last)) or last < first - 1:
        raise Undefined
    count = int(last - first) + 1
    terms = count * int(point.get(_TERMS, 1))
    if terms > _MAX_TERMS or terms * _operations_in(term) > _MAX_STEPS:
        raise TooLarge("too many terms")
    if terms > _MAX_TERMS_AT_POINT and len(point) > 1:
        raise Undefined
    combine, value = _OPERATIONS[SERIES[node.op]], Fraction(node.op == "prod")
    for step in range(count):
        inner = {**point, index.text: first + step, _TERMS: Fraction(max(terms, 1))}
        value = combine(context, value, value_at(term, inner, context))
    return value


def _operations_in(node: Node) -> int:
    return 1 + sum(map(_operations_in, node.args)) if isinstance(node, Apply) else 1


def _add_values(context: MPContext, *terms: Value) -> Value:
    if all(isinstance(term, Fraction) for term in terms):
        return sum(terms[1:], terms[0])
    total, largest = context.mpf(0), 0
    for term in (rounded(term, context) for term in terms):
        if not term:
            continue
        size = context.mag(term)
        if context is HIGH and total and abs(context.mag(total) - size) > context.prec:
            raise TooLarge("terms of too different size")  # the smaller one would vanish without a trace
        total, largest = total + term, max(largest, size)
    if largest > _LARGE_BITS and (not total or context.mag(total) < largest - context.prec + _GUARD_BITS):
        raise Undefined  # what is left of large terms is rounding, as of cosh^2 x - sinh^2 x far out
    return total


def _multiply(context: MPContext, a: Value, b: Value) -> Value:
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return a * b
    return rounded(a, context) * rounded(b, context)


def _divide(context: MPContext, a: Value, b: Value) -> Value:
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return a / b
    return rounded(a, context) / rounded(b, context)


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
        return rounded(base, context) ** count
    base, exponent = rounded(base, context), rounded(exponent, context)
    if abs(exponent) * (1 + abs(context.ln(base))) > _MAX_EXPONENT:
        raise TooLarge("power too large")
    return context.power(base, exponent)


def _root(context: MPContext, radicand: Value, degree: Value) -> Value:
    """The real root if there is one: the cube root of -8 is -2."""
    if not isinstance(degree, Fraction) or not 2 <= degree <= 1000 or degree.denominator != 1:
        raise Unreadable("degree of a root")
    if is_real(radicand) and degree % 2 and rounded(radicand, context).real < 0:
        return -_power(context, -radicand, 1 / degree)
    if degree == 2:
        return context.sqrt(rounded(radicand, context))
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
    return context.ln(rounded(value, context)) / context.ln(rounded(base, context))


def _remainder(context: MPContext, value: Value, modulus: Value) -> Value:
    """The remainder that an operator gives. A number below the modulus as it is may be meant as a class: 3 mod 7."""
    if not all(isinstance(one, Fraction) and one.denominator == 1 for one in (value, modulus)) or modulus <= 0:
        raise ValueError
    if 0 <= value < modulus:
        raise ValueError
    return value % modulus


def _of_whole_numbers(function: Callable[..., int]) -> Callable[..., Value]:
    def apply(context: MPContext, *values: Value) -> Value:
        if not all(isinstance(value, Fraction) and value.denominator == 1 and value > 0 for value in values):
            raise ValueError
        return Fraction(function(*map(int, values)))

    return apply


def _extreme(choose: Callable[..., Value]) -> Callable[..., Value]:
    def apply(context: MPContext, *values: Value) -> Value:
        if not all(map(is_real, values)):
            raise ValueError
        if all(isinstance(value, Fraction) for value in values):
            return choose(values)
        return choose(rounded(value, context).real for value in values)

    return apply


def _small(value: Value, least: int) -> int:
    if not isinstance(value, Fraction) or value.denominator != 1 or not least <= value <= 100:
        raise ValueError
    return int(value)


def _function(name: str, limit: int = _MAX_ANGLE):
    def apply(context: MPContext, value: Value) -> Value:
        if abs(value) > limit:
            raise TooLarge(f"argument of {name} too large")
        return getattr(context, name)(rounded(value, context))

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
    "degree": lambda context, value: rounded(value, context) * context.pi / 180,
    "log": _logarithm,
    "ln": lambda context, value: _logarithm(context, value, context.e),
    "lg": lambda context, value: _logarithm(context, value, Fraction(10)),
    "exp": _function("exp"),
    "\\zeta": lambda context, value: context.zeta(_small(value, 2)),
    "\\Gamma": lambda context, value: _factorial(context, Fraction(_small(value, 1) - 1)),
    "mod": _remainder,
    "gcd": _of_whole_numbers(math.gcd),
    "lcm": _of_whole_numbers(math.lcm),
    "max": _extreme(max),
    "min": _extreme(min),
    "arccot": lambda context, value: context.pi / 2 - context.atan(rounded(value, context)),
}
_TRIGONOMETRY = "sin cos tan cot sec csc sinh cosh tanh arcsin arccos arctan arcsec arccsc"
_OPERATIONS |= {name: _function(name.replace("arc", "a")) for name in _TRIGONOMETRY.split()}
