"""Rounds of GRPO whose responses are sampled by any of the ranks: what one rank and every layout of several must do alike."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_r1.config.grpo import GrpoConfig
from megatron_r1.config.model import ParallelConfig
from megatron_r1.config.optimizer import MoeTrainingConfig
from megatron_r1.config.rewards import RewardConfig
from megatron_r1.config.rollout import RolloutConfig
from megatron_r1.config.runtime import CheckpointConfig, RuntimeConfig
from megatron_r1.config.schema import Config
from megatron_r1.rewards.compose import Verdicts
from megatron_r1.rewards.protocol import Verdict
from megatron_r1.runtime.distributed import rank
from megatron_r1.runtime.run import Run
from megatron_r1.training.grpo import train_grpo
from megatron_r1.training.scoring import CollectiveRewards
from megatron_r1.types import Prompt, Rollout, RolloutGroup
from tests.nonfinite_cases import ARCHITECTURE, MOE, OPTIMIZER
from tests.timed import TIMES

ROUNDS, PROMPTS, GROUP = 2, 6, 4


class Engines:
    """Samples fixed responses: prompt i of a round by one of the owners, another one in every round."""

    def __init__(self, owners: Sequence[int]) -> None:
        self._owners, self._rounds = owners, 0

    def load_weights(self, weights: Any, version: int) -> None:
        """Let all ranks tell what they hold."""
        weights.describe()
        self.version = version

    def sleep(self) -> None:
        """See `RolloutEngine.sleep`."""

    def generate(self, prompts: list[Prompt], sampling: Any, seed: int, on_group: Any) -> list[RolloutGroup]:
        """See `RolloutEngine.generate`."""
        self._rounds += 1
        groups = []
        for position, prompt in enumerate(prompts):
            owner = self._owners[(position * position + self._rounds) % len(self._owners)]
            if owner == rank():
                group = RolloutGroup(prompt, [self._respond(prompt, n) for n in range(GROUP)], self.version)
                group.position, group.owner = position, owner
                groups.append(group)
                if position % 2:  # the others are scored when they are collected
                    on_group(group)
        return groups

    def metrics(self) -> dict[str, float]:
        """See `RolloutEngine.metrics`."""
        return {"rollout/idle": 0.25}

    def _respond(self, prompt: Prompt, number: int) -> Rollout:
        draw = random.Random(f"{prompt.id} {number}")
        ids = [draw.randrange(2, 76) for _ in range(draw.randrange(1, 20))]
        return Rollout(ids, [-4.0 - draw.random() for _ in ids], f"{prompt.id} says {ids} ⟦é⟧\n", draw.random() < 0.8)


class Scoring:
    """Scores by the text; of some prompts one component has no score."""

    def __init__(self) -> None:
        self.started: list[RolloutGroup] = []

    def submit(self, group: RolloutGroup) -> None:
        """See `GroupScoring`."""
        self.started.append(group)

    def collect(self, groups: Sequence[RolloutGroup], on_wait: Any) -> list[Verdicts]:
        """See `GroupScoring`."""
        assert all(group.owner == rank() and group.rollouts[0].text for group in groups), "the owner scores, and it has the texts"
        return [self._verdicts(group) for group in groups]

    def _verdicts(self, group: RolloutGroup) -> Verdicts:
        right = [Verdict(float(len(rollout.text) % 3 == 0), "correct", "counted") for rollout in group.rollouts]
        shape = [Verdict(None, "timeout") if len(r.text) % 5 == 0 else Verdict(0.25, "wrong") for r in group.rollouts]
        return {"accuracy": right, "format": shape} if group.prompt.id.endswith("1") else {"accuracy": right}


class Prompts:
    """p0, p1, ... of different lengths."""

    taken = 0

    def next(self, count: int) -> list[Prompt]:
        """See `PromptSource`."""
        numbers = range(self.taken, self.taken + count)
        self.taken += count
        return [Prompt(f"p{n}", f"question {n}", "a", "t", tuple(range(2, 5 + n % 4))) for n in numbers]

    def state_dict(self) -> dict[str, Any]:
        """See `PromptSource`."""
        return {}


def play_rounds(sizes: dict[str, int], owners: Sequence[int], folder: Path, world_size: int) -> dict[str, Any]:
    """Lines of metrics.jsonl without times, lines of rollouts/, and the sum of every weight, after some rounds. Collective.

    With "share_prompts" among the sizes no router bias moves.
    """
    from megatron_r1.mcore import parallel
    from megatron_r1.mcore.policy import MegatronPolicy, ReferencePolicy

    stage = GrpoConfig(
        rollouts=ROUNDS, prompts_per_rollout=PROMPTS, group_size=GROUP, minibatch_size=8, micro_batch_tokens=40, inner_epochs=2,
        kl_coef=0.1, shuffle_rewards=True, optimizer=OPTIMIZER,
    )  # fmt: skip
    runtime = RuntimeConfig(device="cpu")
    config = Config(runtime=runtime, grpo=stage, checkpoint=CheckpointConfig(interval=5, asynchronous=False), run_dir=str(folder))
    moe, share = (MoeTrainingConfig(), sizes["share_prompts"]) if "share_prompts" in sizes else (MOE, 0)
    sizes = {name: size for name, size in sizes.items() if name != "share_prompts"}
    layout = parallel.resolve_layout(ParallelConfig(**sizes), ARCHITECTURE, world_size, mtp=False)
    parallel.build_process_groups(layout, seed=1)
    model = MegatronPolicy(
        ARCHITECTURE, layout, runtime, moe, optimizer=OPTIMIZER, total_updates=12, seed=7, device=torch.device("cpu"),
        micro_batch_tokens=40, share_prompts=bool(share),
    )  # fmt: skip
    bounds = RolloutConfig(max_response_tokens=20, max_logprob_diff_mean=1e6, max_logprob_diff_max=1e6)
    sums: list[float] = []

    def save(*_: Any) -> Any:
        raise AssertionError("no checkpoint is due")

    with Run.open(folder, config, "grpo") as run:
        run.checkpoint_due = lambda step, total: False  # type: ignore[method-assign]
        train_grpo(
            stage, bounds, policy=model, reference=ReferencePolicy(model), engine=Engines(owners),
            rewards=CollectiveRewards(RewardConfig(), Scoring if rank() in owners else None), prompts=Prompts(), run=run, save=save,
            evaluate=lambda step: {}, seed=3,
        )  # fmt: skip
        sums = [tensor.double().sum().item() for _, tensor in model.weights()]
    torch.distributed.barrier()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    metrics = [{name: value for name, value in line.items() if not name.startswith(TIMES)} for line in lines]
    files = sorted((folder / "rollouts").glob("*.jsonl"))
    assert len(files) == ROUNDS
    return {"metrics": metrics, "rollouts": [json.loads(line) for file in files for line in file.open()], "weights": sums}
