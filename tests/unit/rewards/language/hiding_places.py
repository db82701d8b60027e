"""Ways to write a text so that a reader of words may miss it: each takes a text and gives the disguised one."""

from __future__ import annotations

import re
from collections.abc import Callable

_CYRILLIC = str.maketrans("aceopxyABCEHKMOPTX", "асеорхуАВСЕНКМОРТХ")
_GREEK = str.maketrans("aoiu", "αοιυ")
_SOUNDS = {"ru": "абкдефгхийклмнопкрстуввкйз", "ja": "アブクドエフグヒイジクルムノオプクルストウブウクイズ"}


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text)


def _joined(text: str, joint: str, words_each: int = 0) -> str:
    words = _words(text)
    size = words_each or len(words)
    return " ".join(joint.join(words[start : start + size]) for start in range(0, len(words), size))


def _camel(text: str, words_each: int) -> str:
    return _joined(" ".join(word[:1].upper() + word[1:] for word in _words(text)), "", words_each)


def _shift(text: str, first: int, last: str = "z") -> str:
    """Letters of another block of Unicode, in the order of the alphabet, capitals first."""

    def other(character: str) -> str:
        if character.isascii() and character.isalpha():
            return chr(first + ord(character) - ord("A") - (6 if character >= "a" else 0))
        return character

    return "".join(map(other, text))


def _sounded(text: str, language: str) -> str:
    table = {chr(ord("a") + index): sound for index, sound in enumerate(_SOUNDS[language])}
    return "".join(table.get(character, character) for character in text.lower())


#: those that any text can use
PLACES: dict[str, Callable[[str], str]] = {
    "plain": str,
    "fence": lambda text: f"```\n{text}\n```",
    "fence of a language": lambda text: f"```python\n{text}\n```",
    "fence of tildes": lambda text: f"~~~\n{text}\n~~~",
    "comments": lambda text: "```python\n" + "\n".join(f"# {line}" for line in text.split(".")) + "\n```",
    "docstring": lambda text: f'```python\ndef f():\n    """{text}"""\n```',
    "strings": lambda text: "```python\n" + "\n".join(f"print('{line}')" for line in text.split(".")) + "\n```",
    "a word a line": lambda text: "```\n" + "\n".join(_words(text)) + "\n```",
    "three words a line": lambda text: "```\n" + "\n".join(_joined(text, "_", 3).split()) + "\n```",
    "assignments": lambda text: (
        "```\n" + "\n".join(f"x{n} = {word}" for n, word in enumerate(_joined(text, "_", 2).split())) + "\n```"
    ),
    "calls": lambda text: "```\n" + "".join(f"{word}();" for word in _joined(text, "_", 2).split()) + "\n```",
    "backticks": lambda text: " ".join(f"`{line}`" for line in re.findall(".{1,150}", text)),
    "a backtick a word": lambda text: " ".join(f"`{word}`" for word in _words(text)),
    "\\text": lambda text: f"\\[ \\text{{{text}}} \\]",
    "\\text in dollars": lambda text: " ".join(f"$\\text{{{line.strip()}}}$" for line in re.findall(".{1,150}", text)),
    "a formula a word": lambda text: " ".join(f"$\\text{{{word}}} = 5$" for word in _words(text)),
    "double dollars": lambda text: f"$$ {text} $$",
    "environment": lambda text: f"\\begin{{quote}}{text}\\end{{quote}}",
    "commands": lambda text: " ".join(f"\\{word}" for word in _words(text)),
    "commands of several words": lambda text: " ".join(f"\\{word}" for word in _camel(text, 4).split()),
    "LaTeX comment": lambda text: f"% {text}",
    "quotes": lambda text: f'"{text}"',
    "block quote": lambda text: "\n".join(f"> {line}" for line in text.split(".")),
    "tags": lambda text: " ".join(f"<{line}>" for line in re.findall("[^.]{1,90}", text)),
    "a tag a word": lambda text: "".join(f"<{word}>" for word in _words(text)),
    "attributes": lambda text: " ".join(f'<b title="{line}">' for line in re.findall("[^.]{1,80}", text)),
    "HTML comment": lambda text: f"<!-- {text} -->",
    "address": lambda text: "https://example.org/" + _joined(text, "-"),
    "address of folders": lambda text: "https://example.org/" + _joined(text, "/"),
    "query": lambda text: "www.example.org?q=" + _joined(text, "+"),
    "underscores": lambda text: _joined(text, "_"),
    "two words joined": lambda text: _joined(text, "_", 2),
    "camelCase": lambda text: _camel(text, 0),
    "camelCase of two": lambda text: _camel(text, 2),
    "digits": lambda text: _joined(text, "1"),
    "a digit a word": lambda text: " ".join(f"{word}2" for word in _words(text)),
    "capitals": str.upper,
    "letter by letter": lambda text: " ".join(" ".join(word) for word in _words(text)),
    "dots between letters": lambda text: " ".join(".".join(word) for word in _words(text)),
    "commas between letters": lambda text: ",".join("".join(_words(text))),
    "a letter a line": lambda text: "\n".join("".join(_words(text))),
    "apostrophes": lambda text: _joined(text, "'"),
    "apostrophes between four": lambda text: _joined(text, "'", 4),
    "escapes": lambda text: "".join(f"\\u{ord(c):04x}" for c in text),
    "escapes in a fence": lambda text: '```python\nx = "' + "".join(f"\\u{ord(c):04x}" for c in text) + '"\n```',
    "entities": lambda text: "".join(f"&#{ord(c)};" for c in text),
    "percents": lambda text: "https://example.org/" + "".join(f"%{ord(c):02x}" if ord(c) < 256 else c for c in text),
    "backwards": lambda text: " ".join(word[::-1] for word in _words(text)),
    "no spaces": lambda text: "".join(_words(text)).lower(),
    "pieces without spaces": lambda text: " ".join(re.findall(".{1,24}", "".join(_words(text)).lower())),
    "zero-width joints": lambda text: _joined(text, "\u200b"),
    "zero-width letters": lambda text: "\u200b".join(text),
    "soft hyphens": lambda text: "\u00ad".join(text),
    "variation selectors": lambda text: "\ufe0f".join(text),
    "table": lambda text: "\n".join(f"| {' | '.join(line.split())} |" for line in text.split(".")),
    "JSON": lambda text: "{" + ", ".join(f'"{line}": 1' for line in text.split(".")) + "}",
    "JSON in a fence": lambda text: "```json\n{" + ",\n".join(f'"{line}": 1' for line in text.split(".")) + "}\n```",
    "list": lambda text: "\n".join(f"- {line}" for line in text.split(".")),
}

#: those for texts in Latin letters without accents
LATIN_PLACES: dict[str, Callable[[str], str]] = {
    "full width": lambda text: "".join(chr(ord(c) + 0xFEE0) if c.isalpha() else c for c in text),
    "bold of mathematics": lambda text: _shift(text, 0x1D400),
    "script of mathematics": lambda text: _shift(text, 0x1D4D0),
    "circles": lambda text: _shift(text, 0x24B6),
    "boxes": lambda text: _shift(text.upper(), 0x1F130),
    "flags": lambda text: _shift(text.upper(), 0x1F1E6),
    "invisible tags": lambda text: "".join(chr(0xE0000 + ord(c)) if c.isascii() and c.isalpha() else c for c in text),
    "Braille": lambda text: "".join(chr(0x2800 + ord(c.lower()) - 96) if c.isascii() and c.isalpha() else c for c in text),
    "Cyrillic twins": lambda text: text.translate(_CYRILLIC),
    "Greek twins": lambda text: text.translate(_GREEK),
    "sounds in Cyrillic": lambda text: _sounded(text, "ru"),
    "sounds in katakana": lambda text: _sounded(text, "ja"),
    "no vowels": lambda text: re.sub("[aeiou]", "", text),
    "digits for letters": lambda text: text.translate(str.maketrans("aeiost", "431057")),
    "rot13": lambda text: text.translate(str.maketrans("abcdefghijklmnopqrstuvwxyz", "nopqrstuvwxyzabcdefghijklm")),
    "base64": lambda text: __import__("base64").b64encode(text.encode()).decode(),
}
