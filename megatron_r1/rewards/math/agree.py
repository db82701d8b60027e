"""Whether an answer is the reference: words and forms, then this package's reader, then math-verify under vetoes."""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache

from megatron_r1.rewards.math.compare import trees_agree
from megatron_r1.rewards.math.dates import form_of, is_plain_clock
from megatron_r1.rewards.math.fallback import math_verify_agrees
from megatron_r1.rewards.math.forms import (
    chosen_letter,
    has_relation,
    is_phrase,
    labelled_choice,
    named_value,
    same_choices,
    same_words,
    with_range_sign,
    without_lead,
)
from megatron_r1.rewards.math.measures import with_one_unit
from megatron_r1.rewards.math.numerals import with_plain_numerals
from megatron_r1.rewards.math.parse import parse_answer
from megatron_r1.rewards.math.policy import DEFAULT_POLICY, MathPolicy
from megatron_r1.rewards.math.readings import READINGS, has_condition, is_harmless, split_condition
from megatron_r1.rewards.math.spelling import plain_words, respell
from megatron_r1.rewards.math.tokens import MAX_CHARACTERS, tokenize
from megatron_r1.rewards.math.tree import Apply, Group, Name, Node, Number, Quantity, TooLarge, Unreadable
from megatron_r1.rewards.math.value import names_of, rounds_to

_WRAPPERS = (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"), ("\\boxed{", "}"))
_MAX_WRAPPERS = 4
_STOPS = (".", "。", ",", "，", ";")
_NUMERAL = re.compile(r"-?[0-9]{1,300}(?:\.[0-9]{1,300})?")
_DECIMAL_COMMA = re.compile(r"-?(?:0,[0-9]{1,9}|[0-9]{1,9},(?:[0-9]{1,2}|[0-9]{4,9}))")
_RATIO_IN_WORDS = re.compile(r"([0-9.]{1,20}) ?to ?([0-9.]{1,20})")
_FRACTION = re.compile(r"[0-9]{1,20}/[0-9]{1,20}|\\[dt]?frac\s*(?:\{[0-9]{1,20}\}\s*\{[0-9]{1,20}\}|[0-9]{2})")
_APPROXIMATE = re.compile(r"\s*(?:\\approx|\\simeq|\\doteq)(?![A-Za-z])\s*")


def answers_agree(answer: str, reference: str, policy: MathPolicy = DEFAULT_POLICY) -> bool:
    """Whether an answer is the reference. Never raises; a blank or unreadable answer agrees with nothing but its own text.

    The order matters: `x = 5` is a fine answer to `5`, as is `0 < x < 5` to `(0, 5)`.
    """
    answer, reference = clean_answer(answer), clean_answer(reference)
    if not answer or not reference or max(len(answer), len(reference)) > MAX_CHARACTERS:
        return False
    if answer == reference:
        return True
    if _NUMERAL.fullmatch(answer) and _NUMERAL.fullmatch(reference):
        return Fraction(answer) == Fraction(reference)
    ratio = [_RATIO_IN_WORDS.fullmatch(plain_words(text)) if "to" in text else None for text in (answer, reference)]
    if ratio[0] and ":" in reference:
        answer = f"{ratio[0][1]}:{ratio[0][2]}"
    elif ratio[1] and ":" in answer:
        reference = f"{ratio[1][1]}:{ratio[1][2]}"
    conditional = has_condition(reference)
    answer, reference = _readied(answer), _readied(reference)
    if not answer or not reference:
        return False
    if answer == reference:
        return True
    if _has_letters_only(answer) and _has_letters_only(reference):
        return same_words(answer, reference)
    if same_words(answer, reference):
        return True
    if same_choices(answer, reference):
        return True
    if _is_other_choice(answer, reference):
        return False
    choices = labelled_choice(answer), labelled_choice(reference)
    if any(choices) and (same := _choices_agree(choices, (answer, reference), policy)) is not None:
        return same
    forms = form_of(answer), form_of(reference)
    if all(map(is_plain_clock, (answer, reference))):
        return forms[0][1:] == forms[1][1:]
    if any(forms):
        return forms[0] == forms[1] or (_is_ratio(answer, reference, forms) and _formulas_agree(answer, reference, policy))
    if _formulas_agree(answer, reference, policy) or _agree_but_for_comma(answer, reference):
        return True
    for read in READINGS:
        again = read(answer, reference), read(reference, answer)
        if any(again) and _formulas_agree(again[0] or answer, again[1] or reference, policy):
            return True
    return _agree_but_for_condition(answer, reference, conditional, policy)


@lru_cache(maxsize=4096)
def is_readable(reference: str) -> bool:
    """Whether an answer can agree with a reference other than by being the same text; short phrases count as readable."""
    reference = clean_answer(reference)
    if len(reference) > MAX_CHARACTERS or not (reference := _readied(reference)):
        return False
    if _NUMERAL.fullmatch(reference) or form_of(reference) or _parsed(reference) is not None or is_phrase(reference):
        return True
    value = named_value(reference, is_reference=True)
    if value is not None and _parsed(value) is not None:
        return True
    return math_verify_agrees(reference, reference)


def clean_answer(text: str) -> str:
    """An answer without its wrapping: space, dollars and brackets of a formula, a box, a full stop, "The answer is"."""
    text = without_lead(" ".join(text.split()))
    for _ in range(_MAX_WRAPPERS):
        before = text
        if text.endswith(_STOPS) and not text.endswith(".."):
            text = text[:-1].rstrip()
        if text.startswith("=") and not text.startswith("=="):
            text = text[1:].lstrip()
        for opening, closing in _WRAPPERS:
            if not (text.startswith(opening) and text.endswith(closing)):
                continue
            inner = text[len(opening) : len(text) - len(closing)]
            if _is_one_piece(inner, opening):
                text = inner.strip()
                break
        if text == before:
            break
    return _without_dollar_pairs(text) if "$" in text else text


def _readied(text: str) -> str:
    """An answer in one spelling.

    Of `x = 1/3 \\approx 0.333` the exact value counts if the decimal is its rounding. Otherwise a sign of approximation is one of
    equality: whether the number is exact enough shows later.
    """
    text = with_one_unit(with_plain_numerals(with_range_sign(respell(text))))
    exact, sign, rounded = text.rpartition("\\approx")
    decimal = _parsed(rounded.strip()) if sign and exact.strip() else None
    if isinstance(decimal, Number):
        value = _parsed(exact.rpartition("=")[2].strip())
        if value is not None and not names_of(value) and rounds_to(value, decimal):
            return exact.strip()
    return _APPROXIMATE.sub(lambda found: "=" if found.start() else "", text)


def _agree_but_for_condition(answer: str, reference: str, conditional: bool, policy: MathPolicy) -> bool:
    r"""Whether `x+1, x \ne 1` stands for `x+1`, or for the same with the same condition."""
    parts = split_condition(answer)
    if parts is None:
        return False
    if not conditional:
        return is_harmless(parts[1]) and _formulas_agree(parts[0], reference, policy)
    others = split_condition(reference)
    return others is not None and all(_formulas_agree(*pair, policy) for pair in zip(parts, others, strict=True))


def _is_other_choice(answer: str, reference: str) -> bool:
    """Whether one says "A and B" and the other "A or B"; of numbers, both just list the answers."""
    joined = [set(re.findall(r"(?<![a-z])(?:and|or)(?![a-z])", text.lower())) for text in (answer, reference)]
    return {frozenset(words) for words in joined} == {frozenset({"and"}), frozenset({"or"})} and not re.search(r"[0-9=<>]", answer)


def _choices_agree(choices: tuple, texts: tuple[str, str], policy: MathPolicy) -> bool | None:
    """Whether `C) 5` is the choice C, or, held against no letter, the value behind the letter; None if neither is at stake."""
    letters = [choice[0] if choice else chosen_letter(text) for choice, text in zip(choices, texts, strict=True)]
    if all(letters):
        same = letters[0] == letters[1]
        return same and (not all(choices) or answers_agree(choices[0][1], choices[1][1], policy))
    bare = [choice[1] if choice else text for choice, text in zip(choices, texts, strict=True)]
    return True if answers_agree(*bare, policy) else None


def _agree_but_for_comma(answer: str, reference: str) -> bool:
    """`2,74` and 2.74: a decimal comma. `1,234` is 1234, and `1, 2` two answers."""
    for text, other in ((answer, reference), (reference, answer)):
        if _DECIMAL_COMMA.fullmatch(text) and "." in other and _NUMERAL.fullmatch(other):
            return Fraction(text.replace(",", ".")) == Fraction(other)
    return False


def _is_ratio(answer: str, reference: str, forms: tuple) -> bool:
    """Whether a text like 3:10 stands against a ratio or a fraction: then it is no time, unless a zero says that it is one."""
    if forms[1] and _FRACTION.fullmatch(answer):
        return is_plain_clock(reference) and reference.split(":")[1].strip()[0] != "0"
    clock = answer if forms[0] else reference
    if ":" not in answer or ":" not in reference:
        return False
    return not all(forms) and is_plain_clock(clock) and clock.split(":")[1].strip()[0] != "0"


def _formulas_agree(answer: str, reference: str, policy: MathPolicy) -> bool:
    trees = _parsed(answer), _parsed(reference)
    if None not in trees:
        try:
            if trees_agree(*trees, policy):
                return True
            if all(map(_is_computed, trees)):
                return False  # their values differ: a proof, which needs no second opinion
        except (TooLarge, RecursionError):  # a product of hundreds of factors is a deep tree
            return _same_tokens(answer, reference)
        except Unreadable:
            pass
    values = named_value(answer, is_reference=False), named_value(reference, is_reference=True)
    if (values[0] is None) != (values[1] is None) and not has_relation(answer if values[0] is None else reference):
        return _formulas_agree(values[0] or answer, values[1] or reference, policy)
    if None not in values and _same_tokens(answer.partition("=")[0], reference.partition("=")[0]):
        return _formulas_agree(*values, policy)
    return _same_tokens(answer, reference) or _same_signs(answer, reference) or math_verify_agrees(answer, reference)


def _is_computed(tree: Node) -> bool:
    """Whether a tree is one whose values are computed wherever it is compared: a scalar, or a matrix of them."""
    if isinstance(tree, Quantity):
        return _is_computed(tree.value)
    if isinstance(tree, Apply):
        return not any(isinstance(arg, Group) for arg in tree.args) and all(map(_is_computed, tree.args))
    return isinstance(tree, Number | Name) or (isinstance(tree, Group) and tree.kind == "matrix")


def _without_dollar_pairs(text: str) -> str:
    """`$x = 1$ or $x = 2$` without its dollars. Those of `$5 and $6`, which stand before a number and not after one, are money."""
    pieces = text.split("$")
    formulas, between = pieces[1::2], pieces[2:-1:2]
    if len(pieces) % 2 == 0 or len(pieces) < 3 or any(piece.endswith("\\") for piece in pieces):
        return text
    if all(piece and piece == piece.strip() for piece in formulas) and all(piece[:1] in " ,;，；、或和与且" for piece in between):
        return "".join(pieces)
    return text


def _is_one_piece(inner: str, opening: str) -> bool:
    """Whether what stands between an opening and a closing belongs together: not the middle of `$1$ or $2$`."""
    if opening != "\\boxed{":
        return bool(inner) and opening.lstrip("\\") not in inner.replace("\\$", "")
    depth = 0
    for character in inner:
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth < 0:
            return False
    return depth == 0 and bool(inner)


def _has_letters_only(text: str) -> bool:
    return len(text) > 1 and text.isascii() and text.isalpha()


@lru_cache(maxsize=4096)
def _parsed(text: str) -> Node | None:
    try:
        return parse_answer(text)
    except Unreadable:
        return None


def _same_tokens(answer: str, reference: str) -> bool:
    """Whether two texts differ in spacing and spelling of commands only."""
    try:
        tokens = [[token[:2] for token in tokenize(text)] for text in (answer, reference)]
    except Unreadable:
        return False
    return bool(tokens[0]) and tokens[0] == tokens[1]


def _same_signs(answer: str, reference: str) -> bool:
    """Whether two texts of signs alone, such as \u2460, differ in spacing and commas only."""
    signs = ["".join(text.replace(",", " ").split()) for text in (answer, reference)]
    return signs[0] == signs[1] != "" and not re.search(r"[0-9A-Za-z]", signs[0])
