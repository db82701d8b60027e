"""What the memory of a node takes beside its devices."""

from __future__ import annotations

import math

from megatron_r1.mcore.state_bytes import optimizer_bytes
from megatron_r1.plan.engine import engine_weights, opened_config, samples
from megatron_r1.plan.job import Job
from megatron_r1.plan.parameters import gradient_ranks
from megatron_r1.plan.static import RankState
from megatron_r1.plan.terms import Term
from megatron_r1.rollout.sync.transfer import SLOTS
from megatron_r1.rollout.sync.weight_buckets import bucket_bytes
from megatron_r1.weights.mapping import model_entries

#: Of nodes as NVIDIA builds them: DGX A100 and H100 have 2 TB; a tray of GB200 NVL72 has two Grace CPUs of 480 GB.
NODE_BYTES = {"GB200": 960 * 10**9}
USUAL_NODE_BYTES = 2 * 10**12
#: Of a rank, and of an engine's worker, without any tensor of the model: Python, torch with CUDA, Megatron-Core or vLLM. Assumed.
PROCESS = 4.0e9
_SAMPLED = 32  #: bytes of a sampled token: id and log-prob, trainer's log-probs, text and the arrays that are packed of it
_CONVERTED = 4  #: tensors that a process of a conversion holds: two read ahead, one at hand, and one that is put together of it
_FLOAT32 = 4
_SYSTEM = 16e9  #: of the operating system and the page cache that it needs. Assumed


def node_bytes(job: Job) -> int:
    """Of one node."""
    return NODE_BYTES.get(job.device_name, USUAL_NODE_BYTES)


def resident(job: Job, rank: RankState) -> tuple[Term, ...]:
    """What a node holds in every phase, with this rank on all of its devices."""
    ranks, state, offload = job.devices_per_node, rank.state, job.runtime.offload
    terms = [
        Term("processes", ranks * PROCESS * (2 if samples(job) and job.config.rollout.placement != "disaggregated" else 1)),
        Term("system", _SYSTEM),
        Term("optimizer", ranks * state.host, "megatron.optimizer_offload_fraction"),
    ]
    if job.stage in ("grpo", "pretrain"):
        away = state.optimizer if "optimizer" in offload and samples(job) else 0
        terms.append(Term("offloaded optimizer", ranks * away, "runtime.offload"))
    if job.stage == "grpo":
        terms.append(Term("reference", ranks * state.reference if "reference" in offload else 0, "runtime.offload"))
        kept = sum(rank.reward_models) if "reward_models" in offload else 0
        terms.append(Term("reward models", ranks * kept, "runtime.offload"))
        terms.append(Term("rollouts", rollout_bytes(job), "grpo.prompts_per_rollout"))
    if job.stage == "pretrain" and job.config.pretrain.ema_decay is not None:
        terms.append(Term("average of the weights", ranks * average_of_weights(job, rank), "pretrain.ema_decay"))
    return tuple(term for term in terms if term.amount)


def saved(job: Job, rank: RankState) -> Term:
    """What a checkpoint holds while it is written beside training."""
    dense, experts = gradient_ranks(job.layout)
    held, moments = rank.parameters, job.switches.moments
    of_optimizer = optimizer_bytes(held.dense, data_parallel=dense, moments=moments) + optimizer_bytes(
        held.experts, data_parallel=experts, moments=moments
    )
    each = of_optimizer + rank.state.weights + rank.state.reference
    return Term("checkpoint", job.devices_per_node * each, "checkpoint.asynchronous")


def converting(job: Job) -> tuple[Term, ...]:
    """What the processes of a conversion hold on a node: a few tensors each, never the model."""
    return Term("processes", job.devices_per_node * PROCESS), Term("system", _SYSTEM), converted_tensors(job)


def converted_tensors(job: Job) -> Term:
    """Those at hand in a conversion."""
    largest = max(math.prod(entry.full_shape) for entry in model_entries(job.arch))
    return Term("tensors", job.devices_per_node * _CONVERTED * largest * _FLOAT32)


def shared_memory(job: Job) -> Term:
    """The files in memory through which weights go to the engines of a node."""
    rollout = opened_config(job).rollout
    bucket = bucket_bytes(rollout.bucket_mb, engine_weights(job.arch, 1, job.width))
    engines = rollout.engines_per_node if rollout.placement == "colocated" else 1
    return Term("shared memory of weights", engines * SLOTS * bucket, "rollout.bucket_mb")


def average_of_weights(job: Job, rank: RankState) -> int:
    """Of a rank, with the copy that is written."""
    dense, experts = gradient_ranks(job.layout)
    return 8 * (rank.parameters.dense // dense + rank.parameters.experts // experts)


def rollout_bytes(job: Job) -> float:
    """Of the responses of a round that a node's engines sample, all at the limit of the first rounds."""
    stage = job.config.grpo
    tokens = job.config.data.max_prompt_tokens + job.config.rollout.max_response_tokens
    sampling_nodes = 1 if job.config.rollout.placement == "single" else job.nodes
    return _SAMPLED * stage.prompts_per_rollout * stage.group_size * tokens / sampling_nodes
