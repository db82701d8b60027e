"""Text to ids and back by the SentencePiece library itself, which no conversion equals in every text.

A text at the beginning of a sequence gets exactly the ids that the library gives it. One that goes on gets no space before it, and
a model that removes extra spaces leaves one of them at its edges, since they may part it from what stands before and after.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Collection, Iterable, Mapping
from functools import cached_property

from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel

from megatron_r1.data.sentence_pieces.model import BYTE, NORMAL, SPACE, UNKNOWN, UNUSED, USER_DEFINED, PieceModel

_SPACES = re.compile(f"{SPACE}{{2,}}")
_SURROGATE = re.compile("[\ud800-\udfff]")
_EACH_BYTE = "megatron_r1.each_byte"  # how bytes that are no text are read: one sign for each, as the library does it


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error(_EACH_BYTE, _replace_each_byte)


class SentencePieceText:
    """Encodes and decodes with one model."""

    def __init__(
        self, model: PieceModel, added: Mapping[int, AddedToken], text_symbols: Collection[int], spaces_after_tokens: bool
    ):
        """
        Args:
            added: the tokenizer's added tokens, some of which may be no pieces of the model.
            text_symbols: those of them that stand for text, wherever they are written; see `text_symbols`.
            spaces_after_tokens: whether the model's space is put before every text that follows an added token in a template,
                and not only before the first ("legacy" in tokenizer_config.json).
        """
        self._model, proto = model, model.proto
        self._first, self._inner = model.processor, model.variant()
        self._joins_spaces = proto.normalizer_spec.remove_extra_whitespaces
        self._strips = self._joins_spaces or proto.normalizer_spec.add_dummy_prefix
        self._prefix = SPACE if proto.normalizer_spec.add_dummy_prefix else ""
        self._after_tokens = spaces_after_tokens
        #: pieces that a text may not become
        self._markers = {id for id in added if id < len(proto.pieces)} - set(text_symbols)
        self._ids = {token.content: id for id, token in added.items() if id not in text_symbols}
        # A vocabulary of the added tokens alone finds them as transformers does, with the space that they take around them.
        self._splitter = Tokenizer(WordLevel({"\0": 0}, unk_token="\0"))
        self._splitter.add_tokens([token for id, token in added.items() if id not in text_symbols])
        self._added, self._text_symbols = added, set(text_symbols)

    def encode(self, text: str, begins: bool, goes_on: bool = False) -> list[int]:
        """The ids of untrusted text; see the head of this file.

        Args:
            goes_on: whether something follows, so that a space at the end is none of the text's edges.
        """
        try:
            if self._joins_spaces and (goes_on or not begins):
                normal = _SPACES.sub(SPACE, self._inner.normalize(text))
                return self._encode_normal(self._prefix + normal.removeprefix(SPACE) if begins else normal)
            processor = self._first if begins else self._inner
            ids = processor.encode(text)
        except RuntimeError:  # half of a surrogate pair, which the library cannot take
            if _SURROGATE.search(text) is None:
                raise
            return self.encode(_SURROGATE.sub("\ufffd", text), begins, goes_on)
        return ids if self._markers.isdisjoint(ids) else self._encode_normal(processor.normalize(text))

    def encode_template(self, text: str, begins: bool) -> list[int]:
        """The ids of text in which added tokens are tokens."""
        found = self._splitter.encode(text, add_special_tokens=False)
        ids: list[int] = []
        for token, (start, end) in zip(found.ids, found.offsets, strict=True):
            if token:
                ids.append(self._ids[self._splitter.id_to_token(token)])
            else:
                ids += self.encode(text[start:end], begins if not ids else self._after_tokens, goes_on=end < len(text))
        return ids

    def token_bytes(self, token_id: int) -> bytes | None:
        """What a token stands for: "\u2581" is a space and <0xE4> a byte. None for an id that is none."""
        token, pieces = self._added.get(token_id), self._model.proto.pieces
        if token is not None and token_id not in self._text_symbols:
            return token.content.encode("utf-8", "replace")
        if not 0 <= token_id < len(pieces):
            return None
        piece = pieces[token_id]
        if piece.type == BYTE:
            return bytes([int(piece.piece[3:5], 16)])
        if piece.type == UNKNOWN:
            return self._model.proto.trainer_spec.unk_surface.encode()
        return piece.piece.replace(SPACE, " ").encode()

    def decode(self, token_ids: Iterable[int]) -> str:
        """The text, without the space that the model puts before one. A byte that is part of no character becomes U+FFFD."""
        parts: list[bytes] = []
        awaits_space = self._strips
        for token_id in token_ids:
            content = self.token_bytes(token_id) or b""
            if awaits_space and self._is_text(token_id) and content.startswith(b" "):
                content, awaits_space = content[1:], self._joins_spaces
            parts.append(content)
            awaits_space = awaits_space and not content
        return b"".join(parts).decode("utf-8", _EACH_BYTE)

    def _is_text(self, token_id: int) -> bool:
        pieces = self._model.proto.pieces
        return token_id < len(pieces) and pieces[token_id].type in (NORMAL, USER_DEFINED, UNUSED)

    def _encode_normal(self, normal: str) -> list[int]:
        """The ids of normalised text, cut inside of every marker that it would become."""
        ids: list[int] = []
        waiting = [normal]
        while waiting:
            part = waiting.pop()
            found = self._as_it_is.encode(part)
            if self._markers.isdisjoint(found):
                ids += found
                continue
            offsets = self._as_it_is.encode_as_offset_mapping(part)["offsets"]
            pairs = zip(found, offsets, strict=True)
            cuts = [start + 1 for id, (start, end) in pairs if id in self._markers and end - start > 1]
            if not cuts:
                ids += found
                continue
            ends = [*cuts, len(part)]
            waiting += reversed([part[start:end] for start, end in zip([0, *cuts], ends, strict=True)])
        return ids

    @cached_property
    def _as_it_is(self) -> SentencePieceProcessor:
        return self._model.variant(keeps_characters=True)


def text_symbols(
    model: PieceModel, added: Mapping[int, AddedToken], control: Collection[str], templates: Collection[str]
) -> set[int]:
    """The user-defined symbols that stand for text, such as runs of spaces or "<table>", which the library makes of any text.

    Not those that control something: control tokens and tags, what the settings call special, what a template writes.

    Args:
        control: control tokens and tags.
        templates: the texts of chat templates.
    """
    found = set()
    for id, token in added.items():
        if id < len(model.proto.pieces) and (piece := model.proto.pieces[id]).type == USER_DEFINED:
            is_word = token.content.replace(SPACE, " ").isspace() or token.content.isalnum()
            is_written = not is_word and any(token.content in template for template in templates)
            if not (token.special or token.content in control or token.content != piece.piece or is_written):
                found.add(id)
    return found
