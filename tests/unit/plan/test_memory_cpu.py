"""The memory of runs on CPUs: which terms, counted from what, of a process and of a machine."""

from __future__ import annotations

import pytest

from megatron_r1.config.load import load_config
from megatron_r1.mcore.activation_bytes import logits_bytes
from megatron_r1.plan.activations_cpu import cpu_activation_bytes
from megatron_r1.plan.batches import largest_batch
from megatron_r1.plan.job import Job, Stage, read_job
from megatron_r1.plan.memory_cpu import (
    ENGINE,
    HEAP,
    LAUNCHER,
    SHARED,
    TRAINER,
    CpuMemoryPlan,
    cpu_rows,
    machine_bytes,
    plan_cpu_memory,
)
from megatron_r1.plan.terms import MemoryPhase
from megatron_r1.runtime.heap import LARGEST_ON_HEAP

CPU = ["runtime.device=cpu", "runtime.dtype=fp32", "run_dir=/nowhere", "data.max_prompt_tokens=32"]
ROUND = ["grpo.prompts_per_rollout=8", "grpo.minibatch_size=128", "rollout.max_response_tokens=32", "rollout.max_num_seqs=128"]
ROOM = 64 * 10**9


def job(stage: Stage, *settings: str, ranks: int = 1, preset: str = "small") -> Job:
    given = [*CPU, f"model.preset={preset}", *(ROUND if stage == "grpo" else []), *settings]
    return read_job(load_config(None, given), stage, world_size=ranks)


def terms(plan: CpuMemoryPlan, name: str, *, of_machine: bool = False) -> dict[str, float]:
    phase: MemoryPhase = next(phase for phase in plan.phases if phase.name == name)
    return {term.name: term.amount for term in (phase.host if of_machine else phase.device)}


def test_a_rank_in_fp32_holds_16_bytes_a_parameter_and_what_its_passes_keep() -> None:
    asked = job("pretrain")
    held = terms(plan_cpu_memory(asked, ROOM), "update")
    assert held["process"] == TRAINER
    assert held["optimizer"] == pytest.approx(2 * held["weights"], rel=1e-4)
    assert held["gradients"] == pytest.approx(held["weights"], rel=1e-4)
    rows = cpu_rows(asked, largest_batch(asked))
    assert (rows.positions, rows.width, rows.is_packed) == (16 * 64, 64, False)
    assert held["activations"] == cpu_activation_bytes(asked.arch, asked.layout, rows, 0, recompute="none", mtp_trained=True)


def test_ranks_of_a_machine_have_the_libraries_once_and_share_the_optimizer() -> None:
    one, two = (plan_cpu_memory(job("pretrain", ranks=ranks), ROOM) for ranks in (1, 2))
    alone, of_rank, both = terms(one, "update"), terms(two, "update"), terms(two, "update", of_machine=True)
    assert of_rank["optimizer"] == pytest.approx(alone["optimizer"] / 2, rel=1e-3)
    assert both["weights"] == 2 * alone["weights"] and both["optimizer"] == pytest.approx(alone["optimizer"], rel=1e-3)
    assert both["process"] + both["shared libraries"] == pytest.approx(2 * TRAINER - SHARED)
    assert both["launcher"] == LAUNCHER and "launcher" not in terms(one, "update", of_machine=True)


def test_a_machine_has_each_pipeline_stage_once() -> None:
    plan = plan_cpu_memory(job("pretrain", "parallel.pp=2", "pretrain.micro_batch_size=4", ranks=2, preset="tiny"), ROOM)
    alone = terms(plan_cpu_memory(job("pretrain", "pretrain.micro_batch_size=4", preset="tiny"), ROOM), "update")
    assert terms(plan, "update", of_machine=True)["weights"] == pytest.approx(alone["weights"], rel=1e-3)


def test_a_micro_batch_has_no_more_samples_than_an_update() -> None:
    asked = job("grpo")
    assert largest_batch(asked).tokens == 34816, "the default"
    rows = cpu_rows(asked, largest_batch(asked))
    assert rows.positions == 128 * 63 and rows.width == 63 and rows.is_packed, "128 samples of 32 and 31 tokens"
    split = job("grpo", "grpo.micro_batch_tokens=640")
    assert cpu_rows(split, largest_batch(split)).positions == 10 * 63


def test_without_experts_a_prompt_is_there_once_for_its_group() -> None:
    asked = job("grpo", preset="tiny_qwen2")
    assert cpu_rows(asked, largest_batch(asked)).positions == 8 * (32 + 16 * 31)
    never = job("grpo", "grpo.share_prompts=never", preset="tiny_qwen2")
    assert cpu_rows(never, largest_batch(never)).positions == 128 * 63


def test_logits_by_tiles_are_not_kept() -> None:
    whole, tiled = (job("pretrain", f"runtime.whole_logits_mb={limit}") for limit in (256, 1))
    kept, few = (terms(plan_cpu_memory(asked, ROOM), "update") for asked in (whole, tiled))
    logits = logits_bytes(whole.arch, whole.layout, 1024, 4)
    assert kept["activations"] - few["activations"] == 2 * logits, "those of multi-token prediction, too"
    assert few["part of the logits"] > kept.get("part of the logits", 0.0)


def test_an_engine_holds_weights_and_a_cache_that_is_full_of_zeros() -> None:
    plan = plan_cpu_memory(job("grpo"), ROOM)
    held = terms(plan, "sampling", of_machine=True)
    assert held["engine processes"] == ENGINE - SHARED
    assert plan.engine is not None and plan.engine.sequences >= 128 and held["engine cache"] == plan.engine.cache
    given = plan_cpu_memory(job("grpo", "rollout.kv_cache_bytes=67108864"), ROOM)
    assert terms(given, "sampling", of_machine=True)["engine cache"] == 64 << 20
    one, two = (
        terms(plan_cpu_memory(job("grpo", "rollout.placement=colocated", f"rollout.engines_per_node={count}", ranks=2), ROOM),
              "sampling", of_machine=True)
        for count in (1, 2)
    )  # fmt: skip
    assert two["engine weights"] == 2 * one["engine weights"] and two["engine processes"] == 2 * one["engine processes"]


def test_the_heap_keeps_what_an_update_freed_but_blocks_that_are_none_of_its_own() -> None:
    plan = plan_cpu_memory(job("grpo"), ROOM)
    held, passing = terms(plan, "sampling"), terms(plan, "update")
    assert held["kept by the heap"] == pytest.approx(HEAP * passing["activations"]), "8,064 positions have no whole logits"
    assert "activations" not in held and "kept by the heap" not in passing
    asked = job("pretrain")
    plan = plan_cpu_memory(asked, ROOM)
    logits = logits_bytes(asked.arch, asked.layout, 1024, 4)
    assert logits > LARGEST_ON_HEAP
    whole = HEAP * terms(plan, "update")["activations"]
    assert terms(plan, "saving")["kept by the heap"] == pytest.approx(whole - 2 * logits), "multi-token prediction has some, too"


def test_activations_leave_holes_in_the_heap() -> None:
    asked = job("pretrain")
    held = terms(plan_cpu_memory(asked, ROOM), "update")
    assert held["holes of the heap"] == pytest.approx((HEAP - 1) * held["activations"])
    assert held["gradient of a weight"] == 4 * asked.arch.vocab_size * asked.arch.hidden_size


@pytest.mark.parametrize(("ranks", "share"), [(2, 1 / 2), (4, 3 / 4), (512, 511 / 512)])
def test_gradients_of_the_other_ranks_arrive_whole(ranks: int, share: float) -> None:
    asked = job("pretrain", f"pretrain.global_batch_size={16 * ranks}", ranks=ranks)
    held = terms(plan_cpu_memory(asked, ROOM), "sum of gradients")
    assert held["gradients of other ranks"] == pytest.approx(share * held["gradients"], rel=1e-3)
    assert "sum of gradients" not in {phase.name for phase in plan_cpu_memory(job("pretrain"), ROOM).phases}
    few = plan_cpu_memory(job("pretrain", ranks=2, preset="tiny"), ROOM)
    assert "sum of gradients" not in {phase.name for phase in few.phases}, "they fit into the heap's holes"


def test_a_checkpoint_that_is_written_meanwhile_is_there_twice() -> None:
    beside, waiting = (
        terms(plan_cpu_memory(job("sft", f"checkpoint.asynchronous={choice}"), ROOM), "saving") for choice in ("true", "false")
    )
    assert beside["checkpoint"] == beside["weights"] + beside["optimizer"]
    assert "checkpoint" not in waiting


def test_conversion_and_sampling_alone_have_no_trainer() -> None:
    held = terms(plan_cpu_memory(job("convert"), ROOM), "converting", of_machine=True)
    assert set(held) == {"shared libraries", "tensors", "processes"}
    (phase,) = plan_cpu_memory(job("rejection"), ROOM).phases
    assert phase.name == "sampling" and {term.name for term in phase.device} == {"process"}


def test_what_does_not_fit_is_one_line_with_what_to_change() -> None:
    asked = job("grpo")
    assert plan_cpu_memory(asked, ROOM).shortfalls() == []
    (line,) = plan_cpu_memory(asked, 3 * 10**9).shortfalls()
    assert line.startswith("saving needs ") and "of the machine, which has 3.0 GB; of it kept by the heap" in line
    assert line.endswith("change runtime.recompute")
    assert plan_cpu_memory(asked).node_bytes == machine_bytes() > 10**9
