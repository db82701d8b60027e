"""The same reward model under any layout: what the ranks of a layout and one rank alone both compute."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_r1.config.model import ParallelConfig
from megatron_r1.config.optimizer import MoeTrainingConfig, OptimizerConfig
from megatron_r1.config.runtime import RuntimeConfig
from megatron_r1.data.reward_packing import ScoredExample
from megatron_r1.training.reward_model import reward_loss_of
from tests.random_weights import full_architecture, qwen2_architecture

ARCHITECTURES = {
    "v3": full_architecture(mtp=1).as_reward_model("helpful"),
    "qwen2": qwen2_architecture().as_reward_model("helpful"),
}
LAYOUTS = [
    ("v3", {"tp": 2}),
    ("v3", {"pp": 2}),
    ("v3", {"ep": 2}),
    ("v3", {"pp": 2, "vpp": 2}),
    ("qwen2", {"tp": 2}),
    ("qwen2", {}),
    ("qwen2", {"cp": 2}),
]
UPDATES = 2
#: A round of `benchmarks.data_plane`: responses, tokens of one in the mean, minibatches, inner epochs.
PLAYED = (64, 40, 4, 2)


def make_examples(count: int = 5, seed: int = 0) -> list[ScoredExample]:
    """Pairs of random sequences of different lengths."""
    generator = torch.Generator().manual_seed(seed)

    def sequence() -> list[int]:
        length = int(torch.randint(4, 24, (), generator=generator))
        return torch.randint(130, (length,), generator=generator).tolist()

    return [ScoredExample((sequence(), sequence())) for _ in range(count)]


def build_reward_model(model: str, sizes: dict[str, int], world_size: int, micro_batch_tokens: int = 64):
    """On these ranks, with an optimizer."""
    from megatron_r1.mcore import parallel
    from megatron_r1.mcore.reward_model import MegatronRewardModel

    arch = ARCHITECTURES[model]
    layout = parallel.resolve_layout(ParallelConfig(**sizes), arch, world_size, mtp=False)
    parallel.build_process_groups(layout, seed=1)
    return MegatronRewardModel(
        arch, layout, RuntimeConfig(), MoeTrainingConfig(), optimizer=OptimizerConfig(lr=1e-3, weight_decay=0.1), total_updates=4,
        seed=7, device=torch.device("cpu"), micro_batch_tokens=micro_batch_tokens,
    )  # fmt: skip


def train_and_score(model: str, sizes: dict[str, int], world_size: int) -> dict[str, list[float]]:
    """Scores before and after some updates, and loss, gradient norm and sums of every update."""
    built = build_reward_model(model, sizes, world_size)
    examples = make_examples()
    sequences = [sequence for example in examples for sequence in example.sequences]
    before = built.scores(sequences)
    own = slice(dist.get_rank(), None, world_size)
    of_own = built.own_scores([np.array(sequence, np.int32) for sequence in sequences[own]])
    assert of_own == pytest.approx(before[own], abs=1e-6), "responses of one rank are scored by all"
    assert built.own_scores([np.array(sequences[0], np.int32)] if dist.get_rank() else []) == (
        pytest.approx(before[:1], abs=1e-6) if dist.get_rank() else []
    )
    steps = [built.train_step(examples, reward_loss_of("helpful", examples)) for _ in range(UPDATES)]
    return {
        "before": before, "after": built.scores(sequences), "loss": [step.loss for step in steps],
        "grad_norm": [step.grad_norm for step in steps], "margin": [step.metrics["margin"].value for step in steps],
        "accuracy": [step.metrics["accuracy"].value for step in steps],
    }  # fmt: skip
