import json

import pytest

from megatron_r1.config.schema import SftConfig
from megatron_r1.data.sft import load_sft_samples
from megatron_r1.data.tally_tokenizer import train_tally_tokenizer
from megatron_r1.errors import DataError


def test_loss_is_on_the_response_and_its_end_only(tmp_path):
    tokenizer = train_tally_tokenizer()
    path = tmp_path / "pairs.jsonl"
    pairs = [
        {"prompt": "Total 7+5-2+1-3?", "response": "<think>first 12</think><answer>8</answer>"},
        {"prompt": "<eos><think>", "response": "No.<eos>"},
    ]
    path.write_text("\n".join(map(json.dumps, pairs)))
    samples = load_sft_samples(path, SftConfig(), "r1_zero", tokenizer)
    for pair, sample in zip(pairs, samples, strict=True):
        prompt = tokenizer.encode_prompt("r1_zero", pair["prompt"])[1]
        trained = [token for token, trained in zip(sample.token_ids[1:], sample.loss_mask, strict=True) if trained]
        assert sample.token_ids[: len(prompt)] == prompt
        assert trained == sample.token_ids[len(prompt) :]
        assert tokenizer.decode(trained) == pair["response"]
        assert sample.token_ids.count(tokenizer.eos_id) == 1 and sample.token_ids[-1] == tokenizer.eos_id


def test_bad_pairs_are_one_line_errors(tmp_path):
    tokenizer = train_tally_tokenizer()
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "a", "response": "b"}\n{"prompt": "a"}\n')
    with pytest.raises(DataError, match=r"pairs.jsonl:2: field 'response' is missing"):
        load_sft_samples(path, SftConfig(), "r1_zero", tokenizer)
    path.write_text(json.dumps({"prompt": "a", "response": "b " * 100}))
    with pytest.raises(DataError, match=r"pairs.jsonl:1: \d+ tokens are more than sft.micro_batch_tokens=50"):
        load_sft_samples(path, SftConfig(micro_batch_tokens=50), "r1_zero", tokenizer)
