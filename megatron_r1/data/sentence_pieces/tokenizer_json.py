"""The tokenizer.json of a SentencePiece model, for transformers, vLLM and everything else that reads Hugging Face folders.

What it cannot say as the library does: a table of characters (nmt_nfkc) is applied to one character at a time; of two equally
scored merges the leftmost need not be first; where texts begin with spaces, `add_dummy_prefix` adds none; spaces at the end of one
stay. So this project itself encodes with the library (`text.py`).
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Any

from megatron_r1.data.sentence_pieces.model import BYTE, CONTROL, NORMAL, SPACE, UNIGRAM, UNUSED, USER_DEFINED, PieceModel
from megatron_r1.errors import DataError

_NO_TEXT_SCORE = -1e4  # of bytes, which a text that spells one shall not become


def tokenizer_json(model: PieceModel, added: Mapping[int, Mapping[str, Any]], bos: str | None, spaces_after_tokens: bool) -> str:
    """The text of the file.

    Args:
        added: id -> {"content": ..., "special": ..., ...} of tokens beside the model's, or in the place of its pieces.
        bos: what a sequence begins with; None: nothing.
        spaces_after_tokens: see `SentencePieceText`.

    Raises:
        DataError: ids of added tokens that leave a gap, or a token that stands twice.
    """
    proto = model.proto
    tokens = {id: {"content": piece.piece, "special": piece.type == CONTROL} for id, piece in enumerate(proto.pieces)
              if piece.type in (CONTROL, USER_DEFINED)}  # fmt: skip
    tokens |= {id: dict(token) for id, token in added.items()}
    names = [tokens[id]["content"] if id in tokens else piece.piece for id, piece in enumerate(proto.pieces)]
    beyond = [id for id in sorted(tokens) if id >= len(names)]
    if beyond != list(range(len(names), len(names) + len(beyond))):
        raise DataError(f"the model has {len(names)} pieces, but the added tokens after them have the ids {beyond}: leave no gap")
    joins_spaces = proto.normalizer_spec.remove_extra_whitespaces
    every = names + [tokens[id]["content"] for id in beyond]
    if len(set(every)) < len(every):
        twice = next(name for number, name in enumerate(every) if name in every[:number])
        raise DataError(f"the token {twice!r} has two ids: one of the model's pieces, and one of the settings")
    return json.dumps(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [_added_token(id, tokens[id], joins_spaces) for id in sorted(tokens)],
            "normalizer": _normalizer(proto.normalizer_spec),
            "pre_tokenizer": _pre_tokenizer(proto.normalizer_spec, spaces_after_tokens),
            "post_processor": None if bos is None else _begins_with(bos, every.index(bos)),
            "decoder": _decoder(proto),
            "model": _unigram(proto, names) if proto.trainer_spec.model_type == UNIGRAM else _bpe(proto, names),
        },
        ensure_ascii=False,
        indent=2,
    )


def _added_token(id: int, token: Mapping[str, Any], joins_spaces: bool) -> dict[str, Any]:
    # A symbol with spaces is looked for where spaces are written as the model writes them; runs, only where they are not joined.
    with_spaces = SPACE in token["content"] and not (joins_spaces and 2 * SPACE in token["content"])
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": with_spaces}
    return {
        "id": id,
        "content": token["content"],
        **{key: token.get(key, off) for key, off in flags.items()},
        "special": token["special"],
    }


def _normalizer(spec: Any) -> dict[str, Any]:
    steps: list[dict[str, Any]] = []
    if spec.precompiled_charsmap:
        table = base64.b64encode(spec.precompiled_charsmap).decode()
        steps.append({"type": "Precompiled", "precompiled_charsmap": table})
    if spec.remove_extra_whitespaces:
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    return {"type": "Sequence", "normalizers": [*steps, {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]}


def _pre_tokenizer(spec: Any, spaces_after_tokens: bool) -> dict[str, Any] | None:
    if not spec.add_dummy_prefix:
        return None
    scheme = "always" if spaces_after_tokens else "first"
    return {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": False}


def _begins_with(bos: str, id: int) -> dict[str, Any]:
    first = {"SpecialToken": {"id": bos, "type_id": 0}}
    a, b = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    tokens = {bos: {"id": bos, "ids": [id], "tokens": [bos]}}
    return {"type": "TemplateProcessing", "single": [first, a], "pair": [first, a, first, b], "special_tokens": tokens}


def _decoder(proto: Any) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": SPACE}, "content": " "}]
    if proto.trainer_spec.byte_fallback:
        steps.append({"type": "ByteFallback"})
    steps.append({"type": "Fuse"})
    spec = proto.normalizer_spec
    if spec.add_dummy_prefix or spec.remove_extra_whitespaces:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}


def _unigram(proto: Any, names: list[str]) -> dict[str, Any]:
    no_text = (BYTE, UNUSED)
    vocab = [
        [name, _NO_TEXT_SCORE if piece.type in no_text else piece.score]
        for name, piece in zip(names, proto.pieces, strict=True)
    ]  # fmt: skip
    spec = proto.trainer_spec
    return {"type": "Unigram", "unk_id": spec.unk_id, "vocab": vocab, "byte_fallback": spec.byte_fallback}


def _bpe(proto: Any, names: list[str]) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": names[proto.trainer_spec.unk_id],
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": proto.trainer_spec.byte_fallback,
        "ignore_merges": False,
        "vocab": {name: id for id, name in enumerate(names)},
        "merges": _merges(proto),
    }


def _merges(proto: Any) -> list[tuple[str, str]]:
    """Both halves of every piece wherever both are pieces: the best scored piece first, and of one the longest left half."""
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type in (NORMAL, UNUSED)}
    found = [
        (-score, -end, piece[:end], piece[end:])
        for piece, score in scores.items()
        for end in range(1, len(piece))
        if piece[:end] in scores and piece[end:] in scores
    ]
    found.sort(key=lambda merge: merge[:2])
    return [(left, right) for _, _, left, right in found]
