"""The memory of a stage: every phase of the rank and of the node that need most, and what to change where it does not fit."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_r1.errors import ConfigError
from megatron_r1.mcore.activation_bytes import activation_bytes
from megatron_r1.plan import host
from megatron_r1.plan.batches import Batch, batches, largest_batch
from megatron_r1.plan.engine import ASLEEP, EngineMemory, engine_memory, opened_config, samples
from megatron_r1.plan.job import Job
from megatron_r1.plan.overheads import COMMUNICATOR, CONTEXT, FRAGMENTATION, communicators
from megatron_r1.plan.static import RankState, rank_state
from megatron_r1.plan.terms import MemoryPhase, Term
from megatron_r1.rollout.sync.transfer import SLOTS
from megatron_r1.rollout.sync.weight_buckets import bucket_bytes

#: Tokens of the rank whose experts are used most, over the mean: what a plan assumes.
IMBALANCE = 1.3
ENGINES_OWN = "sampling, on the engines' own devices"


@dataclass(frozen=True)
class MemoryPlan:
    """The phases of a stage in their order."""

    phases: tuple[MemoryPhase, ...]
    fullest: dict[str, int]  #: phase -> the pipeline stage whose device needs most
    device_bytes: int  #: that a rank's device has
    node_bytes: int  #: that a node has
    engine: EngineMemory | None  #: None: the stage has none

    @property
    def peak(self) -> MemoryPhase:
        """The phase that needs most of a device."""
        return max(self.phases, key=lambda phase: phase.device_bytes)

    @property
    def host_peak(self) -> MemoryPhase:
        """The phase that needs most of a node."""
        return max(self.phases, key=lambda phase: phase.host_bytes)

    def shortfalls(self) -> list[str]:
        """A line for everything that does not fit; [] if all does."""
        found = []
        if self.engine is not None and self.engine.sequences < 1:
            found.append(_too_small_cache(self.engine))
        device, node = self.peak, self.host_peak
        if device.device_bytes > self.device_bytes:
            found.append(_say_shortfall(device, "a device", device.device_bytes, self.device_bytes, device.largest()))
        if node.host_bytes > self.node_bytes:
            found.append(_say_shortfall(node, "a node", node.host_bytes, self.node_bytes, node.largest(host=True)))
        return found


def plan_memory(job: Job, imbalance: float = IMBALANCE) -> MemoryPlan:
    """The memory of a stage on GPUs.

    Args:
        imbalance: tokens of the rank whose experts are used most, over the mean.

    Raises:
        ConfigError: something of the stage does not divide.
    """
    if job.device is None:
        raise ConfigError("runtime.device=cpu has no device to plan for: give --gpu NAME")
    engine = engine_memory(job, job.device.memory_bytes) if samples(job) else None
    of_stages = [stage_phases(job, stage, engine, imbalance) for stage in range(job.layout.pp)]
    fullest, phases = {}, []
    for same in zip(*of_stages, strict=True):
        name = same[0].name
        fullest[name] = max(range(len(same)), key=lambda stage: same[stage].device_bytes)
        node = max(same, key=lambda phase: phase.host_bytes)
        phases.append(MemoryPhase(name, same[fullest[name]].device, node.host))
    return MemoryPlan(tuple(phases), fullest, job.device.memory_bytes, host.node_bytes(job), engine)


def stage_phases(job: Job, stage: int, engine: EngineMemory | None, imbalance: float = IMBALANCE) -> list[MemoryPhase]:
    """The phases of a rank of one pipeline stage, and of a node full of such ranks."""
    if job.stage == "convert":
        return [MemoryPhase("converting", (), host.converting(job))]
    rank = rank_state(job, stage)
    phases: list[MemoryPhase] = []
    if engine is not None:
        phases += _sampling_phases(job, rank, engine)
    if job.stage == "grpo":
        phases += _scoring_phases(job, rank, stage, engine, imbalance)
    if job.is_trained:
        phases += _training_phases(job, rank, stage, engine, imbalance)
    if engine is not None and job.is_trained:
        phases.append(_sync_phase(job, rank, engine))
    return phases


def _sampling_phases(job: Job, rank: RankState, engine: EngineMemory) -> list[MemoryPhase]:
    """While engines sample, of the trainer is there what `runtime.offload` leaves."""
    trainer = _trainer_terms(job, rank, moved=frozenset(job.runtime.offload)) if job.is_trained else ()
    resident = host.resident(job, rank)
    if opened_config(job).rollout.placement == "disaggregated":
        own = (*engine.terms, Term("CUDA, NCCL", CONTEXT + COMMUNICATOR))
        return [MemoryPhase("sampling", (*trainer, _overhead(job)), resident), MemoryPhase(ENGINES_OWN, own)]
    return [MemoryPhase("sampling", (*trainer, *engine.terms, _overhead(job)), resident)]


def _training_phases(job: Job, rank: RankState, stage: int, engine: EngineMemory | None, imbalance: float) -> list[MemoryPhase]:
    away = frozenset(job.runtime.offload) - {"optimizer", "gradients"}
    static = (*_trainer_terms(job, rank, moved=away), *_resting(job, engine), _overhead(job))
    resident, phases = host.resident(job, rank), []
    for batch in batches(job):
        passing = activation_terms(job, batch, stage, imbalance, backward=True)
        name = f"update, {batch.name}" if batch.name else "update"
        beside = [Term("reference", rank.state.reference, "grpo.reference_resident")] if _rides(job) else []
        phases.append(MemoryPhase(name, (*static, *beside, *passing), resident))
    phases.append(MemoryPhase("step", (*static, Term("moments in float32", rank.state.update)), resident))
    writing = (host.saved(job, rank),) if job.config.checkpoint.asynchronous else ()
    return [*phases, MemoryPhase("saving", static, (*resident, *writing))]


def _scoring_phases(job: Job, rank: RankState, stage: int, engine: EngineMemory | None, imbalance: float) -> list[MemoryPhase]:
    """Log-probs of policy and reference, and the scores of reward models: forward passes alone."""
    left = (*_trainer_terms(job, rank, moved=frozenset(job.runtime.offload)), *_resting(job, engine), _overhead(job))
    resident, batch = host.resident(job, rank), largest_batch(job)
    passing = activation_terms(job, batch, stage, imbalance, backward=False)
    phases = []
    if rank.reward_models:
        model = Term("reward model that scores", max(rank.reward_models), "parallel.pp")
        scoring = (model,) if "reward_models" in job.runtime.offload else ()
        of_model = activation_terms(job, batch, stage, imbalance, backward=False, scores=True)
        phases.append(MemoryPhase("reward", (*left, *scoring, *of_model), resident))
    reference = []
    if job.section.has_reference and "reference" in job.runtime.offload:
        # `auto` takes it beside where there is room; without, one tensor at a time is exchanged.
        beside = rank.state.reference if job.section.reference_resident == "always" else rank.parameters.largest * job.width
        reference = [Term("reference", beside, "grpo.reference_resident")]
    phases.append(MemoryPhase("log-probs", (*left, *reference, *passing), resident))
    return phases


def _sync_phase(job: Job, rank: RankState, engine: EngineMemory) -> MemoryPhase:
    """New weights: the engine holds its own, without a cache if it slept, and the trainer gives it piece after piece."""
    rollout = opened_config(job).rollout
    trainer = _trainer_terms(job, rank, moved=frozenset(job.runtime.offload))
    bucket = bucket_bytes(rollout.bucket_mb, engine.weights * rollout.tensor_parallel_size)
    piece = Term("piece of a tensor", min(bucket, rank.parameters.largest * job.width), "rollout.bucket_mb")
    apart = rollout.placement == "disaggregated"
    device: list[Term] = [*trainer, piece, _overhead(job)]
    if apart:
        device.append(Term("buckets of weights", SLOTS * bucket, "rollout.bucket_mb"))
    elif rollout.engines_sleep:
        device.append(Term("engine weights", engine.weights, "rollout.tensor_parallel_size"))
    else:
        device += engine.terms
    return MemoryPhase("weight sync", tuple(device), (*host.resident(job, rank), host.shared_memory(job)))


def _trainer_terms(job: Job, rank: RankState, moved: frozenset[str]) -> tuple[Term, ...]:
    """What is on the device of the trainer's state, but for what is `moved`."""
    state = rank.state
    split = "parallel.ep" if job.arch.experts is not None else "parallel.tp"
    terms = [
        Term("weights", state.weights, split),
        Term("gradients", 0 if "gradients" in moved else state.gradients, split),
        Term("optimizer", 0 if "optimizer" in moved else state.optimizer, "megatron.optimizer_cpu_offload"),
        Term("reference", 0 if "reference" in moved else state.reference, "runtime.offload"),
        Term("reward models", 0 if "reward_models" in moved else sum(rank.reward_models), "runtime.offload"),
    ]
    return tuple(term for term in terms if term.amount)


def activation_terms(
    job: Job, batch: Batch, stage: int, imbalance: float, *, backward: bool, scores: bool = False
) -> tuple[Term, ...]:
    """What a pass over micro-batches takes of a rank beside its state; `scores`: of a reward model, which has no logits."""
    runtime, width, layout = job.runtime, job.width, batch.layout

    def counted(factor: float, recompute: str) -> tuple[int, int, int]:
        found = activation_bytes(
            job.arch, layout, recompute=recompute, tokens=batch.tokens, stage=stage, width=width, mtp_trained=job.trains_mtp,
            modules=runtime.recompute_modules, micro_batches=batch.micro_batches, imbalance=factor,
            whole_logits_mb=None if job.config.megatron.cross_entropy_loss_fusion else runtime.whole_logits_mb,
        )  # fmt: skip
        return found.kept, found.recomputed, found.logits

    recompute = runtime.recompute if backward else "full"
    kept, again, logits = counted(1.0, recompute)
    kept_more, again_more, _ = counted(imbalance, recompute)
    if scores or job.arch.is_reward_model:
        logits = 0
    if again > logits:  # the logits are gone when the first layer is computed again, and come when the last one is through
        logits = 0
    else:
        again = again_more = 0
    if not backward:  # nothing is kept; one layer is computed at a time
        kept = kept_more = 0
    extra = kept_more - kept + again_more - again
    cut = "runtime.recompute" if recompute == "none" else batch.setting
    terms = [
        Term("activations", kept, cut),
        Term("layer that is computed", again, batch.setting),
        Term("logits", logits, "runtime.whole_logits_mb"),
        Term("dispatch to experts", _dispatched(job, batch, imbalance), batch.setting),
        Term("imbalance of experts", extra, batch.setting),
    ]
    terms.append(Term("fragmentation", FRAGMENTATION * sum(term.amount for term in terms)))
    return tuple(term for term in terms if term.amount)


def _dispatched(job: Job, batch: Batch, imbalance: float) -> float:
    """The tokens of one layer on their way to experts: in the order of experts, and as they arrive."""
    if job.arch.experts is None:
        return 0
    positions = batch.tokens // batch.layout.cp // batch.layout.tp
    return positions * job.arch.experts.per_token * job.arch.hidden_size * job.width * (1 + imbalance)


def _rides(job: Job) -> bool:
    """Whether the reference must be on the device in an update: in a round's only one, if it is to be resident."""
    if job.stage != "grpo" or not job.section.has_reference or "reference" not in job.runtime.offload:
        return False
    return job.section.reference_resident == "always" and job.section.updates_per_rollout == 1


def _resting(job: Job, engine: EngineMemory | None) -> tuple[Term, ...]:
    """What an engine beside the trainer keeps while it does not sample."""
    rollout = job.config.rollout
    if engine is None or rollout.placement == "disaggregated":
        return ()
    if rollout.engines_sleep:
        return (Term("engine that sleeps", ASLEEP),)
    setting = "rollout.sleep"
    return (Term("engine", engine.weights + max(0.0, engine.cache) + engine.graphs + engine.activations, setting),)


def _overhead(job: Job) -> Term:
    return Term("CUDA, NCCL", CONTEXT + COMMUNICATOR * communicators(job.layout))


def _say_shortfall(phase: MemoryPhase, of: str, needed: float, room: float, cut: Term | None) -> str:
    most = (
        "" if cut is None else f"; of it {cut.name} {cut.amount / 1e9:,.1f} GB" + (f": change {cut.setting}" if cut.setting else "")
    )
    return f"{phase.name} needs {needed / 1e9:,.1f} GB of {of}, which has {room / 1e9:,.1f} GB{most}"


def _too_small_cache(engine: EngineMemory) -> str:
    return (
        f"sampling: an engine's weights and activations take {(engine.weights + engine.activations) / 1e9:,.1f} GB of its "
        f"{engine.budget / 1e9:,.1f} GB a device, and the longest sequence takes {engine.sequence / 1e9:,.1f} GB of cache: "
        "raise rollout.gpu_memory_utilization or rollout.tensor_parallel_size"
    )
