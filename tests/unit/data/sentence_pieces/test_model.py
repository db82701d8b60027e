"""Files that are no SentencePiece model, not the whole of one, or of a kind that is not read: one line each."""

from __future__ import annotations

import pytest
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from megatron_r1.data.sentence_pieces.model import PieceModel
from megatron_r1.errors import DataError
from tests.sentence_pieces import train


@pytest.mark.parametrize(
    "content", [b"", b"hello", bytes(100), b"\x80" * 40, b"version https://git-lfs.github.com/spec/v1\noid sha256:0"]
)
def test_another_file(content):
    with pytest.raises(DataError, match="not a SentencePiece model|git lfs pull") as caught:
        _ = PieceModel(content).proto
    assert "\n" not in str(caught.value)


def test_a_file_that_was_cut_off_anywhere():
    whole = train()
    proto = ModelProto.FromString(whole)
    fields = [
        len(ModelProto(pieces=proto.pieces[:5]).SerializeToString()),
        len(ModelProto(pieces=proto.pieces).SerializeToString()),
    ]
    proto.ClearField("normalizer_spec")
    for end in (*fields, len(proto.SerializeToString()), *range(1, len(whole), 5003), len(whole) - 1):
        with pytest.raises(DataError, match="whole of") as caught:
            _ = PieceModel(whole[:end]).proto
        assert "\n" not in str(caught.value)


def test_kinds_that_are_not_read():
    for settings, says in (
        ({"treat_whitespace_as_suffix": True}, "treat_whitespace_as_suffix"),
        ({"model_type": "word", "byte_fallback": False}, "model_type=word"),
    ):
        with pytest.raises(DataError, match=says):
            _ = PieceModel(train(**settings)).proto


def test_control_tokens_are_those_of_the_model():
    assert PieceModel(train()).control() == ("<s>", "</s>", None)
    other = {"bos_id": -1, "eos_id": 1, "eos_piece": "<end>", "pad_id": 0, "unk_id": 2, "user_defined_symbols": "<end"}
    assert PieceModel(train(**other)).control() == (None, "<end>", "<pad>")
