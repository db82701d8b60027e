r"""One spelling for what LaTeX, Unicode and other languages write in many ways; nothing is read or computed here.

Bold, colour and frames go, `{1 \over 2}` becomes `\frac{1}{2}`, a full-width 8 becomes 8, a superscript becomes a power, groups of
three digits are joined. Every step is linear in the length of the text, which its caller bounds.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable
from functools import lru_cache

_MAX_STYLES = 40  #: commands that are unwrapped; a text with more keeps the rest
_GREEK = {  # but for \pi and the letters that look Latin
    "α": "alpha", "β": "beta", "γ": "gamma", "δ": "delta", "ε": "epsilon", "ζ": "zeta", "η": "eta", "θ": "theta", "ι": "iota",
    "κ": "kappa", "λ": "lambda", "μ": "mu", "ν": "nu", "ξ": "xi", "ρ": "rho", "σ": "sigma", "τ": "tau", "υ": "upsilon",
    "φ": "phi", "ϕ": "phi", "χ": "chi", "ψ": "psi", "ω": "omega", "Γ": "Gamma", "Δ": "Delta", "Θ": "Theta", "Λ": "Lambda",
    "Ξ": "Xi", "Π": "Pi", "Σ": "Sigma", "Φ": "Phi", "Ψ": "Psi", "Ω": "Omega", "π": "pi",
}  # fmt: skip
_SYMBOLS = {
    "−": "-", "–": "-", "—": "-", "×": "*", "·": "*", "⋅": "*", "∗": "*", "÷": "/", "∕": "/", "⁄": "/", "±": "\\pm ",
    "∓": "\\mp ", "≤": "<=", "≥": ">=", "⩽": "<=", "⩾": ">=", "≦": "<=", "≧": ">=", "≠": "!=", "∈": "\\in ", "∪": "\\cup ",
    "∩": "\\cap ", "∖": "\\setminus ", "√": "\\sqrt ", "∛": "\\cbrt ", "∞": "\\infty ", "°": "^\\circ ",
    "∘": "^\\circ ",
    "º": "^\\circ ",
    "˚": "^\\circ ",
    "∅": "\\emptyset ", "ℝ": "\\mathbb{R}", "ℤ": "\\mathbb{Z}", "ℕ": "\\mathbb{N}", "≈": "\\approx ", "≡": "\\equiv ",
    "∣": "|", "∠": "\\angle ", "△": "\\triangle ", "⌊": "\\lfloor ", "⌋": "\\rfloor ", "⌈": "\\lceil ", "⌉": "\\rceil ",
    "∧": "\\land ", "∨": "\\lor ", "′": "'", "’": "'", "‘": "'", "“": '"', "”": '"', "…": "\\ldots ", "⋯": "\\cdots ",
    "，": ",", "、": ",", "；": ";", "：": ":", "∶": ":", "。": ".", "．": ".", "％": "%", "￥": "¥", "￡": "£",
    "℃": "^\\circ\\text{C}",
    "℉": "^\\circ\\text{F}", "\u2061": "", "\u2062": "", "\u200b": "", "\ufeff": "", "\u00a0": " ", "\u2009": " ",
    "\u202f": " ", "\u3000": " ", "【": "[", "】": "]", "〔": "[", "〕": "]",
}  # fmt: skip
_FULL_WIDTH = {chr(code): chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}
_TABLE = str.maketrans(_FULL_WIDTH | _SYMBOLS | {letter: f"\\{name} " for letter, name in _GREEK.items()})

_RAISED = {unicodedata.normalize("NFKC", sign).replace("−", "-"): sign for sign in "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿ"}
_LOWERED = {unicodedata.normalize("NFKC", sign).replace("−", "-"): sign for sign in "₀₁₂₃₄₅₆₇₈₉₊₋ₙₓ"}
_UP = str.maketrans({sign: plain for plain, sign in _RAISED.items()})
_DOWN = str.maketrans({sign: plain for plain, sign in _LOWERED.items()})
_MICRO = re.compile(r"[\u00b5\u03bc](m|A|s|F|C|g|L|mol)(?![A-Za-z])")
_RAISED_RUN = re.compile(f"[{''.join(_RAISED.values())}]+")
_LOWERED_RUN = re.compile(f"[{''.join(_LOWERED.values())}]+")
_VULGAR = re.compile("[¼½¾⅐⅑⅒⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞]")

#: the words for "or" and "and" between answers, as a whole \text{} or beside Chinese and Japanese characters
_CONNECTIVES = {"或": "or", "或者": "or", "または": "or", "和": "and", "与": "and", "且": "and", "及": "and", "以及": "and",
                "ou": "or", "oder": "or", "или": "or", "et": "and", "und": "and"}  # fmt: skip
_BARE_CONNECTIVE = re.compile("或者|或|または|以及|和|与|且|及")
_TEXT_CONNECTIVE = re.compile(r"\\(?:text|mathrm|mbox|textrm)\s*\{\s*(\w+)\s*\}")

_STYLES = frozenset(
    [
        "mathbf",
        "boldsymbol",
        "bm",
        "bold",
        "pmb",
        "fbox",
        "framebox",
        "boxed",
        "underline",
        "mathit",
        "mathsf",
        "mathtt",
        "ensuremath",
    ]
)
_TEXTS = frozenset(
    ["text", "textbf", "textit", "textrm", "textnormal", "texttt", "textsf", "mathrm", "mbox", "hbox", "emph", "textup"]
)
_PAINTS = {"color": 1, "textcolor": 1, "colorbox": 1, "fcolorbox": 2}  #: groups before the one that is shown
_DECLARATIONS = (
    "bf|it|sf|tt|em|bfseries|boldmath|tiny|small|normalsize|large|Large|LARGE|huge|Huge|displaystyle|textstyle|scriptstyle"
)
_DECLARATION = re.compile(rf"\\(?:{_DECLARATIONS})(?![A-Za-z])\s*")
_ROMAN = re.compile(r"\{\s*\\rm(?![A-Za-z])\s*([^{}]*)\}|\\rm\s*\{([^{}]*)\}")
_STYLE = re.compile(rf"\\({'|'.join(sorted(_STYLES | _TEXTS | set(_PAINTS), key=len, reverse=True))})(?![A-Za-z])\s*(?=\{{)")

_GAP = r"(?: |_|'|\\,|\\ |\\;|\\:|~|\{,\}|\{ \})"
_GROUPS = re.compile(rf"(?<![0-9.,_^])(?<![0-9] )([1-9][0-9]{{0,2}}(?:{_GAP}[0-9]{{3}})+)(?![0-9/]|{_GAP}[0-9]|,[0-9])")
_TIGHT_COMMA = re.compile(r"(?<=[0-9]),\s*\\!\s*(?=[0-9]{3})|(?<=[0-9])\\!\s*,\s*(?=[0-9]{3})")
#: no pair has 000 as a member
_BRACKETED = re.compile(r"\(([1-9][0-9]{0,2}(?:,[0-9]{3}){0,4},000(?:,[0-9]{3}){0,4})\)")
_OVER = re.compile(r"\\(over|choose)(?![A-Za-z])")
_FRACTION = re.compile(r"\\(?:sfrac|nicefrac|flatfrac|xfrac)(?![A-Za-z])")
_UNIT_FRACTION = re.compile(
    r"(?<=[0-9}\s,;~])\\[dt]?frac\s*\{\s*\\(?:text|mathrm|textrm)\s*\{\s*([^{}]*)\}\s*\}"
    r"\s*\{\s*\\(?:text|mathrm|textrm)\s*\{\s*([^{}]*)\}(\s*\^\s*\{?[23]\}?)?\s*\}"
)
_COMMAND_NAME = re.compile(r"\\[A-Za-z]+")
_MAPPING = re.compile(r"(?:([a-zA-Z])\s*:\s*)?([a-z])\s*\\(?:mapsto|longmapsto)(?![A-Za-z])")
_NAMES_OF_FACTORS = {"GCD": "gcd", "HCF": "gcd", "hcf": "gcd", "LCM": "lcm"}
_BOLD = r"\\(?:mathbf|vec|boldsymbol|bm|hat)\s*"
_BARE_UNIT_VECTOR = re.compile(r"\\(mathbf|boldsymbol|bm|vec|hat)\s+\\?([ijk])(?:math)?(?![A-Za-z])")
_UNIT_VECTOR = re.compile(rf"{_BOLD}\{{\s*(?:{_BOLD}\{{)?\s*\\?([ijk])(?:math)?\s*\}}{{1,2}}")
_UNIT_QUOTIENT = re.compile(
    r"\\[dt]?frac\s*\{\s*(-?[0-9.]+)\s*\\(?:text|mathrm|textrm)\s*\{\s*([^{}]*)\}\s*\}"
    r"\s*\{\s*\\(?:text|mathrm|textrm)\s*\{\s*([^{}]*)\}\s*\}"
)
_MODULUS = re.compile(
    r"\\pmod\s*(?:\{([^{}]*)\}|([0-9A-Za-z]))|\(\s*(?:\\bmod|\\mod|\\text\{\s*mod\s*\}|\\mathrm\{mod\}|mod)(?![A-Za-z])\s*([^()]*)\)"
)
_BARE_MODULUS = re.compile(r"(?:\\bmod|\\text\{\s*mod\s*\}|\\mathrm\{mod\}|(?<![A-Za-z\\])mod)(?![A-Za-z])")
_UNION_LETTER = re.compile(r"(?<=[)\]}])\s*U\s*(?=[(\[\\])")
_OPEN_LEFT = re.compile(r"(^|\\cup|\\in)\s*\](\s*[^\[\](){};,]+[;,][^\[\](){};,]+)([\[\]])")
_OPEN_RIGHT = re.compile(r"(^|\\cup|\\in)\s*\[(\s*[^\[\](){};,]+[;,][^\[\](){};,]+)\[")
_BUILDER = re.compile(
    r"\\?\{\s*([a-zA-Z])\s*(?:\\in\s*(?:\\mathbb\s*\{?\s*([RZ])\s*\}?|([RZ]))\s*)?(?:\\[,;: ]\s*)*"
    r"(?:\\mid|\\vert|\||:|\\colon|\\big\|)(?:\\[,;: ]|\s)*(?!\s)(.+?)\\?\}"
)
_SIZES = re.compile(r"\\(?:left|right)\s*\.|\\(?:left|right|middle|[Bb]igg?[lrm]?)(?![A-Za-z])")
_STYLED_SYMBOL = re.compile(r"\\(?:mathbf|boldsymbol|bm|mathit|mathsf)\s+(?=[0-9A-Za-z])")
_PHANTOM = re.compile(r"\\[hv]?phantom\s*(?:\{[^{}]*\}|[^\s\\{}])")
_FIELD = re.compile(r"\\mathbb\s*([A-Z])(?![A-Za-z])")
_TWICE_ESCAPED = re.compile(
    r"\\\\(?=(?:[dt]?frac|left|right|sqrt|pi|cdot|times|infty|text|mathrm|mathbb|cup|cap|circ|pm|leq?|geq?|neq?|in|sin|cos|tan|log|ln)"
    r"(?![a-z]))"
)
_SYSTEM = re.compile(
    r"(?:\\left\s*)?(?:\\\{|\\lbrace)?\s*\\begin\{(cases|array|aligned|gathered)\}(?:\s*\{[lcr| ]*\})?(.*)\\end\{\1\}"
    r"(?:\s*\\right\s*\.?)?"
)
_MATRIX = re.compile(r"[(\[]\s*\\begin\{array\}\s*\{[lcr ]*\}(.*?)\\end\{array\}\s*[)\]]")
_RELATION = re.compile(r"[=<>]|\\[lg]eq?(?![a-z])")
_SHORTENED = re.compile(r"(?<=[0-9}\s{])(sq|cu|ft|in|hrs?|min|sec|lbs?|oz|yd|mi|cm|km|mm|pct|deg|gal)\.(?![0-9])")
_ORDINAL = re.compile(
    r"(?<=[0-9])\s*(?:\^?\s*\{?\s*\\(?:text|mathrm|textrm)\s*\{\s*(st|nd|rd|th)\s*\}\s*\}?|\^\s*\{\s*(st|nd|rd|th)\s*\})"
)
_WITHOUT = re.compile(r"(\\mathbb\{[RZ]\})\s*-\s*(?=\\\{)")
_DOTTED = re.compile(r"(?<=\.)([0-9]*)\\dot\s*\{?([0-9])\}?(?:([0-9]*)\\dot\s*\{?([0-9])\}?)?(?![0-9])")
_NUMBER_IN_TEXT = re.compile(r"\\text\s*\{\s*([0-9][^{}]*)\}")
_LETTERS_IN_TEXT = re.compile(r"\\text\s*\{\s*([A-Z](?:(?:,| and|, and| or) ?[A-Z])+)\s*\}")
_BASES = {"two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10",
          "eleven": "11", "twelve": "12", "sixteen": "16"}  # fmt: skip
_HALF_OF = re.compile(r"^(?i:(?:one[ -])?half) of (?=the |an? )")
_OF_A_WHOLE = re.compile(r"(?<=[0-9}%]) (of (?:the|an?|his|her|their|my|all) [a-z]{2,20}(?: [a-z]{2,20}){0,2})$")
_BASE_IN_WORDS = re.compile(r"(?<=[0-9A-F}])_\s*\{?\s*(?:\\(?:text|mathrm)\s*\{)?\s*([a-z]{3,8})\s*\}{0,2}$")
_OF_REALS = re.compile(
    r"(?i)(?:the set of |set of )?(?:all )?(?:the )?real(?: number)?s(?: x)?(?: (?:except|except for|but|other than) (.+))?"
)
_UNITED_STATES = re.compile(r"(?<=[0-9] )U\.?S\.? (?=dollars?\b)|\bUS(?=\\?\$)")
_CURRENCY_CODE = re.compile(r"^(USD|EUR|GBP|CNY|RMB|INR|JPY|Rs\.?)\s*([0-9][0-9.,]*)$")
_CURRENCY_CODES = {"Rs": "INR", "Rs.": "INR"}
_PLAIN = re.compile(r"[-+]?[0-9]+(?:\.[0-9]+)?")
_STARS = re.compile(r"(\*\*|__|`|\*)([^*`]+)\1|<(b|strong|i|em|u)>([^<>]+)</\3>")
_WORDS_IN_TEXT = re.compile(rf"\\(?:{'|'.join(sorted(_TEXTS))}|operatorname)\s*\{{([^{{}}]*)\}}")
_BLANK = re.compile(r"\\[ ,;:]|~|\\q?quad(?![A-Za-z])")
_BEFORE_STOP = re.compile(r" ([,.;:!?])")


_COMMANDS_FIRST = (
    ("U", _UNITED_STATES, ""),
    ("", _CURRENCY_CODE, lambda found: f"{found[2]} \\text{{{_CURRENCY_CODES.get(found[1], found[1])}}}"),
    (".", _SHORTENED, r"\1"),
    ("\\mu", re.compile(r"\\mu\s*\\(?:text|mathrm)\s*\{\s*([A-Za-z]{1,3})\s*\}"), r"\\text{\\mu \1}"),
    ("_", re.compile(r"\\(?:text|mathrm)\s*\{\s*([0-9A-F]{1,30})\s*\}(?=\s*_)"), r"\1"),
    (")_", re.compile(r"\(([0-9A-F]{1,60})\)(?=_\s*\{?[0-9]{1,2}\}?$)"), r"\1"),
    ("mathcal", re.compile(r"\\mathcal\s*\{?\s*O\s*\}?(?=\s*(?:\\left)?\()"), "O"),
    ("ert", re.compile(r"\\[lr]?Vert(?![A-Za-z])"), r"\\|"),
    ("(", re.compile(r"(?<![A-Za-z])(GCD|HCF|hcf|LCM)(?= ?\()"), lambda found: _NAMES_OF_FACTORS[found[1]]),
    ("mapsto", _MAPPING, lambda found: f"{found[1] or 'f'}({found[2]})="),
    ("rm{", re.compile(r"(?<=\^)\{(-?[0-9])\}(?=[^{}]*\})"), r"\1"),
    ("phantom", _PHANTOM, ""),
    ("\\", _SIZES, ""),
    ("mathbb", _FIELD, r"\\mathbb{\1}"),
    ("dots", re.compile(r"\\dots"), r"\\ldots"),
    ("\\dot", _DOTTED, r"\1\\overline{\2\3\4}"),
    ("mathbb", _WITHOUT, r"\1\\setminus"),
)
_STYLES_FIRST = (
    ("\\rm", _ROMAN, lambda found: f"\\mathrm{{{found[1] or found[2]}}}"),
    ("{", _ORDINAL, lambda found: found[1] or found[2]),
    ("\\", _DECLARATION, ""),
    ("\\", _STYLED_SYMBOL, ""),
)
_NUMBERS_FIRST = (
    (",", _TIGHT_COMMA, ""),
    ("\\!", re.compile(r"\\!"), ""),
    ("000", _BRACKETED, lambda found: found[1].replace(",", "")),
    ("", _GROUPS, lambda found: re.sub(r"[^0-9]", "", found[1])),
    ("frac", _FRACTION, r"\\frac"),
    ("frac", _UNIT_QUOTIENT, r"\1 \\text{\2/\3}"),
    ("frac", _UNIT_FRACTION, lambda found: f"\\text{{ {found[1]}/{found[2]}}}{found[3] or ''}"),
)
_FORMULAS_FIRST = (
    ("mod", _MODULUS, lambda found: f"\\pmod {{{(found[1] or found[2] or found[3] or '').strip()}}}"),
    ("mod", _BARE_MODULUS, r"\\mod "),
    ("{array}", _MATRIX, r"\\begin{pmatrix}\1\\end{pmatrix}"),
    ("U", _UNION_LETTER, r"\\cup "),
    ("]", _OPEN_LEFT, lambda found: f"{found[1]} ({found[2]}{')' if found[3] == '[' else ']'}"),
    ("[", _OPEN_RIGHT, r"\1 [\2)"),
)


@lru_cache(maxsize=4096)
def respell(text: str) -> str:
    """The text in one spelling: shorter, equal in meaning, possibly empty."""
    if _PLAIN.fullmatch(text):
        return text
    text = _without_unicode(text)
    if "\\\\" in text and "\\begin" not in text:
        text = _TWICE_ESCAPED.sub(r"\\", text)  # as JSON that was written twice has it
    if "j" in text:
        text = _BARE_UNIT_VECTOR.sub(r"\\\1{\2}", text)
    if "j" in text and len(set(_UNIT_VECTOR.findall(text))) > 1:  # alone a bold i is as likely a number
        text = _UNIT_VECTOR.sub(r"\\hat{\1}", text)
    text = _replaced(text, _COMMANDS_FIRST)
    text = _without_styles(_replaced(text, _STYLES_FIRST))
    text = _with_fractions(_replaced(text, _NUMBERS_FIRST))
    text = _replaced(text, _FORMULAS_FIRST)
    text = " ".join(text.split()).removesuffix("\\").removesuffix("\\").strip()
    system = _SYSTEM.fullmatch(text) if "\\begin" in text else None
    if system and all(map(_RELATION.search, rows := [row for row in system[2].split("\\\\") if row.strip()])):
        text = " and ".join(row.replace("&", " ").strip(" ,;.") for row in rows)
    if "\\text" in text:
        if numbered := _NUMBER_IN_TEXT.fullmatch(text):
            text = numbered[1].strip()
        if lettered := _LETTERS_IN_TEXT.fullmatch(text):
            return lettered[1]
    text = _OF_A_WHOLE.sub(r" \\text{\1}", _HALF_OF.sub("1/2 of ", text)) if " of " in text else text
    text = _BASE_IN_WORDS.sub(lambda found: f"_{{{_BASES[found[1]]}}}" if found[1] in _BASES else found[0], text)
    if starred := _STARS.fullmatch(text):
        text = (starred[2] or starred[4]).strip()
    if (builder := _BUILDER.fullmatch(text)) and builder[1] in _COMMAND_NAME.sub("", builder[4]):
        condition = _described(builder[4].strip())
        text = f"\\mathbb{{Z}}\\cap ({condition})" if "Z" in (builder[2], builder[3]) else condition
    reals = _OF_REALS.fullmatch(plain_words(text)) if "real" in text.lower() else None
    if reals:
        without = re.sub(r"\b[a-z] ?= ?", "", reals[1] or "")
        text = "\\mathbb{R}" + (f"\\setminus\\{{{without}\\}}" if without else "")
    return text


@lru_cache(maxsize=1024)
def plain_words(text: str) -> str:
    r"""A phrase without \text{} and its like, spaced once: `\text{Row 3}` is `Row 3`."""
    if "\\" in text or "~" in text:
        text = _BLANK.sub(" ", _WORDS_IN_TEXT.sub(r" \1 ", text))
    return _BEFORE_STOP.sub(r"\1", " ".join(text.split())).strip(" .")


def _replaced(text: str, steps: Iterable[tuple[str, re.Pattern, str | Callable]]) -> str:
    """The text after the steps whose needle stands in it: (needle, pattern, replacement)."""
    for needle, pattern, replacement in steps:
        if needle in text:
            text = pattern.sub(replacement, text)
    return text


def _described(condition: str) -> str:
    r"""The members of `\{x : condition\}`; those that solve an equation are all real numbers but those that do not."""
    if condition.count("=") == 1 and not re.search(
        r"[<>!,]|\\(?:ne|neq|le|leq|ge|geq|in|and|or|equiv|text)(?![A-Za-z])", condition
    ):
        return f"\\mathbb{{R}}\\setminus ({condition.replace('=', chr(92) + 'ne ')})"
    return condition


def _without_unicode(text: str) -> str:
    if not text.isascii():
        text = _BARE_CONNECTIVE.sub(lambda found: f" {_CONNECTIVES[found[0]]} ", text)
        text = _VULGAR.sub(_vulgar_fraction, text)
        text = _RAISED_RUN.sub(lambda found: f"^{{{found[0].translate(_UP)}}}", text)
        text = _MICRO.sub(r"\\text{\\mu \1}", text)
        text = _LOWERED_RUN.sub(lambda found: f"_{{{found[0].translate(_DOWN)}}}", text)
        text = text.translate(_TABLE)
    return _TEXT_CONNECTIVE.sub(lambda found: f" {_CONNECTIVES[found[1]]} " if found[1] in _CONNECTIVES else found[0], text)


def _vulgar_fraction(found: re.Match[str]) -> str:
    above, _, below = unicodedata.normalize("NFKC", found[0]).partition("⁄")
    return f"\\frac{{{above}}}{{{below}}}"


def _without_styles(text: str) -> str:
    """Without bold, colour and frames; \text{} stays around letters only."""
    at = 0
    for _ in range(_MAX_STYLES):
        found = _STYLE.search(text, at)
        if found is None:
            break
        start = found.end()
        for _ in range(_PAINTS.get(found[1], 0)):
            end = group_end(text, start)
            start = start if end is None else end
            start += len(text[start:]) - len(text[start:].lstrip())
        end = group_end(text, start) if text[start : start + 1] == "{" else start
        if end is None:
            break
        inner = text[start + 1 : end - 1]
        if found[1] in _TEXTS and any(character.isalpha() for character in inner):
            at = end
            continue
        if _binds(text, found.start(), end) and any(character.isalnum() for character in inner):
            inner = f"{{{inner}}}"
        text = f"{text[: found.start()]} {inner}{text[end:]}"
        at = found.start()
    return text


def _binds(text: str, start: int, end: int) -> bool:
    """Whether what stands beside a group makes its braces needed: `2\\mathbf{x+1}` or `\\mathbf{13}^2`."""
    before, after = text[:start].rstrip()[-1:], text[end:].lstrip()[:1]
    return before in ("^", "_", "}") or before.isalnum() or after == "^"


def _with_fractions(text: str) -> str:
    r"""`{a \over b}` and `{n \choose k}` as `\frac` and `\binom`."""
    for _ in range(8):
        found = _OVER.search(text)
        if found is None:
            break
        start, end = _enclosing_group(text, found.start(), found.end())
        command = "frac" if found[1] == "over" else "binom"
        above, below = text[start : found.start()].strip(), text[found.end() : end].strip()
        text = f"{text[:start]}\\{command}{{{above}}}{{{below}}}{text[end:]}"
    return text


def _enclosing_group(text: str, before: int, after: int) -> tuple[int, int]:
    """Where the contents of the innermost braces around a place start and end; the whole text if there are none."""
    depth, start = 0, 0
    for index in range(before - 1, -1, -1):
        depth += {"{": -1, "}": 1}.get(text[index], 0)
        if depth < 0:
            start = index + 1
            break
    depth, end = 0, len(text)
    for index in range(after, len(text)):
        depth += {"{": 1, "}": -1}.get(text[index], 0)
        if depth < 0:
            end = index
            break
    return start, end


def group_end(text: str, start: int) -> int | None:
    """The index behind the brace that closes the one at `start`; None if it never closes."""
    depth = 0
    for index in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[index], 0)
        if depth == 0:
            return index + 1
    return None
