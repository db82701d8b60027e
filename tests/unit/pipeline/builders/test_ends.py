"""Every end of sequence that a published folder names ends a response."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_r1.config.data import DataConfig
from megatron_r1.config.model import ModelConfig
from megatron_r1.data.tokenizer import train_tokenizer
from megatron_r1.errors import CheckpointError
from megatron_r1.model.presets import PRESETS
from megatron_r1.pipeline.builders.ends import find_end_tokens, with_end_of_turn
from megatron_r1.weights.generation import Generation

ARCH = PRESETS["671b"]  # 129,280 tokens
TOKENIZER = SimpleNamespace(eos_id=128009)


def ends(folder: Path, config: object, generation: object) -> tuple[int, ...]:
    """Of a folder whose files name these."""
    for name, named in (("config.json", config), ("generation_config.json", generation)):
        if named != "no file":
            (folder / name).write_text(json.dumps({} if named == "no key" else {"eos_token_id": named}))
    return find_end_tokens(ModelConfig(weights=str(folder)), ARCH, TOKENIZER)


@pytest.mark.parametrize(
    ("config", "generation", "want"),
    [
        ([128001, 128008, 128009], [128001, 128008, 128009], (128009, 128001, 128008)),  # Llama 3.1 instruct
        (128001, [128001, 128009], (128009, 128001)),  # Llama 3 instruct
        (128009, [128009, 128000], (128009, 128000)),  # as Qwen2.5 instruct
        (128010, 128011, (128009, 128010, 128011)),  # as Moonlight: three names for it
        (128009, "no file", (128009,)),
        (None, "no key", (128009,)),
        ("no key", [], (128009,)),
    ],
)
def test_the_ends_of_both_files_count(tmp_path, config, generation, want):
    assert ends(tmp_path, config, generation) == want


def test_a_fresh_model_has_its_tokenizers_end():
    assert find_end_tokens(ModelConfig(), ARCH, TOKENIZER) == (128009,)


@pytest.mark.parametrize("named", [-1, 129280, 1.5, True, "<|eot_id|>", [1, None], {"id": 1}], ids=str)
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_what_is_no_token_is_one_line(tmp_path, file, named):
    both = {"config.json": 1, "generation_config.json": 1} | {file: named}
    with pytest.raises(CheckpointError, match=f"{file}: eos_token_id is .*0 to 129279") as caught:
        ends(tmp_path, both["config.json"], both["generation_config.json"])
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_one_line(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for text in ("[" * 100_000, "{", "[1]"):
        (tmp_path / "generation_config.json").write_text(text)
        with pytest.raises(CheckpointError, match="generation_config.json cannot be used"):
            find_end_tokens(ModelConfig(weights=str(tmp_path)), ARCH, TOKENIZER)


QWEN = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"


@pytest.mark.parametrize(
    ("jinja", "ends"),
    [
        (QWEN, ["<eos>", "<|im_end|>"]),  # a base of Qwen2.5: its tokenizer's own end is that of a document
        (QWEN.replace("<|im_end|>", "<eos>"), ["<eos>"]),
        (QWEN.replace("<|im_end|>", "</think>\\n<|im_end|>"), ["<eos>", "<|im_end|>"]),
        (QWEN.replace("<|im_end|>", ""), ["<eos>"]),  # nothing ends a turn
        ("{{ raise_exception('no') }}", ["<eos>"]),
        ("{{ messages[0].content }}", ["<eos>"]),
    ],
)
def test_the_end_of_a_turn_of_the_tokenizers_template_counts(tmp_path, jinja, ends):
    tokenizer = train_tokenizer(["user assistant"], 320, single_tokens=("<|im_start|>", "<|im_end|>")).with_chat_template(jinja)
    ids = tuple(tokenizer.encode_template(end)[0] for end in ends)
    own = DataConfig(template="tokenizer")
    assert find_end_tokens(ModelConfig(), ARCH, tokenizer, own) == ids
    assert find_end_tokens(ModelConfig(), ARCH, tokenizer, DataConfig()) == ids[:1]
    told = with_end_of_turn(Generation(), own, tokenizer)
    assert told.ends(ids[0]) == ([*ids[1:], ids[0]] if ids[1:] else ids[0])
    assert with_end_of_turn(Generation(), DataConfig(), tokenizer) == Generation()
    known = Generation({"top_p": 0.8}, (), ids)  # generation_config.json names them: nothing to add
    assert with_end_of_turn(known, own, tokenizer) is known
    lacking = with_end_of_turn(Generation({"top_p": 0.8}, ids[:1], ids[:1]), own, tokenizer)
    assert lacking.to_json(0, ids[0])["eos_token_id"] == (list(ids) if ids[1:] else ids[0])
