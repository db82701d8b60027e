"""Comparison of checksums, engine options and the collective engine, without vLLM."""

from __future__ import annotations

import pytest

from megatron_r1.config.rollout import RolloutConfig
from megatron_r1.errors import ConfigError, WeightSyncError
from megatron_r1.model.families.llama import Llama
from megatron_r1.model.families.qwen2 import Qwen2
from megatron_r1.model.presets import PRESETS, resolve_architecture
from megatron_r1.rollout.options import engine_options
from megatron_r1.rollout.sync.verify_weights import HeldReport, verify_held
from tests.pipeline.engine_cases import options
from tests.ranks import run_ranks

DENSE = {
    "vocab_size": 448, "hidden_size": 128, "num_hidden_layers": 2, "intermediate_size": 256, "num_attention_heads": 4,
    "max_position_embeddings": 256,
}  # fmt: skip


def test_agreement_returns_the_constants():
    worker, other = HeldReport(constants={"rope": 9}), HeldReport(constants={"rope": 9})
    constants = verify_held([worker, other], None)
    assert constants == verify_held([worker, other], constants) and len(constants) == 2


@pytest.mark.parametrize(
    ("worker", "message"),
    [
        (HeldReport(different=["a"]), "different: a"),
        (HeldReport(unsent=["b"]), "held but never sent: b"),
        (HeldReport(uncovered=["w"]), "uncovered: w"),
        (HeldReport(underived=["W_UV"]), "underived: W_UV"),
        (HeldReport(unreached=["c"]), "with a copy that is not updated: c"),
        (HeldReport(constants={"rope": 8}), "changed constants: worker 0 rope"),
    ],
)
def test_each_difference_is_named(worker, message):
    with pytest.raises(WeightSyncError, match=message):
        verify_held([worker], {"worker 0 rope": 9} if worker.constants else None)


def test_many_names_are_cut_and_each_is_named_once():
    names = [f"t{i}" for i in range(10)]
    with pytest.raises(WeightSyncError, match="t0, t1, t2, t3, t4 and 5 more") as caught:
        verify_held([HeldReport(different=names), HeldReport(different=names)], None)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("rollout", "message"),
    [
        ({"max_response_tokens": 1000}, "max_position_embeddings=1024"),
        ({"max_response_tokens": 8, "tensor_parallel_size": 3}, "tensor_parallel_size=3 does not divide"),
        ({"max_response_tokens": 8, "transfer": "nccl"}, "needs a CUDA device"),
    ],
)
def test_impossible_options_are_refused(rollout, message):
    with pytest.raises(ConfigError, match=message):
        engine_options(
            PRESETS["tiny"], RolloutConfig(**rollout), device="cpu", dtype="float32", bos_token_id=0, eos_token_id=1,
            max_prompt_tokens=64,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("arch", "tensor_parallel_size", "message"),
    [
        (Llama(**DENSE, num_key_value_heads=2), 4, "tensor_parallel_size=4 does not divide the model's num_key_value_heads=2"),
        (Llama(**DENSE, head_dim=16), 1, "head_dim=16 is not one that vLLM has on CPU: .*32, 64, 80"),
        (Qwen2(**DENSE, head_dim=64), 1, "head_dim=64 is not hidden_size / num_attention_heads = 32"),
        (resolve_architecture("tiny", {"kv_lora_rank": 256}), 1, "kv_lora_rank=256 is not the one that vLLM has on CPU: 512"),
        (resolve_architecture("tiny", {"qk_rope_head_dim": 32}), 1, "qk_rope_head_dim=32 is not .* on CPU: 64"),
    ],
)
def test_shapes_that_the_engine_does_not_have_are_refused(arch, tensor_parallel_size, message):
    with pytest.raises(ConfigError, match=message):
        options(arch, tensor_parallel_size)


def test_limits_of_the_cpu_kernels_are_not_those_of_cuda():
    arch = Llama(**DENSE, head_dim=16)
    rollout = RolloutConfig(max_response_tokens=8)
    on_cuda = engine_options(
        arch, rollout, device="cuda", dtype="bfloat16", bos_token_id=0, eos_token_id=1, max_prompt_tokens=8
    )  # fmt: skip
    assert on_cuda.hf_config["head_dim"] == 16 and on_cuda.transfer == "shm"


COLLECTIVE = """
import sys
from types import SimpleNamespace
import torch, torch.distributed as dist
from megatron_r1.config.rewards import RewardConfig
from megatron_r1.errors import ConversionError, RewardError, WeightSyncError
from megatron_r1.rewards.protocol import Verdict
from megatron_r1.rollout.collective import CollectiveEngine
from megatron_r1.training.scoring import CollectiveRewards
from megatron_r1.types import Prompt, Rollout, RolloutGroup
from tests.engine_layouts import MemoryEngine

rank = int(sys.argv[1])
dist.init_process_group("gloo", store=dist.FileStore(sys.argv[3], 2), rank=rank, world_size=2)

class Weights:  # rank 1 holds them, rank 0 has the engine
    def __init__(self, fails=False):
        self._fails = fails
    def describe(self):
        return "weights"
    def find_holders(self, described):
        return self
    def names(self):
        return ["t0", "t1"]
    def shape(self, name):
        return (2,)
    def dtype(self, name):
        return torch.float32
    def boxes(self, name):
        return [(((0, 2),), (1,))]
    def read(self, name, box):
        if self._fails:
            raise ConversionError("bad tensor")
        return torch.ones(2)

def load(weights, version, transfer):
    to = MemoryEngine([[("t0", ((0, 2),)), ("t1", ((0, 2),))]])
    transfer.send(weights, to)
    assert to.problems(lambda name: torch.ones(2)) == []
    if version == 13:
        raise WeightSyncError("tensor t2 differs")
    return f"version {version}"

def fails(call, error, message):
    try:
        call()
    except error as caught:
        assert message in str(caught)
    else:
        raise AssertionError("no error")

def start():
    assert rank == 0
    return SimpleNamespace(load_weights=load, sample=sample, close=lambda: print("closed"))

def sample(prompts, sampling, seed, take, on_group):
    groups = {at: RolloutGroup(prompts[at], [Rollout([1], [0.0], "x", True)], seed) for at in take(0).positions}
    for group in reversed(groups.values()):
        on_group(group)
    return groups

class GroupScoring:
    def __init__(self):
        assert rank == 0
        self.started = []

    def submit(self, group):
        self.started.append(group)

    def collect(self, groups, on_wait):
        assert all(a is b for a, b in zip(groups, reversed(self.started), strict=True)), "none is judged twice"
        if len(groups) == 1:
            raise RewardError("no judge")
        return [{"accuracy": [Verdict(float(n), "correct")]} for n, _ in enumerate(groups)]

engine = CollectiveEngine(start if rank == 0 else None)
assert engine.load_weights(Weights(), 1) == "version 1"
fails(lambda: CollectiveRewards(RewardConfig(), (lambda: 1 / 0) if rank else None), ZeroDivisionError, "")
rewards = CollectiveRewards(RewardConfig(), GroupScoring if rank == 0 else None)
prompts = [Prompt(name, "", "", "", (1,)) for name in "pq"]
own = engine.generate(prompts, None, 3, on_group=rewards.submit)
assert len(own) == (2 if rank == 0 else 0)
groups = rewards.collect(own, prompts)
assert [(g.owner, g.rollouts[0].text, len(g.rollouts[0].token_ids)) for g in groups] == [(0, "" if rank else "x", 1)] * 2
assert [(g.prompt.id, g.weights_version, g.rewards_G.tolist()) for g in groups] == [("p", 3, [0.0]), ("q", 3, [1.0])]
if rank == 0:
    rewards._scoring.started.clear()
own = engine.generate(prompts[:1], None, 3, on_group=rewards.submit)
fails(lambda: rewards.collect(own, prompts[:1]), RewardError, "no judge")
fails(lambda: engine.load_weights(Weights(), 13), WeightSyncError, "t2 differs")
fails(lambda: engine.load_weights(Weights(fails=True), 2), ConversionError, "bad tensor")
assert engine.load_weights(Weights(), 4) == "version 4"
fails(lambda: CollectiveEngine(lambda: 1 / 0), ZeroDivisionError, "")
engine.close()
dist.destroy_process_group()  # without it gloo's threads sometimes abort the interpreter as it ends
"""


@pytest.mark.slow
def test_all_ranks_share_results_and_errors(tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(COLLECTIVE)
    outputs = run_ranks(script, 2, tmp_path / "store", timeout=120)
    assert "closed" in outputs[0] and "closed" not in outputs[1]
