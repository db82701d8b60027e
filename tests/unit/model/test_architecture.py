"""Published config.json files are read as they are; what this project does not build is refused by name."""

from __future__ import annotations

import pytest

from megatron_r1.model.hf_config import read_hf_config

QWEN = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 152064, "hidden_size": 3584,
    "num_hidden_layers": 28,
    "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4, "max_position_embeddings": 131072,
    "rope_theta": 1000000.0, "rms_norm_eps": 1e-06, "tie_word_embeddings": False, "hidden_act": "silu", "use_sliding_window": False,
    "sliding_window": 131072, "max_window_layers": 28,
}  # fmt: skip
LLAMA_SCALING = {
    "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192, "rope_type": "llama3",
}  # fmt: skip
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096,
    "num_hidden_layers": 32,
    "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072,
    "rope_theta": 500000.0, "rms_norm_eps": 1e-05, "tie_word_embeddings": False, "hidden_act": "silu", "attention_bias": False,
    "mlp_bias": False, "pretraining_tp": 1, "rope_scaling": LLAMA_SCALING,
}  # fmt: skip


@pytest.mark.parametrize("config", [QWEN, LLAMA], ids=["qwen2", "llama"])
def test_reading_and_writing_a_config_changes_nothing(config):
    arch = read_hf_config(config)
    assert arch.head_dim == 128
    written = arch.to_hf_config(0, 1, "bfloat16")
    assert read_hf_config(written).model_copy(update={"init_std": arch.init_std}) == arch
    assert {key: written[key] for key in config if key in written} == {key: config[key] for key in config if key in written}


def test_rope_as_transformers_5_writes_it():
    config = {key: value for key, value in LLAMA.items() if not key.startswith("rope")}
    assert read_hf_config(config | {"rope_parameters": {**LLAMA_SCALING, "rope_theta": 500000.0}}) == read_hf_config(LLAMA)
    config = {key: value for key, value in QWEN.items() if not key.startswith("rope")}
    assert read_hf_config(config | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}) == read_hf_config(QWEN)


@pytest.mark.parametrize(
    ("config", "change", "named"),
    [
        (QWEN, {"model_type": "mixtral"}, "model_type is 'mixtral', supported are deepseek_v2, deepseek_v3, llama"),
        (QWEN, {"use_sliding_window": True}, "use_sliding_window is True"),
        (QWEN, {"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope_scaling is of type 'dynamic'"),
        (QWEN, {"num_key_value_heads": 5}, "num_key_value_heads=5 does not divide num_attention_heads=28"),
        (QWEN, {"hidden_size": "wide"}, "hidden_size"),
        (QWEN, {"vocab_size": None}, "vocab_size Field required"),
        (LLAMA, {"attention_bias": True}, "attention_bias is True"),
        (LLAMA, {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling is of type 'linear'"),
    ],
)
def test_what_is_not_built_is_named(config, change, named):
    with pytest.raises(ValueError, match=named) as caught:
        read_hf_config(config | change)
    assert "\n" not in str(caught.value)
