"""Adam on Megatron-Core's distributed optimizer."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_r1.config.optimizer import OptimizerConfig
from megatron_r1.config.runtime import RuntimeConfig
from megatron_r1.mcore.active import require_active
from megatron_r1.mcore.switches import Switches

require_active()

from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer

from megatron_r1.mcore.adam_state import create_moments, distributed_optimizers
from megatron_r1.model.architecture import Architecture

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def build_optimizer(
    arch: Architecture, optimizer: OptimizerConfig, runtime: RuntimeConfig, chunks: Sequence[torch.nn.Module], switches: Switches
) -> ChainedOptimizer:
    """The optimizer of `overlap.wrap_for_training`'s chunks, its moments made and zero."""
    is_bf16 = runtime.dtype == "bf16"
    built = get_megatron_optimizer(
        MegatronOptimizerConfig(
            optimizer="adam",
            lr=optimizer.lr,
            min_lr=optimizer.lr * optimizer.min_lr_ratio,
            weight_decay=optimizer.weight_decay,
            adam_beta1=optimizer.beta1,
            adam_beta2=optimizer.beta2,
            adam_eps=optimizer.eps,
            clip_grad=optimizer.clip_grad,
            use_distributed_optimizer=True,
            overlap_param_gather=switches.ddp["overlap_param_gather"],
            bf16=is_bf16,
            params_dtype=torch.bfloat16 if is_bf16 else torch.float32,
            **{name: _DTYPES.get(value, value) for name, value in switches.optimizer.items()},
        ),
        chunks,
    )
    create_moments(built)
    choose_adam(built)
    return built


def choose_adam(optimizer: ChainedOptimizer) -> None:
    """Have torch's AdamW read and write each number once on a CPU, where it goes through memory eight times by itself."""
    for part in distributed_optimizers(optimizer):
        if isinstance(part.optimizer, torch.optim.AdamW):
            for group in part.optimizer.param_groups:
                if all(parameter.is_cpu for parameter in group["params"]):
                    group["fused"] = True
