"""How long a stage's round or update takes, phase by phase, from the config that asks for it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron_r1.config.lengths import lengths_after
from megatron_r1.errors import ConfigError
from megatron_r1.mcore.layout import Layout
from megatron_r1.plan.batches import batches
from megatron_r1.plan.decode_time import ENGINE_COSTS, Engine, SampledRound, cache_bytes_of_token, sampling
from megatron_r1.plan.devices import Accelerator
from megatron_r1.plan.engine import engine_memory, engine_weights
from megatron_r1.plan.job import Job
from megatron_r1.plan.layer_time import Grid, LayerPass, forward_layer
from megatron_r1.plan.lengths import USUAL_SPREAD, ResponseLengths
from megatron_r1.plan.round_time import ALL_COSTS, RoundSetting, round_seconds, samples_of
from megatron_r1.plan.static import rank_state, reward_models
from megatron_r1.plan.terms import Term, TimePhase
from megatron_r1.plan.transfer_time import SentShards
from megatron_r1.plan.update_time import PCIE, TrainedBatch, Training, pass_seconds, update_seconds
from megatron_r1.plan.work import ModelWork, model_work
from megatron_r1.training.pretrain_plan import PretrainPlan

#: Part of a phase -> the key whose change cuts it.
_SETTINGS = {
    "products": "megatron.fp8", "experts": "megatron.fp8", "tensor": "parallel.tp", "bubble": "parallel.vpp",
    "dispatch": "megatron.moe_token_dispatcher_type", "launch": "megatron.cuda_graph_impl",
    "reduction": "megatron.overlap_grad_reduce", "optimizer": "megatron.optimizer_cpu_offload", "pipeline": "parallel.pp",
    "decode": "rollout.tensor_parallel_size", "decode, short of cache": "rollout.gpu_memory_utilization",
    "tail": "rollout.max_response_tokens", "prefill": "data.max_prompt_tokens",
    "state from and to the host": "runtime.offload", "host": "runtime.offload", "to the host": "checkpoint.interval",
    "reference from the host": "grpo.reference_resident",
}  # fmt: skip
#: Modules that `runtime.recompute_modules` names -> parts of a layer's time, and the share of them that is theirs.
_RECOMPUTED = {
    "core_attn": {"attention": 1.0}, "moe": {"experts": 1.0, "dispatch": 1.0}, "mlp": {"products": 0.5},
    "shared_experts": {"products": 0.15}, "moe_act": {"memory": 0.1}, "layernorm": {"memory": 0.1},
    "mla_up_proj": {"products": 0.2},
}  # fmt: skip
_PROMPT, _SAMPLE = 160.0, 5355.0  # tokens in the mean: of R1's problems (R1 v2 B.3.1), and of its 800K samples (v1 2.3.3)
_RESPONSE_SHARE = 0.25  # of its limit, that a response has in the mean where nobody says


@dataclass(frozen=True)
class Assumed:
    """What no setting says. None: see `TimePlan.assumptions`."""

    response: float | None = None  #: tokens of a response, or of a sample, in the mean
    prompt: float = _PROMPT
    spread: float = USUAL_SPREAD
    engine_nodes: int | None = None  #: of rollout.placement=disaggregated
    updates_done: int = 0  #: of the policy, before the round: where grpo.length_schedule stands


NOTHING_SAID = Assumed()


@dataclass(frozen=True)
class TimePlan:
    """A round, an update, or a batch of prompts."""

    unit: str  #: what `seconds` is of
    phases: tuple[TimePhase, ...]
    devices: int  #: those of engines on nodes of their own included
    tokens: float  #: that the unit trains on, or samples
    flops: float  #: model FLOPs of its phases together
    peak: float  #: FLOPS of a device
    units: float | None  #: of the whole stage; None: the data decide
    stage_seconds: float | None  #: of the whole stage
    assumptions: tuple[str, ...]

    @property
    def seconds(self) -> float:
        """From the start of the first phase to the end of the last, as they wait for each other."""
        ends: dict[str, float] = {}
        for phase in self.phases:
            ends[phase.name] = max((ends[name] for name in phase.waits_for), default=0.0) + phase.seconds
        return max(ends.values())

    @property
    def tokens_per_second(self) -> float:
        """Of one device."""
        return self.tokens / self.seconds / self.devices

    @property
    def mfu(self) -> float:
        """Share of the devices' peak."""
        return self.flops / self.seconds / self.devices / self.peak


def plan_time(job: Job, assumed: Assumed = NOTHING_SAID) -> TimePlan | None:
    """The time of a stage on GPUs; None: of a conversion, whose time the disks decide.

    Raises:
        ConfigError: there is no GPU to plan for, or the stage's engines do not fit.
    """
    if job.device is None:
        raise ConfigError("runtime.device=cpu has no device to plan for: give --gpu NAME")
    if job.stage == "convert":
        return None
    plan = {
        "grpo": _time_grpo,
        "pretrain": _time_pretrain,
        "sft": _time_samples,
        "reward-model": _time_samples,
        "rejection": _time_rejection,
    }
    return plan[job.stage](job, job.device, model_work(job.arch), assumed)


def grid_of(layout: Layout) -> Grid:
    """A layout in the planner's numbers."""
    return Grid(layout.world_size, layout.tp, layout.pp, layout.vpp, layout.cp, layout.ep, layout.etp)


def training_of(job: Job, work: ModelWork, device: Accelerator) -> Training:
    """How the job makes an update."""
    transformer, ddp = job.switches.transformer, job.switches.ddp
    whole = job.stage == "reward-model" or job.config.megatron.cross_entropy_loss_fusion
    return Training(
        recompute=_recomputed(job, work, device), fp8=transformer.get("fp8") is not None, mtp=job.trains_mtp,
        overlapped_dispatch=bool(transformer.get("overlap_moe_expert_parallel_comm")),
        deepep=transformer.get("moe_token_dispatcher_type") == "flex",
        graphs=transformer.get("cuda_graph_impl", "none") != "none", overlapped_reduction=bool(ddp.get("overlap_grad_reduce")),
        offloaded_optimizer=job.switches.optimizer_on_host,
        whole_logits=math.inf if whole else job.runtime.whole_logits_mb * 1e6,
    )  # fmt: skip


def _recomputed(job: Job, work: ModelWork, device: Accelerator) -> float:
    """Share of a layer's forward pass that its backward pass repeats."""
    if job.runtime.recompute != "selective":
        return 1.0 if job.runtime.recompute == "full" else 0.0
    parts = forward_layer(work, device, grid_of(job.layout), LayerPass(4096, 2048), moe=work.moe_layers > 0)
    again = sum(parts[part] * share for name in job.runtime.recompute_modules for part, share in _RECOMPUTED.get(name, {}).items())
    return min(again / sum(parts.values()), 1.0)


def _time_grpo(job: Job, device: Accelerator, work: ModelWork, assumed: Assumed) -> TimePlan:
    config, stage, rollout = job.config, job.section, job.config.rollout
    limits = lengths_after(stage, rollout, assumed.updates_done)
    mean = min(assumed.response or limits.max_response_tokens * _RESPONSE_SHARE, limits.max_response_tokens)
    engine, engines, own = planned_engines(job, device, work, assumed)
    # A round of one update computes the policy's log-probs within it; the reference's take a pass of their own.
    scored = int(stage.updates_per_rollout > 1) + int(stage.has_reference)
    setting = RoundSetting(
        grid=grid_of(job.layout), engine=engine, engines=engines, responses=stage.prompts_per_rollout * stage.group_size,
        group=stage.group_size, updates=stage.updates_per_rollout, prompt=min(assumed.prompt, config.data.max_prompt_tokens),
        lengths=ResponseLengths(mean, limits.max_response_tokens, assumed.spread), micro_batch=float(limits.micro_batch_tokens),
        scoring_batch=float(limits.micro_batch_tokens), scored=scored, training=training_of(job, work, device),
        way=shards_of(job, engines), offloaded=False,
    )  # fmt: skip
    # A round trains on every sample once an epoch.
    passes = replace(setting, responses=setting.responses * stage.inner_epochs)
    parts, drawn = round_seconds(work, device, setting)
    if stage.inner_epochs > 1:
        parts["update"] = _update_of_epochs(work, device, passes)
    moved = _moved(job)
    if "gradients" in config.runtime.offload or "optimizer" in config.runtime.offload:
        parts["update"] = {"state from and to the host": moved["optimizer"], **parts["update"]}
    if stage.has_reference and "reference" in config.runtime.offload:
        parts["log-probs"] = {**parts["log-probs"], "reference from the host": moved["reference"]}
    batch = samples_of(setting)
    phases = [_sampled(parts["generation"], drawn)]
    judged = len(reward_models(job))
    if judged:
        training = setting.training
        scores = pass_seconds(
            work, device, setting.grid, replace(batch, micro_batch=setting.scoring_batch), training, backward=False
        )
        phases.append(_phase("reward", {part: seconds * judged for part, seconds in scores.items()}, "sampling"))
    if scored:
        phases.append(_phase("log-probs", parts["log-probs"], phases[-1].name))
    phases.append(_phase("update", parts["update"], phases[-1].name))
    phases.append(_phase("weight sync", parts["sync"], "update"))
    phases.append(_save(job, "update", moved["checkpoint"]))
    phases.append(_phase("between rounds", parts["between"], "weight sync", "save"))
    forward = batch.tokens * work.token_flops(batch.pairs)
    flops = forward * (1 + scored + judged + 3 * stage.inner_epochs)
    notes = (
        f"responses of {mean:,.0f} tokens in the mean, cut at {limits.max_response_tokens:,} (--response-tokens)",
        f"prompts of {setting.prompt:,.0f} tokens (--prompt-tokens)",
        f"{engines:,} engine(s) of {engine.devices}; {drawn.sequences:,.0f} sequences a step, at most {drawn.fullest:,.0f}",
        "rewards by rule are computed while engines sample",
    )
    plan = TimePlan(
        "round", tuple(phases), job.world_size + own, batch.tokens, flops, device.bf16_flops, float(stage.rollouts), None, notes
    )
    return replace(plan, stage_seconds=plan.seconds * stage.rollouts)


def _update_of_epochs(work: ModelWork, device: Accelerator, setting: RoundSetting) -> dict[str, float]:
    """Of a round that trains on its samples several times: the same number of updates on so many more samples."""
    whole, share = samples_of(setting), 1 / setting.updates
    batch = TrainedBatch(whole.tokens * share, whole.pairs, setting.micro_batch, whole.sequences * share, whole.variation)
    parts = update_seconds(work, device, setting.grid, batch, setting.training)
    parts = {part: seconds * setting.updates for part, seconds in parts.items()}
    return parts | {"data": setting.responses * ALL_COSTS.sample}


def planned_engines(job: Job, device: Accelerator, work: ModelWork, assumed: Assumed) -> tuple[Engine, int, int]:
    """An engine, their number, and how many devices they have to themselves."""
    rollout = job.config.rollout
    room = engine_memory(job, device.memory_bytes)
    if room.sequences < 1:
        raise ConfigError(
            f"rollout.gpu_memory_utilization={rollout.gpu_memory_utilization:g} leaves an engine's cache no room for a response at "
            "its limit: raise it or rollout.tensor_parallel_size"
        )
    size = rollout.tensor_parallel_size
    engine = Engine(size, job.width, room.cache / cache_bytes_of_token(work, size), rollout.max_num_seqs)
    if rollout.placement == "single":
        return engine, 1, 0
    if rollout.placement == "colocated":
        return engine, max(job.nodes * rollout.engines_per_node // rollout.nodes_per_engine, 1), 0
    nodes = assumed.engine_nodes or job.nodes
    engines = nodes * job.devices_per_node // size
    if not engines:
        raise ConfigError(
            f"rollout.tensor_parallel_size={size}: {nodes} node(s) of {job.devices_per_node} hold no engine; raise --engine-nodes"
        )
    return engine, engines, nodes * job.devices_per_node


def shards_of(job: Job, engines: int) -> SentShards:
    """What travels in a weight sync of GRPO on GPUs, and who gives and takes how much."""
    rollout = job.config.rollout
    size = rollout.tensor_parallel_size
    apart = rollout.placement == "disaggregated"
    over_nccl = apart and rollout.transfer != "shm"
    nodes = 1 if apart else rollout.nodes_per_engine
    whole = engine_weights(job.arch, 1, job.width)
    return SentShards(
        shard=engine_weights(job.arch, size, job.width), sent=whole * engines / job.world_size, workers=size // nodes,
        far=1.0 if apart else 1 - 1 / job.nodes, through_host=not over_nccl, verified=rollout.verify_weights,
        wakes=rollout.engines_sleep,
    )  # fmt: skip


def _moved(job: Job) -> dict[str, float]:
    """Seconds in which what leaves the devices travels, once a round or a checkpoint, on the fullest pipeline stage."""
    found = {"optimizer": 0.0, "reference": 0.0, "checkpoint": 0.0}
    for stage in range(job.layout.pp):
        state = rank_state(job, stage).state
        optimizer = 2 * state.optimizer / PCIE if "optimizer" in job.runtime.offload else 0.0
        of_stage = {
            "optimizer": optimizer, "reference": 2 * state.reference / PCIE, "checkpoint": (state.optimizer + state.weights) / PCIE,
        }  # fmt: skip
        found = {name: max(seconds, of_stage[name]) for name, seconds in found.items()}
    return found


def _time_pretrain(job: Job, device: Accelerator, work: ModelWork, assumed: Assumed) -> TimePlan:
    """The last update of the phase that takes longest; the whole stage is the sum of all phases."""
    training, plan = training_of(job, work, device), PretrainPlan(job.config.pretrain)
    longest, whole, notes = -1.0, 0.0, []
    for phase, layout in zip(plan.phases, (batch.layout for batch in batches(job)), strict=True):
        length, of_phase = float(phase.sequence_length), 0.0
        ends = [level.first_update for level in phase.levels[1:]] + [phase.last_update + 1]
        for level, end in zip(phase.levels, ends, strict=True):
            batch = TrainedBatch(level.rows * length, (length + 1) / 2, phase.micro_batch_size * length)
            parts = update_seconds(work, device, grid_of(layout), batch, training)
            of_phase += sum(parts.values()) * (end - level.first_update)
        notes.append(
            f"phase {phase.number}: {phase.updates:,} updates of rows of {length:,.0f} tokens, {of_phase / 3600:,.1f} h, its last "
            f"{sum(parts.values()):,.2f} s with {batch.tokens:,.0f} tokens"
        )
        whole += of_phase
        if of_phase > longest:
            longest, of_longest, trained = of_phase, parts, batch
    phases = (_phase("update", of_longest), _save(job, "update", _moved(job)["checkpoint"]))
    flops, units = 3 * trained.tokens * work.token_flops(trained.pairs), float(plan.total_updates)
    found = TimePlan("update", phases, job.world_size, trained.tokens, flops, device.bf16_flops, units, None, tuple(notes))
    return replace(found, stage_seconds=whole + phases[1].seconds * units)


def _time_samples(job: Job, device: Accelerator, work: ModelWork, assumed: Assumed) -> TimePlan:
    """An update of supervised training or of a reward model."""
    stage = job.section
    limit = float(stage.micro_batch_tokens if stage.max_tokens is None else min(stage.max_tokens, stage.micro_batch_tokens))
    pairwise = 2 if job.stage == "reward-model" and stage.kind == "helpful" else 1
    lengths = ResponseLengths(min(assumed.response or _SAMPLE, limit), int(limit), assumed.spread)
    samples = float(stage.batch_size * pairwise)
    batch = TrainedBatch(
        samples * lengths.mean, lengths.mean_square() / lengths.mean / 2, float(stage.micro_batch_tokens), samples,
        lengths.variation(),
    )  # fmt: skip
    parts = update_seconds(work, device, grid_of(job.layout), batch, training_of(job, work, device))
    flops = 3 * batch.tokens * work.token_flops(batch.pairs)
    notes = (f"samples of {lengths.mean:,.0f} tokens in the mean, cut at {limit:,.0f} (--response-tokens)",)
    phases = (_phase("update", parts), _save(job, "update", _moved(job)["checkpoint"]))
    return TimePlan("update", phases, job.world_size, batch.tokens, flops, device.bf16_flops, None, None, notes)


def _time_rejection(job: Job, device: Accelerator, work: ModelWork, assumed: Assumed) -> TimePlan:
    """The prompts of one call."""
    stage = job.section
    engine, engines, own = planned_engines(job, device, work, assumed)
    mean = min(assumed.response or stage.max_tokens * _RESPONSE_SHARE, float(stage.max_tokens))
    responses = stage.batch_prompts * stage.samples_per_prompt
    lengths = ResponseLengths(mean, stage.max_tokens, assumed.spread)
    drawn = sampling(
        work, device, engine, responses=responses, engines=engines, prompt=assumed.prompt, shared_by=stage.samples_per_prompt,
        lengths=lengths, costs=ENGINE_COSTS,
    )  # fmt: skip
    parts = {"prefill": drawn.prefill, "decode": drawn.seconds - drawn.prefill - drawn.tail, "tail": drawn.tail}
    tokens = responses * mean
    flops = tokens * work.token_flops(lengths.mean_square() / mean / 2)
    notes = (f"responses of {mean:,.0f} tokens in the mean, cut at {stage.max_tokens:,} (--response-tokens)",)
    name = f"batch of {stage.batch_prompts:,} prompts"
    devices = own or engines * engine.devices
    return TimePlan(name, (_sampled(parts, drawn),), devices, tokens, flops, device.bf16_flops, None, None, notes)


def _save(job: Job, after: str, seconds: float) -> TimePhase:
    return _phase("save", {"to the host": seconds / job.config.checkpoint.interval}, after)


def _sampled(parts: dict[str, float], drawn: SampledRound) -> TimePhase:
    """Short of cache is what reads sequences again that had lost theirs."""
    short = {"decode": "decode, short of cache"} if drawn.read_again else {}
    return _phase("sampling", {short.get(part, part): seconds for part, seconds in parts.items()})


def _phase(name: str, parts: dict[str, float], *waits_for: str) -> TimePhase:
    return TimePhase(name, tuple(_terms(parts)), waits_for)


def _terms(parts: dict[str, float]) -> Iterator[Term]:
    return (Term(name, seconds, _SETTINGS.get(name, "")) for name, seconds in parts.items() if seconds > 0)
