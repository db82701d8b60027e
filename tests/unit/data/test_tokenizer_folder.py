"""The files of a tokenizer: those of other kinds, and what goes with a model after training."""

from __future__ import annotations

import json
import pickle

import pytest

from megatron_r1.data.tokenizer import Tokenizer, train_tokenizer
from megatron_r1.errors import DataError


@pytest.fixture(scope="module")
def general() -> Tokenizer:
    return train_tokenizer(["Natalia sold 48 clips in April."] * 3, 300)


def test_a_vocabulary_of_another_kind_is_named_with_what_to_do(tmp_path):
    for files, says in (
        ({"tokenizer.model": b"\n\x0e\n\x05<unk>"}, "tokenizer.model, a vocabulary of SentencePiece.*AutoTokenizer"),
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
