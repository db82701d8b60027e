"""Real vLLM in its process, on V3: repeatability, exact weights, and honest failures. Log-probs are in test_vllm_folder."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_r1.errors import RolloutError, WeightSyncError
from megatron_r1.evaluation.benchmark_problems import BenchmarkProblem
from megatron_r1.evaluation.models import EngineModel, Pass
from megatron_r1.evaluation.sample_ledger import open_samples
from megatron_r1.model.presets import PRESETS, resolve_architecture
from megatron_r1.rollout.prompt_queue import Taken
from megatron_r1.rollout.sync.transfer import WeightTransfer
from megatron_r1.rollout.vllm_client import VllmProcessEngine
from megatron_r1.runtime.launch import child_environment
from megatron_r1.types import Prompt
from megatron_r1.weights.shard_plan import StoredWeights
from tests.pipeline.engine_cases import (
    SAMPLING,
    UNEVEN_V3,
    check_corruptions,
    check_held_tensors,
    difference_to_transformers,
    options,
    prompts,
    sampled,
)
from tests.random_weights import random_source, random_weights, write_random_model

ARCH = PRESETS["tiny"]
EOS = 1


def start(folder: Path) -> VllmProcessEngine:
    corruptible = replace(options(ARCH), worker_extension="tests.pipeline.packing_worker.CorruptingWorker")
    return VllmProcessEngine(corruptible, lambda ids: " ".join(map(str, ids)), child_environment(), folder / "engine.log")


def end(engine: VllmProcessEngine) -> None:
    """Without the seconds that vLLM takes to leave by itself."""
    engine._channel.close(patience=0)
    engine.close()


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    engine = start(tmp_path_factory.mktemp("engine"))
    yield engine
    end(engine)


@pytest.fixture(scope="module")
def second(tmp_path_factory):
    """Another engine, which nothing but seed 1 was loaded into."""
    engine = start(tmp_path_factory.mktemp("second"))
    engine.load_weights(random_source(ARCH, 1), version=1)
    yield engine
    end(engine)


@pytest.fixture
def loaded(engine):
    """The engine with the weights of seed 0."""
    engine.load_weights(random_source(ARCH, 0), version=0)
    return engine


def test_an_answer_is_told_token_by_token_and_can_be_stopped(loaded):
    prompt, greedy = prompts(ARCH)[0], replace(SAMPLING, temperature=0.0)
    (group,) = loaded.generate([prompt], greedy, seed=0)
    (whole,) = group.rollouts
    heard = []
    answer = loaded.answer(prompt, greedy, 0, lambda ids: heard.append(ids) is None)
    assert answer.token_ids.tolist() == whole.token_ids.tolist() == [token for ids in heard for token in ids]
    assert len(heard) == len(whole.token_ids) > 3 and (answer.finished, answer.text) == (whole.finished, whole.text)
    assert abs(answer.rollout_logprobs - whole.rollout_logprobs).max() < 1e-5
    heard.clear()
    stopped = loaded.answer(prompt, greedy, 0, lambda ids: heard.append(ids) is None and len(heard) < 3)
    assert stopped.token_ids.tolist() == whole.token_ids.tolist()[:3] and not stopped.finished
    assert sampled(loaded.generate([prompt], greedy, seed=0)) == sampled([group])


def test_weights_come_first(engine):
    engine.version = None  # as it is after the start, whichever test runs first
    with pytest.raises(RolloutError, match="no weights"):
        engine.generate(prompts(ARCH, 1), SAMPLING, seed=0)


def test_every_part_of_v3_on_two_ranks(tmp_path):
    """Sharded weights verify too, with a padded vocabulary and padded experts; the draft layer is not sent."""
    arch = resolve_architecture("tiny", UNEVEN_V3)
    engine = VllmProcessEngine(options(arch, 2), str, child_environment(), tmp_path / "engine.log")
    try:
        engine.load_weights(random_source(arch, 1), version=0)
        report = engine.load_weights(random_source(arch, 0), version=1)
        draft = [name for name, _ in random_weights(arch, 0) if name.startswith("model.layers.3.")]
        assert report.num_verified == sum(1 for _ in random_weights(arch, 0)) - len(draft) and draft
        for received, held in zip(report.received_bytes, report.held_bytes, strict=True):
            assert held < received < 1.02 * held < 0.75 * report.num_bytes, "two ranks, each its own"
        groups = engine.generate(prompts(arch, 8), SAMPLING, seed=1)
    finally:
        engine.close()
    difference = difference_to_transformers(write_random_model(tmp_path / "model", arch), groups, 1.0)
    assert difference.mean() < 1e-5 and difference.max() < 1e-3


def test_update_equals_a_fresh_engine(engine, second):
    engine.load_weights(random_source(ARCH, 0), version=0)
    before = sampled(engine.generate(prompts(ARCH), SAMPLING, seed=5))
    report = engine.load_weights(random_source(ARCH, 1), version=1)
    assert report.num_verified == report.num_tensors == sum(1 for _ in random_weights(ARCH, 1))
    after = sampled(engine.generate(prompts(ARCH), SAMPLING, seed=5))
    assert before != after
    assert sampled(second.generate(prompts(ARCH), SAMPLING, seed=5)) == after


def test_weights_over_nccl_go_in_buckets_and_a_lost_engine_is_not_waited_for(engine):
    """Both halves on the real model, with a communicator that is played: every bucket is a call of its own."""
    (calls,) = engine._call("call_workers", "update_over_nccl", ARCH, 0, 1 << 20, False)
    begin = ["init_weight_transfer_engine", "call_workers", "call_workers", "start_weight_update"]
    size = sum(tensor.nbytes for _, tensor in random_weights(ARCH, 0))
    buckets = len(calls) - len(begin) - 1
    assert calls == [*begin, *["update_weights"] * buckets, "finish_weight_update"] and size / (1 << 20) <= buckets <= size / (
        1 << 19
    )
    check_held_tensors(engine, ARCH)
    (calls,) = engine._call("call_workers", "update_over_nccl", ARCH, 0, 1 << 20, True)
    assert calls[len(begin) :] == ["update_weights", "lost: the rollout engine gave no sign"]


def test_the_prompt_of_a_group_is_computed_once_to_the_same_bits(loaded):
    """One step takes 2,048 tokens: the prompts of 40 groups of 6 go into several, beside tokens of those that came before."""
    asked, sampling = prompts(ARCH, 20), replace(SAMPLING, n=6, max_tokens=5)
    asked += [replace(prompt, id=f"again {prompt.id}") for prompt in asked]
    found = {}
    for share in (True, False):
        loaded._call("call_workers", "count_prompts", share)
        groups = loaded.generate(asked, sampling, seed=4)
        (rows,) = loaded._call("call_workers", "counted_prompts")
        found[share] = sampled(groups), rows
    loaded._call("call_workers", "count_prompts", True)
    length = sum(len(prompt.token_ids) for prompt in asked[:20])
    assert found[True][0] == found[False][0]
    assert found[False][1] == [12 * length] * 2 and found[True][1][0] == 12 * length
    assert found[True][1][1] <= length * 3, "once in every step that has it"


def test_seed_decides_everything(loaded):
    sampling = replace(SAMPLING, n=4)
    first = loaded.generate(prompts(ARCH, 8), sampling, seed=11)
    loaded.generate(prompts(ARCH, 16), sampling, seed=12)
    again = loaded.generate(prompts(ARCH, 8), sampling, seed=11)
    assert sampled(first) == sampled(again)
    assert sampled(first) != sampled(loaded.generate(prompts(ARCH, 8), sampling, seed=13))
    mixed = loaded.generate(prompts(ARCH, 8), replace(sampling, greedy=1), seed=11)
    alone = loaded.generate(prompts(ARCH, 8), replace(SAMPLING, temperature=0.0), seed=0)
    for group, seeded, greedy in zip(mixed, first, alone, strict=True):
        expected = [rollout.token_ids.tolist() for rollout in (*seeded.rollouts, *greedy.rollouts)]
        assert [rollout.token_ids.tolist() for rollout in group.rollouts] == expected, "greedy ones beside the others"
    assert len({tuple(ids) for ids, _ in sampled(first)}) == 32, "samples of one prompt must differ"


def test_who_samples_a_prompt_and_when_does_not_change_its_responses(loaded):
    """Two engines that share a batch, played by one: prompts come one by one, while others are computed."""
    asked, sampling = prompts(ARCH, 8), replace(SAMPLING, n=4)
    whole = loaded.generate(asked, sampling, seed=11)
    shared = {}
    for mine in ([5, 0, 3], [7, 1, 2, 4, 6]):
        left, held = list(mine), []

        def take(unfinished, left=left, held=held):
            held.append(unfinished)
            return Taken([left.pop(0)], is_last=not left)

        shared |= loaded.sample(asked, sampling, 11, take)
        assert len(held) == len(mine) and max(held), "further prompts came while others were computed"
    again = [shared[position] for position in range(len(asked))]
    assert [tokens for tokens, _ in sampled(again)] == [tokens for tokens, _ in sampled(whole)]
    for (_, before), (_, after) in zip(sampled(whole), sampled(again), strict=True):
        assert after == pytest.approx(before, abs=1e-4)


def test_responses_end_at_end_of_sequence(loaded):
    groups = loaded.generate(prompts(ARCH, 8), replace(SAMPLING, n=16, max_tokens=32), seed=2)
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
            loaded.generate([*prompts(ARCH, 2), prompt], SAMPLING, seed=0)
    assert len(loaded.generate(prompts(ARCH, 2), SAMPLING, seed=0)) == 2


def test_held_tensors_are_the_sent_ones(loaded):
    check_held_tensors(loaded, ARCH)


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


def test_one_flipped_bit_is_named(engine):
    """Damage before the check is found, whatever it hits."""
    check_corruptions(engine, ARCH, {(target, None): named for target, named in CORRUPTIONS.items()})


def test_missing_and_unknown_tensors_are_named(engine):
    weights, last = dict(random_weights(ARCH, 0)), "model.layers.2.mlp.experts.7.down_proj.weight"
    fewer = {name: tensor for name, tensor in weights.items() if name != last}
    with pytest.raises(WeightSyncError, match=f"held but not sent: {last}$"):
        engine.load_weights(StoredWeights.of_tensors(fewer), 1)
    with pytest.raises(WeightSyncError, match="sent but not held: model.surplus$"):
        engine.load_weights(StoredWeights.of_tensors(weights | {"model.surplus": weights[last]}), 1)
    engine.load_weights(StoredWeights.of_tensors(weights), 1)


def test_what_never_came_is_named_without_checksums(engine):
    engine.load_weights(random_source(ARCH, 0), 0)
    engine._call("call_workers", "forget_piece", "model.norm.weight")
    own, engine.options = engine.options, replace(engine.options, verify_weights=False)
    with pytest.raises(WeightSyncError, match="held but never sent: model.norm.weight$"):
        engine.load_weights(random_source(ARCH, 0), 1)
    engine.options, engine._own_transfer = own, WeightTransfer()
    engine.load_weights(random_source(ARCH, 0), 1)


def test_every_copy_is_checked(second):
    """Packed weights, a router's own copy of its bias, and a parameter that no rule explains. (All spoil the engine.)"""
    second.generate(prompts(ARCH, 1), SAMPLING, seed=0)
    (packed,) = second._call("call_workers", "keep_packed")
    with pytest.raises(WeightSyncError, match=f"underived: {packed}.weight, packed"):
        second.load_weights(random_source(ARCH, 0), version=1)
    second._call("call_workers", "replace_router_bias", 1)
    with pytest.raises(WeightSyncError, match=r"copy that is not updated: model.layers.1.mlp.gate.e_score_correction_bias"):
        second.load_weights(random_source(ARCH, 0), version=1)
    second._call("call_workers", "add_parameter")
    with pytest.raises(WeightSyncError, match="uncovered: surplus"):
        second.load_weights(random_source(ARCH, 0), version=1)
    os.kill(second._channel.pid, signal.SIGKILL)
    with pytest.raises(RolloutError, match="died in start_weight_update .*SIGKILL.*engine.log"):
        second.load_weights(random_source(ARCH, 0), version=2)
    with pytest.raises(RolloutError, match="closed"):
        second.load_weights(random_source(ARCH, 0), version=2)


def test_an_evaluation_goes_on_after_a_kill_with_the_same_responses(loaded, tmp_path):
    """Through the engine itself: what a call that was interrupted would have given, it gives when it is made again."""
    asked = [BenchmarkProblem(prompt.id, "", "") for prompt in prompts(ARCH, 6)]
    by_id = {prompt.id: prompt for prompt in prompts(ARCH, 6)}
    model = EngineModel(loaded, lambda problem: by_id[problem.id], responses_per_call=8)
    sampling = replace(SAMPLING, n=2, temperature=0.6, top_p=0.95)
    with open_samples(tmp_path / "a.jsonl", {}) as kept:
        model.sample(asked, Pass(sampling, "seed", kept, lambda _: None))
    lines = (tmp_path / "a.jsonl").read_text().splitlines()
    assert len(lines) == 12 and len({line.split('"response"')[1] for line in lines}) == 12
    open_samples(tmp_path / "b.jsonl", {}).close()
    (tmp_path / "b.jsonl").write_text("".join(f"{line}\n" for line in lines[:5]))  # killed in the first of two calls
    with open_samples(tmp_path / "b.jsonl", {}) as kept:
        model.sample(asked, Pass(sampling, "seed", kept, lambda _: None))
    assert sorted((tmp_path / "b.jsonl").read_text().splitlines()) == sorted(lines)
