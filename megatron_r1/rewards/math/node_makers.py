"""How the reader makes nodes from tokens and from other nodes."""

from __future__ import annotations

from fractions import Fraction

from megatron_r1.rewards.math.tree import Apply, Group, Node, Number, Unreadable

MAX_DIGITS = 400


def numeral(text: str) -> Number:
    """An exact number from a number token; `0.1~6` repeats the 6.

    Raises:
        Unreadable: it has too many digits.
    """
    if len(text) > MAX_DIGITS:
        raise Unreadable("too many digits")
    if "~" in text:
        head, _, period = text.partition("~")
        decimals = len(head.partition(".")[2])
        return Number(Fraction(head + "0") + Fraction(int(period), (10 ** len(period) - 1) * 10**decimals))
    return Number(Fraction(text), len(text.partition(".")[2]) if "." in text else -1)


def with_sign(sign: str, value: Node) -> Node:
    r"""A value behind +, -, `\pm` or `\mp`."""
    if sign == "+":
        return value
    return Apply({"-": "neg", "\\pm": "plus_minus", "\\mp": "minus_plus"}[sign], (value,))


def is_proper_fraction(node: Node) -> bool:
    """Whether a node is a fraction of whole numbers below one."""
    if not isinstance(node, Apply) or node.op != "div":
        return False
    if not all(isinstance(arg, Number) and arg.decimals < 0 for arg in node.args):
        return False
    return 0 < node.args[0].value < node.args[1].value


def joined_sets(kind: str, first: Node, second: Node) -> Group:
    """Two sets joined; a longer union is one group."""
    flat = kind != "difference" and isinstance(first, Group) and first.kind == kind
    return Group(kind, (*(first.items if flat else (first,)), second))
