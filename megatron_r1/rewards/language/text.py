"""The words of a text by script: of its prose, and of what is set aside as code, formulas, addresses, markup and identifiers.

What is set aside counts as nothing if it is what it looks like. A policy that is paid for one language may write its reasoning in
another one and dress it as code; therefore words in a row are prose wherever they stand, and the rest is reported as loose words.
Every pattern is bounded or tried once per position: the cost is linear in the length of the text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import chain
from typing import NamedTuple

from megatron_r1.rewards.language.identify import latin_words
from megatron_r1.rewards.language.letters import LETTERS, plain_letters, split_identifier
from megatron_r1.tags import THINK_CLOSE, THINK_OPEN

_FENCES = ("```", "~~~")
_SPANS = (("$$", "$$"), ("\\[", "\\]"), ("\\(", "\\)"), ("\\begin{", "\\end{"))  #: formulas that may hold line breaks
_INLINE = re.compile(
    r"`[^`\n]{1,200}`"  # code
    r"|\$[^\s$](?:[^$\n]{0,300}[^\s$])?\$(?![0-9])"  # a formula: no space inside its dollars, so that `$5 and $6` stays
    r"|\\(?:begin|end)\{[^{}\n]{1,30}\}|(?:\\[A-Za-z]+[ ]?)+|<[^<>\n]{1,100}>|(?:https?://|www\.)\S+"
)
_SENTENCE_END = re.compile(r"[.!?;:](?=\s|$)|[\n。！？；：…]")
_WORD = re.compile(
    "(?P<cjk>[\u3005\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff]+)"
    "|(?P<hangul>[\u1100-\u11ff\u3130-\u318f\uac00-\ud7af]+)"
    # letters that look alike, mixed in one word; a Greek letter at the end of a Latin word is a variable
    f"|(?P<mixed>(?:[{LETTERS['latin']}]++(?=[{LETTERS['cyrillic']}]|[{LETTERS['greek']}]+[{LETTERS['latin']}])"
    f"|[{LETTERS['cyrillic']}]++(?=[{LETTERS['latin']}])|[{LETTERS['greek']}]++(?=[{LETTERS['latin']}]{{2}}))"
    f"[{LETTERS['latin']}{LETTERS['cyrillic']}{LETTERS['greek']}]+)"
    f"|(?P<cyrillic>[{LETTERS['cyrillic']}]+)"
    f"|(?P<latin>[{LETTERS['latin']}]+(?:['\u2019][{LETTERS['latin']}]+)*)"
    f"|(?P<greek>[{LETTERS['greek']}]+)"
    "|(?P<broken>[\x00-\x08\x0e-\x1f\x7f\ud800-\udfff\ue000-\uf8ff\ufffd\u2800-\u28ff]+)"  # no text, or Braille: no language
    r"|(?P<other>[^\W\d_])"
)
_MATH = "sin cos tan cot sec csc log ln lg exp sqrt mod gcd lcm max min lim det dx dy dt"
_FORMULA_WORDS = frozenset(_MATH.split())
_COMMANDS_TEXT = """
frac dfrac tfrac cfrac sqrt cdot cdots ldots dots times div pm mp le leq ge geq ne neq lt gt approx equiv sim cong propto to
mapsto rightarrow leftarrow Rightarrow Leftarrow implies iff infty sum prod int lim sin cos tan cot sec csc log ln exp max min gcd
det dim arcsin arccos arctan mod bmod pmod in notin subset subseteq cup cap setminus emptyset forall exists land lor neg angle
triangle circ degree perp parallel overline underline hat bar vec tilde dot ddot text textbf textit textrm textsf mathrm mathbf
mathbb mathcal mathit mathsf operatorname boxed left right big Big bigg Bigg bigl bigr quad qquad hspace vspace displaystyle
limits begin end alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi pi rho sigma tau phi
varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega binom choose lfloor rfloor lceil rceil langle rangle mid
nmid vert Vert ell prime partial nabla stackrel overset underset underbrace overbrace hline hfill item label tag cdotp star ast
oplus otimes textstyle phantom cancel color not over atop cases array align aligned gather equation matrix pmatrix bmatrix vmatrix
split tabular center enumerate itemize section subsection usepackage documentclass draw fill path node tikz asy itshape bfseries
par newline
"""
_COMMANDS = frozenset(_COMMANDS_TEXT.split())
_KEYWORDS_TEXT = """
and as assert async await break class continue def del elif else except false finally for from global if import in is lambda none
nonlocal not or pass raise return true try while with yield auto bool case catch char const constexpr default delete do double
enum extern final float friend goto include inline int interface let long namespace new null operator package private protected
public register short signed sizeof static string struct super switch template this throw throws typedef typename union unsigned
using var virtual void volatile function print self len range str list dict set tuple
"""
_KEYWORDS = frozenset(_KEYWORDS_TEXT.split())
LONGEST_WORD = 30  #: letters; a longer one is of no language
_LONGEST_ACRONYM = 6
_MANY_LETTERS = 9  #: different ones in a row of capitals: more than the points of a figure have
_FEWEST_SPELT = 10  #: single letters in a row that spell something
_LETTERS_OF_A_WORD = 4  #: of a spelt one
_ROW = 4  #: words, one after the other, that are prose wherever they stand, if they hold words that only sentences have
_LONG_NAME = 6  #: pieces of an identifier that stands alone; FileNotFoundError has four
_COMMON_SHARE = 0.25  #: of the words of a row; "num epochs lr batch size" has none
_FEWEST_WORDS_OF_TEXT = 8  #: in something that was set aside and has too few signs for code or a formula
_SIGNS_PER_WORD = 0.25
_LONGEST_ENVIRONMENT = 30
_JOINT = re.compile(r"[\s_\-,.;:!?'\"|\u2018-\u201d\u3001\u3002\uff0c\uff1a\uff1b\u2026\u00b7\\]*")  #: between words of a row
_ASIDE_WORD = re.compile(rf"\n|\\(?P<command>[A-Za-z]+)|{_WORD.pattern}")
_SIGN = re.compile(r"[=()\[\]{}<>+*/%&^~@#$:;0-9]")
_DIGITS_WITHIN = re.compile(r"(?<![^\W_])(?:[A-Za-z]+\d+[A-Za-z]|\d+[A-Za-z]+\d)[A-Za-z0-9]*")
_BLOB = re.compile(r"[A-Za-z0-9+/]{40,}")
_CHANGE = re.compile(r"[a-z](?=[A-Z0-9])|[A-Z](?=[a-z0-9])|[0-9](?=[A-Za-z])")
_LETTERS_A_CHANGE = 4
_SPELT = re.compile(
    rf"(?<![^\W\d_])(?:[{LETTERS['latin']}][\s._\-,*|/]{{1,3}}){{{_FEWEST_SPELT - 1},}}[{LETTERS['latin']}](?![^\W\d_])"
)


class Word(NamedTuple):
    """A run of letters of one script; Chinese and Japanese runs hold several words."""

    script: str  #: cjk, hangul, cyrillic, latin, greek, mixed, broken or other
    text: str


class FoundWords(NamedTuple):
    """What a text says."""

    sentences: list[list[Word]]  #: of its prose, and every row of words elsewhere
    loose: list[list[Word]]  #: those words of each piece that was set aside which stand in no row


def reasoning_of(response: str) -> str:
    """What stands between the think tags; before the closing one, if there is no other; a whole response without tags."""
    _, opened, rest = response.partition(THINK_OPEN)
    return (rest if opened else response).partition(THINK_CLOSE)[0]


def read_words(text: str) -> FoundWords:
    """The words of a text, see `FoundWords`."""
    prose, asides = set_aside(plain_letters(text))
    sentences, loose = [spelt] if (spelt := _spelt_words(prose)) else [], []
    for words, rest in chain(map(_read_sentence, _SENTENCE_END.split(prose)), map(_read_aside, asides)):
        sentences += [row for row in words if row]
        if rest:
            loose.append(rest)
    return FoundWords(sentences, loose)


def set_aside(text: str) -> tuple[str, list[str]]:
    """The prose, and the code, formulas, LaTeX commands, tags and addresses. An opening without an end sets nothing aside."""
    asides: list[str] = []
    for fence in _FENCES:
        text = _without_spans(text, fence, fence, asides)
    for opening, closing in _SPANS:
        text = _without_spans(text, opening, closing, asides)

    def keep(found: re.Match[str]) -> str:
        asides.append(found[0])
        return " "

    return _INLINE.sub(keep, text), asides


def _read_sentence(sentence: str) -> tuple[list[list[Word]], list[Word]]:
    """The words, and the rows of words that identifiers or capitals hold; then what is neither."""
    words: list[Word] = []
    rows, loose = [words], []
    identifiers: list[str] = []
    capitals: list[str] = []

    def end_row() -> None:
        pieces = [piece for identifier in identifiers for piece in split_identifier(identifier)]
        row = [Word("latin", piece) for piece in pieces]
        is_one_name = len(identifiers) == 1 and len(row) < _LONG_NAME and sum(map(len, identifiers)) <= LONGEST_WORD
        if not is_one_name and _is_row(row):
            rows.append(row)
        else:
            loose.extend(row)
        if len(capitals) >= _ROW and len(set("".join(capitals))) > _MANY_LETTERS:
            rows.append([Word("latin", text.lower()) for text in capitals])
        identifiers.clear()
        capitals.clear()

    for found in _WORD.finditer(sentence):
        kind, text = found.lastgroup or "other", found[0]
        if kind != "latin":
            if _is_foreign_word(kind, text):
                words.append(Word(kind, text))
                end_row()
        elif _is_identifier(sentence, found):
            identifiers.append(text)
        elif text.isupper() and len(text) <= _LONGEST_ACRONYM:
            capitals.append(text)
        elif len(text) > 1 and text not in _FORMULA_WORDS:
            words.append(Word(kind, text))
            end_row()
    end_row()
    loose += [Word("mixed", token[0]) for token in _DIGITS_WITHIN.finditer(sentence)]
    return rows, loose


def _is_foreign_word(kind: str, text: str) -> bool:
    """Whether letters that are not Latin are a word: a Greek letter alone is a variable, a circled digit is no letter."""
    return len(text) > 1 if kind == "greek" else kind != "other" or text.isalpha()


def _is_identifier(sentence: str, found: re.Match[str]) -> bool:
    """Whether a Latin word is a name in code: camelCase, or beside an underscore or a digit. A title-case word is none."""
    text = found[0]
    neighbours = sentence[found.start() - 1 : found.start()] + sentence[found.end() : found.end() + 1]
    if any(character in "_0123456789" for character in neighbours):
        return True
    return not text.isupper() and any(part[1:] != part[1:].lower() for part in re.split("['\u2019]", text))


def _read_aside(text: str) -> tuple[list[list[Word]], list[Word]]:
    """The rows of words in something that was set aside, and its other words."""
    rows: list[list[Word]] = []
    loose: list[Word] = []
    row: list[Word] = []
    every: list[Word] = []
    end = 0

    def end_row() -> None:
        if _is_row(row):
            rows.append(row.copy())
        else:
            loose.extend(word for word in row if word.script != "latin" or len(word.text) > 2)
        row.clear()

    for found in _ASIDE_WORD.finditer(text):
        if not _JOINT.fullmatch(text, end, found.start()):
            end_row()
        end = found.end()
        command = found["command"]
        if found[0] == "\n" or command in _COMMANDS:
            end_row()
            continue
        kind = "latin" if command else found.lastgroup or "other"
        for piece in split_identifier(command or found[0]) if kind == "latin" else [found[0]]:
            word = Word(kind, piece)
            is_keyword = kind == "latin" and piece.lower() in _KEYWORDS
            if is_keyword:
                end_row()
                every.append(word)
            elif piece not in _FORMULA_WORDS if kind == "latin" else _is_foreign_word(kind, piece):
                row.append(word)
                every.append(word)
    end_row()
    if len(every) >= _FEWEST_WORDS_OF_TEXT and len(_SIGN.findall(text)) < _SIGNS_PER_WORD * len(every):
        rows, loose = [every], []
    if all(word.script == "latin" and word.text.isupper() for word in loose):  # points and units
        loose.clear()
    return [*rows, _spelt_words(text)], loose


def _is_row(words: list[Word]) -> bool:
    """Whether words, one after the other, are a phrase. Names in code may stand in a row, too, without the words of sentences."""
    if any(len(word.text) > LONGEST_WORD and word.script != "cjk" for word in words):  # words without spaces
        return True
    latin = [word.text for word in words if word.script == "latin"]
    others = sum(len(word.text) / 2 if word.script == "cjk" else 1 for word in words if word.script != "latin")
    if len(latin) + others < _ROW:
        return False
    return others >= len(latin) or latin_words().count_common(latin) >= _COMMON_SHARE * len(latin)


def _spelt_words(text: str) -> list[Word]:
    """Words that are written letter by letter, `F i r s t`, or in base64, as words of no language."""
    found = (sum(map(str.isalpha, spelt[0])) for spelt in _SPELT.finditer(text))
    spelt = [Word("mixed", "?" * _LETTERS_OF_A_WORD) for letters in found for _ in range(letters // _LETTERS_OF_A_WORD)]
    return spelt + [Word("mixed", blob[0]) for blob in _BLOB.finditer(text) if _is_encoded(blob[0])]


def _is_encoded(text: str) -> bool:
    """Whether letters and digits without a space are an encoding: they change their kind at every third or so."""
    return len(_CHANGE.findall(text)) >= len(text) / _LETTERS_A_CHANGE


def _without_spans(text: str, opening: str, closing: str, asides: list[str]) -> str:
    """Cut every span out, in one pass, and add it to `asides`."""
    kept, at = [], 0
    while (start := text.find(opening, at)) >= 0:
        end = text.find(closing, start + len(opening))
        if end < 0:
            break
        kept.append(text[at:start])
        asides.append(text[start + len(opening) : end])
        at = end + len(closing)
        if closing.endswith("{"):  # the name of the environment
            at = text.find("}", at, at + _LONGEST_ENVIRONMENT) + 1 or at
    kept.append(text[at:])
    return " ".join(kept)


def sentence_texts(sentences: list[list[Word]], script: str) -> Iterator[list[str]]:
    """The words of one script, by sentence."""
    return ([word.text for word in sentence if word.script == script] for sentence in sentences)
