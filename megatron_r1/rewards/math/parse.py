r"""Reads one mathematical answer into a tree: numbers, expressions, tuples, sets, intervals, (in)equalities, matrices, words.

The reader evaluates nothing: `9^{9^{9^9}}` is a small tree. It refuses what it does not understand; it never guesses.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

from megatron_r1.rewards.math.functions import CLOSING, FunctionReader
from megatron_r1.rewards.math.node_makers import is_proper_fraction, joined_sets, numeral, with_sign
from megatron_r1.rewards.math.tokens import LIST_FUNCTIONS, Token, tokenize
from megatron_r1.rewards.math.tree import (
    FLIPPED,
    UNNAMED,
    Apply,
    Dots,
    Group,
    Name,
    Node,
    Number,
    Quantity,
    Relation,
    Unreadable,
    Words,
)
from megatron_r1.rewards.math.units import NotAUnit, split_words

MAX_DEPTH = 24

_SPECIAL_FUNCTIONS = frozenset(["\\zeta", "\\Gamma"])
_SIGNS = {"+", "-", "\\pm", "\\mp"}
_SET_SIGNS = {"\\cup": "union", "\\cap": "intersection", "\\setminus": "difference"}


def parse_answer(text: str) -> Node:
    """The tree of one answer.

    Raises:
        Unreadable: it is not understood.
    """
    reader = _Reader(tokenize(text))
    tree = reader.read_list()
    if reader.peek() is not None:
        raise Unreadable(f"unexpected {reader.peek().text or reader.peek().kind}")
    return tree


class _Reader(FunctionReader):
    """Recursive descent over the tokens; `depth` bounds the recursion."""

    def __init__(self, tokens: list[Token]):
        super().__init__(tokens)
        self._depth = 0
        self._bars = 0  # inside |...|, where a bar closes

    def read_list(self) -> Node:
        """Items separated by commas or connectives."""
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise Unreadable("nested too deep")
        items, separators = [self._read_union()], []
        while self._next_is("separator"):
            separators.append(self._take().text)
            if separators[-1] == "," and self._next_is("separator", "and", "or"):
                separators[-1] = self._take().text
            items.append(self._read_union())
        self._depth -= 1
        if not separators:
            return items[0]
        kind = separators[0] if len(set(separators)) == 1 and separators[0] != "," else "list"
        return Group(kind, tuple(items))

    def _read_union(self) -> Node:
        """Relations joined by signs between sets, the left ones first."""
        value = self._read_relation()
        while self._next_is("op", *_SET_SIGNS):
            kind = _SET_SIGNS[self._take().text]
            more = self._read_relation()
            if isinstance(value, Relation) and value.signs == ("\\in",):
                value = Relation(value.signs, (value.sides[0], joined_sets(kind, value.sides[1], more)))
            else:
                value = joined_sets(kind, value, more)
        return value

    def _read_relation(self) -> Node:
        bare = self._at == 0 and self._next_is("relation", *FLIPPED)
        sides, signs = [UNNAMED if bare else self._read_side()], []
        while self._next_is("relation"):
            signs.append(self._take().text)
            sides.append(self._read_side())
        if self._next_is("mod"):
            is_operator = self._take().text != "class" and not signs
            remainder = (sides[-1], self._read_sum())
            sides[-1] = Apply("mod", remainder) if is_operator else Group("mod", remainder)
        return Relation(tuple(signs), tuple(sides)) if signs else sides[0]

    def _read_side(self) -> Node:
        """A value with its unit, words, a ratio, or an ellipsis alone."""
        if self._next_is("dots"):
            self._take()
            return Dots()
        if self._next_is("word"):
            return Words(self._read_words())
        if letters := self._read_letters():
            return letters
        parts = [self._read_quantity()]
        while self._next_is("op", ":"):
            self._take()
            parts.append(self._read_quantity())
        return parts[0] if len(parts) == 1 else Group("ratio", tuple(parts))

    def _read_letters(self) -> Node | None:
        """Two or more letters that stand alone: a word or the name of a thing as likely as a product."""
        count = 0
        while self._next_is("name", ahead=count) and self.peek(count).text.isalpha() and not (count and self.peek(count).spaced):
            count += 1
        behind = self.peek(count)
        if count < 2 or (behind is not None and behind.kind not in ("separator", "relation", "close")):
            return None
        return Apply("letters", tuple(Name(self._take().text) for _ in range(count)))

    def _read_quantity(self) -> Node:
        unit = ""
        negative = self._next_is("op", "-") and self._next_is("currency", ahead=1)
        if negative or self._next_is("currency"):
            self._at += negative
            unit = self._take().text
        value = self._read_sum()
        if self._next_is("percent"):
            self._take()
            value = Apply("percent", (value,))
        if negative:
            value = Apply("neg", (value,))
        inner = value.args[0] if isinstance(value, Apply) and value.op == "neg" else None
        if isinstance(inner, Apply) and inner.op in ("degree", "base"):
            value = Apply(inner.op, (Apply("neg", (inner.args[0],)), *inner.args[1:]))
        if isinstance(value, Apply) and value.op in ("degree", "percent", "base"):
            value, unit = value.args[0], (value.op if value.op != "base" else f"base {value.args[1].value}")
        if self._next_is("ordinal"):
            self._take()
            return Quantity(value, "ordinal")
        if self._next_is("word"):
            words = self._read_words()
            try:
                factor, named = split_words(f"{'degree ' if unit == 'degree' else ''}{words}")
            except NotAUnit as error:
                raise Unreadable("words that are no unit") from error
            unit = unit if unit == "percent" else named or unit
            value = Apply("mul", (value, Number(Fraction(factor)))) if factor != 1 else value
        elif self._next_is("currency"):
            unit = self._take().text
        return Quantity(value, unit) if unit else value

    def _read_words(self) -> str:
        """Words in a row, with the power of a unit."""
        words = []
        while (token := self.peek()) is not None:
            if token.kind == "word" or (words and token.kind == "name" and token.spaced and len(token.text) == 1):
                words.append(self._take().text)
            elif words and self._next_is("op", "/", "*") and self._next_is_unit(ahead=1):
                words += [self._take().text, self._take().text]
            elif words and self._next_is("op", "^"):
                self._take()
                exponent = self._read_tex_argument()
                negative = isinstance(exponent, Apply) and exponent.op == "neg"
                size = exponent.args[0] if negative else exponent
                if not isinstance(size, Number):
                    raise Unreadable("power of a word")
                words.append(f"^{'-' if negative else ''}{size.value}")
            else:
                break
        return " ".join(words)

    def _next_is_unit(self, ahead: int) -> bool:
        """Whether a word stands there, or a letter that is no product's first: the h of km/h."""
        behind = self.peek(ahead + 1)
        alone = behind is None or behind.kind in ("separator", "close", "op")
        return self._next_is("word", ahead=ahead) or (self._next_is("name", ahead=ahead) and alone)

    def _read_sum(self) -> Node:
        terms = [self._signed(self._read_product)]
        while self._next_is("op", *_SIGNS):
            sign = self._take().text
            terms.append(with_sign(sign, self._signed(self._read_product)))
        return terms[0] if len(terms) == 1 else Apply("add", tuple(terms))

    def _read_product(self) -> Node:
        value = self._read_power()
        while True:
            if self._next_is("op", "*", "/"):
                op = "mul" if self._take().text == "*" else "div"
                value = Apply(op, (value, self._signed(self._read_power)))
            elif self._starts_factor() or self._starts_power(value):
                value = Apply("mul", (value, self._read_power()))
            else:
                return value

    def _starts_power(self, value: Node) -> bool:
        """Whether a number after a power or a factorial starts a factor: `2^3 3^2`, `3!7!`."""
        last = value.args[1] if isinstance(value, Apply) and value.op == "mul" else value
        is_power = isinstance(last, Apply) and last.op in ("pow", "factorial") and self._next_is("number")
        before = self._tokens[self._at - 1]
        return is_power and (self.peek().spaced or before.kind == "close" or before == Token("op", "!"))

    def _read_power(self) -> Node:
        value = self._read_primary()
        while (token := self.peek()) is not None:
            if token.kind == "op" and token.text == "!":
                self._take()
                if self._next_is("op", "!"):
                    raise Unreadable("double factorial")
                value = Apply("factorial", (value,))
            elif token.kind == "op" and token.text == "^":
                self._take()
                exponent = self._read_exponent()
                value = self._read_scale(value) if exponent is None else Apply("pow", (value, exponent))
            elif token.kind == "degree":
                self._take()
                value = self._read_scale(value)
            elif token.kind == "percent" and self.peek(1) is not None and self._next_is("op", ahead=1):
                self._take()
                value = Apply("percent", (value,))
            else:
                break
        return value

    def _read_scale(self, value: Node) -> Node:
        """What stands before a degree sign: an angle, or a temperature if the letter of a scale follows."""
        if self._next_is("name", "C", "F"):
            self._tokens[self._at] = Token("word", self.peek().text)
        return Apply("degree", (value,))

    def _read_exponent(self) -> Node | None:
        """None: the degree sign."""
        if self._next_is("degree"):
            self._take()
            return None
        if self._next_is("open", "{") and self._next_is("degree", ahead=1) and self._next_is("close", "}", ahead=2):
            self._at += 3
            return None
        return self._signed(self._read_power)

    def _read_primary(self) -> Node:
        token = self._take()
        if token.kind == "number":
            return self._read_numeral(token)
        if token.kind == "name":
            return self._read_name(token.text)
        if token.kind == "function":
            return self._read_list_function(token.text) if token.text in LIST_FUNCTIONS else self._read_function(token.text)
        if token.kind == "series":
            return self._read_series(token.text)
        if token.kind == "command":
            return Apply("div" if token.text == "frac" else "binom", (self._read_tex_argument(), self._read_tex_argument()))
        if token.kind == "open":
            return self._read_brackets(token.text)
        if token.kind == "bar" and not self._bars:
            self._bars += 1
            value = self._read_sum()
            self._bars -= 1
            self._expect("bar")
            return Apply("abs", (value,))
        if token.kind == "matrix" and token.text.startswith("begin"):
            return self._read_matrix(token.text.removeprefix("begin "))
        raise Unreadable(f"unexpected {token.text or token.kind}")

    def _read_numeral(self, token: Token) -> Node:
        """A number, a mixed number such as `1 1/2` or `1\\frac12`, or a numeral with its base."""
        value = numeral(token.text)
        if self._next_is("op", "_"):
            self._take()
            base = self._read_tex_argument()
            if not isinstance(base, Number) or "." in token.text:
                raise Unreadable("base of a numeral")
            return Apply("base", (value, base))
        if value.decimals < 0 and self._next_is("command", "frac"):
            start = self._at
            fraction = self._read_primary()
            if is_proper_fraction(fraction):
                return Apply("add", (value, fraction))
            self._at = start
        fraction_follows = self._next_is("number") and self._next_is("op", "/", ahead=1) and self._next_is("number", ahead=2)
        if value.decimals < 0 and fraction_follows:
            numerator, _, denominator = (self._take() for _ in range(3))
            fraction = Apply("div", (numeral(numerator.text), numeral(denominator.text)))
            if numerator.spaced and is_proper_fraction(fraction):
                return Apply("add", (value, fraction))
            raise Unreadable("two numbers in a row")
        return value

    def _read_name(self, name: str) -> Node:
        """A name with its subscript and primes; `f(x)` if one symbol follows in brackets."""
        if self._next_is("op", "_"):
            self._take()
            name += self._read_subscript()
        while self._next_is("prime"):
            self._take()
            name += "'"
        if self._next_is("open", "(") and self._next_is("close", ")", ahead=2) and not self.peek().spaced:
            argument = self._read_primary()
            if name in _SPECIAL_FUNCTIONS and isinstance(argument, Number):
                return Apply(name, (argument,))
            return Apply("call", (Name(name), argument))
        return Name(name)

    def _read_subscript(self) -> str:
        """The text of a subscript: one symbol, or those between braces."""
        token = self._take()
        if token.kind in ("number", "name", "word"):
            return f"_{token.text}"
        texts = []
        while token.kind == "open" and token.text == "{" and not self._next_is("close"):
            texts.append(self._take().text)
        self._expect("close", "}")
        return f"_{''.join(texts)}"

    def _read_brackets(self, opening: str) -> Node:
        bars, self._bars = self._bars, 0
        if self._next_is("close", "\\}") and opening == "\\{":
            self._take()
            return Name("\\emptyset")
        is_nested = opening == "{" and self._next_is("open", "{")
        content = self.read_list()
        self._bars = bars
        closing = self._expect("close").text
        matching = closing == CLOSING.get(opening)
        if isinstance(content, Group) and content.kind == "list":
            if matching or {opening, closing} <= {"(", ")", "[", "]"}:
                return Group("\\{\\}" if opening == "{" else opening + closing, content.items)
        elif matching and (opening == "\\{" or (is_nested and isinstance(content, Group) and content.kind == "\\{\\}")):
            return Group("\\{\\}", (content,))
        elif matching and opening in ("\\lfloor", "\\lceil"):
            return Apply(opening[1:].removeprefix("l"), (content,))
        elif matching:
            return content
        raise Unreadable("brackets")

    def _read_matrix(self, environment: str) -> Node:
        rows: list[list[Node]] = [[self._read_sum()]]
        while not self._next_is("matrix"):
            if self._next_is("cell"):
                self._take()
                rows[-1].append(self._read_sum())
            else:
                self._expect("row")
                if not self._next_is("matrix"):
                    rows.append([self._read_sum()])
        if self._take().text != f"end {environment}" or environment.startswith(("v", "V")):  # |A| is a number
            raise Unreadable("matrix")
        return Group("matrix", tuple(Group("row", tuple(row)) for row in rows))

    def _signed(self, read: Callable[[], Node]) -> Node:
        """One sign at most: `--8` is a slip, not 8."""
        return with_sign(self._take().text, read()) if self._next_is("op", *_SIGNS) else read()

    def _starts_factor(self) -> bool:
        """Whether a factor follows without a sign. Two numbers in a row are no product."""
        token = self.peek()
        if token is None:
            return False
        if token.kind == "bar":
            return not self._bars
        return token.kind in ("name", "function", "series", "command", "open", "matrix") and not token.text.startswith("end")
