"""Real vLLM in its process: log-probs, repeatability, exact weights, and honest failures."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_r1.config.schema import RolloutConfig
from megatron_r1.errors import RolloutError, WeightSyncError
from megatron_r1.model.presets import PRESETS
from megatron_r1.rollout.options import EngineOptions, engine_options
from megatron_r1.rollout.process import VllmProcessEngine
from megatron_r1.runtime.launch import child_environment
from megatron_r1.types import Prompt, RolloutGroup, Sampling
from tests.random_weights import random_weights, write_random_model

ARCH = PRESETS["tiny"]
EOS = 1
SAMPLING = Sampling(n=1, temperature=1.0, top_p=1.0, max_tokens=16)


def options() -> EngineOptions:
    rollout = RolloutConfig(max_response_tokens=32, kv_cache_bytes=64 << 20)
    made = engine_options(ARCH, rollout, device="cpu", dtype="float32", bos_token_id=0, eos_token_id=EOS, max_prompt_tokens=64)
    return replace(made, worker_extension="tests.pipeline.corrupting_worker.CorruptingWorker")


def start(folder: Path) -> VllmProcessEngine:
    return VllmProcessEngine(options(), lambda ids: " ".join(map(str, ids)), child_environment(), folder / "engine.log")


def prompts(n: int = 32) -> list[Prompt]:
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(8, 33, (n,), generator=generator).tolist()
    tokens = [tuple(torch.randint(2, ARCH.vocab_size, (length,), generator=generator).tolist()) for length in lengths]
    return [Prompt(f"p{i}", "", "", "", ids) for i, ids in enumerate(tokens)]


def sampled(groups: list[RolloutGroup]) -> list[tuple[list[int], list[float]]]:
    return [(r.token_ids, r.rollout_logprobs) for group in groups for r in group.rollouts]


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    engine = start(tmp_path_factory.mktemp("engine"))
    yield engine
    engine.close()


@pytest.fixture
def loaded(engine):
    """The engine with the weights of seed 0."""
    engine.load_weights(random_weights(ARCH, 0), version=0)
    return engine


def test_weights_come_first(engine):
    engine.version = None  # as it is after the start, whichever test runs first
    with pytest.raises(RolloutError, match="no weights"):
        engine.generate(prompts(1), SAMPLING, seed=0)


def test_logprobs_are_those_of_transformers(loaded, tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(write_random_model(tmp_path / "model", ARCH), dtype=torch.float32).eval()
    for temperature in (1.0, 0.7):
        differences = []
        for group in loaded.generate(prompts(), replace(SAMPLING, temperature=temperature), seed=1):
            response = torch.tensor(group.rollouts[0].token_ids)
            tokens = torch.cat([torch.tensor(group.prompt.token_ids), response])
            with torch.no_grad():
                logits = model(tokens[None]).logits[0, -len(response) - 1 : -1] / temperature
            expected = logits.log_softmax(-1).gather(1, response[:, None])[:, 0]
            differences.append((torch.tensor(group.rollouts[0].rollout_logprobs) - expected).abs())
        difference = torch.cat(differences)
        assert difference.mean() < 1e-5 and difference.max() < 1e-3
        assert expected.std() > 0.1, "the distributions are flat: the comparison would show nothing"


def test_update_equals_a_fresh_engine(engine, tmp_path):
    engine.load_weights(random_weights(ARCH, 0), version=0)
    before = sampled(engine.generate(prompts(), SAMPLING, seed=5))
    report = engine.load_weights(random_weights(ARCH, 1), version=1)
    assert report.num_verified == report.num_tensors == sum(1 for _ in random_weights(ARCH, 1))
    after = sampled(engine.generate(prompts(), SAMPLING, seed=5))
    fresh = start(tmp_path)
    try:
        fresh.load_weights(random_weights(ARCH, 1), version=1)
        assert sampled(fresh.generate(prompts(), SAMPLING, seed=5)) == after
    finally:
        fresh.close()
    assert before != after


def test_seed_decides_everything(loaded):
    sampling = replace(SAMPLING, n=4)
    first = loaded.generate(prompts(8), sampling, seed=11)
    loaded.generate(prompts(16), sampling, seed=12)
    again = loaded.generate(prompts(8), sampling, seed=11)
    assert sampled(first) == sampled(again)
    assert sampled(first) != sampled(loaded.generate(prompts(8), sampling, seed=13))
    assert len({tuple(ids) for ids, _ in sampled(first)}) == 32, "samples of one prompt must differ"


def test_responses_end_at_end_of_sequence(loaded):
    groups = loaded.generate(prompts(8), replace(SAMPLING, n=16, max_tokens=32), seed=2)
    rollouts = [r for group in groups for r in group.rollouts]
    assert {r.finished for r in rollouts} == {True, False}
    for r in rollouts:
        assert r.finished == (r.token_ids[-1] == EOS)
        assert EOS not in r.token_ids[:-1] and (r.finished or len(r.token_ids) == 32)
        assert len(r.rollout_logprobs) == len(r.token_ids)
        assert r.text == " ".join(map(str, r.token_ids[:-1] if r.finished else r.token_ids))
    assert all(group.weights_version == 0 for group in groups)


def test_bad_prompts_are_named(loaded):
    long = Prompt("too-long", "", "", "", tuple([5] * 81))
    for prompt, reason in (
        (long, "too-long.*81 tokens"),
        (Prompt("odd", "", "", "", (5, 448)), "odd.*448"),
        (Prompt("empty", "", "", "", ()), "empty"),
    ):
        with pytest.raises(RolloutError, match=reason):
            loaded.generate([*prompts(2), prompt], SAMPLING, seed=0)
    assert len(loaded.generate(prompts(2), SAMPLING, seed=0)) == 2


def test_held_tensors_are_the_sent_ones(loaded):
    """Not only the checksums: the tensors read back from vLLM's fused and packed storage are the sent ones, bit for bit."""
    (held,) = loaded._call("call_workers", "held_tensors")
    for name, tensor in random_weights(ARCH, 0):
        assert torch.equal(torch.from_numpy(held.pop(name)), tensor), name
    assert not held


CORRUPTIONS = {
    "model.embed_tokens.weight": "model.embed_tokens.weight",
    "lm_head.weight": "lm_head.weight",
    "model.norm.weight": "model.norm.weight",
    "model.layers.0.input_layernorm.weight": "model.layers.0.input_layernorm.weight",
    "model.layers.0.self_attn.q_proj.weight": "model.layers.0.self_attn.q_proj.weight",
    "model.layers.0.self_attn.kv_a_layernorm.weight": "model.layers.0.self_attn.kv_a_layernorm.weight",
    "model.layers.1.self_attn.kv_b_proj.weight": "model.layers.1.self_attn.kv_b_proj.weight",
    "model.layers.1.self_attn.mla_attn.mla_attn.W_UV": r"model.layers.1.self_attn.*(W_UV|kv_b_proj)",
    "model.layers.1.self_attn.mla_attn.mla_attn.W_UK_T": r"model.layers.1.self_attn.*(W_UK_T|kv_b_proj)",
    "model.layers.0.mlp.gate_up_proj.weight": "model.layers.0.mlp.up_proj.weight",
    "model.layers.1.mlp.gate.weight": "model.layers.1.mlp.gate.weight",
    "model.layers.1.mlp.gate.e_score_correction_bias": "model.layers.1.mlp.gate.e_score_correction_bias",
    "model.layers.2.mlp.experts.routed_experts.w13_weight": r"model.layers.2.mlp.experts.4.(gate|up)_proj.weight",
    "model.layers.2.mlp.experts.routed_experts.w2_weight": r"model.layers.2.mlp.experts.4.down_proj.weight",
    "model.layers.2.mlp.shared_experts.down_proj.weight": "model.layers.2.mlp.shared_experts.down_proj.weight",
    "model.layers.0.self_attn.rotary_emb.cos_sin_cache": "changed constants: .*cos_sin_cache",
}


def test_one_flipped_bit_is_named(engine, monkeypatch):
    """Damage after the update and before the check is found, whatever it hits."""
    call = engine._call

    def flip_before_check(name, *args, **kwargs):
        if args and args[0] == "held_weights":
            call("call_workers", "flip_bit", target)
        return call(name, *args, **kwargs)

    engine.load_weights(random_weights(ARCH, 0), version=0)
    monkeypatch.setattr(engine, "_call", flip_before_check)
    for target, named in CORRUPTIONS.items():
        with pytest.raises(WeightSyncError, match=named):
            engine.load_weights(random_weights(ARCH, 0), version=0)
        with pytest.raises(RolloutError, match="no weights"):
            engine.generate(prompts(1), SAMPLING, seed=0)
        call("call_workers", "flip_bit", target)
    monkeypatch.undo()
    engine.load_weights(random_weights(ARCH, 0), version=0)


def test_missing_and_unknown_tensors_are_named(engine):
    weights = dict(random_weights(ARCH, 0))
    with pytest.raises(WeightSyncError, match="held but not sent: model.layers.2.mlp.experts.7.down_proj.weight"):
        engine.load_weights(((n, t) for n, t in weights.items() if n != "model.layers.2.mlp.experts.7.down_proj.weight"), 1)
    engine.load_weights(weights.items(), 1)


def test_every_copy_is_checked(tmp_path):
    """A router that kept its own copy of the bias, and a parameter that no rule explains. (Both spoil the engine.)"""
    engine = start(tmp_path)
    try:
        engine.load_weights(random_weights(ARCH, 0), version=0)
        engine._call("call_workers", "replace_router_bias", 1)
        with pytest.raises(WeightSyncError, match=r"contradictions: model.layers.1.mlp.gate.e_score_correction_bias"):
            engine.load_weights(random_weights(ARCH, 0), version=1)
        engine._call("call_workers", "add_parameter")
        with pytest.raises(WeightSyncError, match="uncovered: surplus"):
            engine.load_weights(random_weights(ARCH, 0), version=1)
        os.kill(engine._child.pid, signal.SIGKILL)
        with pytest.raises(RolloutError, match="died in start_weight_update .*SIGKILL.*engine.log"):
            engine.load_weights(random_weights(ARCH, 0), version=2)
        with pytest.raises(RolloutError, match="closed"):
            engine.load_weights(random_weights(ARCH, 0), version=2)
    finally:
        engine.close()
