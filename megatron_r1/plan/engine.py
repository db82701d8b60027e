"""What a vLLM engine takes of each of its devices, and how many sequences its cache has room for."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from megatron_r1.config.lengths import for_longest_response
from megatron_r1.config.rollout import RolloutConfig
from megatron_r1.config.schema import Config
from megatron_r1.errors import ConfigError
from megatron_r1.model.architecture import Architecture
from megatron_r1.model.rows import Split
from megatron_r1.plan.job import Job
from megatron_r1.plan.terms import Term
from megatron_r1.rollout.cache_size import choose_cache, sequence_bytes

#: Tokens that vLLM 0.32 computes in one step at most, by which it measures its activations as it starts: its default on such GPUs.
_STEP_TOKENS = 8192
_GRAPHS = 1.0e9  #: CUDA graphs of an engine's decode steps; vLLM logs 0.5 to 1.5 GB. Assumed
_BLOCK = 64  #: tokens of a block of the cache, at most: of vLLM's kernels for latent attention
#: What an engine keeps of a device while it sleeps: its CUDA context, communicators and graphs. Assumed
ASLEEP = 2.0e9


@dataclass(frozen=True)
class EngineMemory:
    """Bytes of one device of an engine."""

    weights: int
    activations: int  #: at most, beside the weights
    graphs: float
    cache: float
    sequence: int  #: of the cache that the longest sequence takes
    budget: float  #: of weights, activations and cache together: `rollout.gpu_memory_utilization` of the device

    @property
    def sequences(self) -> int:
        """Of the longest kind that have room in the cache; 0: vLLM would not start."""
        return max(0, int(self.cache // self.sequence))

    @property
    def terms(self) -> tuple[Term, ...]:
        """For a phase in which it samples."""
        return (
            Term("engine weights", self.weights, "rollout.tensor_parallel_size"),
            Term("engine activations", self.activations, "rollout.max_num_seqs"),
            Term("engine cache", max(0.0, self.cache), "rollout.gpu_memory_utilization"),
            Term("engine CUDA graphs", self.graphs),
        )


def samples(job: Job) -> bool:
    """Whether the stage has engines."""
    return job.stage in ("grpo", "rejection") or (job.stage == "pretrain" and job.config.pretrain.gate_accuracy > 0)


def opened_config(job: Job) -> Config:
    """The config that the stage's engines are opened with."""
    return for_longest_response(job.config) if job.stage == "grpo" else job.config


def engine_memory(job: Job, device_bytes: int) -> EngineMemory:
    """One device of an engine of this stage.

    Raises:
        ConfigError: `rollout.tensor_parallel_size` does not divide the model.
    """
    config = opened_config(job)
    rollout, arch = config.rollout, job.arch
    size = rollout.tensor_parallel_size
    for name, whole in arch.vllm_split_sizes().items():
        if whole % size:
            raise ConfigError(f"rollout.tensor_parallel_size={size} does not divide the model's {name}={whole}")
    longest = rollout.max_response_tokens
    if job.stage == "rejection":
        longest = job.section.max_tokens
    weights, activations = engine_weights(arch, size, job.width), _activations(arch, rollout, job.width)
    budget = rollout.gpu_memory_utilization * device_bytes
    cache = budget - weights - activations if rollout.kv_cache_bytes is None else float(rollout.kv_cache_bytes)
    sequence = cached_bytes(arch, config.data.max_prompt_tokens + longest, size, job.width)
    return EngineMemory(weights, activations, _GRAPHS, cache, sequence, budget)


def cpu_engine_memory(job: Job, free_bytes: int) -> EngineMemory:
    """One process of an engine of this stage on a CPU, which fills its whole cache with zeros as it starts.

    Args:
        free_bytes: of a machine, which its engines share.

    Raises:
        ConfigError: `rollout.tensor_parallel_size` does not divide the model.
    """
    found = engine_memory(job, free_bytes)
    rollout = opened_config(job).rollout
    longest = job.section.max_tokens if job.stage == "rejection" else rollout.max_response_tokens
    tokens = job.config.data.max_prompt_tokens + longest
    size = rollout.tensor_parallel_size
    dtype: Literal["float32", "bfloat16"] = "float32" if job.width == 4 else "bfloat16"
    cache = rollout.kv_cache_bytes
    if cache is None:
        engines = 1 if rollout.placement == "single" else rollout.engines_per_node
        workers = engines * size // rollout.nodes_per_engine
        cache = choose_cache(
            job.arch, dtype, max_model_len=tokens, max_num_seqs=rollout.max_num_seqs, workers=size,
            free_bytes=free_bytes // workers, share=rollout.gpu_memory_utilization,
        ).bytes  # fmt: skip
    return replace(found, graphs=0.0, cache=float(cache), sequence=sequence_bytes(job.arch, dtype, tokens, size))


def engine_weights(arch: Architecture, size: int, width: int) -> int:
    """Weights on one of `size` devices. vLLM splits what the trainer splits over tensor-parallel ranks, experts, too; it has no
    multi-token prediction.
    """
    total = 0
    for block in arch.blocks():
        if block.megatron.startswith("mtp."):
            continue
        for row in block.rows:
            times = arch.experts.count if row.is_expert and arch.experts is not None else 1
            numel = times * sum(math.prod(shape) for shape in row.shapes)
            total += numel if row.split is Split.REPLICATED else -(-numel // size)
    return total * width


def cached_bytes(arch: Architecture, tokens: int, size: int, width: int) -> int:
    """What a sequence takes of one device's cache. Heads are shared by devices; the latent of latent attention is whole on each."""
    kept = -(-tokens // _BLOCK) * _BLOCK
    sharers = 1 if arch.ATTENTION == "latent" else min(size, arch.query_groups)
    return kept * arch.num_hidden_layers * (arch.cached_width // sharers) * width


def _activations(arch: Architecture, rollout: RolloutConfig, width: int) -> int:
    """Of the widest layer in a full step, and of the logits of all sequences in float32: theirs, their softmax and its order."""
    size = rollout.tensor_parallel_size
    feed_forward = 3 * arch.intermediate_size // size
    if arch.experts is not None:
        experts = arch.experts
        routed = experts.per_token * (max(2 * experts.width // size, arch.hidden_size) + experts.width // size)
        feed_forward = max(feed_forward, routed + 3 * experts.shared_width // size)
    query, value = arch.head_widths()
    attention = arch.num_attention_heads * (query + query + value) // size
    per_token = 3 * arch.hidden_size + max(feed_forward, attention)
    return _STEP_TOKENS * per_token * width + 3 * rollout.max_num_seqs * arch.vocab_size * 4
