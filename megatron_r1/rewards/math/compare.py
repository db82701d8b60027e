"""Whether two parsed answers are the same: first their structure, then the values in it, exactly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from megatron_r1.rewards.math.policy import MathPolicy
from megatron_r1.rewards.math.tree import Apply, Dots, Group, Name, Node, Number, Quantity, Relation, Words
from megatron_r1.rewards.math.value import equal_values, exact_value, names_of, proportional, rounds_to

_MAX_ITEMS = 32
_FLIPPED = {"<": ">", ">": "<", "<=": ">=", ">=": "<="}
_INFINITY = Name("\\infty")
_MINUS_INFINITY = Apply("neg", (_INFINITY,))


def trees_agree(answer: Node, reference: Node, policy: MathPolicy) -> bool:
    """Whether an answer is the reference.

    Raises:
        Unreadable: something in them has no value to compare.
    """
    answer, reference = _unwrapped(answer), _unwrapped(reference)
    if answer == reference and not _is_degenerate(answer):
        return True
    return _agree(answer, reference, policy)


def _agree(answer: Node, reference: Node, policy: MathPolicy) -> bool:
    if isinstance(reference, Relation):
        if isinstance(answer, Relation):
            return _relations_agree(answer, reference, policy)
        named = _is_equation(reference) and len(reference.sides) == 2 and _is_name(reference.sides[0])
        return named and _agree(answer, reference.sides[1], policy)
    if isinstance(answer, Relation):
        return _is_equation(answer) and all(_agree(side, reference, policy) for side in _named_values(answer))
    if isinstance(answer, Group) or isinstance(reference, Group):
        return _groups_agree(answer, reference, policy)
    if isinstance(answer, Words) or isinstance(reference, Words):
        return _words_of(answer) == _words_of(reference) != ""
    if isinstance(answer, Dots) or isinstance(reference, Dots):
        return answer == reference
    return _quantities_agree(answer, reference, policy)


def _quantities_agree(answer: Node, reference: Node, policy: MathPolicy) -> bool:
    (answer, unit), (reference, reference_unit) = _split_unit(answer), _split_unit(reference)
    if "percent" in (unit, reference_unit):
        if unit not in ("percent", "") or reference_unit not in ("percent", ""):
            return False
        if policy.percent != "hundredth" and _scalars_agree(answer, reference, policy):
            return True
        hundredths = [Apply("percent", (value,)) if u else value for value, u in ((answer, unit), (reference, reference_unit))]
        return (policy.percent != "unit" or unit == reference_unit) and _scalars_agree(*hundredths, policy)
    if policy.units == "required" and unit != reference_unit:
        return False
    if policy.units == "optional" and unit != reference_unit and unit and reference_unit:
        return False
    return _scalars_agree(answer, reference, policy)


def _scalars_agree(answer: Node, reference: Node, policy: MathPolicy) -> bool:
    if answer == reference or equal_values(answer, reference):
        return True
    negative = isinstance(answer, Apply) and answer.op == "neg"
    decimal = answer.args[0] if negative else answer
    if not policy.rounding or not isinstance(decimal, Number) or decimal.decimals < 0 or names_of(reference):
        return False
    digits = str(int(decimal.value * 10**decimal.decimals)).lstrip("0")
    if len(digits) < policy.rounding or _has_decimal_form(reference):
        return False
    return rounds_to(reference, replace(decimal, value=-decimal.value) if negative else decimal)


def _groups_agree(answer: Node, reference: Node, policy: MathPolicy) -> bool:
    unordered = ("list", "\\{\\}")
    kinds = [node.kind if isinstance(node, Group) else "" for node in (answer, reference)]
    if "" in kinds:  # one answer against several: only a set of one is the same
        single = [node.items[0] if isinstance(node, Group) and node.kind == "\\{\\}" and len(node.items) == 1 else node
                  for node in (answer, reference)]  # fmt: skip
        return single != [answer, reference] and _agree(single[0], single[1], policy)
    if kinds[0] != kinds[1] and not set(kinds) <= set(unordered):
        return False
    if len(answer.items) != len(reference.items) or len(reference.items) > _MAX_ITEMS:
        return False
    has_dots = any(isinstance(item, Dots) for item in (*answer.items, *reference.items))
    in_order = has_dots or (kinds[0] == kinds[1] == "list" and policy.list_order == "same")
    if in_order or kinds[0] not in (*unordered, "union"):
        return all(_agree(a, r, policy) for a, r in zip(answer.items, reference.items, strict=True))
    return _match(answer.items, list(reference.items), policy)


def _match(answers: Sequence[Node], references: list[Node], policy: MathPolicy) -> bool:
    """Whether the items agree one to one, in any order."""
    for answer in answers:
        found = next((index for index, reference in enumerate(references) if _agree(answer, reference, policy)), None)
        if found is None:
            return False
        del references[found]
    return True


def _relations_agree(answer: Relation, reference: Relation, policy: MathPolicy) -> bool:
    """The same relation up to the order of its sides, or up to a factor once all is on one side."""
    same_name = _is_name(reference.sides[0]) and answer.sides[0] == reference.sides[0]
    if same_name and _is_equation(answer) and _is_equation(reference):
        return all(_agree(value, target, policy) for value in answer.sides[1:] for target in reference.sides[1:])
    if len(answer.signs) != 1 or len(reference.signs) != 1:
        return _chains_agree(answer, reference, policy)
    signs = answer.signs[0], reference.signs[0]
    factor = proportional(*(Apply("add", (node.sides[0], Apply("neg", (node.sides[1],)))) for node in (answer, reference)))
    if factor is None or signs[0] not in (*_FLIPPED, "=", "!="):
        return False
    return (signs[0] if factor > 0 else _FLIPPED.get(signs[0], signs[0])) == signs[1]


def _chains_agree(answer: Relation, reference: Relation, policy: MathPolicy) -> bool:
    for signs, sides in ((answer.signs, answer.sides), _reversed(answer)):
        if signs == reference.signs:
            return all(_agree(a, r, policy) for a, r in zip(sides, reference.sides, strict=True))
    return False


def _unwrapped(node: Node) -> Node:
    """One form for what is written in several: intervals for inequalities in one variable, two items for a plus-minus sign."""
    if isinstance(node, Relation):
        return _interval(node) or node
    if isinstance(node, Group):
        items = []
        for item in node.items:
            item = _unwrapped(item)
            nested = isinstance(item, Group) and item.kind == "list" and node.kind in ("list", "or", "\\{\\}")
            items += item.items if nested else [item]
        if node.kind == "or":
            are_intervals = all(isinstance(item, Group) and item.kind in ("()", "[]", "(]", "[)") for item in items)
            return Group("union" if are_intervals else "list", tuple(items))
        return Group(node.kind, tuple(items))
    if _has_plus_minus(node):
        return Group("list", (_with_sign(node, True), _with_sign(node, False)))
    return node


def _interval(relation: Relation) -> Node | None:
    """The set that an inequality in one variable, or a membership, describes; None for other relations."""
    signs, sides = relation.signs, relation.sides
    if signs == ("\\in",) and _is_name(sides[0]):
        return _unwrapped(sides[1])
    if signs == ("=",) and _has_plus_minus(sides[1]):
        return Group("list", tuple(Relation(("=",), (sides[0], item)) for item in _unwrapped(sides[1]).items))
    if len(signs) == 2 and not isinstance(sides[0], Name):
        if any(sign in (">", ">=") for sign in signs):
            signs, sides = _reversed(relation)
        if not (set(signs) <= {"<", "<="} and isinstance(sides[1], Name) and not _mentions(sides[1], sides[0], sides[2])):
            return None
        return Group(("(" if signs[0] == "<" else "[") + (")" if signs[1] == "<" else "]"), (sides[0], sides[2]))
    if len(signs) != 1:
        return None
    if isinstance(sides[1], Name) and not isinstance(sides[0], Name):
        signs, sides = _reversed(relation)
    if not isinstance(sides[0], Name) or _mentions(sides[0], sides[1]) or names_of(sides[1]):
        return None
    bound = sides[1]
    below, above = (_MINUS_INFINITY, bound), (bound, _INFINITY)
    forms = {"<": ("()", below), "<=": ("(]", below), ">": ("()", above), ">=": ("[)", above)}
    if signs[0] == "!=":
        return Group("union", (Group("()", below), Group("()", above)))
    return Group(*forms[signs[0]]) if signs[0] in forms else None


def _reversed(relation: Relation) -> tuple[tuple[str, ...], tuple[Node, ...]]:
    return tuple(_FLIPPED.get(sign, sign) for sign in reversed(relation.signs)), tuple(reversed(relation.sides))


def _mentions(name: Name, *nodes: Node) -> bool:
    return any(name.text in names_of(node) or not isinstance(node, Number | Name | Apply) for node in nodes)


def _is_equation(relation: Relation) -> bool:
    return set(relation.signs) == {"="}


def _is_degenerate(node: Node) -> bool:
    """An equation without a variable, such as 0 = 0, says nothing: only its own text is the same."""
    return isinstance(node, Relation) and not any(names_of(side) or isinstance(side, Words) for side in node.sides)


def _named_values(equation: Relation) -> list[Node]:
    """The sides that are values: in `x = 4/2 = 2` all but the name. `7 = 8` has two, and each must be right."""
    values = [side for side in equation.sides if not _is_name(side)]
    return values or [equation.sides[-1]]


def _is_name(node: Node) -> bool:
    """Whether a side only names what the other side gives: x, f(x), "Area"."""
    if isinstance(node, Name):
        return bool(names_of(node))
    return isinstance(node, Words) or (isinstance(node, Apply) and node.op == "call")


def _split_unit(node: Node) -> tuple[Node, str]:
    return (node.value, node.unit) if isinstance(node, Quantity) else (node, "")


def _words_of(node: Node) -> str:
    if isinstance(node, Words):
        words = " ".join(node.text.split()).strip(" .()")
        return words if len(words) == 1 else words.casefold()
    return node.text if isinstance(node, Name) else ""


def _has_decimal_form(node: Node) -> bool:
    """Whether a decimal writes the value exactly: a fraction whose denominator divides a power of ten."""
    value = exact_value(node)
    if value is None:
        return False
    rest = value.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    return rest == 1


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
    if node.op in ("plus_minus", "minus_plus"):
        return args[0] if upper == (node.op == "plus_minus") else Apply("neg", args)
    return Apply(node.op, args)
