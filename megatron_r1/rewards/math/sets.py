r"""Sets of real numbers: what an inequality describes, and whether two sets are the same.

A set is a list of intervals from left to right that do not touch. `x > 1, x \ne 2`, `(1,2) \cup (2,\infty)` and
`\{x \mid 2x > 2\} \setminus \{2\}` come to the same list.
"""

from __future__ import annotations

from fractions import Fraction
from functools import cmp_to_key
from typing import Any, NamedTuple

from megatron_r1.rewards.math.tree import FLIPPED, Apply, Group, Name, Node, Number, Quantity, Relation
from megatron_r1.rewards.math.value import equal_values, infinity, names_of, order, real_value, substituted

REALS = Name("\\mathbb{R}")
INTEGERS = Name("\\mathbb{Z}")
INTERVALS = frozenset({"()", "[]", "(]", "[)"})
OPERATIONS = frozenset({"union", "intersection", "difference"})
_INFINITY = Name("\\infty")
_MINUS_INFINITY = Apply("neg", (_INFINITY,))
_MAX_PIECES = 32
_ZERO, _ONE = Number(Fraction(0)), Number(Fraction(1))


class RealInterval(NamedTuple):
    """An interval; its ends are values of `real_value`."""

    low: Any
    low_closed: bool
    high: Any
    high_closed: bool


def described_set(relation: Relation) -> tuple[Name, Node] | None:
    """The variable that a relation bounds and the set it leaves it; None if it bounds none alone.

    Raises:
        Unreadable: as `equal_values`.
    """
    signs, sides = relation.signs, relation.sides
    if signs == ("\\in",):
        return (sides[0], sides[1]) if is_variable(sides[0]) else None
    if not signs or any(sign not in FLIPPED and sign != "!=" for sign in signs):
        return None
    if len(signs) == 2 and is_variable(sides[1]) and not is_variable(sides[0]):
        if any(sign in (">", ">=") for sign in signs):
            signs, sides = reversed_relation(relation)
        if set(signs) <= {"<", "<="} and all(_is_free_of(sides[1], end) for end in (sides[0], sides[2])):
            return sides[1], Group(("(" if signs[0] == "<" else "[") + (")" if signs[1] == "<" else "]"), (sides[0], sides[2]))
        return None
    found = [_solved(sign, *sides[index : index + 2]) for index, sign in enumerate(signs)]
    if any(one is None or one[0] != found[0][0] for one in found):
        return None
    name, first = found[0]
    return name, first if len(found) == 1 else Group("intersection", tuple(one[1] for one in found))


def sets_agree(first: Node, second: Node) -> bool | None:
    """Whether two sets of numbers are the same; None if one is no such set, or has ends without a value."""
    pieces = pieces_of(first), pieces_of(second)
    if pieces[0] is None or pieces[1] is None:
        return None
    return len(pieces[0]) == len(pieces[1]) and all(
        order(a.low, b.low) == 0 == order(a.high, b.high) and a.low_closed == b.low_closed and a.high_closed == b.high_closed
        for a, b in zip(*pieces, strict=True)
    )


def is_between(sets: list[Node]) -> bool:
    """Whether two rays, as of `x > 1, x < 4`, leave what is between them: there they can only both hold."""
    pieces = [pieces_of(one) for one in sets]
    if len(sets) != 2 or any(one is None or len(one) != 1 for one in pieces):
        return False
    common = _overlap(*pieces)
    ends = [end for one in common for end in (one.low, one.high)]
    return bool(ends) and all(order(end, real_value(far)) for end in ends for far in (_INFINITY, _MINUS_INFINITY))


def is_variable(node: Node) -> bool:
    """Whether a node is a variable, not a constant."""
    return isinstance(node, Name) and bool(names_of(node)) and not node.text.startswith("\\mathbb")


def reversed_relation(relation: Relation) -> tuple[tuple[str, ...], tuple[Node, ...]]:
    """The signs and sides read from right to left."""
    return tuple(FLIPPED.get(sign, sign) for sign in reversed(relation.signs)), tuple(reversed(relation.sides))


def pieces_of(node: Node) -> list[RealInterval] | None:
    """The intervals of a set; None if it is none, or if an end has no value."""
    if node == REALS:
        return [_between(_MINUS_INFINITY, _INFINITY)]
    if node == Name("\\emptyset"):
        return []
    if isinstance(node, Relation) and node.signs == ("\\in",):
        return pieces_of(node.sides[1])
    if not isinstance(node, Group) or len(node.items) > _MAX_PIECES:
        return None
    if node.kind in INTERVALS and len(node.items) == 2:
        piece = _between(*node.items, node.kind)
        return None if piece is None else [piece]
    if node.kind == "\\{\\}":
        points = [_between(item, item, "[]") for item in node.items]
        return None if None in points else _merged(points)
    if node.kind not in OPERATIONS:
        return None
    if node.kind == "intersection" and node.items[0] == INTEGERS and len(node.items) == 2:
        return _whole_numbers(pieces_of(node.items[1]))
    parts = [pieces_of(item) for item in node.items]
    if None in parts:
        return None
    if node.kind == "union":
        return _merged([piece for part in parts for piece in part])
    result = parts[0]
    for part in parts[1:]:
        result = _overlap(result, part if node.kind == "intersection" else _outside(part))
    return _merged(result)


def _whole_numbers(pieces: list[RealInterval] | None) -> list[RealInterval] | None:
    """The whole numbers in a set, if they are few."""
    if pieces is None or not all(_is_finite(piece.low) and _is_finite(piece.high) for piece in pieces):
        return None
    if sum(piece.high - piece.low + 1 for piece in pieces) > _MAX_PIECES:
        return None
    points = []
    for piece in pieces:
        for number in range(int(piece.low) - 1, int(piece.high) + 2):
            value = real_value(Number(Fraction(number)))
            left, right = order(piece.low, value), order(value, piece.high)
            if (left < 0 or (left == 0 and piece.low_closed)) and (right < 0 or (right == 0 and piece.high_closed)):
                points.append(RealInterval(value, True, value, True))
    return points


def _is_finite(end: Any) -> bool:
    return all(order(end, real_value(far)) for far in (_INFINITY, _MINUS_INFINITY))


def _between(low: Node, high: Node, kind: str = "()") -> RealInterval | None:
    ends = real_value(low), real_value(high)
    if ends[0] is None or ends[1] is None or order(*ends) > 0:
        return None
    closed = [bracket in "[]" and not infinity(end) for bracket, end in zip(kind, (low, high), strict=True)]
    return RealInterval(ends[0], closed[0], ends[1], closed[1]) if order(*ends) or all(closed) else None


def _merged(pieces: list[RealInterval]) -> list[RealInterval]:
    """Pieces from left to right, those that touch joined."""
    result: list[RealInterval] = []
    for piece in sorted(pieces, key=cmp_to_key(lambda a, b: order(a.low, b.low) or b.low_closed - a.low_closed)):
        last = result[-1] if result else None
        touch = order(piece.low, last.high) if last else 1
        if last is None or touch > 0 or (touch == 0 and not (piece.low_closed or last.high_closed)):
            result.append(piece)
            continue
        longer = order(piece.high, last.high)
        closed = piece.high_closed if longer > 0 else last.high_closed or (longer == 0 and piece.high_closed)
        result[-1] = RealInterval(last.low, last.low_closed, piece.high if longer > 0 else last.high, closed)
    return result


def _overlap(first: list[RealInterval], second: list[RealInterval]) -> list[RealInterval]:
    result = []
    for a in first:
        for b in second:
            left, right = order(a.low, b.low), order(a.high, b.high)
            low, low_closed = (a if left > 0 else b)[:2] if left else (a.low, a.low_closed and b.low_closed)
            high, high_closed = (a if right < 0 else b)[2:] if right else (a.high, a.high_closed and b.high_closed)
            size = order(low, high)
            if size < 0 or (size == 0 and low_closed and high_closed):
                result.append(RealInterval(low, low_closed, high, high_closed))
    return result


def _outside(pieces: list[RealInterval]) -> list[RealInterval]:
    low, closed, result = real_value(_MINUS_INFINITY), False, []
    for piece in pieces:
        if order(low, piece.low) < 0 or (order(low, piece.low) == 0 and closed and not piece.low_closed):
            result.append(RealInterval(low, closed, piece.low, not piece.low_closed))
        low, closed = piece.high, not piece.high_closed
    if order(low, real_value(_INFINITY)) < 0:
        result.append(RealInterval(low, closed, real_value(_INFINITY), False))
    return result


def _solved(sign: str, left: Node, right: Node) -> tuple[Name, Node] | None:
    """What an inequality says of its one variable, in which it must be linear."""
    if not all(isinstance(side, Number | Name | Apply) for side in (left, right)):
        return None
    names = names_of(left) | names_of(right)
    if len(names) != 1:
        return None
    name = Name(next(iter(names)))
    if isinstance(left, Apply) and left.op == "abs" and not names_of(right):
        return _solved_distance(sign, left.args[0], right)
    if isinstance(right, Apply) and right.op == "abs" and not names_of(left):
        return _solved_distance(FLIPPED.get(sign, sign), right.args[0], left)
    if right == name and not names_of(left):
        sign, left, right = FLIPPED.get(sign, sign), right, left
    if left == name and not names_of(right):
        return name, _ray(sign, right)
    if not is_variable(name):
        return None
    difference = Apply("add", (left, Apply("neg", (right,))))
    start = substituted(difference, name, _ZERO)
    slope = Apply("add", (substituted(difference, name, _ONE), Apply("neg", (start,))))
    rise = real_value(slope)
    if rise is None or real_value(start) is None:
        return None
    if not order(rise, 0 * rise) or not equal_values(difference, Apply("add", (start, Apply("mul", (slope, name))))):
        return _solved_square(sign, difference, name, start)
    return name, _ray(sign if rise > 0 else FLIPPED.get(sign, sign), Apply("neg", (Apply("div", (start, slope)),)))


def _solved_distance(sign: str, inner: Node, bound: Node) -> tuple[Name, Node] | None:
    """What |inner| < bound says, or the like with another sign."""
    size = real_value(bound)
    if size is None:
        return None
    if order(size, 0 * size) < 0:
        solved = _solved("<", inner, _ZERO)
        return solved and (solved[0], Name("\\emptyset") if sign in ("<", "<=") else REALS)
    sides = _solved(sign, inner, bound), _solved(FLIPPED.get(sign, sign), inner, Apply("neg", (bound,)))
    if None in sides:
        return None
    return sides[0][0], Group("union" if sign in (">", ">=") else "intersection", (sides[0][1], sides[1][1]))


def _solved_square(sign: str, difference: Node, name: Name, start: Node) -> tuple[Name, Node] | None:
    """What a square inequality says, with its constant term."""
    ends = [substituted(difference, name, point) for point in (_ONE, Apply("neg", (_ONE,)))]
    half = Number(Fraction(1, 2))
    square = Apply("add", (Apply("mul", (half, Apply("add", tuple(ends)))), Apply("neg", (start,))))
    slope = Apply("mul", (half, Apply("add", (ends[0], Apply("neg", (ends[1],))))))
    rise = real_value(square)
    if rise is None or real_value(slope) is None or not order(rise, 0 * rise):
        return None
    power = Apply("mul", (square, Apply("pow", (name, Number(Fraction(2))))))
    if not equal_values(difference, Apply("add", (power, Apply("mul", (slope, name)), start))):
        return None
    sign = sign if rise > 0 else FLIPPED.get(sign, sign)
    middle = Apply("neg", (Apply("div", (slope, Apply("mul", (Number(Fraction(2)), square)))),))
    below = Apply("add", (Apply("pow", (middle, Number(Fraction(2)))), Apply("neg", (Apply("div", (start, square)),))))
    room = real_value(below)
    if room is None:
        return None
    if order(room, 0 * room) < 0 or (not order(room, 0 * room) and sign in ("<", ">=")):
        return name, REALS if sign in (">", ">=", "!=") else Name("\\emptyset")
    root = Apply("root", (below, Number(Fraction(2)))) if order(room, 0 * room) else _ZERO
    low, high = Apply("add", (middle, Apply("neg", (root,)))), Apply("add", (middle, root))
    if sign in ("<", "<="):
        return name, Group("()" if sign == "<" else "[]", (low, high))
    if sign == "!=":
        return name, Group("intersection", (_ray(sign, low), _ray(sign, high)))
    return name, Group("union", (_ray(FLIPPED[sign], low), _ray(sign, high)))


def _ray(sign: str, end: Node) -> Node:
    below, above = (_MINUS_INFINITY, end), (end, _INFINITY)
    if sign == "!=":
        return Group("union", (Group("()", below), Group("()", above)))
    return Group(*{"<": ("()", below), "<=": ("(]", below), ">": ("()", above), ">=": ("[)", above)}[sign])


def _is_free_of(name: Name, node: Node) -> bool:
    if isinstance(node, Quantity):
        return _is_free_of(name, node.value)
    return isinstance(node, Number | Name | Apply) and name.text not in names_of(node)
