"""The files of a tokenizer: those of other kinds, and what goes with a model after training."""

from __future__ import annotations

import json
import pickle

import pytest

from megatron_r1.data.tokenizer import Tokenizer, train_tokenizer
from megatron_r1.errors import DataError
from tests.sentence_pieces import train


@pytest.fixture(scope="module")
def general() -> Tokenizer:
    return train_tokenizer(["Natalia sold 48 clips in April."] * 3, 300)


def test_a_vocabulary_of_another_kind_is_named_with_what_to_do(tmp_path):
    for files, says in (
        ({"tokenizer.model": b"\n\x0e\n\x05<unk>"}, "tokenizer.model: is not a SentencePiece model, or not the whole of one"),
        ({"sentencepiece.bpe.model": b"x"}, "sentencepiece.bpe.model, whose ids transformers counts otherwise.*AutoTokenizer"),
        ({"a.model": b"x", "b.model": b"x"}, "has a.model, b.model: name one of them as data.tokenizer"),
        ({"tiktoken.model": b"IQ== 0\nIg== 1\n"}, "tiktoken.model, a vocabulary of tiktoken.*TikTokenConverter"),
        ({"tokenizer.model": b"IQ== 0\nIg== 1\n"}, "tokenizer.model, a vocabulary of tiktoken"),
        ({"qwen.tiktoken": b"IQ== 0\n"}, "qwen.tiktoken, a vocabulary of tiktoken"),
        ({"tekken.json": b"{}"}, "tekken.json, a vocabulary of mistral-common"),
        ({"vocab.json": b"{}", "merges.txt": b""}, "vocab.json and merges.txt"),
        ({"readme.md": b""}, "tokenizer.json: cannot read the tokenizer.*tools/train_tokenizer.py"),
    ):  # fmt: skip
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_bytes(content)
        with pytest.raises(DataError, match=says) as caught:
            Tokenizer.load(folder)
        assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_what_a_published_folder_says_of_its_tokenizer_goes_with_the_model(general, tmp_path):
    general.save(tmp_path / "published")
    config = {
        "tokenizer_class": "LlamaTokenizerFast", "model_max_length": 16384, "bos_token": {"content": "<bos>", "lstrip": False},
        "eos_token": "<eos>", "add_bos_token": True, "add_eos_token": False, "additional_special_tokens": ["<answer>"],
        "chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}], "legacy": True,
        "added_tokens_decoder": {"1": {"content": "<bos>", "special": True}},
    }  # fmt: skip
    beside = {
        "tokenizer_config.json": json.dumps(config).encode(), "special_tokens_map.json": b'{"eos_token": "<eos>"}',
        "added_tokens.json": b'{"<think>": 3}', "tokenizer.model": b"\x0a\x00", "merges.txt": b"a b",
    }  # fmt: skip
    foreign = {"progress.json": b"{}", "model.safetensors": b"x", "pytorch_model.bin": b"x", "README.md": b"x", "notes.json": b"{}"}
    for name, content in {**beside, **foreign}.items():
        (tmp_path / "published" / name).write_bytes(content)
    loaded = Tokenizer.load(tmp_path / "published")
    pickle.loads(pickle.dumps(loaded)).save(tmp_path / "kept")
    assert {path.name: path.read_bytes() for path in (tmp_path / "kept").iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / "published").iterdir() if path.name not in foreign
    } | {"tokenizer_config.json": (json.dumps(config, indent=2) + "\n").encode()}
    loaded.with_chat_template("new").save(tmp_path / "trained")
    trained = json.loads((tmp_path / "trained/tokenizer_config.json").read_text())
    assert trained == config | {"chat_template": [{"name": "default", "template": "new"}, config["chat_template"][0]]}
    (tmp_path / "published/chat_template.jinja").write_text("beside")
    Tokenizer.load(tmp_path / "published").with_chat_template("new").save(tmp_path / "trained")
    assert (tmp_path / "trained/chat_template.jinja").read_text() == "new"
    assert Tokenizer.load(tmp_path / "trained").chat_template == "new"


def test_control_tokens_may_stand_in_the_older_file(general, tmp_path):
    general.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": true}')
    (tmp_path / "special_tokens_map.json").write_text('{"bos_token": "<bos>", "eos_token": {"content": "<eos>"}}')
    loaded = Tokenizer.load(tmp_path)
    assert (loaded.start_ids, loaded.eos_id, loaded.pad_id) == ([1], 2, 2)


def piece_folder(folder, name="tokenizer.model", files=(), **settings):
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(train(**settings))
    for other, content in dict(files).items():
        (folder / other).write_text(json.dumps(content))
    return folder


def test_a_sentencepiece_model_alone_and_in_a_folder(tmp_path):
    alone = Tokenizer.load(piece_folder(tmp_path / "alone") / "tokenizer.model")
    assert (alone.bos, alone.eos, alone.start_ids, alone.pad_id) == ("<s>", "</s>", [1], 2)
    for name in ("tokenizer.model", "spiece.model", "own.model"):
        found = Tokenizer.load(piece_folder(tmp_path / name, name))
        assert found.fingerprint == alone.fingerprint and found.vocab_size == alone.vocab_size
    config = {
        "tokenizer_class": "LlamaTokenizer", "add_bos_token": False, "chat_template": "t", "eos_token": {"content": "<ctl>"},
        "pad_token": "<pad>", "added_tokens_decoder": {str(alone.vocab_size): {"content": "<pad>", "special": True}},
        "auto_map": {"AutoTokenizer": ["x.T", None]}, "model_max_length": 77,
    }  # fmt: skip
    found = Tokenizer.load(piece_folder(tmp_path / "config", files={"tokenizer_config.json": config}))
    assert (found.bos, found.start_ids, found.eos_id, found.pad_id) == ("<s>", [], 3, alone.vocab_size)
    assert found.chat_template == "t" and found.vocab_size == alone.vocab_size + 1
    found.save(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved/tokenizer_config.json").read_text())
    assert saved["tokenizer_class"] == "PreTrainedTokenizerFast" and saved["model_max_length"] == 77 and "auto_map" not in saved
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == [
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
    ]
    assert Tokenizer.load(tmp_path / "saved").fingerprint == found.fingerprint
    older = {"added_tokens.json": {"<pad>": alone.vocab_size}, "special_tokens_map.json": {"pad_token": "<pad>"}}
    assert Tokenizer.load(piece_folder(tmp_path / "older", files=older)).pad_id == alone.vocab_size
    (tmp_path / "saved/tokenizer.json").write_text(general_json(tmp_path))
    with pytest.raises(DataError, match="tokenizer.json is not that of tokenizer.model beside it"):
        Tokenizer.load(tmp_path / "saved")
    (tmp_path / "saved/tokenizer.model").unlink()
    with pytest.raises(DataError, match="text_encoder='tokenizer.model', but there is no tokenizer.model"):
        Tokenizer.load(tmp_path / "saved")


def general_json(folder):
    train_tokenizer(["a b c"], 300).save(folder / "general")
    return (folder / "general/tokenizer.json").read_text().replace("<bos>", "<s>").replace("<eos>", "<ctl>")


def test_a_folder_with_both_is_read_by_its_tokenizer_json_as_before(general, tmp_path):
    general.save(piece_folder(tmp_path / "both"))
    found = Tokenizer.load(tmp_path / "both")
    assert found.fingerprint == general.fingerprint and found.encode_plain("Natalia") == general.encode_plain("Natalia")


def test_settings_that_do_not_fit_a_sentencepiece_model_are_named(tmp_path):
    size = Tokenizer.load(piece_folder(tmp_path / "size")).vocab_size
    gap = {"added_tokens_decoder": {str(size + 5): {"content": "<pad>", "special": True}}}
    for settings, config, says in (
        ({"eos_id": -1}, {}, "tokenizer.model: has no end of sequence: train it with eos_id"),
        ({}, {"eos_token": None}, "has no end of sequence"),
        ({}, {"eos_token": "<end>"}, "token '<end>' of tokenizer_config.json is no piece of the model"),
        ({}, {"additional_special_tokens": ["<x>"]}, "token '<x>' of tokenizer_config.json is no piece"),
        ({}, {"added_tokens_decoder": {"a": 1}}, "the added tokens are not readable"),
        ({}, {"added_tokens_decoder": [1]}, "the added tokens are not readable"),
        ({}, gap, "leave no gap"),
        ({}, {"add_bos_token": "yes"}, "add_bos_token is 'yes'"),
        ({}, [], "not a tokenizer config"),
    ):
        folder = piece_folder(tmp_path / "bad", files={"tokenizer_config.json": config}, **settings)
        with pytest.raises(DataError, match=says) as caught:
            Tokenizer.load(folder)
        assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
