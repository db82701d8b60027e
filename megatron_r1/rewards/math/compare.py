"""Whether two parsed answers are the same: first their structure, then the values in it, exactly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

from megatron_r1.rewards.math.measures import times_as_large
from megatron_r1.rewards.math.pairs import equal_alternatives, with_reference_names
from megatron_r1.rewards.math.policy import MathPolicy
from megatron_r1.rewards.math.sets import INTERVALS, OPERATIONS, REALS, reversed_relation, sets_agree
from megatron_r1.rewards.math.tree import UNNAMED, Apply, Dots, Group, Name, Node, Number, Quantity, Relation, Words
from megatron_r1.rewards.math.units import unit_of_letter
from megatron_r1.rewards.math.unwrap import is_equation, names_a_value, unwrapped
from megatron_r1.rewards.math.value import equal_values, exact_value, infinity, names_of, proportional, real_value, rounds_to

_MAX_ITEMS = 32
_USUAL_NAMES = tuple(map(frozenset, ("xy", "xyz", "xyzw", "ab", "abc", "abcd")))  #: whose order everyone knows


def trees_agree(answer: Node, reference: Node, policy: MathPolicy) -> bool:
    """Whether an answer is the reference.

    Raises:
        Unreadable: something in them has no value to compare.
    """
    if alternatives := equal_alternatives(answer, reference):
        return all(trees_agree(one, reference, policy) for one in alternatives)
    answer, reference = unwrapped(answer), unwrapped(reference)
    answer = with_reference_names(answer, reference)
    if any(isinstance(node, Group | Relation) for node in (answer, reference)):
        answer, reference = _as_class(answer), _as_class(reference)
    if answer == reference and not _is_degenerate(answer):
        return True
    return _agree(answer, reference, policy)


def _agree(answer: Node, reference: Node, policy: MathPolicy) -> bool:
    if _is_set(answer) or _is_set(reference):
        return _bounds_agree(answer, reference, policy)
    if isinstance(reference, Relation):
        if isinstance(answer, Relation):
            return _relations_agree(answer, reference, policy)
        if _is_congruence(reference) and isinstance(answer, Group):
            return _agree(answer, reference.sides[1], policy)
        named = is_equation(reference) and len(reference.sides) == 2 and names_a_value(reference.sides[0])
        return named and _agree(answer, reference.sides[1], policy)
    if isinstance(answer, Relation):
        if _is_congruence(answer) and isinstance(reference, Group):
            return _agree(answer.sides[1], reference, policy)
        return is_equation(answer) and all(_agree(side, reference, policy) for side in _named_values(answer))
    if isinstance(answer, Group) or isinstance(reference, Group):
        return _groups_agree(answer, reference, policy)
    if isinstance(answer, Words) or isinstance(reference, Words):
        return _words_of(answer) == _words_of(reference) != ""
    if isinstance(answer, Dots) or isinstance(reference, Dots):
        return answer == reference
    if _is_unreckoned(answer) or _is_unreckoned(reference):
        return _unreckoned_agree(answer, reference, policy)
    if all(isinstance(node, Apply) and node.op == "letters" for node in (answer, reference)):
        return answer == reference
    return _quantities_agree(answer, reference, policy)


def _bounds_agree(answer: Node, reference: Node, policy: MathPolicy) -> bool:
    """Two sets, one of which at least is no tuple for sure; if both say of which variable, of the same one."""
    bound = [isinstance(node, Relation) and node.signs == ("\\in",) for node in (answer, reference)]
    if all(bound) and answer.sides[0] != reference.sides[0] and UNNAMED not in (answer.sides[0], reference.sides[0]):
        return False
    sets = [node.sides[1] if is_bound else node for node, is_bound in zip((answer, reference), bound, strict=True)]
    same = sets_agree(*sets)
    if same is not None:
        return same
    if any(bound):
        return _agree(sets[0], sets[1], policy)
    if all(isinstance(node, Group) for node in sets):
        return _groups_agree(sets[0], sets[1], policy)
    return sets[0] == sets[1]


def _quantities_agree(answer: Node, reference: Node, policy: MathPolicy) -> bool:
    answer, reference = _with_letter_unit(answer, reference), _with_letter_unit(reference, answer)
    (answer, unit), (reference, reference_unit) = _split_unit(answer), _split_unit(reference)
    if "percent" in (unit, reference_unit):
        unit, reference_unit = ("" if u.startswith("the ") else u for u in (unit, reference_unit))  # 1/4 of the class and 25%
        if unit not in ("percent", "") or reference_unit not in ("percent", ""):
            return False
        if unit == reference_unit:
            return _scalars_agree(answer, reference, policy)
        # 0.5% for 0.5 is a slip, whatever the policy, and so is 1% for 1: only above may the sign be missing
        if policy.percent != "hundredth" and _is_large(reference) and _scalars_agree(answer, reference, policy):
            return True
        hundredths = [Apply("percent", (value,)) if u else value for value, u in ((answer, unit), (reference, reference_unit))]
        return policy.percent != "unit" and _scalars_agree(*hundredths, policy)
    if policy.units == "required" and unit != reference_unit:
        return False
    if policy.units == "optional" and unit != reference_unit and unit and reference_unit:
        return _amounts_agree(answer, unit, reference, reference_unit)
    return _scalars_agree(answer, reference, policy)


def _amounts_agree(answer: Node, unit: str, reference: Node, reference_unit: str) -> bool:
    """Whether two amounts in different units of one dimension are the same. Nothing is nothing, but 0 km is not 0 m as written."""
    if {unit, reference_unit} == {"degree", "radian"}:
        sides = [Apply("degree", (node,)) if u == "degree" else node for node, u in ((answer, unit), (reference, reference_unit))]
    else:
        scale = times_as_large(unit, reference_unit)
        if scale is None:
            return False
        sides = [Apply("mul", (answer, Number(scale))), reference]
    return real_value(reference) != 0 and equal_values(*sides)


def _is_large(node: Node) -> bool:
    value = real_value(node)
    return value is None or value == 0 or abs(value) > 1


def _with_letter_unit(node: Node, other: Node) -> Node:
    """`5 m` against `5 meters`: a letter that is short for the other side's unit is a unit, too."""
    unit, other_unit = _letter_unit(node), other.unit if isinstance(other, Quantity) else _letter_unit(other)
    return Quantity(node.args[0], unit) if unit and other_unit and times_as_large(unit, other_unit) else node


def _letter_unit(node: Node) -> str:
    """The unit that the letter behind a number is short for, "" if there is none."""
    if not (isinstance(node, Apply) and node.op == "mul") or names_of(node.args[0]):
        return ""
    letter, power = node.args[1], ""
    if isinstance(letter, Apply) and letter.op == "pow" and isinstance(letter.args[1], Number):
        letter, power = letter.args[0], f"^{letter.args[1].value}"
    unit = unit_of_letter(letter.text) if isinstance(letter, Name) else None
    return unit + power if unit else ""


def _scalars_agree(answer: Node, reference: Node, policy: MathPolicy) -> bool:
    if answer == reference or equal_values(answer, reference):
        return True
    if not policy.rounding or names_of(reference) or _has_decimal_form(reference):
        return False
    sign, hundredths, decimal = 1, False, answer
    while isinstance(decimal, Apply) and decimal.op in ("neg", "percent"):
        sign, hundredths, decimal = (-sign if decimal.op == "neg" else sign), hundredths or decimal.op == "percent", decimal.args[0]
    if not isinstance(decimal, Number) or decimal.decimals < 0:
        return False
    digits = str(int(decimal.value * 10**decimal.decimals)).lstrip("0")
    if len(digits) < policy.rounding:
        return False
    exact = Apply("mul", (reference, Number(Fraction(100)))) if hundredths else reference
    return rounds_to(exact, replace(decimal, value=sign * decimal.value))


def _is_unreckoned(node: Node) -> bool:
    """Whether a node is a score or a range, not a difference to compute: 3-2, 5-10 km, 2020-06-03."""
    node = _split_unit(node)[0]
    if not isinstance(node, Apply) or node.op != "add":
        return False
    first, *rest = node.args
    negated = all(
        isinstance(term, Apply) and term.op == "neg" and isinstance(_split_unit(term.args[0])[0], Number) for term in rest
    )
    return isinstance(first, Number) and negated


def _unreckoned_agree(answer: Node, reference: Node, policy: MathPolicy) -> bool:
    (answer, unit), (reference, reference_unit) = _split_unit(answer), _split_unit(reference)
    units_differ = (
        unit != reference_unit and policy.units != "ignored" and (policy.units == "required" or (unit and reference_unit))
    )
    return _without_decimals(answer) == _without_decimals(reference) and not units_differ


def _without_decimals(node: Node) -> Node:
    if isinstance(node, Number):
        return Number(node.value)
    return Apply(node.op, tuple(map(_without_decimals, node.args))) if isinstance(node, Apply) else node


def _groups_agree(answer: Node, reference: Node, policy: MathPolicy) -> bool:
    unordered = ("list", "\\{\\}")
    if "named" in (kinds := [node.kind if isinstance(node, Group) else "" for node in (answer, reference)]):
        return _named_agree(answer, reference, policy)
    if "" in kinds:  # one answer against several: only a set of one is the same
        if isinstance(reference, Group) and reference.kind == "ratio" and _is_fraction(answer):
            return len(reference.items) == 2 and equal_values(answer, Apply("div", reference.items))
        single = list(map(_as_scalar, (answer, reference)))
        return single != [answer, reference] and _agree(single[0], single[1], policy)
    if set(kinds) == {"list", "union"} and _are_rays(answer if kinds[0] == "list" else reference):
        return _bounds_agree(Group("union", answer.items), Group("union", reference.items), policy)
    if set(kinds) == {"matrix", "()"}:
        answer, reference = map(_as_tuple, (answer, reference))
        kinds = [answer.kind, reference.kind]
    if kinds[0] != kinds[1] and not set(kinds) <= set(unordered):
        return False
    if max(len(answer.items), len(reference.items)) > _MAX_ITEMS:
        return False
    if kinds == ["\\{\\}"] * 2:
        return _have_same_members(answer, reference, policy)
    if len(answer.items) != len(reference.items):
        return False
    if kinds[0] == "mod":
        return _congruent(answer, reference)
    if kinds == ["ratio", "ratio"] and all(map(_is_nonzero_scalar, (*answer.items, *reference.items))):
        if all(map(_is_digit, (*answer.items, *reference.items))) and len(answer.items) == 2:
            return answer.items == reference.items  # 4:2 and 2:1 are different scores
        pairs = list(zip(answer.items, reference.items, strict=True))
        return all(equal_values(Apply("mul", (pairs[0][0], r)), Apply("mul", (a, pairs[0][1]))) for a, r in pairs[1:])
    has_dots = any(isinstance(item, Dots) for item in (*answer.items, *reference.items))
    in_order = has_dots or (kinds[0] == kinds[1] == "list" and policy.list_order == "same")
    if in_order or kinds[0] not in (*unordered, "union"):
        return all(_agree(a, r, policy) for a, r in zip(answer.items, reference.items, strict=True))
    return _match(answer.items, list(reference.items), policy)


def _as_scalar(node: Node) -> Node:
    """The member of a set of one. A ratio stays one, as 3:2 may be a score, and so does a remainder: 1 mod 3 is not 1."""
    is_single = isinstance(node, Group) and node.kind == "\\{\\}" and len(node.items) == 1 and node.items != (Name("\\emptyset"),)
    return node.items[0] if is_single else node


def _as_class(node: Node) -> Node:
    """`2 mod 5` beside a congruence: the class, not the remainder."""
    return Group("mod", node.args) if isinstance(node, Apply) and node.op == "mod" else node


def _as_tuple(group: Group) -> Group:
    """A vector written as a matrix of one column or row, as a tuple."""
    if group.kind != "matrix":
        return group
    rows = [row.items for row in group.items]
    if len(rows) > 1 and all(len(row) == 1 for row in rows):
        return Group("()", tuple(row[0] for row in rows))
    return Group("()", rows[0]) if len(rows) == 1 and len(rows[0]) > 1 else group


def _have_same_members(answer: Group, reference: Group, policy: MathPolicy) -> bool:
    """Whether two sets have the same members, however often they name them. {1} is no member of {1}, but of {{1}}."""

    def agree(a: Node, r: Node) -> bool:
        return _is_braced(a) == _is_braced(r) and _agree(a, r, policy)

    return all(any(agree(a, r) for r in reference.items) for a in answer.items) and all(
        any(agree(a, r) for a in answer.items) for r in reference.items
    )


def _is_braced(node: Node) -> bool:
    return isinstance(node, Group) and node.kind == "\\{\\}"


def _is_digit(node: Node) -> bool:
    return isinstance(node, Number) and node.decimals < 0 and 0 <= node.value < 10


def _is_fraction(node: Node) -> bool:
    """Whether a node is written as one whole number over another."""
    return isinstance(node, Apply) and node.op == "div" and all(isinstance(a, Number) and a.decimals < 0 for a in node.args)


def _is_nonzero_scalar(node: Node) -> bool:
    return isinstance(node, Number | Name | Apply) and real_value(node) != 0


def _is_congruence(relation: Relation) -> bool:
    return relation.signs == ("\\equiv",) and names_a_value(relation.sides[0]) and isinstance(relation.sides[1], Group)


def _are_rays(group: Group) -> bool:
    """Whether several intervals are named one by one, at least one of them endless: no points of the plane."""
    return all(isinstance(item, Group) and item.kind in INTERVALS for item in group.items) and any(
        infinity(end) for item in group.items for end in item.items
    )


def _match(answers: Sequence[Node], references: list[Node], policy: MathPolicy) -> bool:
    """Whether the items agree one to one, in any order."""
    for answer in answers:
        found = next((index for index, reference in enumerate(references) if _agree(answer, reference, policy)), None)
        if found is None:
            return False
        del references[found]
    return True


def _named_agree(answer: Node, reference: Node, policy: MathPolicy) -> bool:
    """x = 1, y = 2 against itself in any order, or against (1, 2) or 1, 2 in the order of the names."""
    named = [node for node in (answer, reference) if isinstance(node, Group) and node.kind == "named"]
    if len(named) == 2:
        values = [{item.sides[0]: item.sides[1] for item in node.items} for node in (answer, reference)]
        return values[0].keys() == values[1].keys() and all(_agree(values[0][n], values[1][n], policy) for n in values[0])
    bare = reference if named[0] is answer else answer
    if not isinstance(bare, Group) or bare.kind not in ("()", "list", "\\{\\}") or len(bare.items) != len(named[0].items):
        return False
    if any(isinstance(item, Relation) for item in bare.items):
        return False
    items = named[0].items
    if named[0] is answer and bare.kind in ("list", "\\{\\}") and _are_numbered(items):
        return _match([item.sides[1] for item in items], list(bare.items), policy)  # x_1 and x_2 are roots, in no order
    if bare.kind == "\\{\\}":
        return False
    letters = [item.sides[0].text for item in items if isinstance(item.sides[0], Name)]
    if letters != sorted(letters):
        if frozenset(letters) not in _USUAL_NAMES:
            return False
        items = sorted(items, key=lambda item: item.sides[0].text)
    pairs = [(item.sides[1], value) for item, value in zip(items, bare.items, strict=True)]
    return all(_agree(*(pair if named[0] is answer else reversed(pair)), policy) for pair in pairs)


def _are_numbered(equations: Sequence[Relation]) -> bool:
    """Whether they give x_1, x_2 and so on."""
    names = [item.sides[0].text if isinstance(item.sides[0], Name) else "" for item in equations]
    return sorted(names) == [f"{names[0][:1]}_{index}" for index in range(1, len(names) + 1)] and names[0][:1].isalpha()


def _congruent(answer: Group, reference: Group) -> bool:
    """Whether two remainders are the same for the same modulus."""
    (value, modulus), (other, other_modulus) = answer.items, reference.items
    if not equal_values(modulus, other_modulus):
        return False
    steps = exact_value(Apply("div", (Apply("add", (value, Apply("neg", (other,)))), modulus)))
    return steps.denominator == 1 if steps is not None else equal_values(value, other)


def _relations_agree(answer: Relation, reference: Relation, policy: MathPolicy) -> bool:
    """The same relation up to the order of its sides, or up to a factor once all is on one side."""
    same_name = names_a_value(reference.sides[0]) and answer.sides[0] == reference.sides[0]
    if same_name and is_equation(answer) and is_equation(reference):
        return all(_agree(value, target, policy) for value in answer.sides[1:] for target in reference.sides[1:])
    signs = answer.signs[0], reference.signs[0]
    if len(answer.signs) != 1 or len(reference.signs) != 1 or "\\equiv" in signs:
        return _chains_agree(answer, reference, policy)
    factor = proportional(*(Apply("add", (node.sides[0], Apply("neg", (node.sides[1],)))) for node in (answer, reference)))
    if factor is None:
        return False
    as_written, flipped = (signs[0], reversed_relation(answer)[0][0])
    return (as_written if factor > 0 else flipped) == signs[1] and "\\in" not in signs


def _chains_agree(answer: Relation, reference: Relation, policy: MathPolicy) -> bool:
    for signs, sides in ((answer.signs, answer.sides), reversed_relation(answer)):
        if signs == reference.signs:
            return all(_agree(a, r, policy) for a, r in zip(sides, reference.sides, strict=True))
    return False


def _is_set(node: Node) -> bool:
    """Whether a node is a set of numbers, and neither a tuple nor a list for sure."""
    if isinstance(node, Relation):
        return node.signs == ("\\in",)
    return node == REALS or (isinstance(node, Group) and (node.kind in OPERATIONS or node.kind in INTERVALS - {"()", "[]"}))


def _is_degenerate(node: Node) -> bool:
    """An equation without a variable, such as 0 = 0, says nothing: only its own text is the same."""
    return isinstance(node, Relation) and not any(names_of(side) or isinstance(side, Words | Group) for side in node.sides)


def _named_values(equation: Relation) -> list[Node]:
    """The sides that are values: in `x = 4/2 = 2` all but the name. `7 = 8` has two, and each must be right."""
    values = [side for side in equation.sides if not names_a_value(side)]
    return values or [equation.sides[-1]]


def _split_unit(node: Node) -> tuple[Node, str]:
    return (node.value, node.unit) if isinstance(node, Quantity) else (node, "")


def _words_of(node: Node) -> str:
    if isinstance(node, Words):
        words = " ".join(node.text.split()).strip(" .()")
        return words if len(words) == 1 else words.casefold()
    if isinstance(node, Apply) and node.op == "letters":
        return "".join(name.text for name in node.args).casefold()
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
