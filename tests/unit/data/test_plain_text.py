"""Untrusted text in vocabularies whose model holds control tokens, bytes and a space before every text."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest

from megatron_r1.data.tokenizer import Tokenizer

CONTROL = ["<unk>", "<s>", "</s>", "<pad>", "<think>"]


def sentencepiece_like(folder: Path, kind: str) -> Tokenizer:
    """Vocabularies whose model holds the control tokens itself, as conversions from SentencePiece do."""
    bytes_ = [f"<0x{number:02X}>" for number in range(256)]
    pieces = ["\u2581", *"abcdefghijklmnopqrstuvwxyz.,<>/|", "\u2581the", "th", "he", "\u2581cat", "cat"]
    scored = [*((token, 0.0) for token in (*CONTROL[:3], *bytes_)), *((piece, -float(len(pieces))) for piece in pieces)]
    added = [
        {"id": CONTROL.index(token), "content": token, "special": True, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False}
        for token in CONTROL[:3]
    ]  # fmt: skip
    metaspace = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False}
    state = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": {"type": "NFKC"},
        "pre_tokenizer": metaspace, "post_processor": None, "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "Unigram", "unk_id": 0, "vocab": scored, "byte_fallback": True},
    }  # fmt: skip
    if kind == "word":
        words = [*CONTROL[:3], "the", "cat", "<", ">", "/s"]
        state |= {"normalizer": {"type": "NFKC"}, "pre_tokenizer": {"type": "WhitespaceSplit"}, "decoder": None}
        state["model"] = {"type": "WordLevel", "vocab": {word: number for number, word in enumerate(words)}, "unk_token": "<unk>"}
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(state))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}))
    return Tokenizer.load(folder)


HOSTILE = [
    "the cat</s>", "</s>", "</s></s><s>", "<</s>", "\uff1c/s\uff1e the", "the <unk> cat", "<0x0A>", "a<0x0A>b", "<s>the</s> " * 300,
    "\uff1c0x41\uff1e",
]  # fmt: skip


@pytest.mark.parametrize("kind", ["unigram", "word"])
@pytest.mark.parametrize("text", HOSTILE)
def test_control_tokens_in_a_text_stay_text_where_the_model_holds_them_too(tmp_path, kind, text):
    loaded = sentencepiece_like(tmp_path, kind)
    for ids in (
        loaded.encode_plain(text),
        loaded.encode_response(text),
        loaded.encode(text),
        loaded.encode_prompt("r1_chat", text)[1][1:],
    ):
        assert not {1, 2} & set(ids)
        if kind == "unigram":
            shown = loaded.decode_everything(ids)
            assert unicodedata.normalize("NFKC", text).strip() in shown, "and the text is still there"
    assert loaded.encode_template("the</s>")[-1] == 2, "a template's control tokens are tokens"


def test_bytes_and_unknown_characters_are_still_encoded_by_their_bytes(tmp_path):
    loaded = sentencepiece_like(tmp_path, "unigram")
    for text in ("cat 猫", "a\nb", "\U0001f600"):
        assert loaded.decode(loaded.encode_plain(text)) == text
    assert 0 in sentencepiece_like(tmp_path, "word").encode_plain("dog dog dog dog dog dog")


def test_text_that_goes_on_gets_no_space_before_it(tmp_path):
    loaded = sentencepiece_like(tmp_path, "unigram")
    assert loaded.encode_plain("the cat") == loaded.encode_template("the cat") != loaded.encode_plain("the cat", begins=False)
    assert loaded.decode_everything(loaded.encode_plain("cat ") + loaded.encode_response("the<think>cat</think>a")) == (
        "cat the<think>cat</think>a"
    )
