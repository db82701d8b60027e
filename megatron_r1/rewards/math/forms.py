"""Answers that are no formula: words, choices, and values with the name of what they are the value of."""

from __future__ import annotations

import re

from megatron_r1.rewards.math.spelling import plain_words
from megatron_r1.rewards.math.units import SHORT_UNITS

_RANGE = re.compile(r"(?:from )?(\$?\d[\d.]*%?) (?:to|through) (\$?\d[\d.]*%?)( .*)?")
_BOUNDS = {
    **dict.fromkeys(("at least", "no less than", "not less than", "至少", "不少于", "不小于"), ">="),
    **dict.fromkeys(("at most", "no more than", "not more than", "至多", "不超过", "不大于"), "<="),
    **dict.fromkeys(("more than", "greater than", "larger than", "大于"), ">"),
    **dict.fromkeys(("less than", "smaller than", "小于"), "<"),
}  # fmt: skip
_BOUND = re.compile(rf"({'|'.join(_BOUNDS)}) ?([0-9][0-9.,/]*)", re.IGNORECASE)

_LEAD = re.compile(
    r"(?:\\text\s*\{\s*)?(?:(?:(?:so|thus|hence|therefore),? )?(?:the |my )?(?:final |correct |required )?(?:answer|ans|result) ?"
    r"(?:(?:is|=|:|equals)+:? *|(?=\$|\\[(\[]))"
    r"|(?:所以|因此|故)?[，,]?(?:最终|正确)?答案(?:是|为|:|：)+ *|答[:：] *)(?:\}\s*)?",
    re.IGNORECASE,
)

#: phrases that say the same
_SYNONYMS = {
    **dict.fromkeys(
        ("no solution", "no solutions", "there is no solution", "there are no solutions", "no real solution", "no real solutions",
         "no real roots", "无解", "无实数解", "方程无解", "empty set", "the empty set", "空集",
         "\\varnothing", "\\{\\}", "\\{ \\}"),
        "\\emptyset",
    ), "does not exist": "dne", "doesn't exist": "dne", "不存在": "dne",
    "infinitely many": "infinitely many solutions",
    **dict.fromkeys(("true.", "yes", "correct", "是", "是的", "对", "正确", "真", "\\sqrt", "\\checkmark", "✓", "✔"), "true"),
    **dict.fromkeys(("no", "incorrect", "否", "不是", "错", "错误", "不对", "不正确", "假", "*", "✗", "✘"), "false"),
    "neither even nor odd": "neither", "neither odd nor even": "neither",
    "infinity": "\\infty", "perpendicular lines": "perpendicular",
}  # fmt: skip
_TRUTH_LETTERS = {"T": "true", "F": "false"}  #: only beside the word; alone they are letters
_WORD = re.compile(r"[^\W\d_]+")
_ARTICLE = re.compile(r"(?:a|an|the) (?=\S*[a-z]{3})", re.IGNORECASE)
_CHOICE = re.compile(r"(?:(?:option|choice) )?\(?([A-Za-z])\)?|\(([A-Za-z]+)\)", re.IGNORECASE)
_LABELLED = re.compile(r"(?:option |choice |answer )?(?:\(([A-J])\)|([A-J])[.):])\s+(\S.*)", re.IGNORECASE)
_CHOICES = re.compile("[A-H]{2,8}")
_ANOTHER = re.compile(
    r"(?<![A-Za-z])(?:[A-J]\)|[A-J][.:](?!\S)|[A-J](?![A-Za-z0-9^_'=(])|not|wrong|incorrect|isn't|or|and (?:so|then))(?![a-z])"
)
_MARKUP = re.compile(r"[\\{}\[\]_^=<>]")
_NAMED_SIDE = re.compile(
    r"\\(?:text|mathrm|textbf|textrm|mathit|operatorname|overline|overrightarrow|widehat|vec|mbox|mathbb|dot|ddot|hat|bar|tilde)\s*\{([^{}]*)\}"
)
_COMMAND = re.compile(r"\\[A-Za-z]+|\\.")
_FUNCTIONS = frozenset(
    [
        "\\measuredangle",
        "\\nabla",
        "\\bar",
        "\\hat",
        "\\vec",
        "\\tilde",
        "\\dot",
        "\\overline",
        "\\Pr",
        "\\sin",
        "\\cos",
        "\\tan",
        "\\cot",
        "\\sec",
        "\\csc",
        "\\angle",
        "\\triangle",
        "\\det",
        "\\deg",
        "\\lvert",
        "\\rvert",
        "\\left",
        "\\right",
    ]
)
_LETTER_COMMANDS = re.compile(
    r"\\(?:alpha|beta|gamma|delta|theta|phi|varphi|lambda|mu|omega|sigma|rho|tau|epsilon|ell|Delta|Gamma|Omega)(?![A-Za-z])"
)
_SUBSCRIPT = re.compile(r"_(?:\{(?:[^{}]|\{[^{}]*\})*\}|\\?\w)")
_LETTER = re.compile(rf"(?:{_LETTER_COMMANDS.pattern}|[A-Za-z])(?:{_SUBSCRIPT.pattern})?")
_INVERSE = re.compile(r"\^\s*(?:\{\s*(?:-1|\\prime|\([a-z0-9]\))\s*\}|\\prime)")
_DERIVATIVE = re.compile(r"\\d?frac\s*\{\s*(?:\\mathrm\{d\}|d)\s*\w*\s*\}\s*\{\s*(?:\\mathrm\{d\}|d)\s*\w+\s*\}")
_CALL = re.compile(r"(?<=[A-Za-z'}])\s*(?:\\left)?[(\[][^()\[\]]*(?:\\right)?[)\]]")
_POWER = re.compile(r"()\^\s*\{?[0-9]\}?")
_POWER_OF_FUNCTION = re.compile(r"(\\(?:sin|cos|tan|cot|sec|csc|sigma))\s*\^\s*\{?[0-9]\}?")
_OTHER_RELATION = re.compile(r"[<>]|!=|\\(?:ne|neq|le|leq|ge|geq|lt|gt|in|equiv|approx)(?![A-Za-z])")
_DIGITS_RATIO = re.compile(r"[0-9] ?: ?[0-9]")
_JOINT = re.compile(r"(?<![A-Za-z])(?:or|and)(?![A-Za-z])|\\(?:vee|wedge|lor|land)(?![A-Za-z])")
_MAX_SIDES = 6
_COORDINATES = frozenset("xyz")


def without_lead(text: str) -> str:
    """An answer without "The answer is" or "Answer:" before it."""
    found = _LEAD.match(text)
    if found and found[0].count("{") == found[0].count("}"):
        return text[found.end() :].strip()
    return text


def with_range_sign(text: str) -> str:
    """`5 to 10` as `5-10`, `at least 5` as `>= 5`."""
    if bound := _BOUND.fullmatch(plain_words(text)):
        return f"{_BOUNDS[bound[1].lower()]} {bound[2]}"
    found = _RANGE.fullmatch(plain_words(text))
    return f"{found[1]}-{found[2]}{found[3] or ''}" if found else text


def same_words(answer: str, reference: str) -> bool:
    r"""Whether two texts are the same words, in \text{} or not: "No solution", "Row 3", DNE.

    Capital letters matter in words of one or two letters only, which may be names: AB and ab are two segments.
    """
    phrases = [_ARTICLE.sub("", " ".join(plain_words(text).replace(" ,", ",").split())) for text in (answer, reference)]
    phrases = [_chosen(phrase) for phrase in phrases]
    phrases = [_SYNONYMS.get(phrase.lower(), phrase) for phrase in phrases]
    if len(short := [phrase for phrase in phrases if phrase in _TRUTH_LETTERS]) == 1 and phrases[0] != phrases[1]:
        phrases = [_TRUTH_LETTERS[phrase] if phrase in short else phrase for phrase in phrases]
    words = [_WORD.findall(phrase) for phrase in phrases]
    if not all(words):
        return False
    if phrases[0] == phrases[1]:
        return True
    if any(_MARKUP.search(phrase) for phrase in phrases) or phrases[0].casefold() != phrases[1].casefold():
        return False
    return all(
        a == b or ((len(a) > 2 or (len(a) == 2 and a[1] == b[1])) and not {a, b} <= SHORT_UNITS)  # MeV is not meV
        for a, b in zip(*words, strict=True)
    )


def _chosen(phrase: str) -> str:
    """The letter of a phrase that names a choice, a capital one if it says that it is a choice; else the phrase."""
    found = _CHOICE.fullmatch(phrase)
    if not found:
        return phrase
    letter = found[1] or found[2]
    return letter.upper() if phrase[:1] != "(" and len(phrase) > 4 and len(letter) == 1 else letter


def same_choices(answer: str, reference: str) -> bool:
    """Whether ABD stands against A, B, D: several choices, their letters in order. BA is a segment, not the choices A and B."""
    joined, listed = sorted((answer, reference), key=lambda text: "," in text)
    letters = [letter.strip() for letter in listed.split(",")]
    is_choice = bool(_CHOICES.fullmatch(joined)) and all(len(letter) == 1 for letter in letters) and len(letters) > 1
    return is_choice and "".join(letters) == joined == "".join(sorted(set(joined)))


def labelled_choice(text: str) -> tuple[str, str] | None:
    r"""The letter of a choice and what stands behind it, of `C) 5` or `\textbf{(C)}\ 5`; None if more than it may be meant."""
    if "." not in text and ")" not in text and ":" not in text:
        return None
    found = _LABELLED.fullmatch(plain_words(text))
    if not found or not (found[1] or found[2]).isupper() or _ANOTHER.search(found[3]):
        return None
    return found[1] or found[2], found[3].strip()


def chosen_letter(text: str) -> str | None:
    """The letter of a text that is nothing but a choice: C, (C), Option C."""
    found = _CHOICE.fullmatch(plain_words(text))
    letter = (found[1] or found[2]) if found else ""
    return letter if len(letter) == 1 and letter.isupper() else None


def is_phrase(text: str) -> bool:
    """Whether a text is words that only the same words can match; longer prose is no answer."""
    words = plain_words(text)
    return bool(_WORD.search(words)) and not _MARKUP.search(words) and len(words.split()) <= 10 and len(words) <= 80


def named_value(text: str, is_reference: bool) -> str | None:
    r"""The value of `m+n = 33`, `\angle ABC = 30^\circ` or `f'(1) = 3`; None if the left side is no name of a value.

    `2x = 10` and `x^2 = 4` are equations still to be solved. Nor is a curve, `x + y = 5`, the value 5, if a reference says so.
    """
    sides = _sides(text)
    if not 2 <= len(sides) <= _MAX_SIDES or not all(sides):
        return None
    *names, value = sides
    if _DIGITS_RATIO.fullmatch(value) and any(":" in name for name in names):
        value = value.replace(":", ".0:", 1)  # a:b = 3:4 is a ratio for sure, not a score, so it may be scaled
    return value if all(_is_name_of(name, value, is_reference) for name in names) else None


def has_relation(text: str) -> bool:
    """Whether a text is an equation, an inequality or another relation, not a bare value."""
    return len(_sides(text)) != 1


def _is_name_of(name: str, value: str, is_reference: bool) -> bool:
    core = _NAMED_SIDE.sub(r" \1 ", _INVERSE.sub("", name))
    core = _CALL.sub("", _DERIVATIVE.sub("Y", core))
    if "," in core or (_JOINT.search(core) and re.search(r"[0-9]", core)):
        return False  # (x, y) = (1, 2) gives every name its value, x = 3 or y = 3 has two
    bare = _COMMAND.sub(lambda found: found[0] if _LETTER_COMMANDS.fullmatch(found[0]) else " ", core)
    names = set(_LETTER.findall(bare))
    core = _SUBSCRIPT.sub("", core)
    commands = {found for found in _COMMAND.findall(_LETTER_COMMANDS.sub("", core)) if found[1:].isalpha()}
    if not names:  # \tan(A+B), but not 5 or \sqrt{4}
        return bool(commands) and commands <= _FUNCTIONS and core.strip() in commands and bool(_LETTER.search(name[len(core) :]))
    core = (_POWER if len(names) > 1 else _POWER_OF_FUNCTION).sub(r"\1", core)
    has_digits = bool(re.search(r"[0-9]", core))
    if has_digits or re.search(r"[+*/^:-]", core) or commands - _FUNCTIONS:
        if len(names) < 2 or value == "0" or names & set(_LETTER.findall(_COMMAND.sub("", value))):
            return False
        is_curve = names <= _COORDINATES and (has_digits or (is_reference and bool(re.search(r"[+-]", core))))
        if is_curve or (is_reference and has_digits):
            return False
    return True


def _sides(text: str) -> list[str]:
    """The sides of a chain of equals signs outside of all brackets; none if there is another sign of relation."""
    sides, depth, start = [], 0, 0
    for index, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if character == "=" and not depth:
            sides.append(text[start:index].strip())
            start = index + 1
    sides.append(text[start:].strip())
    flat = re.sub(r"\([^()]*\)|\{[^{}]*\}", "", text)
    return [] if depth or _OTHER_RELATION.search(flat) else sides
