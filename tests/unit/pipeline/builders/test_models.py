"""What stands in `model.weights` is looked at before anything is built of it."""

from __future__ import annotations

import json

import pytest

from megatron_r1.config.data import DataConfig
from megatron_r1.config.model import ModelConfig
from megatron_r1.data.tokenizer import train_tokenizer
from megatron_r1.errors import ConfigError, R1Error
from megatron_r1.pipeline.builders.models import build_architecture, build_tokenizer
from tests.random_weights import full_architecture, write_random_model


@pytest.fixture
def folder(tmp_path):
    return write_random_model(tmp_path / "model", full_architecture())


@pytest.mark.parametrize(
    ("lie", "named"),
    [
        ({"num_hidden_layers": 1000}, "lacks tensors"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers"),
        ({"n_routed_experts": 8192}, "lacks tensors"),
        ({"n_routed_experts": 8192, "num_hidden_layers": 1000}, "more than 65,536 experts"),
        ({"hidden_size": 1 << 19}, "has shape"),
        ({"moe_intermediate_size": 1 << 19}, "experts.*has shape"),
        ({"vocab_size": 1 << 21}, "embed_tokens.weight in .* has shape .130, 64., expected .2097152, 64."),
        ({"vocab_size": -1}, "vocab_size"),
        ({"intermediate_size": 512}, "layers.0.mlp.gate_proj.* expected .512, 64."),
    ],
    ids=str,
)
def test_a_config_that_lies_is_one_line_before_memory_is_taken(folder, lie, named):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | lie))
    with pytest.raises(R1Error, match=named) as caught:
        build_architecture(ModelConfig(weights=str(folder)))
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_the_advice_for_a_tokenizer_that_is_too_large_can_be_followed(folder, tmp_path):
    train_tokenizer(["a text"], 300).save(tmp_path / "tokenizer")
    data, given = DataConfig(tokenizer=str(tmp_path / "tokenizer")), ModelConfig(weights=str(folder))
    with pytest.raises(ConfigError, match="vocab_size is 130: give the model's own tokenizer in data.tokenizer"):
        build_tokenizer(data, given, build_architecture(given))
    fresh = ModelConfig(preset="tiny", overrides={"vocab_size": 130})
    with pytest.raises(ConfigError, match="set model.overrides.vocab_size=") as caught:
        build_tokenizer(data, fresh, build_architecture(fresh))
    size = int(str(caught.value).partition("vocab_size=")[2].partition(",")[0])
    followed = ModelConfig(preset="tiny", overrides={"vocab_size": size})
    assert build_tokenizer(data, followed, build_architecture(followed)).vocab_size == size


def test_a_folder_that_is_whole_is_read(folder):
    assert build_architecture(ModelConfig(weights=str(folder))) == full_architecture().model_copy(update={"init_std": 0.006})
