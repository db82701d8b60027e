"""Published memory: what torch had allocated at most. Nothing of the planner's memory is fitted to anything."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from benchmarks.published.rows import NotPredicted
from megatron_r1.config.load import load_config
from megatron_r1.plan.job import read_job
from megatron_r1.plan.memory import plan_memory

_SIMUMAX = "SimuMax 1.2, measured on B200 (not its simulation)"
_GIB = 2**30
#: Not torch's: the driver's share. And what the planner adds for blocks that are not full.
_BESIDE = ("CUDA, NCCL", "fragmentation")

_V3 = ("671b", {"num_hidden_layers": 4, "first_k_dense_replace": 1, "num_nextn_predict_layers": 0})
_70B = ("llama3.3_70b", {"num_hidden_layers": 12, "rope_scaling": None})
_405B = (
    "llama3.3_70b",
    {"num_hidden_layers": 4, "hidden_size": 16384, "intermediate_size": 53248, "num_attention_heads": 128, "rope_scaling": None},
)


@dataclass(frozen=True)
class Peak:
    """Memory of the fullest of 8 B200 in a step of pretraining in BF16, rows of one micro-batch each, nothing recomputed."""

    name: str
    model: tuple[str, dict[str, Any]]  #: preset and what differs from it
    parallel: dict[str, int]
    gib: float
    tokens: int = 4096
    source: str = _SIMUMAX


PEAKS: list[Peak] = [
    Peak("V3 of 4 layers, EP8", _V3, {"ep": 8}, 104.30),
    Peak("V3 of 4 layers, EP4 PP2", _V3, {"ep": 4, "pp": 2}, 114.00),
    Peak("Llama-3-70B of 12 layers, PP2", _70B, {"pp": 2}, 66.55),
    Peak("Llama-3-70B of 12 layers, TP2", _70B, {"tp": 2}, 60.68),
    Peak("Llama-3-70B of 12 layers, TP4", _70B, {"tp": 4}, 39.07),
    Peak("Llama-3-70B of 12 layers, TP8", _70B, {"tp": 8}, 28.29),
    Peak("Llama-3-70B of 12 layers, CP8, 32K", _70B, {"cp": 8}, 104.51, 32768),
    Peak("Llama-3-70B of 12 layers, TP2 CP4, 32K", _70B, {"tp": 2, "cp": 4}, 68.43, 32768),
    Peak("Llama-3.1-405B of 4 layers, PP2", _405B, {"pp": 2}, 87.08),
    Peak("Llama-3.1-405B of 4 layers, TP2", _405B, {"tp": 2}, 81.59),
    Peak("Llama-3.1-405B of 4 layers, TP4", _405B, {"tp": 4}, 52.89),
    Peak("Llama-3.1-405B of 4 layers, TP8", _405B, {"tp": 8}, 38.57),
    Peak("Llama-3.1-405B of 4 layers, CP8, 32K", _405B, {"cp": 8}, 139.22, 32768),
]

NOT_PREDICTED: list[NotPredicted] = [
    NotPredicted("V3 GRPO, 96 H20", "66 GB, 1,500 GB of a node",
                 "what its offloads keep on the device is not stated", "verl, documentation"),
    NotPredicted("V3, 128 H100, Adam on the host", "1.4 to 1.5 TB of a node",
                 "which copies are on the host is not stated", "slime, V3 example"),
    NotPredicted("16B of V3's kind, 8 H100", "73 GiB", "FSDP, which this project does not have", "torchtitan issue 1789"),
    NotPredicted("Qwen3-0.6B, RL 16K and 64K, SFT 8K, 1 H100", "12.5, 19.6, 31.7 GiB", "FSDP; the batch is not stated",
                 "prime-rl, benchmarks of 2026-02-01"),
    NotPredicted("Qwen3-4B LoRA, 1 H100", "23.3 GiB",
                 "LoRA, which this project does not have", "prime-rl, benchmarks of 2026-02-01"),
    NotPredicted("Qwen3-30B-A3B, 8 H200", "105 GiB", "FSDP; the batch is not stated", "prime-rl, benchmarks of 2026-02-01"),
]  # fmt: skip


def predicted_gib(row: Peak) -> float:
    """What the planner says that torch has allocated."""
    preset, overrides = row.model
    settings = [
        f"model.preset={preset}", f"model.overrides={json.dumps(overrides)}", "runtime.device=cuda", "runtime.dtype=bf16",
        f"pretrain.sequence_length={row.tokens}", "pretrain.micro_batch_size=1", "pretrain.global_batch_size=32",
        "pretrain.mask_documents=false", "pretrain.moe.mtp_loss_scale=0",
        *(f"parallel.{name}={size}" for name, size in row.parallel.items()),
    ]  # fmt: skip
    plan = plan_memory(read_job(load_config(None, settings), "pretrain", "B200", 1), imbalance=1.0)
    update = next(phase for phase in plan.phases if phase.name.startswith("update"))
    return sum(term.amount for term in update.device if term.name not in _BESIDE) / _GIB
