"""How the reader reads functions, sums and products with their arguments."""

from __future__ import annotations

from abc import ABC, abstractmethod
from fractions import Fraction

from megatron_r1.rewards.math.node_makers import numeral
from megatron_r1.rewards.math.tokens import FUNCTIONS, Token, TokenCursor
from megatron_r1.rewards.math.tree import Apply, Group, Name, Node, Number, Quantity, Unreadable

CLOSING = {"(": ")", "[": "]", "\\{": "\\}", "{": "}", "\\lfloor": "\\rfloor", "\\lceil": "\\rceil"}
_MINUS_ONE = Apply("neg", (Number(Fraction(1)),))
_MAX_SERIES = 4  #: sums and products in an answer


class FunctionReader(TokenCursor, ABC):
    """The part of the reader that stands behind the name of a function."""

    def __init__(self, tokens: list[Token]):
        super().__init__(tokens)
        self._series = 0

    @abstractmethod
    def read_list(self) -> Node:
        """Items separated by commas or connectives."""

    @abstractmethod
    def _read_sum(self) -> Node: ...

    @abstractmethod
    def _read_product(self) -> Node: ...

    @abstractmethod
    def _read_power(self) -> Node: ...

    @abstractmethod
    def _read_primary(self) -> Node: ...

    @abstractmethod
    def _read_exponent(self) -> Node | None: ...

    @abstractmethod
    def _starts_factor(self) -> bool: ...

    def _read_function(self, name: str) -> Node:
        """A function, with the power or base that stands before its argument."""
        degree = base = power = None
        if name == "sqrt" and self._next_is("open", "["):
            self._take()
            degree = self._read_sum()
            self._expect("close", "]")
        while self._next_is("op", "_" if name == "log" else "^", "^"):
            if self._take().text == "_":
                base = self._read_tex_argument()
            else:
                power = self._read_exponent()
                if power == _MINUS_ONE and f"arc{name}" in FUNCTIONS:
                    name, power = f"arc{name}", None
                elif power is None or (isinstance(power, Apply) and power.op == "neg"):
                    raise Unreadable("inverse or degrees of a function")
        if name in ("sqrt", "cbrt", "abs") or self._next_is("open"):
            argument = self._read_tex_argument()
        else:
            argument = self._read_power()
            while self._starts_factor() and not self._next_is("function"):
                argument = Apply("mul", (argument, self._read_power()))
        if isinstance(argument, Quantity) and argument.unit == "degree":
            argument = Apply("degree", (argument.value,))
        if name == "sqrt":
            value = Apply("root", (argument, degree or Number(Fraction(2))))
        elif name == "cis":
            value = Apply("exp", (Apply("mul", (Name("i"), argument)),))
        elif name == "cbrt":
            value = Apply("root", (argument, Number(Fraction(3))))
        else:
            value = Apply(name, (argument,) if base is None else (argument, base))
        return value if power is None else Apply("pow", (value, power))

    def _read_list_function(self, name: str) -> Node:
        r"""`\gcd(12, 18)` or `\max\{a, b\}`."""
        if not self._next_is("open", "(", "\\{", "{"):
            raise Unreadable("no list where one belongs")
        opening = self._take().text
        content = self.read_list()
        self._expect("close", CLOSING[opening])
        return Apply(name, content.items if isinstance(content, Group) and content.kind == "list" else (content,))

    def _read_series(self, name: str) -> Node:
        r"""A sum or product with its bounds, `\sum_{k=1}^{n} k^2`."""
        self._series += 1
        if self._series > _MAX_SERIES:
            raise Unreadable("too many sums")
        self._expect("op", "_")
        self._expect("open", "{")
        index = Name(self._expect("name").text)
        self._expect("relation", "=")
        first = self._read_sum()
        self._expect("close", "}")
        self._expect("op", "^")
        last = self._read_tex_argument()
        return Apply(name, (index, first, last, self._read_product()))

    def _read_tex_argument(self) -> Node:
        """A braced or bracketed group, or the one symbol that TeX takes: the first digit of a number."""
        token = self.peek()
        if token is not None and token.kind == "number" and len(token.text) > 1 and self._behind_command():
            if not token.text.isdigit():
                raise Unreadable("argument without braces")
            self._tokens[self._at] = Token("number", token.text[1:])
            return numeral(token.text[0])
        return self._read_primary()

    def _behind_command(self) -> bool:
        before = self._tokens[self._at - 1]
        return before.kind == "command" or (before.kind == "number" and self._tokens[self._at - 2].kind == "command")
