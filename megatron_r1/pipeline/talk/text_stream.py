"""Tokens that come one by one as text for a terminal: whole characters, nothing that moves the cursor, reasoning dimmed."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence

from megatron_r1.tags import THINK_CLOSE, THINK_OPEN

_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"
_CUT = "\ufffd"  # what a decoder says of a character of which bytes are missing
_MOST_HELD = 16  # tokens: no character has more, so that a broken one does not hold back the rest
_KEPT = "\n\t\u200c\u200d"  # with the joiners of Persian and of emoji


class TokenText:
    """Text of tokens that come bit by bit. Put together, what it gives is what `decode` gives of all.

    Args:
        decode: token ids -> text. It is asked for a few tokens at a time, so that a long response costs no more a token.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._told = 0  # the first of them, which were given and are decoded before what comes
        self._anchor = 1  # the first of these, which stay before a run of tokens without text

    def add(self, token_ids: Sequence[int], is_last: bool = False) -> str:
        """What is new; a character whose bytes are not all there waits for them.

        Args:
            is_last: nothing follows.
        """
        self._ids += token_ids
        before, now = self._decode(self._ids[: self._told]), self._decode(self._ids)
        if now.endswith(_CUT) and not is_last and len(self._ids) - self._told < _MOST_HELD:
            return ""
        self._forget()
        return now[len(before) :]

    def _forget(self) -> None:
        """Leave only what the next tokens must be decoded after.

        SentencePiece drops spaces at the beginning of a text: tokens that alone would be dropped are no beginning to decode from.
        """
        if self._decode(self._ids[self._told :]):
            self._ids = self._ids[self._told :]
            self._anchor = len(self._ids)
        elif len(self._ids) > self._anchor + _MOST_HELD:
            self._ids = self._ids[: self._anchor]
        self._told = len(self._ids)


class ReasoningShade:
    """Dims what stands between <think> and </think>, whose tags may come in pieces.

    Args:
        is_on: whether the terminal can; without it text stays as it is.
    """

    def __init__(self, is_on: bool) -> None:
        self._is_on, self._inside, self._held = is_on, False, ""

    def add(self, text: str) -> str:
        """The text for the terminal. The beginning of what may become a tag waits for more."""
        if not self._is_on:
            return show_safely(text)
        text, shown = self._held + text, []
        while True:
            tag = THINK_CLOSE if self._inside else THINK_OPEN
            before, found, after = text.partition(tag)
            if not found:
                break
            opened = f"{_DIM}{tag}" if not self._inside else f"{tag}{_PLAIN}"
            shown += [show_safely(before), opened]
            self._inside, text = not self._inside, after
        held = next((size for size in range(len(tag) - 1, 0, -1) if text.endswith(tag[:size])), 0)
        self._held = text[len(text) - held :]
        return "".join(shown) + show_safely(text[: len(text) - held])

    def end(self) -> str:
        """What waited, and back to plain text."""
        rest, self._held = show_safely(self._held), ""
        plain, self._inside = _PLAIN if self._inside else "", False
        return rest + plain


def show_safely(text: str) -> str:
    r"""Text without characters that could move the cursor, end the line or turn the order of others: they are written as escapes.

    Kept are what Unicode calls printable, spaces of any width, tab, line break and the joiners of scripts that need them.
    """
    return "".join(character if _is_safe(character) else _escape(character) for character in text)


def _is_safe(character: str) -> bool:
    return character.isprintable() or character in _KEPT or unicodedata.category(character) == "Zs"


def _escape(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")
