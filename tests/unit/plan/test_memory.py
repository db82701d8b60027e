"""The phases of a stage: what is where when, what does not fit, and which setting cuts it."""

from __future__ import annotations

import pytest

from megatron_r1.config.load import load_config
from megatron_r1.config.schema import Config
from megatron_r1.errors import ConfigError
from megatron_r1.mcore.activation_bytes import activation_bytes, logits_bytes
from megatron_r1.plan.batches import batches
from megatron_r1.plan.job import Job, read_job
from megatron_r1.plan.memory import ENGINES_OWN, MemoryPlan, plan_memory
from megatron_r1.plan.terms import MemoryPhase
from tests.paths import ROOT

V3 = ROOT / "examples/v3_671b"


def stage4(*settings: str) -> Job:
    return read_job(load_config(V3 / "stage4.yaml", list(settings)), "grpo", "H800", 64)


def phases(plan: MemoryPlan) -> dict[str, MemoryPhase]:
    return {phase.name: phase for phase in plan.phases}


def device(phase: MemoryPhase) -> dict[str, float]:
    return {term.name: term.amount for term in phase.device}


def gb(number: float) -> float:
    return round(number / 1e9, 1)


def test_the_published_stage_at_512_ranks() -> None:
    """Stage 1 of 16: layers 4 to 7. Dense parameters over dp 4, experts over one rank, in bf16."""
    job = stage4()
    found = phases(plan_memory(job))
    assert list(found) == ["sampling", "reward", "log-probs", "update", "step", "saving", "weight sync"]
    update = device(found["update"])
    experts = 4 * 256 // 32 * 3 * 7168 * 2048
    attention = 7168 * 1536 + 1536 + 7168 * 576 + 512 + 2 * 7168 + (1536 * 128 * 192 + 512 * 128 * 256 + 128 * 128 * 7168) // 8
    dense = 4 * (attention + 256 * 7168 + 3 * 7168 * 2048 // 8)
    assert update["weights"] == pytest.approx(2 * (dense + experts), rel=1e-4)
    assert update["gradients"] == pytest.approx(4 * (dense + experts), rel=1e-4)
    assert update["optimizer"] == pytest.approx(12 * (dense / 4 + experts), rel=1e-4)
    assert update["activations"] == 15 * 4 * 34816 * 7168 * 2 // 8, "15 micro-batches in flight, four layers' inputs each"
    assert (gb(update["weights"]), gb(update["gradients"]), gb(update["optimizer"])) == (3.2, 6.3, 17.4)
    sampling = device(found["sampling"])
    assert "gradients" not in sampling and "optimizer" not in sampling, "they are on the host"
    whole = sum(sampling[name] for name in ("engine weights", "engine activations", "engine cache"))
    assert whole == pytest.approx(job.config.rollout.gpu_memory_utilization * 81_559 * 2**20)
    scored = device(found["reward"])["reward model that scores"]
    assert scored == pytest.approx(2 * (experts + dense), rel=1e-4), "four layers of it"
    host = {term.name: term.amount for term in found["saving"].host}
    assert host["offloaded optimizer"] == pytest.approx(8 * update["optimizer"])
    assert host["checkpoint"] == pytest.approx(8 * (update["optimizer"] + 2 * update["weights"]), rel=1e-3)
    assert gb(host["reward models"] / 8) == 6.3, "two models on the host"


def test_a_phase_is_that_of_the_stage_that_needs_most() -> None:
    plan = plan_memory(stage4())
    assert plan.fullest["update"] == 1 and plan.fullest["log-probs"] == 15, "stage 0 has dense layers, the last one logits"
    assert plan.peak.device_bytes == max(phase.device_bytes for phase in plan.phases)
    assert not plan.shortfalls()


def test_what_leaves_the_device_is_on_the_host_meanwhile() -> None:
    stays, leaves = (phases(plan_memory(stage4(f"runtime.offload={names}"))) for names in ("[]", "[optimizer,gradients,reference]"))
    for name, amount in (("gradients", 6.3), ("optimizer", 17.4), ("reference", 3.2)):
        assert gb(device(stays["sampling"])[name]) == pytest.approx(amount, abs=0.6)
        assert name not in device(leaves["sampling"])
    assert leaves["sampling"].host_bytes - stays["sampling"].host_bytes == pytest.approx(8 * (17.4e9 + 3.2e9), rel=0.01)


def test_an_engine_that_does_not_sleep_stays() -> None:
    awake = phases(plan_memory(stage4("rollout.sleep=false")))
    assert device(awake["update"])["engine"] > 30e9 and "engine that sleeps" not in device(awake["update"])


def test_engines_on_nodes_of_their_own_have_a_phase_of_their_own() -> None:
    plan = plan_memory(stage4("rollout.placement=disaggregated", "rollout.servers=x", "rollout.gpu_memory_utilization=0.9"))
    found = phases(plan)
    assert "engine cache" in device(found[ENGINES_OWN]) and "engine weights" not in device(found["sampling"])
    assert "engine weights" not in device(found["weight sync"]) and "buckets of weights" in device(found["weight sync"])


def test_imbalance_and_recomputation_are_terms() -> None:
    even, uneven = (device(phases(plan_memory(stage4(), factor))["update"]) for factor in (1.0, 2.0))
    assert "imbalance of experts" not in even and uneven["imbalance of experts"] > 1e9
    assert uneven["dispatch to experts"] == 1.5 * even["dispatch to experts"] == 3 * 34816 // 8 * 8 * 7168 * 2
    kept = plan_memory(stage4("runtime.recompute=none"))
    problem = kept.shortfalls()[0]
    assert problem.startswith("update needs ") and "change runtime.recompute" in problem and "\n" not in problem


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("rollout.gpu_memory_utilization=0.25",), "raise rollout.gpu_memory_utilization or rollout.tensor_parallel_size"),
        (("parallel.pp=4", "parallel.ep=8"), "change parallel.ep"),
        (("rollout.gpu_memory_utilization=1.0",), "change rollout.gpu_memory_utilization"),
    ],
)
def test_what_does_not_fit_names_what_cuts_it(settings: tuple[str, ...], said: str) -> None:
    problems = plan_memory(stage4(*settings)).shortfalls()
    assert problems and said in problems[0], problems


def test_a_node_may_have_too_little_memory() -> None:
    job = read_job(load_config(V3 / "stage4.yaml", []), "grpo", "GB200", 128, devices_per_node=4)
    assert plan_memory(job).node_bytes == 960e9
    large = read_job(Config(model={"preset": "671b"}, runtime={"dtype": "bf16", "device": "cuda"}), "sft", "B200", 1)
    told = plan_memory(large).shortfalls()
    assert len(told) == 2 and "of a node, which has 2,000.0 GB" in told[1] and "checkpoint.asynchronous" in told[1]


def test_phases_of_pretraining_have_their_own_lengths_and_layouts() -> None:
    job = read_job(load_config(V3 / "pretrain.yaml"), "pretrain", "H800", 256)
    first, long, longest = batches(job)
    assert (first.tokens, first.layout.cp, first.micro_batches) == (4096, 1, 120)
    assert (long.tokens, longest.tokens, longest.layout.cp, longest.layout.dp) == (32768, 131072, 4, 32)
    found = phases(plan_memory(job))
    assert [gb(found[f"update, phase {n}"].device_bytes) for n in range(3)] == sorted(
        gb(found[f"update, phase {n}"].device_bytes) for n in range(3)
    )
    assert "moments in float32" in device(found["step"]), "both moments are bf16"


def test_micro_batches_are_as_many_as_the_longest_samples_need() -> None:
    one = batches(read_job(load_config(V3 / "r1_zero.yaml"), "grpo", nodes=64))
    assert [(batch.tokens, batch.micro_batches) for batch in one] == [(34816, 128), (67584, 128)]
    assert one[1].setting == "grpo.length_schedule.0.micro_batch_tokens"
    few = read_job(load_config(V3 / "stage1.yaml", ["sft.batch_size=8"]), "sft", nodes=64)
    assert batches(few)[0].micro_batches == 2, "so two are in flight, not sixteen"
    update = device(phases(plan_memory(few))["update"])
    assert update["activations"] == 2 * 4 * 32768 * 7168 * 2 // 8


def test_the_last_stage_has_the_logits_that_cross_entropy_keeps() -> None:
    config = load_config(ROOT / "examples/distill_qwen/qwen_7b.yaml")
    job = read_job(config, "sft", nodes=1)
    whole = read_job(load_config(ROOT / "examples/distill_qwen/qwen_7b.yaml", ["runtime.whole_logits_mb=100000"]), "sft", nodes=1)
    update = device(phases(plan_memory(whole))["update"])
    found = activation_bytes(job.arch, job.layout, recompute="full", tokens=32768, stage=0)
    assert update["logits"] == found.logits > logits_bytes(job.arch, job.layout, 32768) > 4e9
    tiles = device(phases(plan_memory(job))["update"])
    assert "logits" not in tiles, "of tiles there is less than of a layer that is computed again"
    assert sum(tiles.values()) < sum(update.values()) - 1e9


def test_sampling_alone_and_conversion_are_planned_too() -> None:
    config = load_config(V3 / "r1.yaml")
    rejection = phases(plan_memory(read_job(config, "rejection", nodes=64)))
    assert list(rejection) == ["sampling"] and "weights" not in device(rejection["sampling"])
    converted = phases(plan_memory(read_job(config, "convert", nodes=1)))["converting"]
    assert converted.device == () and 40e9 < converted.host_bytes < 200e9, "eight processes with a few tensors each, not the model"


def test_a_cpu_is_no_device_to_plan_for() -> None:
    with pytest.raises(ConfigError, match="give --gpu"):
        plan_memory(read_job(Config(runtime={"device": "cpu"}), "sft"))
