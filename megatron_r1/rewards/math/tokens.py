r"""Tokens of one mathematical answer, written in LaTeX or as plain text.

The text is short (`MAX_CHARACTERS`) and every pattern is tried once per position, so reading costs little whatever the text is.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from megatron_r1.rewards.math.tree import Unreadable
from megatron_r1.rewards.math.units import ORDINALS, SHORT_UNITS, names_a_unit, unit_of_letter

MAX_CHARACTERS = 1000
MAX_TOKENS = 400
_WORD = 4  #: letters in a row that are a word, not a product; behind a number one letter less will do


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


FUNCTIONS = _names(
    "sin cos tan cot sec csc sinh cosh tanh arcsin arccos arctan arccot arcsec arccsc ln log lg exp sqrt cbrt abs floor ceil "
    "cis gcd lcm max min"
)
LIST_FUNCTIONS = _names("gcd lcm max min")
CONSTANTS = {"pi": "\\pi", "infinity": "\\infty", "infty": "\\infty", "inf": "\\infty", "oo": "\\infty"}
_GREEK = _names(
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi rho sigma tau upsilon phi varphi "
    "chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi Psi Omega ell emptyset varnothing"
)
_TEXT = _names("text textbf textit textrm textnormal texttt textsf mathrm mathbf mathit mathsf mbox hbox operatorname")
_IGNORED = _names("left right big Big bigl bigr Bigl Bigr bigg biggl biggr displaystyle textstyle limits quad qquad thinspace")
_COMMANDS = {
    "cdot": ("op", "*"),
    "times": ("op", "*"),
    "ast": ("op", "*"),
    "div": ("op", "/"),
    "sum": ("series", "sum"),
    "prod": ("series", "prod"),
    "pm": ("op", "\\pm"),
    "mp": ("op", "\\mp"),
    "lt": ("relation", "<"),
    "gt": ("relation", ">"),
    "le": ("relation", "<="),
    "leq": ("relation", "<="),
    "leqslant": ("relation", "<="),
    "ge": ("relation", ">="),
    "geq": ("relation", ">="),
    "geqslant": ("relation", ">="),
    "ne": ("relation", "!="),
    "neq": ("relation", "!="),
    "in": ("relation", "\\in"),
    "cup": ("op", "\\cup"),
    "cap": ("op", "\\cap"),
    "setminus": ("op", "\\setminus"),
    "backslash": ("op", "\\setminus"),
    "smallsetminus": ("op", "\\setminus"),
    "equiv": ("relation", "\\equiv"),
    "mod": ("mod", ""),
    "pmod": ("mod", "class"),
    "prime": ("prime", ""),
    "vee": ("separator", "or"),
    "wedge": ("separator", "and"),
    "colon": ("op", ":"),
    "circ": ("degree", ""),
    "degree": ("degree", ""),
    "lbrace": ("open", "\\{"),
    "rbrace": ("close", "\\}"),
    "lbrack": ("open", "["),
    "rbrack": ("close", "]"),
    "lvert": ("bar", "|"),
    "rvert": ("bar", "|"),
    "vert": ("bar", "|"),
    "langle": ("open", "("),
    "rangle": ("close", ")"),
    "lfloor": ("open", "\\lfloor"),
    "rfloor": ("close", "\\rfloor"),
    "lceil": ("open", "\\lceil"),
    "rceil": ("close", "\\rceil"),
    "frac": ("command", "frac"),
    "dfrac": ("command", "frac"),
    "tfrac": ("command", "frac"),
    "cfrac": ("command", "frac"),
    "binom": ("command", "binom"),
    "dbinom": ("command", "binom"),
    "tbinom": ("command", "binom"),
    "infty": ("name", "\\infty"),
    "pi": ("name", "\\pi"),
    "imath": ("name", "i"),
    "land": ("separator", "and"),
    "lor": ("separator", "or"),
    "pounds": ("currency", "pound sterling"),
    "euro": ("currency", "euro"),
}
_SYMBOLS = {
    "**": ("op", "^"), "<=": ("relation", "<="), ">=": ("relation", ">="), "!=": ("relation", "!="),
    "\\{": ("open", "\\{"), "\\}": ("close", "\\}"), "\\%": ("percent", ""), "\\$": ("currency", "dollar"), "\\\\": ("row", ""),
    "\\|": ("norm", ""),
    "+": ("op", "+"), "-": ("op", "-"), "*": ("op", "*"), "/": ("op", "/"), "^": ("op", "^"), "_": ("op", "_"), "!": ("op", "!"),
    ":": ("op", ":"), "(": ("open", "("), ")": ("close", ")"), "[": ("open", "["), "]": ("close", "]"), "{": ("open", "{"),
    "}": ("close", "}"), "|": ("bar", "|"), ",": ("separator", ","), ";": ("separator", ","), "=": ("relation", "="),
    "<": ("relation", "<"), ">": ("relation", ">"), "&": ("cell", ""), "%": ("percent", ""), "$": ("currency", "dollar"),
    "\u20ac": ("currency", "euro"), "\u00a3": ("currency", "pound sterling"), "\u00a5": ("currency", "yen sign"),
    "\u20b9": ("currency", "rupee"),
    "\u00a2": ("currency", "cent"), "'": ("prime", ""),
}  # fmt: skip

_BEFORE_UNITS = _names("number close word percent currency degree op")

_SPACE = re.compile(r"(?:\s|\\[,;:! ()\[\]]|~)+")  # also the delimiters of a formula
_SPACE_COMMAND = re.compile(r"\\[,;: ]|~|\\(?:cdot|times)(?![A-Za-z])")
_DOTS = re.compile(r"\.\.\.+|\u2026|\\(?:l|c|d|v)?dots(?:b|c|i|m|o)?(?![A-Za-z])")
_REPEATING = re.compile(r"([0-9]*)\.([0-9]*)\\overline\{([0-9]+)\}")
_SCIENTIFIC = re.compile(r"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)[eE][+-]?[0-9]{1,2}(?![0-9A-Za-z_.])")
_LATEX_THOUSANDS = re.compile(r"[0-9]{1,3}(?:(?:\{,\}|,\\!|\\,)[0-9]{3})+(?![0-9])(?:\.[0-9]+)?")
_THOUSANDS = re.compile(r"[0-9]{1,3}(?:,[0-9]{3})+(?!,?[0-9])(?:\.[0-9]+)?")
_PLAIN = re.compile(r"[0-9]+(?:\.(?!\.)[0-9]*)?|\.[0-9]+")
_LETTERS = re.compile(r"[A-Za-z]+")
_IDEOGRAPHS = re.compile("[\u4e00-\u9fff]+")
_COMMAND = re.compile(r"\\([A-Za-z]+)\*?")
_BRACED = re.compile(r"\s*\{([^{}]*)\}")


class Token(NamedTuple):
    """One token: `spaced` says whether a space stands before it."""

    #: number name function op relation separator open close bar command word dots degree percent currency matrix cell row prime mod
    #: ordinal series norm
    kind: str
    text: str
    spaced: bool = False


def tokenize(text: str) -> list[Token]:
    """The tokens of an answer.

    Raises:
        Unreadable: too long, or something in it is unknown.
    """
    if len(text) > MAX_CHARACTERS:
        raise Unreadable("too long")
    tokens: list[Token] = []
    at, depth, spaced = 0, 0, False
    while at < len(text):
        character = text[at]
        if (character.isspace() or character in "\\~") and (blank := _SPACE.match(text, at)):
            at, spaced = blank.end(), True
            continue
        number = _read_number(text, at, inside=depth > 0) if character in "0123456789." else None
        new, at = number or _read_rest(text, at, tokens, spaced)
        if new:
            tokens += [new[0]._replace(spaced=True), *new[1:]] if spaced else new
            depth += (new[0].kind == "open") - (new[0].kind == "close")
            spaced = False
        if len(tokens) > MAX_TOKENS:
            raise Unreadable("too many symbols")
    return _with_quotients_of_units(tokens)


def _with_quotients_of_units(tokens: list[Token]) -> list[Token]:
    """The letters of `9.8 m/s^2` and `5 g/cm^3` as words: behind a number and a space they are units."""
    for at in range(len(tokens) - 3):
        number, above, slash, below = tokens[at : at + 4]
        is_number = number.kind == "number" or (number.text == "}" and _is_power_of_ten(tokens[max(at - 5, 0) : at]))
        is_quotient = is_number and above.kind == "name" and above.spaced and slash.text == "/"
        if is_quotient and unit_of_letter(above.text) and (below.kind == "word" or unit_of_letter(below.text)):
            tokens[at + 1], tokens[at + 3] = above._replace(kind="word"), below._replace(kind="word")
    return tokens


def _is_power_of_ten(tokens: list[Token]) -> bool:
    """Whether tokens end in `10^{8` or `10^{-8`."""
    texts = [token.text for token in tokens if token.text != "-"]
    return texts[-4:-1] == ["10", "^", "{"] and tokens[-1].kind == "number"


def _read_number(text: str, at: int, inside: bool) -> tuple[list[Token], int] | None:
    """A comma between groups of three is a thousands separator, but within brackets (1,234) is a pair."""
    if "overline" in text and (repeating := _REPEATING.match(text, at)):
        return [Token("number", "".join((repeating[1] or "0", ".", repeating[2], "~", repeating[3])))], repeating.end()
    patterns = [_SCIENTIFIC, _LATEX_THOUSANDS, _PLAIN] if inside else [_SCIENTIFIC, _LATEX_THOUSANDS, _THOUSANDS, _PLAIN]
    for pattern in patterns:
        found = pattern.match(text, at)
        if found:
            return [Token("number", re.sub(r"[^0-9.eE+-]", "", found[0]))], found.end()
    return None


def _read_rest(text: str, at: int, before: list[Token], spaced: bool) -> tuple[list[Token], int]:
    dots = _DOTS.match(text, at) if text[at] in ".\\\u2026" else None
    if dots:
        return [Token("dots", "")], dots.end()
    letters = _LETTERS.match(text, at)
    if letters:
        return _read_letters(letters[0], before, spaced), letters.end()
    ideographs = _IDEOGRAPHS.match(text, at)
    if ideographs:
        return [Token("word", ideographs[0])], ideographs.end()
    command = _COMMAND.match(text, at)
    if command:
        return _read_command(text, command, before)
    for length in (2, 1):
        if text[at : at + length] in _SYMBOLS:
            return [Token(*_SYMBOLS[text[at : at + length]])], at + length
    raise Unreadable(f"unknown symbol {text[at]!a}")


def _read_letters(letters: str, before: list[Token], spaced: bool) -> list[Token]:
    """A function, a constant, a word, or the product of one-letter names."""
    if letters.lower() in ("and", "or"):
        return [Token("separator", letters.lower())]
    if letters in FUNCTIONS and not (letters == "min" and before and before[-1].kind in _BEFORE_UNITS):
        return [Token("function", letters)]
    if letters in CONSTANTS:
        return [Token("name", CONSTANTS[letters])]
    last = before[-1].kind if before else ""
    if letters in _GREEK and len(letters) >= _WORD and last != "word":
        return [Token("name", f"\\{letters}")]
    if last in ("number", "close", "command") and letters in ORDINALS and not spaced:
        return [Token("ordinal", letters)]
    after_value = last in ("number", "close", "percent", "currency", "degree")
    per_unit = last == "op" and before[-1].text == "/" and len(before) > 2 and before[-2].kind in ("word", "name")
    per_unit = per_unit and (before[-2].kind == "word" or (before[-2].spaced and before[-3].kind == "number"))
    is_short = letters in SHORT_UNITS and len(letters) > 1
    if (is_short and (after_value or last == "word" or per_unit)) or (per_unit and len(letters) >= _WORD and names_a_unit(letters)):
        return [Token("word", letters)]
    if after_value and (len(letters) >= _WORD + 1 or (spaced and len(letters) >= _WORD - 1)):
        return [Token("word", letters)]
    if len(letters) > 1 and (last == "word" or (len(letters) >= _WORD and (spaced or not before))):
        return [Token("word", letters)]
    return [Token("name", letter) for letter in letters]


def _read_command(text: str, command: re.Match[str], before: list[Token]) -> tuple[list[Token], int]:
    name = command[1]
    if name in _IGNORED:
        return [], command.end()
    if name in _COMMANDS:
        return [Token(*_COMMANDS[name])], command.end()
    if name in FUNCTIONS:
        return [Token("function", name)], command.end()
    if name in _GREEK:
        return [Token("name", "\\emptyset" if name == "varnothing" else f"\\{name}")], command.end()
    braced = _BRACED.match(text, command.end())
    if braced and name in _TEXT:
        return _read_text(braced[1].strip(), before), braced.end()
    if braced and name in ("mathbb", "mathcal", "vec", "overline", "overrightarrow", "hat", "bar"):
        return [Token("name", f"\\{name}{{{braced[1].strip()}}}")], braced.end()
    if braced and name in ("begin", "end") and braced[1].strip("*bpvBV") in ("matrix", "smallmatrix"):
        return [Token("matrix", f"{name} {braced[1]}")], braced.end()
    raise Unreadable(f"unknown command \\{name}")


def _read_text(content: str, before: list[Token]) -> list[Token]:
    r"""What \text{} and its like hold: a connective, a function, a single name, or words."""
    word = content.strip(" ,")
    if word.lower() in ("and", "or"):
        return [Token("separator", word.lower())]
    if word in FUNCTIONS and not (word == "min" and before and before[-1].kind in _BEFORE_UNITS):
        return [Token("function", word)]
    if len(word) == 1 and word.isascii() and word.isalpha():
        is_unit = bool(before) and before[-1].kind in ("number", "close") and unit_of_letter(word) is not None
        return [Token("word", word) if is_unit or content != word else Token("name", word)]
    content = " ".join(_SPACE_COMMAND.sub(" ", content).split())
    return [Token("word", content)] if content else []


class TokenCursor:
    """A place in a list of tokens."""

    def __init__(self, tokens: list[Token]):
        self._tokens = tokens
        self._at = 0

    def peek(self, ahead: int = 0) -> Token | None:
        """The next token but `ahead`, None past the end."""
        return self._tokens[self._at + ahead] if self._at + ahead < len(self._tokens) else None

    def _take(self) -> Token:
        token = self.peek()
        if token is None:
            raise Unreadable("unfinished")
        self._at += 1
        return token

    def _expect(self, kind: str, *texts: str) -> Token:
        if not self._next_is(kind, *texts):
            raise Unreadable(f"no {texts[0] if texts else kind} where one belongs")
        return self._take()

    def _next_is(self, kind: str, *texts: str, ahead: int = 0) -> bool:
        token = self.peek(ahead)
        return token is not None and token.kind == kind and (not texts or token.text in texts)
