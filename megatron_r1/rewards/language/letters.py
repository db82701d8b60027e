"""Letters: which script they are of, and those that only look or print otherwise."""

from __future__ import annotations

import re
import unicodedata

#: script -> its letters, as the inside of a character class
LETTERS = {
    "latin": "A-Za-z\u00aa\u00ba\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f\u1e00-\u1eff",
    "cyrillic": "\u0400-\u052f\u0301",
    "greek": "\u0370-\u03ff\u1f00-\u1fff",
}
#: prints nothing, yet may part or join letters: soft hyphen, joiners, marks of direction, variation selectors, fillers
_INVISIBLE = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0"
    "\U000e0100-\U000e01ef]+"
)
#: full width, styles of mathematics, circles, squares, flags, and tags, which print nothing
_STYLED = re.compile(
    "[\uff21-\uff3a\uff41-\uff5a\U0001d400-\U0001d7cb\u2102-\u2149\u249c-\u24e9\U0001f110-\U0001f189\U0001f1e6-\U0001f1ff"
    "\U000e0041-\U000e007a]"
)
#: a letter with its accents apart. The whole text is not normalised: that takes the square of a run of accents
_DECOMPOSED = re.compile("[^\\W\\d_][\u0300-\u036f\u3099\u309a]{1,4}")
#: characters by their numbers, several in a row: escapes of Python and JSON, of HTML and of addresses
_ESCAPED = re.compile(r"(?:\\u[0-9a-fA-F]{4}|\\x[0-9a-fA-F]{2}|&#[0-9]{2,6};|&#x[0-9a-fA-F]{2,5};|%[0-9a-fA-F]{2}){4,}")
_NUMBER = re.compile(r"(?:\\[ux]|&#x|%)([0-9a-fA-F]+);?|&#([0-9]+);")
_PIECE = re.compile(r"[^\W\d_]+(?:['\u2019][^\W\d_]+)*")
_NEW_WORD = re.compile("(?<=[^\\W\\d_A-Z])(?=[A-Z\u00c0-\u00d6\u00d8-\u00de])|(?<=[A-Z])(?=[A-Z][a-z])")
_OFFSETS = {0x1F130: 26, 0x1F150: 26, 0x1F170: 26, 0x1F1E6: 26, 0x1F110: 26}  #: first of an alphabet in boxes -> its length


def plain_letters(text: str) -> str:
    """A text whose letters are plain ones: accents joined, styled letters as ASCII, without characters that print nothing."""
    text = _ESCAPED.sub(lambda escaped: _NUMBER.sub(_numbered_letter, escaped[0]), text)
    text = _STYLED.sub(lambda found: _plain_letter(found[0]), _INVISIBLE.sub("", text))
    return _DECOMPOSED.sub(lambda found: unicodedata.normalize("NFC", found[0]), text)


def split_identifier(text: str) -> list[str]:
    """The pieces of `getName`, `get_name` and `name2`, those of two letters and more."""
    return [piece for part in _PIECE.findall(text.replace("_", " ")) for piece in _NEW_WORD.split(part) if len(piece) > 1]


def _numbered_letter(found: re.Match[str]) -> str:
    number = int(found[1], 16) if found[1] else int(found[2])
    return chr(number) if number < 0x110000 else " "


def _plain_letter(character: str) -> str:
    code = ord(character)
    if code >= 0xE0041:
        return chr(code - 0xE0000)
    for first, length in _OFFSETS.items():
        if first <= code < first + length:
            return chr(ord("a") + code - first)
    return unicodedata.normalize("NFKC", character).strip("()")
