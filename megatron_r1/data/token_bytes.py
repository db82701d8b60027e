"""The bytes that a token stands for: a character of several bytes may be spread over several tokens, so not each is text."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

from tokenizers import Tokenizer

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_SPACE = "\u2581"  # what SentencePiece writes for one


def reader_of_tokens(tokenizer_json: str, vocabulary: Tokenizer) -> Callable[[int], bytes | None]:
    """What gives the bytes of an id of this tokenizer: an added token is its text. None for an id that the vocabulary has not."""
    read, added = reader_of_pieces(tokenizer_json), vocabulary.get_added_tokens_decoder()

    def read_token(token_id: int) -> bytes | None:
        if token_id in added:
            return added[token_id].content.encode("utf-8", "replace")
        piece = vocabulary.id_to_token(token_id) if token_id >= 0 else None
        return None if piece is None else read(piece)

    return read_token


def reader_of_pieces(tokenizer_json: str) -> Callable[[str], bytes]:
    """What gives the bytes of a piece of this tokenizer's model, but for added tokens, which are text.

    Byte-level pieces write each byte as a character; those of SentencePiece write a space as U+2581 and a byte as <0xE4>. Pieces of
    other models, such as the ##ing of WordPiece, are given as they are.
    """
    decoder = json.loads(tokenizer_json).get("decoder") or {}
    types = {part.get("type") for part in (decoder, *decoder.get("decoders", []))}
    if "ByteLevel" in types:
        return _read_byte_level
    return _read_sentencepiece if types & {"ByteFallback", "Metaspace", "Replace"} else lambda piece: _encode(piece)


def _read_sentencepiece(piece: str) -> bytes:
    byte = _BYTE.fullmatch(piece)
    return bytes([int(byte[1], 16)]) if byte else _encode(piece.replace(_SPACE, " "))


def _byte_of_character() -> dict[str, int]:
    """GPT-2's table: a byte that is a printable character of Latin-1 is that one, the others count on from U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + number): byte for number, byte in enumerate(others)}


_BYTES = _byte_of_character()


def _read_byte_level(piece: str) -> bytes:
    known = [_BYTES.get(character) for character in piece]
    return bytes(byte for byte in known if byte is not None) if None not in known else _encode(piece)


def _encode(text: str) -> bytes:
    return text.encode("utf-8", "replace")
