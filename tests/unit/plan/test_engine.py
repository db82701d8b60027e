"""What an engine's device holds: weights as vLLM splits them, a cache, and how many responses have room in it."""

from __future__ import annotations

import pytest

from megatron_r1.config.load import load_config
from megatron_r1.errors import ConfigError
from megatron_r1.model.presets import PRESETS
from megatron_r1.plan.engine import cached_bytes, engine_memory, engine_weights, samples
from megatron_r1.plan.job import read_job
from megatron_r1.rollout.cache_size import sequence_bytes
from megatron_r1.rollout.options import engine_weight_bytes
from tests.paths import ROOT

H800 = 81_559 * 2**20
V3, QWEN = PRESETS["671b"], PRESETS["qwen2.5_7b"]


def test_one_device_holds_what_the_engine_holds() -> None:
    for name in ("671b", "small", "qwen2.5_7b", "qwen3_0.6b"):
        arch = PRESETS[name]
        assert engine_weights(arch, 1, 2) == engine_weight_bytes(arch, "bfloat16"), name


def test_every_device_of_an_engine_has_what_is_not_split() -> None:
    whole, share = engine_weights(V3, 1, 2), engine_weights(V3, 64, 2)
    replicated = 61 * (7168 * (1536 + 576) + 1536 + 512 + 2 * 7168) + 58 * 257 * 7168 - 58 * 7168 + 58 * 256 + 7168
    assert share == pytest.approx(whole / 64 + 2 * replicated * 63 / 64, rel=1e-6)
    assert round(whole / 1e9) == 1342 and round(share / 1e9, 1) == 23.0


def test_heads_are_shared_and_a_latent_is_not() -> None:
    assert cached_bytes(V3, 32768, 64, 2) == cached_bytes(V3, 32768, 1, 2) == 32768 * 61 * 576 * 2
    assert cached_bytes(QWEN, 1024, 2, 2) == 1024 * 28 * 2 * 4 * 128 * 2 // 2
    assert cached_bytes(QWEN, 1024, 2, 4) == sequence_bytes(QWEN, "float32", 1024, 2)
    assert cached_bytes(QWEN, 1, 1, 2) == cached_bytes(QWEN, 64, 1, 2), "whole blocks"


def test_the_cache_is_what_the_share_of_the_device_leaves() -> None:
    job = read_job(load_config(ROOT / "examples/v3_671b/r1_zero.yaml", ["rollout.gpu_memory_utilization=0.4"]), "grpo", nodes=64)
    found = engine_memory(job, H800)
    assert found.weights + found.activations + found.cache == pytest.approx(0.4 * H800)
    assert found.sequence == 67584 * 61 * 576 * 2, "engines are opened for the longest response of the run"
    assert found.sequences == int(found.cache // found.sequence) == 2
    given = read_job(load_config(ROOT / "examples/v3_671b/r1_zero.yaml", ["rollout.kv_cache_bytes=1000000"]), "grpo", nodes=64)
    assert engine_memory(given, H800).sequences == 0


def test_what_has_engines() -> None:
    config = load_config(ROOT / "examples/v3_671b/r1.yaml")
    assert [samples(read_job(config, stage)) for stage in ("grpo", "rejection", "sft", "convert")] == [True, True, False, False]
    rejection = read_job(load_config(ROOT / "examples/v3_671b/r1.yaml", ["curation.rejection.max_tokens=1000"]), "rejection")
    assert engine_memory(rejection, H800).sequence == cached_bytes(V3, 2048 + 1000, 64, 2)


def test_a_size_that_does_not_divide_is_one_line() -> None:
    job = read_job(load_config(ROOT / "examples/v3_671b/r1_zero.yaml", ["rollout.tensor_parallel_size=48"]), "grpo", nodes=64)
    with pytest.raises(ConfigError, match="rollout.tensor_parallel_size=48 does not divide the model's num_attention_heads=128"):
        engine_memory(job, H800)
