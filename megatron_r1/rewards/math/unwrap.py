"""One form for what answers write in several: sets, values by name, points, double signs."""

from __future__ import annotations

from megatron_r1.rewards.math.sets import INTERVALS, described_set, is_between, is_variable
from megatron_r1.rewards.math.tree import Apply, Group, Name, Node, Quantity, Relation, Words
from megatron_r1.rewards.math.value import names_of


def unwrapped(node: Node) -> Node:
    """One form for what is written in several.

    A set for an inequality in one variable (as x \\in set), two items for a plus-minus sign, values by name for x = 1, y = 2 and
    (x, y) = (1, 2), a tuple for a point with its name.
    """
    if isinstance(node, Relation):
        return _unwrapped_relation(node)
    if isinstance(node, Group):
        items: list[Node] = []
        for item in node.items:
            item = unwrapped(item)
            nested = isinstance(item, Group) and item.kind == "list" and node.kind in ("list", "or", "and", "\\{\\}")
            items += item.items if nested else [item]
        return _joined_answers(node.kind, items) if node.kind in ("list", "or", "and") else Group(node.kind, tuple(items))
    if isinstance(node, Apply) and node.op == "mul" and isinstance(node.args[1], Group) and isinstance(node.args[0], Name):
        return unwrapped(node.args[1]) if node.args[0].text.isupper() and node.args[1].kind == "()" else node
    if _has_plus_minus(node):
        return Group("list", (_with_sign(node, True), _with_sign(node, False)))
    return node


def _unwrapped_relation(relation: Relation) -> Node:
    signs, sides = relation.signs, relation.sides
    if signs == ("=",) and _has_plus_minus(sides[1]):
        return Group("list", tuple(Relation(("=",), (sides[0], item)) for item in unwrapped(sides[1]).items))
    if signs == ("=",) and all(isinstance(side, Group) and side.kind == "()" for side in sides):
        names, values = (side.items for side in sides)
        if len(names) == len(values) == len(set(names)) and all(map(is_variable, names)):
            return Group("named", tuple(Relation(("=",), pair) for pair in zip(names, values, strict=True)))
    *names, value = sides
    is_chain = len(set(names)) == len(names) > 1 and set(signs) == {"="} and all(map(is_variable, names))
    if is_chain and not is_variable(value):  # a = b = 2
        return Group("named", tuple(Relation(("=",), (name, value)) for name in names))
    if signs == ("!=",) and _has_plus_minus(sides[1]):
        both = [described_set(Relation(signs, (sides[0], value))) for value in unwrapped(sides[1]).items]
        if None not in both:
            return Relation(("\\in",), (both[0][0], Group("intersection", tuple(item[1] for item in both))))
    if described := described_set(relation):
        return Relation(("\\in",), (described[0], unwrapped(described[1])))
    return Relation(signs, tuple(unwrapped(side) if isinstance(side, Group) else side for side in sides))


def _joined_answers(kind: str, items: list[Node]) -> Node:
    """Several answers joined by commas, "and" or "or"."""
    bounds = [item for item in items if isinstance(item, Relation) and item.signs == ("\\in",)]
    if len(bounds) == len(items) and len({bound.sides[0] for bound in bounds}) == 1:
        excluding = any(isinstance(bound.sides[1], Group) and bound.sides[1].kind == "union" for bound in bounds)
        operation = {"or": "union", "and": "intersection"}.get(kind) or ("intersection" if excluding else "")
        if not operation and is_between([bound.sides[1] for bound in bounds]):
            operation = "intersection"
        if operation:
            return Relation(("\\in",), (bounds[0].sides[0], Group(operation, tuple(bound.sides[1] for bound in bounds))))
        return Group("list", tuple(items))
    if kind == "or" and all(isinstance(item, Group) and item.kind in INTERVALS for item in items):
        return Group("union", tuple(items))
    equations = [item for item in items if isinstance(item, Relation) and item.signs == ("=",) and names_a_value(item.sides[0])]
    if len(equations) == len(items) > 1 and len({item.sides[0] for item in equations}) == len(items) and kind != "or":
        return Group("named", tuple(equations))
    if (
        len(equations) == 1
        and items[0] is equations[0]
        and not any(isinstance(item, Relation) or names_of(item) for item in items[1:])
    ):
        return Group("list", (equations[0].sides[1], *items[1:]))  # x = 1, 2
    return Group("list", tuple(items))


def is_equation(relation: Relation) -> bool:
    return set(relation.signs) == {"="}


def names_a_value(node: Node) -> bool:
    """Whether a side only names what the other side gives: x, f(x), AB, "Area"."""
    if isinstance(node, Name):
        return is_variable(node)
    return isinstance(node, Words) or (isinstance(node, Apply) and node.op in ("call", "letters"))


def _has_plus_minus(node: Node) -> bool:
    if isinstance(node, Quantity):
        return _has_plus_minus(node.value)
    return isinstance(node, Apply) and (node.op in ("plus_minus", "minus_plus") or any(map(_has_plus_minus, node.args)))


def _with_sign(node: Node, upper: bool) -> Node:
    """The expression with the upper or the lower of its double signs."""
    if isinstance(node, Quantity):
        return Quantity(_with_sign(node.value, upper), node.unit)
    if not isinstance(node, Apply):
        return node
    args = tuple(_with_sign(arg, upper) for arg in node.args)
    if node.op == "add" and not upper:
        args = args[::-1]  # 5 - 2 as the lower of 5 +- 2 is no score
    if node.op in ("plus_minus", "minus_plus"):
        return args[0] if upper == (node.op == "plus_minus") else Apply("neg", args)
    return Apply(node.op, args)
