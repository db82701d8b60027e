"""One update of a model with experts, balance loss, moving biases and multi-token prediction, on any layout.

Used by the unit test of one rank and by the ranks of `distributed/train_layouts.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from megatron_r1.config.grpo import GrpoConfig
from megatron_r1.config.model import ParallelConfig
from megatron_r1.config.optimizer import MoeTrainingConfig, OptimizerConfig
from megatron_r1.config.runtime import RuntimeConfig
from megatron_r1.data.reward_packing import ScoredExample
from megatron_r1.training.grpo import loss_of
from megatron_r1.training.pretrain import loss_over
from megatron_r1.training.reward_model import reward_loss_of
from megatron_r1.types import TrainingSample
from tests.random_weights import full_architecture

if TYPE_CHECKING:
    from megatron_r1.mcore.step_stats import StepStats

LENGTHS = (40, 24, 7, 16, 9, 33, 12, 20)
BALANCED = MoeTrainingConfig(bias_update_rate=1e-3, aux_loss_coeff=1e-2, mtp_loss_scale=0.3)
#: Above every norm here: clipped gradients would hide a wrong scale.
NO_CLIPPING = OptimizerConfig(lr=1e-3, clip_grad=1e9, warmup_steps=0)


def build_model(
    stage: str, *, micro_batch_tokens: int, world_size: int = 1, recompute: str = "none", moe: MoeTrainingConfig = BALANCED,
    **sizes: int,
) -> Any:  # fmt: skip
    """A policy, or the reward model if `stage` is "reward_model", always with the same weights."""
    from megatron_r1.mcore import parallel
    from megatron_r1.mcore.policy import MegatronPolicy
    from megatron_r1.mcore.reward_model import MegatronRewardModel

    arch = full_architecture(mtp=1)
    if stage == "reward_model":
        arch = arch.as_reward_model("helpful")
    layout = parallel.resolve_layout(ParallelConfig(**sizes), arch, world_size, mtp=stage != "reward_model")
    parallel.build_process_groups(layout, seed=1)
    runtime = RuntimeConfig(recompute=recompute, recompute_modules=["layernorm", "moe"], skip_nonfinite_updates=1)
    return (MegatronRewardModel if stage == "reward_model" else MegatronPolicy)(
        arch, layout, runtime, moe, optimizer=NO_CLIPPING, total_updates=4, seed=7, device=torch.device("cpu"),
        micro_batch_tokens=micro_batch_tokens,
    )  # fmt: skip


def make_batch(stage: str) -> list[Any]:
    """Samples, or the examples of a reward model: always the same."""
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(130, (length + 1,), generator=generator).tolist() for length in LENGTHS]
    if stage == "reward_model":
        return [ScoredExample((ids[i], ids[i + 1])) for i in range(0, len(ids), 2)]
    return [TrainingSample(tokens, [0] * 3 + [1] * (len(tokens) - 4)) for tokens in ids]


def one_update(stage: str, model: Any) -> dict[str, Any]:
    """What `finish_update` gives of the first update."""
    batch = make_batch(stage)
    if stage == "reward_model":
        return finish_update(model, model.train_step(batch, reward_loss_of("helpful", batch)))
    loss_fn = loss_over(sum(sample.num_trained for sample in batch))
    if stage == "grpo":
        for place, sample in enumerate(batch):
            sample.advantage = float(place % 3 - 1)
            sample.rollout_logprobs = sample.old_logprobs = torch.full((sample.num_targets,), -4.9)
            sample.ref_logprobs = torch.full((sample.num_targets,), -5.0)
        loss_fn = loss_of(GrpoConfig(kl_coef=0.04), batch)
    return finish_update(model, model.train_step(batch, loss_fn))


def finish_update(model: Any, stats: StepStats) -> dict[str, Any]:
    """Loss, gradient norm, metrics, router biases and the whole gradient of an update: the same on every rank."""
    biases = torch.cat([tensor for name, tensor in model.weights() if name.endswith("e_score_correction_bias")])
    return {
        "loss": stats.loss, "grad_norm": stats.grad_norm, "bias": biases,
        **{name: metric.value for name, metric in stats.metrics.items()}, "gradient": whole_gradient(model),
    }  # fmt: skip


def whole_gradient(model: Any) -> torch.Tensor:
    """The gradient of all parameters, by Hugging Face name, end to end; the model's weights are lost."""
    for chunk in model.chunks:
        for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]:
            group = buffer.data_parallel_group
            for bucket in buffer.buckets:
                # The optimizer of a rank has the sum of its own share only.
                shares = list(bucket.grad_data.chunk(group.size()))
                dist.all_gather(shares, shares[group.rank()].clone(), group=group)
    for module in model.modules:
        for parameter in module.parameters():
            parameter.data.copy_(parameter.main_grad if parameter.requires_grad else torch.zeros_like(parameter))
    gradient = {name: tensor.flatten() for name, tensor in model.weights() if not name.endswith("e_score_correction_bias")}
    return torch.cat([gradient[name] for name in sorted(gradient)])


def compare(got: dict[str, Any], want: dict[str, Any], tolerance: float = 1e-6) -> None:
    """The same biases; everything else to `tolerance`, relative."""
    assert got.keys() == want.keys()
    assert torch.equal(got["bias"], want["bias"]) and want["bias"].unique().numel() > 1
    off = (got["gradient"] - want["gradient"]).norm() / want["gradient"].norm()
    assert off < tolerance, f"the gradient is off by {off:.1e}"
    for name in got.keys() - {"bias", "gradient"}:
        assert abs(got[name] - want[name]) <= tolerance * abs(want[name]) + 1e-7, f"{name}: {got[name]} instead of {want[name]}"
