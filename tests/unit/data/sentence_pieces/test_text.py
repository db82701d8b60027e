"""Encoding and decoding equal the SentencePiece library's, and nothing hostile in a text becomes a token."""

from __future__ import annotations

import json
import pickle
import random
from pathlib import Path

import pytest
import sentencepiece
from transformers import AutoTokenizer

from megatron_r1.data.tokenizer import Tokenizer
from tests.public_data import public_file
from tests.sentence_pieces import KINDS, lines, odd_texts, train

HOSTILE = [
    "<s>",
    "a</s>b",
    "</s></s><s>",
    "\uff1c/s\uff1e",
    "<unk>",
    "<0x0A>",
    "x<ctl>",
    "<think>",
    "\uff1cthink\uff1e",
    "<think></think>",
]


def load(folder: Path, **settings) -> tuple[Tokenizer, sentencepiece.SentencePieceProcessor]:
    content = train(**settings)
    (folder / "own.model").write_bytes(content)
    return Tokenizer.load(folder / "own.model"), sentencepiece.SentencePieceProcessor(model_proto=content)


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_has_the_ids_that_the_library_gives_it(tmp_path, kind):
    tokenizer, library = load(tmp_path, **KINDS[kind])
    tags = ("<think>", "</think>", "\uff1c", "\ud800")  # tags are no tokens here, and the library has no surrogates
    texts = lines(400, seed=1) + [text for text in odd_texts(600) if not any(tag in text for tag in tags)]
    assert len(texts) > 700
    for text in texts:
        ids = library.encode(text)
        assert tokenizer.encode_plain(text) == ids
        assert tokenizer.decode(ids) == library.decode(ids)
    generator = random.Random(kind)
    for _ in range(200):  # any ids: broken characters, spaces, symbols; what a model writes
        ids = [generator.randrange(4, library.vocab_size()) for _ in range(8)]
        assert tokenizer.decode(ids) == library.decode(ids)


def test_tags_stand_where_the_library_puts_them(tmp_path):
    tokenizer, library = load(tmp_path)
    for text in ("ab <think> cd </think>ef", "ab<think>", "ab  <think>\ncd", "ab <think> <think>"):
        assert tokenizer.encode(text) == library.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == library.decode(library.encode(text))


@pytest.mark.parametrize("kind", KINDS)
def test_what_controls_something_stays_text(tmp_path, kind):
    tokenizer, library = load(tmp_path, **KINDS[kind])
    tokens = {library.piece_to_id(name) for name in ("<s>", "</s>", "<ctl>", "<think>", "</think>")}
    unknown = library.unk_id()
    for text in HOSTILE + [text for text in odd_texts(300) if "\ud800" not in text]:
        for ids in (
            tokenizer.encode_plain(text),
            tokenizer.encode_plain(text, begins=False),
            tokenizer.encode_prompt("r1_chat", text)[1][1:],
        ):
            assert not tokens & set(ids)
        if unknown not in ids and "\0" not in text:
            assert "".join(library.normalize(text).split("\u2581")) in tokenizer.decode(tokenizer.encode_plain(text)).replace(
                " ", ""
            )
    assert tokenizer.encode_plain("a\ud800b") == tokenizer.encode_plain("a\ufffdb")


def test_symbols_that_a_template_writes_are_no_text(tmp_path):
    symbols = ("<turn>", "<table>", "<\uff5cUser\uff5c>", "<special>")
    tokenizer, library = load(tmp_path, user_defined_symbols=symbols)
    turn, table, user, special = (library.piece_to_id(symbol) for symbol in symbols)
    text = "a<turn>b<table>c<\uff5cUser\uff5c><special>"
    assert {turn, table, special} <= set(tokenizer.encode_plain(text)) and user not in tokenizer.encode_plain(text)
    assert user in tokenizer.encode_template(text)
    chat = tokenizer.with_chat_template("{{'<turn>' + messages[0].content}}")
    assert set(chat.encode_plain(text)).isdisjoint({turn, user}) and {table, special} <= set(chat.encode_plain(text))
    assert turn in chat.encode_template(text) and chat.is_marker(turn) and not chat.is_marker(table)
    (tmp_path / "in").mkdir()
    (tmp_path / "own.model").rename(tmp_path / "in/tokenizer.model")
    (tmp_path / "in/tokenizer_config.json").write_text('{"additional_special_tokens": ["<special>"], "extra_special_tokens": []}')
    assert special not in Tokenizer.load(tmp_path / "in").encode_plain(text)


def test_text_that_goes_on_keeps_its_edges_and_gets_no_space(tmp_path):
    for kind in ("bpe", "llama"):
        tokenizer, library = load(tmp_path, **KINDS[kind])
        for before, after in (("ab", " cd"), ("ab ", "cd"), ("ab", "cd"), ("ab ", " cd")):
            ids = tokenizer.encode(before + "<think>" + after)
            assert ids == library.encode(before + "<think>" + after)
            ids = tokenizer.encode_plain("x") + tokenizer.encode_plain(before, False) + tokenizer.encode_plain(after, False)
            assert tokenizer.decode(ids) == "x" + before + after


def test_bytes_of_tokens(tmp_path):
    tokenizer, library = load(tmp_path)
    byte, word = library.piece_to_id("<0xE4>"), library.encode("ab")[0]
    found = tokenizer.token_bytes([1, byte, word, library.piece_to_id("<think>"), library.piece_to_id("\u2581\u2581"), -1, 10**6])
    assert found == {1: b"<s>", byte: b"\xe4", word: library.id_to_piece(word).replace("\u2581", " ").encode(),
                     library.piece_to_id("<think>"): b"<think>", library.piece_to_id("\u2581\u2581"): b"  "}  # fmt: skip
    ids = tokenizer.encode_plain("ab \U0001f468 cd")
    assert b"".join(tokenizer.token_bytes(ids)[id] for id in ids).decode() == " ab \U0001f468 cd"


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_encodes_alike_here_and_nearly_so_in_transformers(tmp_path, kind):
    tokenizer, library = load(tmp_path, **KINDS[kind])
    tokenizer.save(tmp_path / "saved")
    again = Tokenizer.load(tmp_path / "saved")
    assert again.fingerprint == tokenizer.fingerprint and again.start_ids == [1] == tokenizer.start_ids
    theirs = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert (theirs.bos_token_id, theirs.eos_token_id) == (1, 2)
    for text in odd_texts(100):
        assert again.encode_plain(text) == pickle.loads(pickle.dumps(tokenizer)).encode_plain(text)
    for text in [text for text in lines(200, seed=2) if library.unk_id() not in library.encode(text)]:
        assert theirs(text).input_ids == [1, *library.encode(text)]
        assert theirs.decode(library.encode(text)) == library.decode(library.encode(text))
        chat = f"<think>{text} </think> {text}</s>"
        assert theirs(chat, add_special_tokens=False).input_ids == tokenizer.encode_template(chat)


def test_space_after_every_token_as_older_conversions_had_it(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/tokenizer.model").write_bytes(train(**KINDS["llama"]))
    ids = {}
    for legacy in (True, False):
        (tmp_path / "in/tokenizer_config.json").write_text(json.dumps({"legacy": legacy, "tokenizer_class": "LlamaTokenizer"}))
        tokenizer = Tokenizer.load(tmp_path / "in")
        tokenizer.save(tmp_path / "out")
        ids[legacy] = tokenizer.encode_template("<s>ab</s>cd")
        assert ids[legacy] == AutoTokenizer.from_pretrained(tmp_path / "out")("<s>ab</s>cd", add_special_tokens=False).input_ids
    assert ids[True] != ids[False] and [id for id in ids[True] if id < 3] == [id for id in ids[False] if id < 3]


def test_ten_thousand_lines_of_eight_languages(tmp_path):
    folders = [public_file("language"), public_file("text")]
    texts = [
        line for folder in folders for path in sorted(folder.iterdir()) for line in path.read_text("utf-8").splitlines() if line
    ]
    assert len(texts) > 10_000
    for kind in ("unigram", "llama"):
        tokenizer, library = load(tmp_path, **KINDS[kind])
        theirs = library.encode(texts[::2] + texts[-1:], num_threads=1)
        assert [tokenizer.encode_plain(text) for text in texts[::2] + texts[-1:]] == theirs
