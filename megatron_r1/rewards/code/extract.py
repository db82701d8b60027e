"""The program in a response: one fenced block of code after the reasoning."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from megatron_r1.tags import THINK_CLOSE, THINK_OPEN

Language = Literal["python", "cpp"]
CppStandard = Literal["gnu++17", "gnu++20", "gnu++23"]

MAX_CODE_CHARACTERS = 256 << 10  #: a longer text is no answer
_FENCE = re.compile(r"`{3,}|~{3,}")
_FIRST_WORD = re.compile(r"[^\s,:;{}=]+")
_PYTHON_TAG = re.compile(r"(?:python|py|pypy|ipython)[-_]?[0-9.]*")
_CPP_TAG = re.compile(r"(?:c\+\+|cpp|cxx|cc|g\+\+|gnu\+\+)[-_]?([0-9a-z]*)")
_STANDARDS: dict[str, CppStandard] = {
    "98": "gnu++17", "03": "gnu++17", "0x": "gnu++17", "11": "gnu++17", "14": "gnu++17", "1y": "gnu++17", "17": "gnu++17",
    "1z": "gnu++17", "20": "gnu++20", "2a": "gnu++20", "23": "gnu++23", "2b": "gnu++23",
}  # fmt: skip
_READS_INPUT = re.compile(
    r"\b(?:input|raw_input|open|fileinput|stdin|cin|scanf|getline|getchar|getchar_unlocked|getc|fgetc|gets|fgets|fread|read)\b"
)


@dataclass(frozen=True)
class Code:
    """A program as the response gives it."""

    text: str
    language: Language
    standard: CppStandard | None = None  #: C++ only: what the tag says (c++17)


@dataclass(frozen=True)
class Wanted:
    """What the tests need of a program, by which one block is taken before another."""

    function: str = ""  #: name of the function that the tests call; "": the program is run as a whole
    reads_input: bool = False  #: whether the program gets an input

    def fits(self, code: Code) -> bool:
        """Whether a block can be the whole answer, as far as a look at its text says: nothing is parsed."""
        text = code.text[:MAX_CODE_CHARACTERS]
        if self.function:
            name = re.escape(self.function)
            patterns = {
                "python": rf"\bclass\s+Solution\b|\b(?:def|class)\s+{name}\b|^{name}\s*=[^=]|^[ \t]*(?:from|import)\b.*\b{name}\b",
                "cpp": rf"\bclass\s+Solution\b|\bstruct\s+Solution\b|^(?![ \t]*return\b)[^\n#/=(]*[\w>&*\]]\s+[&*]?{name}\s*\(",
            }
            return re.search(patterns[code.language], text, re.MULTILINE) is not None
        return not self.reads_input or _READS_INPUT.search(text) is not None


@dataclass(frozen=True)
class _Block:
    code: Code
    is_tagged: bool  #: the block names its language


def find_code(response: str, default: Language, wanted: Wanted = Wanted()) -> Code | None:
    """The closed block that is the answer, or None.

    Of the blocks whose tag is a language we run, the last one that `wanted` fits; else of those without a tag, which are in the
    default language, the last one that fits; else the last of those with a tag; else the last one. So sample output, an example of
    use or a fragment after the program does not take its place.

    Blocks with another tag (json, text, bash) are no programs and are skipped. Code inside the reasoning does not count; if
    the reasoning never ends, there is none. A block that is not closed does not count either.
    """
    start = response.rfind(THINK_CLOSE)
    if response.rfind(THINK_OPEN) > start:
        return None
    blocks = _closed_blocks(response[start + len(THINK_CLOSE) :] if start >= 0 else response, default)
    by_tag = [[block.code for block in blocks if block.is_tagged is is_tagged] for is_tagged in (True, False)]
    fitting = [[code for code in codes if wanted.fits(code)] for codes in by_tag]
    found = next((codes[-1] for codes in (*fitting, *by_tag) if codes), None)
    return found if found is not None and len(found.text) <= MAX_CODE_CHARACTERS else None


def _closed_blocks(answer: str, default: Language) -> list[_Block]:
    """The closed blocks that can be programs, in order. A fence is closed by one of its kind that is at least as long."""
    blocks: list[_Block] = []
    fence, info, indent, lines = "", "", "", []
    for line in answer.split("\n"):
        line = line.removesuffix("\r")
        opening = _opening(line) if not info else None
        # A tag of a language in a block without one: the fence before it stood in prose and opened nothing.
        if opening is not None and (not fence or _language(opening[1].lower()) is not None):
            fence, info, indent = opening
            lines = []
            continue
        if not fence:
            continue
        last = _last_line(line, fence)
        if last is None:
            lines.append(line)
            continue
        if last.strip():
            lines.append(last)
        block = _as_block(lines, info, indent, default)
        if block is not None:
            blocks.append(block)
        fence = info = ""
    return blocks


def _opening(line: str) -> tuple[str, str, str] | None:
    """(fence, what follows it, the space before it) if a block begins in this line.

    A fence within a line, after words or a tag, begins a block only if at most the name of a language follows.
    """
    found = _FENCE.search(line)
    if found is None:
        return None
    before, info = line[: found.start()], line[found.end() :].strip()
    if found[0][0] in info or "`" in before:
        return None  # code within the line
    if not before.strip():
        return found[0], info, before
    return (found[0], info, "") if not info or _language(info.lower()) is not None and " " not in info else None


def _last_line(line: str, fence: str) -> str | None:
    """The code that stands before the closing fence if the block ends in this line, else None.

    The fence stands alone, or a tag or words follow it, or it follows code.
    """
    found = re.search(rf"{re.escape(fence[0])}{{{len(fence)},}}", line)
    if found is None:
        return None
    before, after = line[: found.start()], line[found.end() :]
    if fence[0] in after or "`" in before:
        return None
    if not before.strip():
        closes = not after.strip() or not (after[0].isalnum() or after[0] in "_{.") or after.startswith(". ")
        return "" if closes and _language(after.strip().lower()) is None else None
    rest = after.strip()
    return before if fence[0] == "`" and (not rest or rest.startswith("</") and rest.endswith(">")) else None


def _as_block(lines: list[str], info: str, indent: str, default: Language) -> _Block | None:
    info = info.lower()
    tag = _language(info)
    if info and tag is None:
        return None
    language, standard = tag or (default, None)
    if language == "python" and indent and all(line.startswith(indent) or not line.strip() for line in lines):
        lines = [line[len(indent) :] for line in lines]  # the block stands in a list
    return _Block(Code("\n".join(lines) + "\n", language, standard), tag is not None)


def _language(info: str) -> tuple[Language, CppStandard | None] | None:
    """The language that the words after a fence name: `python3.11`, `py title="a.py"`, `{.cpp}`, `c++17`."""
    found = _FIRST_WORD.search(info)
    word = found[0].lstrip(".") if found else ""
    if _PYTHON_TAG.fullmatch(word):
        return "python", None
    cpp = _CPP_TAG.fullmatch(word)
    return ("cpp", _STANDARDS.get(cpp[1])) if cpp and (not cpp[1] or cpp[1] in _STANDARDS) else None
