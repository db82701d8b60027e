"""The output layer without whole logits, in every kind of update: the numbers of whole ones, and the loss asked for its slope."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megatron_r1.config.grpo import GrpoConfig
from megatron_r1.config.optimizer import MoeTrainingConfig, OptimizerConfig
from megatron_r1.config.runtime import RuntimeConfig
from megatron_r1.config.schema import Config
from megatron_r1.mcore import head_bytes, host, logits_tiles
from megatron_r1.model.architecture import Architecture
from megatron_r1.pipeline.builders.models import build_policy
from megatron_r1.pipeline.session import open_session
from megatron_r1.training.grpo import loss_of
from megatron_r1.training.pretrain import loss_over
from megatron_r1.types import Metric, TrainingSample
from tests.random_weights import full_architecture, qwen2_architecture
from tests.unit.mcore.test_policy import make_samples

host.activate("cpu")

from megatron_r1.mcore.policy import MegatronPolicy


@pytest.fixture(scope="module")
def session():
    with open_session(RuntimeConfig()) as opened:
        yield opened


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_bytes, "TILE", 2**11)
    monkeypatch.setattr(logits_tiles, "BLOCK", 2**10)


def build(session, whole_logits_mb: int, arch: Architecture | None = None, **more: object) -> MegatronPolicy:
    config = Config(seed=3, runtime=RuntimeConfig(whole_logits_mb=whole_logits_mb))
    moe = MoeTrainingConfig(mtp_loss_scale=0.3, mtp_trains_trunk=True) if arch is None else MoeTrainingConfig()
    return build_policy(
        config, session, arch or full_architecture(mtp=1), optimizer=OptimizerConfig(lr=1e-3), moe=moe, total_updates=4,
        micro_batch_tokens=90, packed=True, temperature=0.7, **more,
    )  # fmt: skip


def samples_of(arch: Architecture) -> list[TrainingSample]:
    found = [dataclasses.replace(sample, token_ids=sample.token_ids % arch.vocab_size) for sample in make_samples()]
    return [dataclasses.replace(sample, old_logprobs=sample.rollout_logprobs) for sample in found]


def of_sequences(logprobs: torch.Tensor, micro_batch):
    """A loss that is no sum over tokens: the square of each micro-batch's sum."""
    total = (logprobs * micro_batch.loss_mask).sum() / 100
    return total * total, {"none/here": Metric(total.detach(), "max")}


def update(policy: MegatronPolicy, kind: str):
    samples = samples_of(policy.arch)
    losses = {"grpo": loss_of(GrpoConfig(kl_coef=0.0), samples), "sft": loss_over(40), "of_sequences": of_sequences}
    return policy.train_step(samples, losses[kind], gate=lambda found: None)


def gradients(policy: MegatronPolicy) -> list[torch.Tensor]:
    return [
        parameter.main_grad.clone() for module in policy.modules for parameter in module.parameters() if parameter.requires_grad
    ]


@pytest.mark.parametrize("kind", ["grpo", "sft", "of_sequences"])
@pytest.mark.parametrize("tied", [False, True], ids=["v3", "qwen2-tied"])
def test_an_update_is_the_same_and_a_loss_that_is_a_sum_is_derived_once(
    session, monkeypatch: pytest.MonkeyPatch, kind: str, tied: bool
) -> None:
    arch = qwen2_architecture(tied=True) if tied else None
    tiled, whole = build(session, 0, arch), build(session, 256, arch)
    logprobs = [policy.logprobs(samples_of(policy.arch)) for policy in (tiled, whole)]
    assert all((a - b).abs().max() < 1e-5 for a, b in zip(*logprobs, strict=True))
    projected = count_projections(monkeypatch)
    found = []
    for policy in (tiled, whole):
        stats = update(policy, kind)
        found.append((stats.loss, stats.grad_norm, gradients(policy), stats.tokens))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5) and found[0][1] == pytest.approx(found[1][1], rel=1e-5)
    for ours, theirs in zip(found[0][2], found[1][2], strict=True):
        assert (ours - theirs).abs().max() <= 2e-5 * max(theirs.abs().max().item(), found[1][1] / 100)
    module = tiled.modules[0]
    asked = {head.guessed for head in module._asked}
    if kind == "of_sequences":
        assert not module._is_sum or False in asked
    else:
        assert module._is_sum and asked == {True}
        assert sum(projected) == found[0][3] * (1 if tied else 2), "every position once, by each head"


def count_projections(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    rows: list[int] = []
    project = logits_tiles.TorchTiles.project

    def counted(self, hidden: torch.Tensor, *arguments):
        rows.append(len(hidden))
        return project(self, hidden, *arguments)

    monkeypatch.setattr(logits_tiles.TorchTiles, "project", counted)
    return rows


def test_the_exact_entropy_is_that_of_the_logits(session) -> None:
    policy = build(session, 256, qwen2_architecture(tied=False), exact_entropy=True)
    samples = samples_of(policy.arch)
    module = policy.modules[0]
    want = []
    with torch.no_grad():
        for sample in samples:
            ids = torch.from_numpy(sample.token_ids.astype("int64"))[None, :-1]
            logits = module(ids, torch.arange(ids.shape[1])[None], None)[0, sample.trained].float() / 0.7
            want.append(torch.distributions.Categorical(logits=logits).entropy())
    stats = update(policy, "grpo")
    assert stats.metrics["entropy/exact"].value == pytest.approx(torch.cat(want).mean().item(), rel=1e-5)
    assert "entropy/exact" not in update(build(session, 0, qwen2_architecture(tied=False)), "grpo").metrics
