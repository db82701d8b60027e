"""What tokenizer.json says of a SentencePiece model."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer

from megatron_r1.data.sentence_pieces.model import PieceModel
from megatron_r1.data.sentence_pieces.tokenizer_json import tokenizer_json
from megatron_r1.errors import DataError
from tests.sentence_pieces import train


def test_ids_bytes_and_the_beginning():
    model = PieceModel(train())
    made = Tokenizer.from_str(tokenizer_json(model, {}, "<s>", False))
    names = [piece.piece for piece in model.proto.pieces]
    assert [made.id_to_token(id) for id in range(made.get_vocab_size())] == names
    assert made.encode("\U0001f468").tokens == ["<s>", "\u2581", "<0xF0>", "<0x9F>", "<0x91>", "<0xA8>"]
    assert json.loads(tokenizer_json(model, {}, None, False))["post_processor"] is None
    assert "<0x41>" not in made.encode("<0x41>").tokens, "a byte's name in a text is text"


def test_added_tokens_follow_the_pieces_or_rename_them():
    model = PieceModel(train())
    size = len(model.proto.pieces)
    pad = {"content": "<pad>", "special": True, "rstrip": True}
    made = Tokenizer.from_str(tokenizer_json(model, {size: pad, 6: {"content": "<renamed>", "special": False}}, None, False))
    assert (
        made.token_to_id("<pad>") == size
        and made.token_to_id("<renamed>") == 6
        and made.encode("<pad>  <renamed>").ids == [size, 6]
    )
    with pytest.raises(DataError, match="leave no gap"):
        tokenizer_json(model, {size + 1: pad}, None, False)
    with pytest.raises(DataError, match="'</s>' has two ids"):
        tokenizer_json(model, {size: {"content": "</s>", "special": True}}, None, False)
