"""Qwen3: what sets it apart, and a run of GRPO. What holds for every family, this one included, is tested for all families at once:

`test_weights_parity.py` (logits of transformers, one rank and split), `test_convert.py` (there and back, bit for bit),
`test_vllm_folder.py` (log-probs, updates and tensors of vLLM), `test_reward_model.py` and `../distributed/test_layouts.py`.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from megatron_r1.model.hf_config import read_hf_config
from megatron_r1.model.presets import PRESETS
from megatron_r1.weights.mapping import hf_shapes
from tests.pipeline.grpo_runs import command, finish, grpo_command, read_metrics
from tests.random_weights import further_families, write_random_model

#: config.json of Qwen/Qwen3-0.6B as published.
PUBLISHED = {
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643,
    "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024, "initializer_range": 0.02,
    "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28, "model_type": "qwen3",
    "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": None,
    "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_cache": True,
    "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
#: Billions of parameters of the model cards: all, and those without embedding and output layer.
SIZES = {
    "qwen3_0.6b": (0.6, 0.44), "qwen3_1.7b": (1.7, 1.4), "qwen3_4b": (4.0, 3.6), "qwen3_8b": (8.2, 6.95), "qwen3_14b": (14.8, 13.2),
    "qwen3_32b": (32.8, 31.2),
}  # fmt: skip
TINY = PRESETS["tiny_qwen3"]


def test_the_tests_of_all_families_have_it():
    assert further_families()["qwen3"] is TINY


def test_the_published_config_is_the_preset():
    assert read_hf_config(PUBLISHED) == PRESETS["qwen3_0.6b"]
    assert read_hf_config({key: value for key, value in PUBLISHED.items() if key != "head_dim"}).head_dim == 128  # not 1024 / 16
    written = PRESETS["qwen3_0.6b"].to_hf_config(151643, 151645, "bfloat16")
    same = PUBLISHED.keys() & written.keys() - {"initializer_range"}
    assert {key: written[key] for key in same} == {key: PUBLISHED[key] for key in same}


@pytest.mark.parametrize("name", SIZES)
def test_presets_have_the_published_number_of_parameters(name):
    sizes = {tensor: math.prod(shape) for tensor, shape in hf_shapes(PRESETS[name]).items()}
    vocabulary = sum(size for tensor, size in sizes.items() if tensor in ("model.embed_tokens.weight", "lm_head.weight"))
    total, inner = sum(sizes.values()) / 1e9, (sum(sizes.values()) - vocabulary) / 1e9
    assert (total, inner) == (pytest.approx(SIZES[name][0], abs=0.051), pytest.approx(SIZES[name][1], abs=0.051))


@pytest.mark.parametrize(
    "change", [{"attention_bias": True}, {"use_sliding_window": True}, {"rope_scaling": {"type": "yarn"}}], ids=str
)
def test_what_is_not_built_is_named(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        read_hf_config(PUBLISHED | change)


def test_the_norms_of_queries_and_keys_are_seen(tmp_path: Path):
    """The comparison with transformers means something: other norms give other logits."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(write_random_model(tmp_path / "model", TINY), dtype=torch.float32).eval()
    ids = torch.arange(2, 40)[None]
    with torch.no_grad():
        before = model(ids).logits
        for kind in ("q_norm", "k_norm"):
            getattr(model.model.layers[1].self_attn, kind).weight.mul_(torch.linspace(0.5, 2.0, TINY.head_dim))
            after = model(ids).logits
            assert (after - before).abs().max() > 1e-2
            before = after


def test_grpo_trains_it_with_rollouts_of_vllm(tmp_path: Path) -> None:
    """Pretraining, then GRPO: vLLM samples from every version of the weights, and its log-probs are the trainer's."""
    finish(command("pretrain", tmp_path / "base", "model.preset=tiny_qwen3"), tmp_path / "base.log")
    config = json.loads((tmp_path / "base/hf/config.json").read_text())
    assert (config["model_type"], config["tie_word_embeddings"], config["head_dim"]) == ("qwen3", True, 32)
    finish(grpo_command(tmp_path / "grpo", tmp_path / "base", "grpo.rollouts=3"), tmp_path / "grpo.log")
    steps = [line for line in read_metrics(tmp_path / "grpo") if line["step"] > 0]
    assert len(steps) == 3 and max(line["grad_norm"] for line in steps) > 1e-2
    assert all(line["logprob_diff/mean"] < 1e-4 and line["logprob_diff/max"] < 1e-2 for line in steps)
