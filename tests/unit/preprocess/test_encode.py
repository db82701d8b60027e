"""Documents to tokens: what a tokenizer may make of a text, and batches that give what one text after the other gives."""

from __future__ import annotations

import json

import numpy as np

from megatron_r1.cli import main
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.preprocess.encode import encode_texts
from megatron_r1.preprocess.job import TokenOptions
from tests.preprocess_runs import many_texts, save_tokenizer, write_lines


def test_a_text_without_tokens_is_bad(tmp_path, capsys):
    own = save_tokenizer(tmp_path / "own")
    state = json.loads(own.tokenizer_json)
    state["normalizer"] = {"type": "Replace", "pattern": {"String": "\u200b"}, "content": ""}
    Tokenizer(json.dumps(state), own.bos, own.eos, None).save(tmp_path / "strips")
    source = write_lines(tmp_path / "a.jsonl", ["one", "\u200b", "two"])
    paths = {"--input": source, "--output-prefix": tmp_path / "o", "--tokenizer": tmp_path / "strips"}
    command = ["preprocess", *(str(word) for option in paths.items() for word in option)]
    assert main(command) == 2
    assert "a.jsonl:3: an empty document: the tokenizer makes no token of it" in capsys.readouterr().err
    assert main([*command, "--skip-bad"]) == 0
    assert "2 documents" in capsys.readouterr().out


def test_a_batch_is_one_text_after_the_other(tmp_path):
    own = save_tokenizer(tmp_path / "own")
    texts = [*many_texts(40), "<eos>", "a <think> b</think>"]
    lengths, tokens = encode_texts(own, texts, TokenOptions(append_eod=True))
    one_by_one = [[*own.start_ids, *own.encode_plain(text), own.eos_id] for text in texts]
    assert lengths == [[len(ids)] for ids in one_by_one]
    assert tokens.dtype == np.int32 and tokens.tolist() == [token for ids in one_by_one for token in ids]
    assert own.eos_id not in own.encode_plain_batch(["<eos>"])[0]
