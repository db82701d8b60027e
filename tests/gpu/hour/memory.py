"""Part 9: what the formula of `mcore.state_bytes` predicts, and what there is."""

from __future__ import annotations

from typing import Any

import torch

from tests.gpu.hour.ground import Ground
from tests.gpu.hour.training import batch, opened


def run(ground: Ground) -> None:
    """Four layers of the 16B model in bf16, through one update; on the CPU the tiny model."""
    from megatron_r1.config.optimizer import MoeTrainingConfig, OptimizerConfig
    from megatron_r1.config.runtime import RuntimeConfig
    from megatron_r1.config.schema import Config
    from megatron_r1.mcore.state_bytes import StateBytes
    from megatron_r1.model.presets import resolve_architecture
    from megatron_r1.model.size import count_parameters
    from megatron_r1.pipeline.builders.models import build_policy
    from megatron_r1.training.pretrain import loss_over

    arch = ground.pick(("16b", {"num_hidden_layers": 4}), ("tiny", {}))
    arch = resolve_architecture(*arch)
    config = Config(runtime=RuntimeConfig(device=ground.kind, dtype="bf16"))
    with opened(ground.kind) as session:
        at_start = torch.cuda.memory_allocated() if ground.kind == "cuda" else 0
        policy = build_policy(
            config, session, arch, optimizer=OptimizerConfig(lr=1e-4), moe=MoeTrainingConfig(), total_updates=2,
            micro_batch_tokens=ground.pick(8192, 1024), packed=True,
        )  # fmt: skip
        ids, samples = batch()
        policy.train_step(samples, loss_over(sum(len(row) - 1 for row in ids)))
        parameters = [p for module in policy.modules for p in module.parameters()]
        frozen = sum(p.numel() for p in parameters if not p.requires_grad)
        predicted = StateBytes.of(sum(p.numel() for p in parameters) - frozen, frozen=frozen, bf16=True)
        ground.say("parameters by the formula", count_parameters(arch) / 1e6, "million")
        ground.say("parameters there", sum(p.numel() for p in parameters) / 1e6, "million")
        total = predicted.weights + predicted.gradients + predicted.optimizer
        there = _bytes_there(policy, parameters)
        ground.say("weights, gradients, optimizer: predicted", total / 1e9, "GB")
        ground.check("the tensors are as many bytes", abs(there / total - 1) < 0.02, f"{there / total:.4f} of it")
        if ground.kind == "cuda":
            ground.say("allocated after an update", (torch.cuda.memory_allocated() - at_start) / 1e9, "GB")
            ground.say("peak of an update", (torch.cuda.max_memory_allocated() - at_start) / 1e9, "GB")
            ground.say("reserved by torch", torch.cuda.memory_reserved() / 1e9, "GB")


def _bytes_there(policy: Any, parameters: list[torch.nn.Parameter]) -> int:
    """Of all tensors of training state, each once."""
    tensors = [*parameters, *(p.main_grad for p in parameters if hasattr(p, "main_grad"))]
    for optimizer in getattr(policy.optimizer, "chained_optimizers", [policy.optimizer]):
        for group in optimizer.optimizer.param_groups:
            tensors += group["params"]
        for state in optimizer.optimizer.state.values():
            tensors += [value for value in state.values() if isinstance(value, torch.Tensor) and value.dim()]
    return sum({(t.data_ptr(), t.nbytes): t.nbytes for t in tensors}.values())
