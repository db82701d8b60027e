"""What a published row says: a run's setting, what was measured, and whether the planner's efficiencies were fitted to it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megatron_r1.model.architecture import Architecture
from megatron_r1.model.families.llama import Llama
from megatron_r1.model.presets import resolve_architecture
from megatron_r1.plan.layer_time import Grid
from megatron_r1.plan.lengths import USUAL_SPREAD
from megatron_r1.plan.transfer_time import Way
from megatron_r1.plan.update_time import Training

Set = Literal["fitted", "held out"]  #: chosen before anything was fitted

_KIMI_K2 = {
    "vocab_size": 163840,
    "num_attention_heads": 64,
    "n_routed_experts": 384,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "num_nextn_predict_layers": 0,
}
_QWEN3_235B = {
    "hidden_size": 4096, "num_hidden_layers": 94, "num_attention_heads": 64, "num_key_value_heads": 4,
    "moe_intermediate_size": 1536, "intermediate_size": 12288,
}  # fmt: skip


def _llama3(hidden: int, width: int, heads: int, layers: int) -> Architecture:
    return Llama(
        vocab_size=128256, hidden_size=hidden, intermediate_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=8, max_position_embeddings=8192, rope_theta=500000.0,
    )  # fmt: skip


MODELS: dict[str, Architecture] = {
    "V3": resolve_architecture("671b"),
    "V3 of 4 layers": resolve_architecture("671b", {"num_hidden_layers": 4, "first_k_dense_replace": 1}),
    "Kimi-K2": resolve_architecture("671b", _KIMI_K2),
    "Qwen3-30B-A3B": resolve_architecture("qwen3_30b_a3b"),
    "Qwen3-235B": resolve_architecture("qwen3_30b_a3b", _QWEN3_235B),
    "Qwen3-4B": resolve_architecture("qwen3_4b"),
    "Qwen2.5-7B": resolve_architecture("qwen2.5_7b"),
    "Qwen2.5-14B": resolve_architecture("qwen2.5_14b"),
    "Qwen3-14B": resolve_architecture("qwen3_14b"),
    "Qwen2.5-32B": resolve_architecture("qwen2.5_32b"),
    "Llama-3-70B of 12 layers": _llama3(8192, 28672, 64, 12),
    "Llama-3.1-405B of 4 layers": _llama3(16384, 53248, 128, 4),
}


@dataclass(frozen=True)
class TrainStep:
    """An optimizer step on rows of one length."""

    name: str
    set: Set
    model: str
    device: str
    grid: Grid
    rows: int
    seconds: float  #: measured; `of_rate` computes it from tokens a second
    source: str
    tokens: int = 4096  #: of a row
    micro_rows: int = 1
    training: Training = field(default_factory=Training)


def of_rate(rate: float, rows: int, devices: int, tokens: int = 4096) -> float:
    """Seconds of a step that has so many tokens per second and device."""
    return rows * tokens / devices / rate


@dataclass(frozen=True)
class Round:
    """A step of reinforcement learning, or parts of it."""

    name: str
    set: Set
    model: str
    device: str
    grid: Grid  #: of the trainer
    engine: int  #: devices of an engine
    responses: int
    updates: int
    mean: float  #: tokens of a response
    limit: int  #: of a response
    seconds: dict[str, float]  #: measured: "generation", "log-probs", "update", "sync", "step"
    source: str
    prompt: float = 180.0
    shared_by: int = 16
    micro_batch: float = 10240
    scoring_batch: float | None = None  #: tokens of a forward pass for log-probs; None: micro_batch
    scored: int = 1  #: passes of log-probs
    training: Training = field(default_factory=Training)
    cache_share: float = 0.6  #: of a device's memory, that an engine may take
    graphs: bool = True  #: whether the engine captures its steps
    accepted: float = 1.0
    drafts: int = 0
    sampling_devices: int = 0  #: of engines that sample beside training; 0: engines and trainer share devices, in turn
    ahead: int = 1  #: rounds that those may be ahead
    spread: float = USUAL_SPREAD
    element: float = 2.0  #: bytes of an engine's matrix element


@dataclass(frozen=True)
class Transfer:
    """Weights on their way from a trainer to engines."""

    name: str
    set: Set
    model: str
    device: str
    way: Way
    trainers: int
    engines: int
    seconds: float
    source: str
    element: float = 2.0


@dataclass(frozen=True)
class NotPredicted:
    """A row that the planner has nothing to say of."""

    name: str
    measured: str
    why: str
    source: str
