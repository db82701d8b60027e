"""What a policy loss is handed: sequences and counts of the whole minibatch, however it is packed."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_r1.algorithms.losses import registry
from megatron_r1.algorithms.losses.contract import PolicyBatch, PolicySettings
from megatron_r1.config.grpo import GrpoConfig, LengthPhase
from megatron_r1.config.rollout import RolloutConfig
from megatron_r1.config.schema import Config
from megatron_r1.data.packing import pack_samples
from megatron_r1.runtime.run import Run
from megatron_r1.training.grpo import is_due, loss_of, shuffle_rewards, train_grpo
from megatron_r1.training.samples import minibatches
from megatron_r1.types import Prompt, Rollout, RolloutGroup, Sampling, TrainingSample

LENGTHS = (9, 4, 6)  # tokens; the first three are the prompt's


def samples() -> list[TrainingSample]:
    made = []
    for number, length in enumerate(LENGTHS):
        mask = [0, 0] + [1] * (length - 3)
        zeros = torch.zeros(length - 1)
        made.append(TrainingSample([number] * length, mask, float(number), old_logprobs=zeros, rollout_logprobs=zeros))
    return made


def test_a_loss_gets_boundaries_and_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[PolicyBatch, PolicySettings]] = []

    def watch(batch: PolicyBatch, settings: PolicySettings) -> tuple[torch.Tensor, dict[str, Any]]:
        seen.append((batch, settings))
        return batch.logprobs.sum(), {}

    monkeypatch.setitem(registry.POLICY_LOSSES, "watch", watch)
    stage = GrpoConfig(loss="watch", clip_eps=0.3, kl_coef=0.0, normalization="token")
    (micro_batches,) = pack_samples(samples(), max_tokens=13, dp_size=1, pad_multiple=16)
    assert len(micro_batches) == 2
    for micro_batch in micro_batches:
        loss_of(stage, samples())(torch.zeros(1, 16, requires_grad=True), micro_batch)
    for (batch, settings), micro_batch in zip(seen, micro_batches, strict=True):
        assert settings == PolicySettings(0.3, 0.0, "token")
        assert (batch.minibatch_sequences, batch.minibatch_tokens, batch.ref_logprobs) == (3, sum(LENGTHS) - 9, None)
        assert batch.num_sequences == len(micro_batch.sample_ids) == len(batch.sequence_ids.unique())
        for place, number in enumerate(micro_batch.sample_ids):
            mine = batch.sequence_ids == place
            assert batch.loss_mask[mine].sum() == (LENGTHS[number] - 3 if number >= 0 else 0)
            assert (batch.advantages[mine] == max(number, 0)).all()
        responses = batch.sum_sequences(torch.ones(1, 16)).tolist()
        assert responses == [max(0, LENGTHS[number] - 3) if number >= 0 else 0 for number in micro_batch.sample_ids]


@pytest.mark.parametrize(
    ("updates", "new", "interval", "due"), [(4, 4, 4, True), (3, 3, 4, False), (9, 2, 4, True), (9, 2, 0, False)]
)
def test_a_reference_is_refreshed_once_its_interval_is_passed(updates: int, new: int, interval: int, due: bool) -> None:
    assert is_due(updates, new, interval) == due


def test_every_inner_epoch_uses_each_sample_once_in_an_order_of_its_own() -> None:
    once = list(minibatches(list(range(10)), 4, "0/1"))
    assert list(map(len, once)) == [4, 4, 2] and sorted(chain(*once)) == list(range(10))
    thrice = list(minibatches(list(range(10)), 4, "0/1", epochs=3))
    assert thrice[:3] == once, "the first epoch is that of a run with one"
    epochs = [list(chain(*thrice[start : start + 3])) for start in (0, 3, 6)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs) and len(set(map(tuple, epochs))) == 3


@pytest.mark.parametrize(("outputs", "size", "epochs", "updates"), [((2, 8), 4, 1, 4), ((2, 8), 4, 3, 12), ((3, 5), 4, 2, 8)])
def test_the_updates_of_a_round_count_all_epochs(outputs: tuple[int, int], size: int, epochs: int, updates: int) -> None:
    prompts, group = outputs
    stage = GrpoConfig(prompts_per_rollout=prompts, group_size=group, minibatch_size=size, inner_epochs=epochs)
    assert stage.updates_per_rollout == updates == len(list(minibatches(list(range(prompts * group)), size, "0", epochs)))


@pytest.mark.parametrize(
    ("kl_coef", "measure", "has"), [(0.1, False, True), (0.0, True, True), (0.0, False, False), (0.1, True, True)]
)
def test_a_reference_is_kept_to_penalise_or_to_measure(kl_coef: float, measure: bool, has: bool) -> None:
    assert GrpoConfig(kl_coef=kl_coef, measure_kl=measure).has_reference == has


def test_shuffled_rewards_keep_the_magnitude_of_their_sums() -> None:
    prompt = Prompt("p", "q", "a", "t", (1,))
    groups = [
        RolloutGroup(prompt, [Rollout([1], [0.0], "", True)] * 2, 0, torch.tensor([r, r]), reward_magnitude=m)
        for r, m in ((1.0, 3.0), (2.0, 7.0))
    ]
    shuffle_rewards(groups, seed="0")
    assert [g.reward_magnitude for g in groups] == [7.0, 7.0] and sorted(torch.cat([g.rewards_G for g in groups])) == [1, 1, 2, 2]


class Trainer:
    """Policy, engine, prompts and rewards in one, which learn nothing and note how long responses may be."""

    def __init__(self, updates: int) -> None:
        self.updates, self.micro_batch_tokens, self.seen, self.reports = updates, 0, [], True
        self.events: list[str] = []

    def shards(self) -> None: ...

    def offload(self) -> None:
        self.events.append("offload")

    def load_weights(self, weights: Any, version: int) -> None:
        self.events.append("load")

    def metrics(self) -> dict[str, float]:
        return {"rollout/idle": 0.0}

    def sleep(self) -> None:
        self.events.append("sleep")

    def check_weights(self) -> None: ...

    def next(self, count: int) -> list[Prompt]:
        return [Prompt(f"p{n}", "q", "a", "t", (1, 2)) for n in range(count)]

    def state_dict(self) -> dict[str, Any]:
        return {}

    def generate(self, prompts: list[Prompt], sampling: Sampling, seed: int, on_group: Any) -> list[RolloutGroup]:
        self.seen.append((self.updates, sampling.max_tokens, self.micro_batch_tokens))
        self.events.append("generate")
        length = sampling.max_tokens
        return [RolloutGroup(prompt, [Rollout([3] * length, [0.0] * length, "", False)] * 2, 0) for prompt in prompts]

    def submit(self, group: RolloutGroup) -> None: ...

    def collect(self, groups: list[RolloutGroup], prompts: list[Prompt]) -> list[RolloutGroup]:
        for group in groups:
            group.rewards_G = torch.tensor([0.0, 1.0], dtype=torch.float64)
        return groups

    def place(self, samples: list[TrainingSample], batches: list[list[int]]) -> list[TrainingSample]:
        return samples

    def logprobs(self, samples: list[TrainingSample]) -> list[torch.Tensor]:
        return [torch.zeros(sample.num_targets) for sample in samples]

    def train_step(self, samples: list[TrainingSample], loss_fn: Any, gate: Any, reference: Any) -> SimpleNamespace:
        self.updates += 1
        self.events.append("train")
        return SimpleNamespace(loss=0.0, grad_norm=0.0, lr=0.0, metrics={}, tokens=1, flops=1.0, applied=True, skipped=None)


@pytest.mark.parametrize("done", [0, 2, 3])
def test_a_round_has_the_limits_of_the_updates_before_it_also_after_a_resume(done: int, tmp_path: Path) -> None:
    """Two updates a round: the limit that begins after 3 updates is first used by the round that begins after 4."""
    longer = LengthPhase(after_updates=3, max_response_tokens=6, micro_batch_tokens=7)
    stage = GrpoConfig(
        rollouts=4,
        prompts_per_rollout=2,
        group_size=2,
        minibatch_size=2,
        kl_coef=0.0,
        micro_batch_tokens=5,
        length_schedule=[longer],
    )
    it = Trainer(updates=2 * done)
    config = Config(grpo=stage, run_dir=str(tmp_path / "run"))
    with Run.open(tmp_path / "run", config, "grpo") as run:
        run.step = done
        train_grpo(
            stage, RolloutConfig(max_response_tokens=4), policy=it, reference=None, engine=it, rewards=it, prompts=it, run=run,
            save=lambda folder: None, evaluate=lambda step: {}, seed=0,
        )  # fmt: skip
    assert it.seen == [(0, 4, 5), (2, 4, 5), (4, 6, 7), (6, 6, 7)][done:]
    of_round = ["generate", "sleep", "train", "train", "offload", "load"]  # the device is the engine's, or the trainer's
    assert it.events == ["offload", "load", *(4 - done) * of_round]
