"""Untrusted text to ids: whatever the vocabulary, nothing in it becomes a control token, an added token or a byte.

Leaving the added tokens out of a tokenizer.json is enough for byte-level BPE. Vocabularies that come from SentencePiece hold
"</s>" and "<0x0A>" as pieces of the model itself, and word-level ones as words: there such a piece is found after encoding, the
text is cut inside it, and both sides are encoded again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

import tokenizers

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_PREFIX = "add_prefix_space"


class PlainText:
    """Encodes with the vocabulary alone."""

    def __init__(self, first: tokenizers.Tokenizer, inner: tokenizers.Tokenizer, state: dict[str, Any], control: Iterable[str]):
        """
        Args:
            first: with `inner`, what `begin_and_middle` gives.
            inner: see `first`.
            state: what they were made of.
            control: the texts that are control tokens.
        """
        self._first = _without_added(first)
        self._inner = self._first if inner is first else _without_added(inner)
        added = {token["content"]: token["special"] for token in state["added_tokens"]}
        in_model = self._first.get_vocab(with_added_tokens=False)
        bytes_ = [text for text in in_model if _BYTE.fullmatch(text)] if state["model"].get("byte_fallback") else []
        # A single character cannot be cut, and runs of space control nothing.
        written = {text for text in (*added, *control) if len(text) > 1 and text.replace("\u2581", "").strip()}
        self._unknown = {in_model[text] for text in (*bytes_, *_unknown_token(state)) if text in in_model}
        self._pieces = {in_model[text]: text for text in (*written, *bytes_, *_unknown_token(state)) if text in in_model}

    def encode(self, text: str, begins: bool) -> list[int]:
        """The ids.

        Args:
            begins: whether the text stands at the beginning of a sequence, where some vocabularies put a space before it.
        """
        if not self._pieces:
            return (self._first if begins else self._inner).encode(text, add_special_tokens=False).ids
        ids: list[int] = []
        waiting = [(text, begins)]
        while waiting:
            part, is_first = waiting.pop()
            encoding = (self._first if is_first else self._inner).encode(part, add_special_tokens=False)
            cuts = [] if self._pieces.keys().isdisjoint(encoding.ids) else self._cuts(part, encoding)
            if not cuts:
                ids += encoding.ids
                continue
            ends = [*cuts, len(part)]
            pieces = [part[start:end] for start, end in zip([0, *cuts], ends, strict=True)]
            waiting += reversed([(piece, is_first and number == 0) for number, piece in enumerate(pieces)])
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text as `encode` gives them at the beginning of a sequence."""
        found = [encoding.ids for encoding in self._first.encode_batch_fast(texts, add_special_tokens=False)]
        if not self._pieces:
            return found
        written = self._pieces.keys()
        return [ids if written.isdisjoint(ids) else self.encode(text, True) for ids, text in zip(found, texts, strict=True)]

    def _cuts(self, text: str, encoding: tokenizers.Encoding) -> list[int]:
        """Where to cut so that no control piece stands there as it is written."""
        cuts = []
        for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if token in self._pieces and end - start > 1 and self._is_written(token, text[start:end]):
                cuts.append(start + 1)
        return cuts

    def _is_written(self, token: int, text: str) -> bool:
        """Whether the token came from its name; a byte and the unknown token also stand for characters without a piece."""
        if token not in self._unknown:
            return True
        normalizer = self._first.normalizer
        return self._pieces[token] in (normalizer.normalize_str(text) if normalizer else text)


def without_limits(tokenizer_json: str) -> tuple[dict[str, Any], str]:
    """The state in a tokenizer.json without what some programs leave in it: truncation, padding, random merges. And its text."""
    state = json.loads(tokenizer_json)
    model = state["model"]
    if "dropout" in model:
        model = {**model, "dropout": None}
    free = {**state, "truncation": None, "padding": None, "model": model}
    return free, tokenizer_json if free == state else json.dumps(free)


def begin_and_middle(state: dict[str, Any], text: str) -> tuple[tokenizers.Tokenizer, tokenizers.Tokenizer]:
    """Two encoders: for text at the beginning of a sequence, and for text that goes on; the same where no space is put before.

    Args: what `without_limits` gives.
    """
    first = tokenizers.Tokenizer.from_str(text)
    middle = {**state, **{part: _without_prefix(state.get(part)) for part in ("normalizer", "pre_tokenizer")}}
    return first, first if middle == state else tokenizers.Tokenizer.from_str(json.dumps(middle))


def _without_added(whole: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """The same encoder without its added tokens. Both have one vocabulary in memory, of 128,000 tokens some 60 MB."""
    plain = tokenizers.Tokenizer(whole.model)
    for part in ("normalizer", "pre_tokenizer", "post_processor"):
        if (given := getattr(whole, part)) is not None:
            setattr(plain, part, given)
    return plain


def _without_prefix(part: Any) -> Any:
    if not isinstance(part, dict):
        return part
    if part["type"] == "Prepend":
        return None
    if part["type"] == "Sequence":
        (name,) = part.keys() - {"type"}
        kept = [inner for inner in map(_without_prefix, part[name]) if inner is not None]
        return {**part, name: kept}
    if part["type"] == "Metaspace":
        return {**part, "prepend_scheme": "never"} | ({_PREFIX: False} if _PREFIX in part else {})
    return {**part, _PREFIX: False} if part.get(_PREFIX) else part


def _unknown_token(state: dict[str, Any]) -> list[str]:
    model = state["model"]
    if isinstance(model.get("unk_token"), str):
        return [model["unk_token"]]
    number = model.get("unk_id")  # Unigram numbers it
    return [] if number is None else [model["vocab"][number][0]]
