"""The program in a response: the last fenced block of code after the reasoning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_r1.tags import THINK_CLOSE, THINK_OPEN

Language = Literal["python", "cpp"]
LANGUAGES: dict[str, Language] = {
    "python": "python", "python3": "python", "py": "python", "cpp": "cpp", "c++": "cpp", "cc": "cpp", "cxx": "cpp",
}  # fmt: skip

MAX_CODE_BYTES = 256 << 10  #: a longer text is no answer
FENCE = "```"


@dataclass(frozen=True)
class Code:
    """A program as the response gives it."""

    text: str
    language: Language


def find_code(response: str, default: Language) -> Code | None:
    """The last closed block whose tag is a language we run, or that has no tag: then it is in the default language.

    Blocks with another tag (json, text, bash) are no programs and are skipped. Code inside the reasoning does not count; if
    the reasoning never ends, there is none. A block that is not closed does not count either.
    """
    start = response.rfind(THINK_CLOSE)
    if response.rfind(THINK_OPEN) > start:
        return None
    answer = response[start + len(THINK_CLOSE) :] if start >= 0 else response
    found, tag, lines = None, None, []
    for line in answer.splitlines():
        text = line.strip()
        if tag is None and text.startswith(FENCE):
            tag, lines = text.lstrip("`").strip().lower(), []
        elif tag is not None and text == FENCE:
            if not tag or tag in LANGUAGES:
                found = Code("\n".join(lines) + "\n", LANGUAGES.get(tag, default))
            tag = None
        elif tag is not None:
            lines.append(line)
    return found if found is not None and len(found.text) <= MAX_CODE_BYTES else None
