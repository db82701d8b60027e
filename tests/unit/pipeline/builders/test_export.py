"""What stands beside the weights of a trained model: all of the published one's settings, and nothing else of its folder."""

from __future__ import annotations

import json
from types import SimpleNamespace

import torch

from megatron_r1.config.model import ModelConfig
from megatron_r1.data.tokenizer import Tokenizer, train_tokenizer
from megatron_r1.model.presets import PRESETS
from megatron_r1.pipeline.builders.export import describe_policy
from megatron_r1.pipeline.builders.models import _load_given_weights
from megatron_r1.weights.generation import Generation


def test_settings_of_a_published_folder_go_through_training(tmp_path):
    published, checkpoint = tmp_path / "published", tmp_path / "checkpoint"
    train_tokenizer(["Some words."] * 3, 300).save(published)
    config = json.loads((published / "tokenizer_config.json").read_text()) | {"model_max_length": 4096, "chat_template": "t"}
    generation = {"eos_token_id": [7, 8], "temperature": 0.6}
    files = {
        "config.json": {"eos_token_id": 7}, "generation_config.json": generation, "tokenizer_config.json": config,
        "special_tokens_map.json": {"eos_token": "<eos>"}, "added_tokens.json": {"<think>": 3}, "progress.json": {"updates": 9},
        "model.safetensors.index.json": {}, "trainer_state.json": {},
    }  # fmt: skip
    for name, content in files.items():
        (published / name).write_text(json.dumps(content))
    (published / "pytorch_model.bin").write_bytes(b"old")

    policy = SimpleNamespace(
        arch=PRESETS["tiny"], modules=[SimpleNamespace(config=SimpleNamespace(params_dtype=torch.bfloat16))],
        load_hf=lambda folder, trunk: None, generation=Generation(),
    )  # fmt: skip
    _load_given_weights(ModelConfig(weights=str(published)), policy)
    checkpoint.mkdir()
    tokenizer = Tokenizer.load(published)
    describe_policy(policy, tokenizer, checkpoint)
    assert {path.name for path in checkpoint.iterdir()} == {
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
        "added_tokens.json",
    }  # fmt: skip
    written = {name: json.loads((checkpoint / name).read_text()) for name in files if (checkpoint / name).is_file()}
    assert written["config.json"]["eos_token_id"] == [7, tokenizer.eos_id]
    assert written["generation_config.json"] == generation | {"eos_token_id": [7, 8, tokenizer.eos_id]}
    assert written["tokenizer_config.json"] == config
    assert (checkpoint / "tokenizer.json").read_bytes() == (published / "tokenizer.json").read_bytes()
