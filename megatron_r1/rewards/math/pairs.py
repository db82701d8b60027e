"""What one answer says and the other leaves out, or calls by another name, without being another answer."""

from __future__ import annotations

from megatron_r1.rewards.math.tree import Apply, Group, Name, Node, Number, Quantity, Relation
from megatron_r1.rewards.math.value import names_of, substituted

_CONSTANTS_OF_INTEGRATION = frozenset({"C", "c"})
_VARIABLES = frozenset(["x", "y", "z", "t", "u", "v", "w", "s", "r", "\\theta"])


def with_reference_names(answer: Node, reference: Node) -> Node:
    """The answer with the names of the reference where those are free to choose.

    `y = 2x` and `f(t) = 2t` say what `f(x) = 2x` does, and `x^2 + c` what `x^2 + C` does.
    """
    if isinstance(answer, Relation) and isinstance(reference, Relation):
        return _with_same_function(answer, reference)
    if isinstance(answer, Apply) and isinstance(reference, Apply):
        return _with_same_constant(answer, reference)
    return answer


def equal_alternatives(answer: Node, reference: Node) -> tuple[Node, ...]:
    """The values of `7/3 or 2 1/3`, each of which must be a single reference; else none."""
    scalars = (Number, Apply, Quantity)
    if not (isinstance(answer, Group) and answer.kind == "or" and isinstance(reference, scalars)):
        return ()
    return answer.items if all(isinstance(item, scalars) for item in answer.items) else ()


def _with_same_function(answer: Relation, reference: Relation) -> Relation:
    if answer.signs != ("=",) or reference.signs != ("=",):
        return answer
    if answer.sides[0] == reference.sides[0]:
        return Relation(answer.signs, (answer.sides[0], _with_same_constants(answer.sides[1], reference.sides[1])))
    (name, value), (target, other) = answer.sides, reference.sides
    called, expected = _argument(name), _argument(target)
    if called and expected and called[0] == expected[0]:
        is_free = called[1].text in names_of(value) and expected[1].text in names_of(other) - names_of(value)
        if not is_free:
            return answer  # f(1) and P(A) are values of other things than f(2) and P(B)
        return Relation(answer.signs, (target, substituted(value, called[1], expected[1])))
    one = called or expected
    if one is None or Name("y") not in (name, target) or "y" in names_of(value) | names_of(other):
        return answer
    is_of_variable = names_of(value) == names_of(other) == {one[1].text}
    return Relation(answer.signs, (target, value)) if is_of_variable else answer


def _argument(node: Node) -> tuple[Node, Name] | None:
    """The function and the variable of `f(x)`."""
    is_call = isinstance(node, Apply) and node.op == "call" and isinstance(node.args[1], Name)
    return (node.args[0], node.args[1]) if is_call and names_of(node.args[1]) else None


def _with_same_constant(answer: Apply, reference: Apply) -> Apply:
    constants = [_constant_term(node) for node in (answer, reference)]
    if None in constants or constants[0] == constants[1]:
        return answer
    others = [names_of(node) - {constant.text} for node, constant in zip((answer, reference), constants, strict=True)]
    if others[0] != others[1] or len(others[0]) != 1 or not others[0] <= _VARIABLES:
        return answer
    return substituted(answer, *constants)


def _with_same_constants(answer: Node, reference: Node) -> Node:
    """`C_1 e^x + C_2` for `c_1 e^x + c_2`, behind the name of a function of one variable."""
    names = names_of(answer) - names_of(reference)
    others = names_of(reference) - names_of(answer)
    common = names_of(answer) & names_of(reference)
    if not names or {name.swapcase() for name in names} != others or not all(name[:1] in "Cc" for name in names | others):
        return answer
    if len(common) != 1 or not common <= _VARIABLES:
        return answer
    for name in sorted(names):
        answer = substituted(answer, Name(name), Name(name.swapcase()))
    return answer


def _constant_term(node: Apply) -> Name | None:
    """The constant of an indefinite integral: C or c, added once."""
    terms = [term for term in node.args if isinstance(term, Name) and term.text in _CONSTANTS_OF_INTEGRATION]
    rest = [term for term in node.args if term not in terms]
    if node.op != "add" or len(terms) != 1 or any(terms[0].text in names_of(term) for term in rest):
        return None
    return terms[0]
