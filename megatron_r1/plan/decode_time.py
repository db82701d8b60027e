"""Seconds in which engines sample a round's responses: prompts read, then a token of every sequence at each step.

A step of decoding reads the weights that its tokens meet and the cache of its sequences, or computes longer than that takes; each
of its layers adds tensor parallelism's two sums. How many sequences a step has is what the cache holds, and what the lengths leave.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from megatron_r1.errors import ConfigError
from megatron_r1.plan.devices import Accelerator
from megatron_r1.plan.lengths import ResponseLengths
from megatron_r1.plan.work import ModelWork

_BF16 = 2
_STEPS, _SHORTEST = 256, 32  # parts that the longest response is counted in, and steps of decoding in one of them at least
_GOLDEN = 0.6180339887  # its multiples' fractions spread evenly


@dataclass(frozen=True)
class EngineCosts:
    """What depends on the engine's program rather than on devices: one set for all."""

    step: float = 2.3e-3  #: seconds of a step outside the model: scheduler, sampler, detokenizer
    sequence: float = 10e-6  #: seconds of a step for each of its sequences
    layer: float = 26e-6  #: seconds of a layer's small kernels in a captured graph
    expert_layer: float = 60e-6  #: seconds that a layer with experts adds
    launch: float = 220e-6  #: seconds in which the host starts a layer that is not captured; hidden while the device is slower
    expert_launch: float = 530e-6  #: seconds that experts add to these
    near_sum: float = 10e-6  #: seconds of a sum over ranks of one NVLink domain, however small
    far_sum: float = 60e-6  #: over ranks of several


ENGINE_COSTS = EngineCosts()


@dataclass(frozen=True)
class Engine:
    """One engine and its limits."""

    devices: int  #: that share every layer: tensor parallelism, of experts too
    weight_bytes: float = 2.0  #: of a matrix element
    cache_tokens: float = math.inf  #: that its KV cache holds
    max_sequences: int = 256  #: of a step
    accepted: float = 1.0  #: tokens that a step adds to a sequence, with speculation: 1 + accepted drafts
    drafts: int = 0  #: tokens that are proposed and checked beside the next one
    graphs: bool = True  #: whether steps are captured as CUDA graphs
    attention: int | None = None  #: devices that share attention and cache of a sequence, experts being all devices'; None: all

    @property
    def groups(self) -> int:
        """Of devices with sequences of their own: data parallelism of attention (V3 section 3.4.2)."""
        return self.devices // (self.attention or self.devices)

    def weights(self, work: ModelWork, experts: float) -> float:
        """Elements of one device, with so many of a layer's experts on all devices."""
        routed = work.moe_layers * experts * work.expert / self.devices
        return routed + work.unrouted * self.groups / self.devices


def cache_tokens(work: ModelWork, device: Accelerator, engine: Engine, share: float, reserved: float = 4e9) -> float:
    """Tokens of an engine's KV cache, if it may take `share` of each device and needs `reserved` for activations and graphs.

    Raises:
        ConfigError: the weights alone do not fit.
    """
    weights = engine.weights(work, work.experts) * engine.weight_bytes
    free = device.memory_bytes * share - reserved - weights
    if free <= 0:
        raise ConfigError(
            f"rollout.gpu_memory_utilization={share:g}: {weights / 1e9:.0f} GB of weights on each of an engine's {engine.devices} "
            f"devices leave no cache; raise it or rollout.tensor_parallel_size"
        )
    return engine.groups * free / cache_bytes_of_token(work, engine.devices // engine.groups)


def cache_bytes_of_token(work: ModelWork, devices: int) -> float:
    """Bytes of one token's cache on each device of an engine; ranks beyond the cache's heads keep copies."""
    return work.layers * work.cached * _BF16 / min(devices, work.cache_shares)


def step_seconds(
    work: ModelWork, device: Accelerator, engine: Engine, sequences: float, context: float, costs: EngineCosts
) -> float:
    """Of one step of so many sequences with so many tokens each in the cache, on an engine that computes nothing else."""
    tokens = sequences * (1 + engine.drafts)
    groups, size = engine.groups, engine.devices // engine.groups
    touched = work.experts * (1 - (1 - work.per_token / work.experts) ** tokens) if work.moe_layers else 0.0
    read = engine.weights(work, touched) - (work.head_rows - 1) * work.head / size  # the embedding is looked up, not read
    weights = read * engine.weight_bytes / device.memory_rate
    fp8 = engine.weight_bytes == 1
    computed = 2 * tokens * work.active / engine.devices / device.gemm_flops(fp8=fp8)
    cache = sequences / groups * context * cache_bytes_of_token(work, size) / device.memory_rate
    pairs = tokens * context * work.absorbed_pair_flops * work.layers / engine.devices / device.attention_flops
    seconds = max(weights, computed) + max(cache, pairs)
    seconds += work.layers * costs.layer + work.moe_layers * costs.expert_layer
    seconds += _travel(work, device, engine, tokens, costs)
    if not engine.graphs:
        seconds = max(seconds, work.layers * costs.launch + work.moe_layers * costs.expert_launch)
    if engine.drafts:
        seconds *= 1 + engine.drafts / work.layers  # a layer for each draft
    return seconds + costs.step + sequences * costs.sequence


def _travel(work: ModelWork, device: Accelerator, engine: Engine, tokens: float, costs: EngineCosts) -> float:
    """Seconds of a step in which ranks send each other hidden states: two sums a layer; with attention of groups one of each layer
    inside a group, and of experts tokens there and back.
    """
    own, size = tokens / engine.groups * work.hidden * _BF16, engine.devices // engine.groups
    dispatched = work.moe_layers if engine.groups > 1 else 0
    seconds = 0.0
    if size > 1:
        far = size > device.domain
        latency = costs.far_sum if far else costs.near_sum
        seconds += (2 * work.layers - dispatched) * (latency + 2 * own / device.link_rate(far))
    if dispatched:
        far = engine.devices > device.domain
        latency = costs.far_sum if far else costs.near_sum
        sent = own / size * min(work.per_token, engine.devices)
        seconds += 2 * dispatched * (latency + sent / device.link_rate(far))
    return seconds


def prefill_seconds(work: ModelWork, device: Accelerator, engine: Engine, tokens: float) -> float:
    """Of reading so many tokens of prompts, whose attention is short."""
    fp8 = engine.weight_bytes == 1
    seconds = 2 * tokens * work.active / engine.devices / device.gemm_flops(fp8=fp8)
    if engine.devices > 1:
        sums = 4 * work.layers * tokens * work.hidden * _BF16
        seconds += sums / device.link_rate(engine.devices > device.domain)
    return seconds


class _Queue:
    """The sequences of one engine: those that are decoded, and those that wait.

    As in vLLM, a sequence is let in while the cache has room for what it has so far. When the cache overflows, those that came last
    lose theirs, wait first in line and are read again.
    """

    def __init__(self, lengths: np.ndarray, prompt: float, engine: Engine, step: int):
        self._engine, self._step = engine, step
        self._left, self._held = lengths.copy(), np.full(len(lengths), float(prompt))  # all, in the order of the queue
        self._inside = 0  # the first so many are decoded
        self._started = 0  # and the first so many have been
        self.read_again = 0.0  #: tokens that the last call of `admit` let in again

    @property
    def size(self) -> int:
        """Sequences that are decoded."""
        return self._inside

    @property
    def waiting(self) -> int:
        """Sequences that are not."""
        return len(self._left) - self._inside

    @property
    def context(self) -> float:
        """Tokens that one of them has, in the mean."""
        return float(self._held[: self._inside].mean())

    def admit(self) -> bool:
        """Let in what there is room for; at least one. False: nothing is left."""
        self.read_again = 0.0
        if not self._left.size:
            return False
        need = np.cumsum(self._held[: self._engine.max_sequences] + self._step)
        fitting = int(np.searchsorted(need, self._engine.cache_tokens, side="right"))
        size = max(fitting, 1)
        again = slice(self._inside, min(size, self._started))
        self.read_again = float(self._held[again].sum())
        self._inside, self._started = size, max(size, self._started)
        return True

    def steps_ahead(self) -> float:
        """Steps until a sequence ends, at most `step`; the last to come in lose their cache if it cannot hold those."""
        need = np.cumsum(self._held[: self._inside] + self._step)
        self._inside = max(int(np.searchsorted(need, self._engine.cache_tokens, side="right")), 1)
        return max(min(float(self._left[: self._inside].min()), self._step), 1.0)

    def decode(self, steps: float) -> None:
        """So many tokens for each sequence inside; those that are complete leave."""
        self._left[: self._inside] -= steps
        self._held[: self._inside] += steps
        stays = np.ones(len(self._left), dtype=bool)
        stays[: self._inside] = self._left[: self._inside] > 1e-9
        gone = len(stays) - int(stays.sum())
        self._left, self._held = self._left[stays], self._held[stays]
        self._inside, self._started = self._inside - gone, self._started - gone


@dataclass(frozen=True)
class SampledRound:
    """How a round's responses came about."""

    seconds: float
    prefill: float  #: seconds of them
    tail: float  #: seconds in which no sequence waits and a step has less than half of those that it has in the mean
    sequences: float  #: of a step, in the mean over steps
    fullest: float  #: of a step, at most
    read_again: float  #: tokens of sequences that lost their place in the cache


@lru_cache(maxsize=512)
def sampling(
    work: ModelWork,
    device: Accelerator,
    engine: Engine,
    *,
    responses: int,
    engines: int,
    prompt: float,
    shared_by: int,
    lengths: ResponseLengths,
    costs: EngineCosts = ENGINE_COSTS,
) -> SampledRound:
    """A round of `responses`, which engines take from one queue.

    Args:
        prompt: tokens of a prompt, in the mean.
        shared_by: responses to one prompt, which is read once.

    Engines are alike, so one of them is played with its share; the last response to end is the longest of all of them.
    """
    share = max(responses / engines, 1.0)
    count = math.ceil(share)
    drawn = lengths.quantiles(responses)
    own = drawn[np.linspace(0, responses - 1, count).round().astype(int)] * (share / count)
    own = own[np.argsort(np.modf(np.arange(count) * _GOLDEN)[0])]  # the queue is in no order of length
    queue = _Queue(own, prompt, engine, max(_SHORTEST, lengths.limit // _STEPS))
    busy: list[tuple[float, float]] = []  # sequences, seconds
    last: list[tuple[float, float]] = []  # the same while no sequence waits
    again = 0.0  # tokens read again, of sequences that lost their cache
    while queue.admit():
        again += queue.read_again
        ahead = queue.steps_ahead()
        inside, context = queue.size, queue.context
        busy.append((inside, step_seconds(work, device, engine, inside, context, costs) * ahead / engine.accepted))
        if not queue.waiting:
            last.append(busy[-1])
        queue.decode(ahead)
    prefill = prefill_seconds(work, device, engine, prompt * share / shared_by + again)
    fullest = max(sequences for sequences, _ in busy)
    total = sum(seconds for _, seconds in busy)
    mean = sum(sequences * seconds for sequences, seconds in busy) / total
    tail = sum(seconds for sequences, seconds in last if sequences < mean / 2)
    return SampledRound(total + prefill, prefill, tail, mean, fullest, again)
