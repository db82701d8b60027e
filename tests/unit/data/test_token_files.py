"""Bad .bin and .idx files are refused in one line that names the file."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_r1.data.tally.tokenizer import train_tally_tokenizer
from megatron_r1.data.token_files import open_token_file
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.errors import DataError
from tests.token_sources import numbered_documents, write_source

EOS = 2


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tally_tokenizer()


@pytest.fixture
def prefix(tmp_path) -> Path:
    write_source(tmp_path / "text", numbered_documents(20, 5), "uint16")
    return tmp_path / "text"


def problem(prefix: Path, tokenizer: Tokenizer) -> str:
    with pytest.raises(DataError) as caught:
        open_token_file(str(prefix)).check(tokenizer)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
def test_what_megatron_writes_is_read(dtype, tmp_path, tokenizer):
    documents = numbered_documents(20, 5)
    prefix = write_source(tmp_path / "text", documents, dtype)
    file = open_token_file(prefix)
    assert file.check(tokenizer) is None
    assert (file.documents, file.tokens, file.dtype) == (20, sum(map(len, documents)), np.dtype(dtype))
    assert [file.read(number).tolist() for number in range(20)] == documents
    assert file.tokens_of(range(3, 9)) == sum(map(len, documents[3:9])) and file.tokens_of(range(0)) == 0
    assert file.identify() == open_token_file(prefix).identify()
    other = write_source(tmp_path / "other", documents[::-1], dtype)
    assert open_token_file(other).identify() != file.identify()


def test_megatron_s_own_builder_writes_such_files(tmp_path):
    from megatron_r1.mcore import host

    host.activate("cpu")
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    documents = numbered_documents(20, 5)
    builder = IndexedDatasetBuilder(str(tmp_path / "a.bin"), np.int32)
    for document in documents:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(str(tmp_path / "a.idx"))
    write_source(tmp_path / "b", documents)
    for ending in (".bin", ".idx"):
        assert (tmp_path / f"a{ending}").read_bytes() == (tmp_path / f"b{ending}").read_bytes()


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def append(path: Path, content: bytes) -> None:
    path.write_bytes(path.read_bytes() + content)


def put(path: Path, place: int, content: bytes) -> None:
    data = bytearray(path.read_bytes())
    data[place : place + len(content)] = content
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("ending", "damage", "told"),
    [
        (".bin", lambda p: cut(p, 100), "is cut off: it has 100 bytes, and text.idx says"),
        (".bin", lambda p: append(p, b"more"), "they do not belong together"),
        (".bin", Path.unlink, "text.bin: cannot be read (No such file or directory)"),
        (".idx", Path.unlink, "text.idx: cannot be read (No such file or directory)"),
        (".idx", lambda p: cut(p, 20), "is no index of tokenised documents"),
        (".idx", lambda p: cut(p, 200), "is cut off or damaged: it has 200 bytes"),
        (".idx", lambda p: put(p, 0, b"x"), "is no index of tokenised documents"),
        (".idx", lambda p: put(p, 9, b"\x02"), "of version 2 with numbers of kind 8"),
        (".idx", lambda p: put(p, 17, b"\x06"), "with numbers of kind 6"),
        (".idx", lambda p: put(p, 18, struct.pack("<Q", 0)), "holds no documents"),
        (".idx", lambda p: append(p, bytes(20)), "holds several modalities"),
        (".idx", lambda p: put(p, 34 + 4 * 3, struct.pack("<i", 1)), "document 5 does not begin where the one before it ends"),
        (".idx", lambda p: put(p, 34 + 4 * 3, struct.pack("<i", 0)), "document 4 is empty"),
        (".idx", lambda p: put(p, 34 + 4 * 3, struct.pack("<i", -5)), "document 4 is empty"),
        (".bin", lambda p: cut(p, 0), "is cut off: it has 0 bytes"),
        (".idx", lambda p: cut(p, 0), "is no index of tokenised documents"),
        (".idx", lambda p: put(p, 18, struct.pack("<Q", 1 << 60)), "is cut off or damaged"),
        (".idx", lambda p: put(p, 26, struct.pack("<Q", 22)), "is cut off or damaged"),
        (".idx", lambda p: put(p, 18, struct.pack("<QQ", 18, 24)), "text.bin: "),  # as many bytes as its header says
        (".idx", lambda p: put(p, 18, struct.pack("<QQ", 22, 18)), "text.bin: "),
        (
            ".idx",
            lambda p: put(p, 34 + 12 * 20 + 8 * 20, struct.pack("<q", 19)),
            "documents are of sequences 0 to 19, and it has 20",
        ),
        (".idx", lambda p: put(p, 34 + 12 * 20, struct.pack("<q", 1)), "documents are of sequences 1 to 20, and it has 20"),
        (".idx", lambda p: put(p, 17, b"\x04"), "text.bin: is cut off"),  # two bytes a token, called four
        (".bin", lambda p: (p.unlink(), p.mkdir()), "text.bin: is no file"),
        (".idx", lambda p: (p.unlink(), os.mkfifo(p)), "text.idx: is no file"),
        (".bin", lambda p: (p.unlink(), p.symlink_to(p)), "text.bin: cannot be read (Too many levels of symbolic links)"),
        (".idx", lambda p: (p.unlink(), p.symlink_to(p)), "text.idx: cannot be read (Too many levels of symbolic links)"),
    ],
)
def test_damage_is_told(ending, damage, told, prefix, tokenizer):
    damage(prefix.with_name(f"text{ending}"))
    assert told in problem(prefix, tokenizer)


def test_another_name_than_a_prefix_is_told(prefix, tokenizer):
    assert "leave out the ending" in problem(Path(f"{prefix}.bin"), tokenizer)
    assert "leave out the ending" in problem(Path(f"{prefix}.idx"), tokenizer)
    assert "is a folder: name a .bin and its .idx in it" in problem(prefix.parent, tokenizer)
    assert "cannot be read (File name too long)" in problem(Path(f"{prefix}{'x' * 300}"), tokenizer)
    assert "cannot be read (Not a directory)" in problem(Path(f"{prefix}.bin/more"), tokenizer)
    assert "cannot be read (embedded null byte)" in problem(Path(f"{prefix}\0"), tokenizer)


def test_tokens_of_another_vocabulary_are_told(tmp_path, tokenizer):
    documents = numbered_documents(400, 5)
    assert max(map(max, documents)) > tokenizer.vocab_size
    write_source(tmp_path / "text", documents)
    assert f"and the tokenizer has {tokenizer.vocab_size}" in problem(tmp_path / "text", tokenizer)
    write_source(tmp_path / "text", [[5, -3, EOS]])
    assert "document 1: holds token -3" in problem(tmp_path / "text", tokenizer)


def test_documents_without_an_end_are_told_and_may_be_meant(tmp_path, tokenizer):
    prefix = write_source(tmp_path / "text", numbered_documents(20, 5, eos=3))
    assert "none of 20 documents looked at ends with <eos>" in open_token_file(prefix).check(tokenizer)


def test_the_sidecar_says_who_made_the_tokens(tmp_path, tokenizer):
    documents = numbered_documents(20, 5, eos=3)
    said = {
        "tokenizer": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size, "documents": 20, "tokens": sum(map(len, documents)),
        "dtype": "int32",
    }  # fmt: skip
    prefix = tmp_path / "text"
    write_source(prefix, documents, sidecar=said)
    assert open_token_file(str(prefix)).check(tokenizer) is None
    for wrong, told in (
        ({"tokenizer": "x"}, "was tokenised with another tokenizer"),
        ({"documents": 21}, "documents is 21, in text.idx 20"),
        ({"tokens": 1}, "tokens is 1, in text.idx"),
        ({"dtype": "uint16"}, "dtype is uint16, in text.idx int32"),
    ):
        Path(f"{prefix}.json").write_text(json.dumps(said | wrong))
        assert told in problem(prefix, tokenizer)
    for content in ("", "[]", "{}", "\xff"):
        Path(f"{prefix}.json").write_text(content, encoding="latin-1")
        assert "does not say how the tokens were made" in problem(prefix, tokenizer)
