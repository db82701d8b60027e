"""The memory of a stage whose ranks are on CPUs: what each process holds, phase by phase, and a machine's processes together.

Ranks, engines and whoever writes a checkpoint share one memory, so a stage fits if the machine holds the sum. `runtime.offload`
moves nothing here. Terms of the model are counted as on GPUs; what a process takes beside them was measured (`TRAINER`, `ENGINE`).
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from megatron_r1.mcore.activation_bytes import logits_bytes
from megatron_r1.mcore.head_bytes import keeps_whole, rows_at_a_time
from megatron_r1.mcore.shared_prompts import shares_prompts
from megatron_r1.plan import host
from megatron_r1.plan.activations_cpu import Rows, cpu_activation_bytes, cpu_layer_numbers, wide_logits
from megatron_r1.plan.batches import Batch, batches, largest_batch
from megatron_r1.plan.engine import EngineMemory, cpu_engine_memory, opened_config, samples
from megatron_r1.plan.job import Job
from megatron_r1.plan.memory import MemoryPlan
from megatron_r1.plan.parameters import gradient_ranks
from megatron_r1.plan.static import RankState, rank_state
from megatron_r1.plan.terms import MemoryPhase, Term
from megatron_r1.rollout.sync.weight_buckets import bucket_bytes
from megatron_r1.runtime.heap import LARGEST_ON_HEAP

#: A rank without any tensor of the model: Python, torch for CPUs, Megatron-Core, gloo, the project. Measured, resident, libraries
#: included: `benchmarks.plan_memory`.
TRAINER = 0.55e9
#: An engine's process likewise, with vLLM in place of Megatron-Core.
ENGINE = 0.66e9
#: torchrun's own, where a machine has several ranks.
LAUNCHER = 0.12e9
#: Of a rank or an engine, the pages of libraries that all processes of a machine share.
SHARED = 0.20e9
#: What a process takes for a byte of activations after some updates: between blocks of many sizes the C library's heap has holes.
#: glibc before 2.38 asks for more than it needs for an aligned block, and so leaves holes of that very size alone. Fitted to four
#: rows of `benchmarks.plan_memory` on one rank: `tiny` in GRPO 1.33 and SFT 1.45, `small` in pretraining 1.41 and SFT 1.18.
HEAP = 1.3
_FLOAT32 = 4
_PROCESS = "process"


@dataclass(frozen=True)
class CpuMemoryPlan(MemoryPlan):
    """`device` of a phase is the process of the rank that needs most, `host` is the machine that needs most."""

    def shortfalls(self) -> list[str]:
        """One line if a machine's processes do not fit; [] if they do."""
        node = self.host_peak
        if node.host_bytes <= self.node_bytes:
            return []
        cut = node.largest(host=True)
        most = "" if cut is None else f"; of it {cut.name} {_gb(cut.amount)} GB"
        most += f": change {cut.setting}" if cut is not None and cut.setting else ""
        return [f"{node.name} needs {_gb(node.host_bytes)} GB of the machine, which has {_gb(self.node_bytes)} GB{most}"]


def machine_bytes() -> int:
    """Memory of this machine, which is taken for every machine of the job."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def plan_cpu_memory(job: Job, room: int | None = None) -> CpuMemoryPlan:
    """The memory of a stage on CPUs.

    Args:
        room: bytes of a machine; None: of this one.

    Raises:
        ConfigError: something of the stage does not divide.
    """
    room = machine_bytes() if room is None else room
    engine = cpu_engine_memory(job, room) if samples(job) else None
    of_stages = [cpu_stage_phases(job, stage, engine) for stage in range(job.layout.pp)]
    fullest, phases = {}, []
    for same in zip(*of_stages, strict=True):
        name = same[0].name
        fullest[name] = max(range(len(same)), key=lambda stage: same[stage].device_bytes)
        of_ranks = _ranks_of_machine(job, same, fullest[name])
        phases.append(MemoryPhase(name, same[fullest[name]].device, (*of_ranks, *same[fullest[name]].host)))
    return CpuMemoryPlan(tuple(phases), fullest, room, room, engine)


def _ranks_of_machine(job: Job, same: tuple[MemoryPhase, ...], fullest: int) -> Iterable[Term]:
    """The terms of all ranks of a machine: of one that has them all, stage by stage; else as if all were of the fullest stage."""
    share = job.devices_per_node / len(same)  # ranks of each stage
    counted: dict[tuple[str, str], float] = defaultdict(float)
    for stage in range(len(same)):
        for term in same[stage if job.nodes == 1 else fullest].device:
            counted[term.name, term.setting] += share * (term.amount - (SHARED if term.name == _PROCESS else 0))
    beside = [Term("shared libraries", SHARED), *([Term("launcher", LAUNCHER)] if job.devices_per_node > 1 else [])]
    return [*beside, *(Term(name, amount, setting) for (name, setting), amount in counted.items())]


def cpu_stage_phases(job: Job, stage: int, engine: EngineMemory | None) -> list[MemoryPhase]:
    """The phases of a rank of one pipeline stage; `host` is what the other processes of a machine hold meanwhile."""
    if job.stage == "convert":
        return [MemoryPhase("converting", (), (host.converted_tensors(job), Term("processes", job.devices_per_node * TRAINER)))]
    rank = rank_state(job, stage)
    others = (*_engines(job, engine), *_rollouts(job))
    static = _state_terms(job, rank) if job.is_trained else (Term(_PROCESS, TRAINER),)
    kept = _kept_by_heap(job, stage, rank) if job.is_trained else ()
    phases = []
    if engine is not None:
        phases.append(MemoryPhase("sampling", (*static, *kept), others))
    if job.stage == "grpo":
        phases.append(MemoryPhase("log-probs", (*static, *_forward(job, largest_batch(job), stage)), others))
    if not job.is_trained:
        return phases
    for batch in batches(job):
        name = f"update, {batch.name}" if batch.name else "update"
        phases.append(MemoryPhase(name, (*static, *_passing_terms(job, batch, stage, rank)), others))
    if received := _received(job, rank):
        phases.append(MemoryPhase("sum of gradients", (*static, *kept, received), others))
    writing: tuple[Term, ...] = ()
    if job.config.checkpoint.asynchronous:  # a forked process writes; what training changes meanwhile is there twice
        writing = (Term("checkpoint", rank.state.weights + rank.state.optimizer, "checkpoint.asynchronous"),)
    phases.append(MemoryPhase("saving", (*static, *kept, *writing), others))
    if engine is not None:
        rollout = opened_config(job).rollout
        slots, all_weights = host.shared_memory(job), engine.weights * rollout.tensor_parallel_size
        bucket = bucket_bytes(rollout.bucket_mb, all_weights)
        shared = Term(slots.name, min(slots.amount, all_weights), slots.setting)  # pages that nothing was written to take nothing
        piece = Term("piece of a tensor", min(bucket, rank.parameters.largest * job.width), "rollout.bucket_mb")
        phases.append(MemoryPhase("weight sync", (*static, *kept, piece), (*others, shared)))
    return phases


def _state_terms(job: Job, rank: RankState) -> tuple[Term, ...]:
    state = rank.state
    split = "parallel.ep" if job.arch.experts is not None else "parallel.tp"
    average = host.average_of_weights(job, rank) if job.stage == "pretrain" and job.config.pretrain.ema_decay is not None else 0
    terms = [
        Term(_PROCESS, TRAINER),
        Term("weights", state.weights, split),
        Term("gradients", state.gradients, split),
        Term("optimizer", state.optimizer + state.host, split),
        Term("reference", state.reference, "grpo.kl_coef"),
        Term("reward models", sum(rank.reward_models), "reward.model"),
        Term("average of the weights", average, "pretrain.ema_decay"),
    ]
    return tuple(term for term in terms if term.amount)


def _engines(job: Job, engine: EngineMemory | None) -> tuple[Term, ...]:
    """All engine processes of a machine."""
    if engine is None:
        return ()
    rollout = opened_config(job).rollout
    engines = 1 if rollout.placement == "single" else rollout.engines_per_node
    count = engines * rollout.tensor_parallel_size // rollout.nodes_per_engine
    if rollout.tensor_parallel_size > 1:  # the workers of an engine have a process beside them
        count += engines
    workers = engines * rollout.tensor_parallel_size // rollout.nodes_per_engine
    return (
        Term("engine processes", count * (ENGINE - SHARED), "rollout.engines_per_node"),
        Term("engine weights", workers * engine.weights, "rollout.engines_per_node"),
        Term("engine activations", workers * engine.activations, "rollout.max_num_seqs"),
        Term("engine cache", workers * engine.cache, "rollout.kv_cache_bytes"),
    )


def _rollouts(job: Job) -> tuple[Term, ...]:
    """Responses of a round."""
    return (Term("rollouts", host.rollout_bytes(job), "grpo.prompts_per_rollout"),) if job.stage == "grpo" else ()


def cpu_rows(job: Job, batch: Batch) -> Rows:
    """The rows of the largest micro-batch, with samples at their limit: no more than an update has."""
    if job.stage == "pretrain":
        width = batch.longest // batch.layout.cp
        positions = batch.tokens // batch.layout.cp
        return Rows(positions, width, positions, is_packed=job.config.pretrain.mask_documents)
    count = max(1, min(batch.tokens // batch.longest, batch.samples))
    tokens = count * batch.longest
    if job.stage == "grpo" and shares_prompts(job.section.share_prompts, job.arch, batch.layout, job.moe, "cpu"):
        # A group's prompt is there once. As many prompts as have room with their whole groups.
        prompt, group = job.config.data.max_prompt_tokens, job.section.group_size
        bundle = prompt + group * (batch.longest - prompt)
        tokens = min(batch.tokens, -(-batch.samples * bundle // group))
    positions = tokens // batch.layout.cp
    return Rows(positions, batch.longest // batch.layout.cp, positions, is_packed=True)


def _passing_terms(job: Job, batch: Batch, stage: int, rank: RankState) -> tuple[Term, ...]:
    """What passes over a micro-batch keep when the first layer's gradients come, and the largest of these."""
    rows, layout, runtime = cpu_rows(job, batch), batch.layout, job.runtime
    kept = cpu_activation_bytes(
        job.arch, layout, rows, stage, recompute=runtime.recompute, modules=runtime.recompute_modules, mtp_trained=job.trains_mtp,
        micro_batches=batch.micro_batches, whole_logits_mb=runtime.whole_logits_mb,
    )  # fmt: skip
    cut = _cutting_setting(job, batch)
    terms = [
        Term("activations", kept, cut),
        Term("holes of the heap", (HEAP - 1) * kept, cut),
        Term("gradient of a weight", _FLOAT32 * rank.parameters.largest),
        Term("part of the logits", _part_of_logits(job, batch, stage, rows), batch.setting),
    ]
    return tuple(term for term in terms if term.amount)


def _cutting_setting(job: Job, batch: Batch) -> str:
    """The setting that makes activations fewer."""
    return "runtime.recompute" if job.runtime.recompute == "none" else batch.setting


def _received(job: Job, rank: RankState) -> Term | None:
    """Other data-parallel ranks' gradients for this one's part of a buffer, before they are summed; None: they fit in holes."""
    dense, experts = gradient_ranks(job.layout)
    buffers = [(rank.parameters.dense_buffer, dense), (rank.parameters.expert_buffer, experts)]
    if job.layout.ep == 1:  # experts lie in one buffer with all else
        buffers = [(rank.parameters.dense_buffer + rank.parameters.expert_buffer, dense)]
    most = max(_FLOAT32 * elements * (ranks - 1) // ranks for elements, ranks in buffers)
    return Term("gradients of other ranks", most, "parallel.tp") if most > LARGEST_ON_HEAP else None


def _kept_by_heap(job: Job, stage: int, rank: RankState) -> tuple[Term, ...]:
    """What an update freed stays with the process for the next one, however much it is: whatever lasts and lies at the heap's end
    keeps all below it. Blocks that are too large for the heap, as whole logits are, go back."""
    batch = largest_batch(job)
    terms = _passing_terms(job, batch, stage, rank)
    freed = sum(term.amount for term in terms if term.name in ("activations", "holes of the heap"))
    whole = _whole_logits(job, batch, stage, cpu_rows(job, batch))
    heads = 1 + (job.arch.mtp_depth if job.trains_mtp else 0)
    return (Term("kept by the heap", freed - heads * whole if whole > LARGEST_ON_HEAP else freed, _cutting_setting(job, batch)),)


def _forward(job: Job, batch: Batch, stage: int) -> tuple[Term, ...]:
    """A pass without gradient: one layer at a time, then the logits."""
    return _moment(job, batch, stage, cpu_rows(job, batch))


def _moment(job: Job, batch: Batch, stage: int, rows: Rows) -> tuple[Term, ...]:
    """What is there for a moment: of the widest layer, or of the logits."""
    layout = batch.layout
    counts = layout.decoder_layers(job.arch.num_hidden_layers)
    chunks = range(stage, layout.pp * layout.vpp, layout.pp)
    layers = [layer for chunk in chunks for layer in range(sum(counts[:chunk]), sum(counts[: chunk + 1]))]
    of_layer = max((cpu_layer_numbers(job.arch, layer, rows) for layer in layers), default=0.0) * _FLOAT32 / layout.tp
    of_logits = _part_of_logits(job, batch, stage, rows)
    if of_logits > of_layer:
        return (Term("part of the logits", of_logits, batch.setting),)
    return (Term("layer that is computed", of_layer, batch.setting),)


def _part_of_logits(job: Job, batch: Batch, stage: int, rows: Rows) -> int:
    """What of the logits is there for a moment: in float32 and in copies, or a tile of those that are not kept whole."""
    if stage < batch.layout.pp - 1 or job.arch.is_reward_model:
        return 0
    found = wide_logits(job.arch, batch.layout, rows.positions)
    if _whole_logits(job, batch, stage, rows):
        return found
    width = logits_bytes(job.arch, batch.layout, rows.positions, _FLOAT32) // rows.positions
    return found + rows_at_a_time(width // _FLOAT32, rows.positions, cuda=False) * width


def _whole_logits(job: Job, batch: Batch, stage: int, rows: Rows) -> int:
    """Bytes of the logits of one head; 0 where they are not kept."""
    if stage < batch.layout.pp - 1 or job.arch.is_reward_model:
        return 0
    whole = logits_bytes(job.arch, batch.layout, rows.positions, _FLOAT32)
    return whole if keeps_whole(whole, job.runtime.whole_logits_mb) else 0


def _gb(amount: float) -> str:
    return f"{amount / 1e9:,.1f}"
