"""Part 9: what the formula of `mcore.state_bytes` predicts, and what there is."""

from __future__ import annotations

from typing import Any

import torch

from tests.gpu.hour.ground import Ground
from tests.gpu.hour.training import batch, opened


def run(ground: Ground) -> None:
    """Four layers of the 16B model in bf16, through one update, with each kind of Adam of a GPU; on the CPU the tiny model."""
    from megatron_r1.config.megatron import MegatronConfig
    from megatron_r1.mcore.active import have_transformer_engine

    kinds = {"": MegatronConfig()}
    if ground.kind == "cuda":
        kinds["with Adam on the host: "] = MegatronConfig(optimizer_cpu_offload=True)
        if have_transformer_engine():
            low = MegatronConfig(use_precision_aware_optimizer=True, exp_avg_dtype="bf16", exp_avg_sq_dtype="bf16")
            kinds["with moments in bf16: "] = low
    for name, megatron in kinds.items():
        _measure(ground, name, megatron)


def _measure(ground: Ground, name: str, megatron: Any) -> None:
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
    config = Config(runtime=RuntimeConfig(device=ground.kind, dtype="bf16"), megatron=megatron)
    with opened(ground.kind) as session:
        if ground.kind == "cuda":
            session.device.release_memory()
            torch.cuda.reset_peak_memory_stats()
        at_start = torch.cuda.memory_allocated() if ground.kind == "cuda" else 0
        policy = build_policy(
            config, session, arch, optimizer=OptimizerConfig(lr=1e-4), moe=MoeTrainingConfig(), total_updates=2,
            micro_batch_tokens=ground.pick(8192, 1024), packed=True,
        )  # fmt: skip
        ids, samples = batch()
        stats = policy.train_step(samples, loss_over(sum(len(row) - 1 for row in ids)))
        ground.say(f"{name}loss of the first update", stats.loss, "nats")
        parameters = [p for module in policy.modules for p in module.parameters()]
        frozen = sum(p.numel() for p in parameters if not p.requires_grad)
        predicted = StateBytes.of(
            sum(p.numel() for p in parameters) - frozen, frozen=frozen, bf16=True, moments=policy.switches.moments,
            on_host=policy.switches.optimizer_on_host,
        )  # fmt: skip
        ground.say(f"{name}parameters by the formula", count_parameters(arch) / 1e6, "million")
        ground.say(f"{name}parameters there", sum(p.numel() for p in parameters) / 1e6, "million")
        total = predicted.weights + predicted.gradients + predicted.optimizer
        there = _bytes_there(policy, parameters, ground.kind)
        ground.say(f"{name}weights, gradients, optimizer: predicted", total / 1e9, "GB")
        ground.check(f"{name}the tensors are as many bytes", abs(there / total - 1) < 0.02, f"{there / total:.4f} of it")
        if ground.kind == "cuda":
            ground.say(f"{name}allocated after an update", (torch.cuda.memory_allocated() - at_start) / 1e9, "GB")
            ground.say(f"{name}peak of an update", (torch.cuda.max_memory_allocated() - at_start) / 1e9, "GB")
            ground.say(f"{name}reserved by torch", torch.cuda.memory_reserved() / 1e9, "GB")


def _bytes_there(policy: Any, parameters: list[torch.nn.Parameter], kind: str) -> int:
    """Of all tensors of training state on the device, each once."""
    from megatron_r1.mcore.adam_state import distributed_optimizers, state_tensors

    tensors = [*parameters, *(p.main_grad for p in parameters if hasattr(p, "main_grad"))]
    tensors += [tensor for part in distributed_optimizers(policy.optimizer) for tensor in state_tensors(part)]
    return sum({(t.data_ptr(), t.nbytes): t.nbytes for t in tensors if t.device.type == kind}.values())
