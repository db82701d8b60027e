"""The memory of a node: what stays, what a checkpoint adds, and what weights travel through."""

from __future__ import annotations

from megatron_r1.config.load import load_config
from megatron_r1.plan.host import USUAL_NODE_BYTES, node_bytes, resident, saved, shared_memory
from megatron_r1.plan.job import read_job
from megatron_r1.plan.static import rank_state
from tests.paths import ROOT

V3 = ROOT / "examples/v3_671b"


def amounts(*settings: str) -> dict[str, float]:
    job = read_job(load_config(V3 / "r1_zero.yaml", list(settings)), "grpo", nodes=64)
    return {term.name: term.amount for term in resident(job, rank_state(job, 1))}


def test_what_leaves_the_devices_is_there() -> None:
    job = read_job(load_config(V3 / "r1_zero.yaml"), "grpo", nodes=64)
    rank = rank_state(job, 1)
    found = amounts()
    assert found["offloaded optimizer"] == 8 * rank.state.optimizer and found["reference"] == 8 * rank.state.reference
    assert {"offloaded optimizer", "reference"} & amounts("runtime.offload=[gradients]").keys() == set()
    assert saved(job, rank).amount >= 8 * (rank.state.optimizer + rank.state.weights + rank.state.reference) * 0.999


def test_a_round_is_kept_where_it_was_sampled() -> None:
    everywhere, one = amounts(), amounts("rollout.placement=single", "rollout.nodes_per_engine=1")
    assert one["rollouts"] == 64 * everywhere["rollouts"] == 32 * 8192 * (2048 + 32768)


def test_an_optimizer_on_the_host_and_an_average_are_counted() -> None:
    config = load_config(V3 / "pretrain.yaml", ["pretrain.ema_decay=0.999"])
    job = read_job(config, "pretrain", nodes=256)
    rank = rank_state(job, 1)
    found = {term.name: term.amount for term in resident(job, rank)}
    share = rank.parameters.dense // 128 + rank.parameters.experts // 2
    assert found["average of the weights"] == 8 * 8 * share and "optimizer" not in found
    offloaded = [
        "megatron.use_precision_aware_optimizer=false", "megatron.exp_avg_dtype=fp32", "megatron.exp_avg_sq_dtype=fp32",
        "megatron.optimizer_cpu_offload=true",
    ]  # fmt: skip
    job = read_job(load_config(V3 / "pretrain.yaml", offloaded), "pretrain", nodes=256)
    rank = rank_state(job, 1)
    assert rank.state.optimizer == 0
    assert {term.name: term.amount for term in resident(job, rank)}["optimizer"] == 8 * rank.state.host > 8 * 15 * share


def test_a_node_has_two_buckets_for_each_of_its_engines() -> None:
    job = read_job(load_config(V3 / "r1_zero.yaml"), "grpo", nodes=64)
    assert shared_memory(job).amount == 2 << 30
    four = read_job(load_config(V3 / "r1_zero.yaml", ["rollout.engines_per_node=4"]), "grpo", nodes=64)
    assert shared_memory(four).amount == 4 * shared_memory(job).amount


def test_nodes_have_what_their_maker_builds() -> None:
    config = load_config(V3 / "stage1.yaml")
    assert node_bytes(read_job(config, "sft")) == USUAL_NODE_BYTES > node_bytes(read_job(config, "sft", "gb200"))
