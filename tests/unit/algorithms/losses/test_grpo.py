"""The GRPO loss against its equations, on a batch of ragged responses."""

import math

import pytest
import torch

from megatron_r1.algorithms.advantage import group_advantages
from megatron_r1.algorithms.losses.contract import Metrics, PolicyBatch, PolicySettings
from megatron_r1.algorithms.losses.grpo import grpo_loss

EPS, BETA = 0.2, 0.04


def make_batch(seed: int = 0, rows: int = 6, length: int = 9) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, length + 1, (rows,), generator=generator)
    mask = (torch.arange(length)[None] < lengths[:, None]).double()
    old = -torch.rand(rows, length, generator=generator, dtype=torch.float64) * 3
    noise = 0.5 * torch.randn(2, rows, length, generator=generator, dtype=torch.float64)
    return {
        "logprobs": old + noise[0],
        "old_logprobs": old * mask,
        "ref_logprobs": (old + noise[1]) * mask,
        "advantages": torch.randn(rows, 1, generator=generator, dtype=torch.float64).expand(rows, length),
        "loss_mask": mask,
        "sequence_lengths": lengths[:, None].expand(rows, length).double(),
    }


def loss_of(
    batch: dict[str, torch.Tensor | None], normalization: str, denominator: int, clip_eps: float = EPS, kl_coef: float = BETA
) -> tuple[torch.Tensor, Metrics]:
    rows, length = batch["logprobs"].shape
    given = PolicyBatch(
        **batch,
        rollout_logprobs=batch["old_logprobs"],
        sequence_ids=torch.arange(rows)[:, None].expand(rows, length),
        num_sequences=rows,
        minibatch_sequences=denominator if normalization == "sequence" else 0,
        minibatch_tokens=denominator if normalization == "token" else 0,
    )
    return grpo_loss(given, PolicySettings(clip_eps, kl_coef, normalization))


@pytest.mark.parametrize("normalization", ["sequence", "token"])
def test_closed_form_one_token_at_a_time(normalization):
    batch = make_batch()
    rows = batch["logprobs"].shape[0]
    denominator = rows if normalization == "sequence" else batch["loss_mask"].sum().item()
    expected = 0.0
    for i in range(rows):
        n = int(batch["sequence_lengths"][i, 0])
        total = 0.0
        for t in range(n):
            lp, old, ref, a = (batch[k][i, t].item() for k in ("logprobs", "old_logprobs", "ref_logprobs", "advantages"))
            ratio = math.exp(lp - old)
            clipped = min(max(ratio, 1 - EPS), 1 + EPS)
            kl = math.exp(ref - lp) - (ref - lp) - 1
            total += min(ratio * a, clipped * a) - BETA * kl
        expected -= total / n if normalization == "sequence" else total
    loss, metrics = loss_of(batch, normalization, denominator)
    assert loss.item() == pytest.approx(expected / denominator, rel=1e-12)
    ratios = (batch["logprobs"] - batch["old_logprobs"]).exp()[batch["loss_mask"] > 0]
    assert metrics["ratio/clipped_fraction"].value.item() == ((ratios - 1).abs() > EPS).sum().item() > 0
    assert metrics["ratio/max"].value.item() == ratios.max().item() and metrics["ratio/max"].reduction == "max"


def test_gradient_at_ratio_one_is_the_policy_gradient():
    batch = make_batch()
    logprobs = batch["old_logprobs"].clone().requires_grad_()
    loss, metrics = loss_of({**batch, "logprobs": logprobs, "ref_logprobs": None}, "sequence", denominator=6, kl_coef=0.0)
    loss.backward()
    policy_gradient = -batch["advantages"] * batch["loss_mask"] / batch["sequence_lengths"] / 6
    assert torch.allclose(logprobs.grad, policy_gradient, atol=1e-15)
    assert metrics["ratio/clipped_fraction"].value.item() == 0 and metrics["ratio/max"].value.item() == 1.0


@pytest.mark.parametrize(
    "advantage, log_ratio, has_gradient",
    [(1.0, 0.5, False), (1.0, -0.5, True), (-1.0, 0.5, True), (-1.0, -0.5, False)],
)
def test_clip_stops_the_gradient_only_where_it_would_go_further(advantage, log_ratio, has_gradient):
    one = torch.ones(1, 1, dtype=torch.float64)
    logprobs = (one * log_ratio).requires_grad_()
    batch = {"logprobs": logprobs, "old_logprobs": one * 0, "ref_logprobs": None, "advantages": one * advantage}
    loss_of({**batch, "loss_mask": one, "sequence_lengths": one}, "sequence", 1, kl_coef=0.0)[0].backward()
    assert (logprobs.grad.item() != 0) == has_gradient


def test_clip_of_ten_never_binds_below():
    one = torch.ones(1, 1, dtype=torch.float64)
    logprobs = (one * -8.0).requires_grad_()
    batch = {"logprobs": logprobs, "old_logprobs": one * 0, "ref_logprobs": None, "advantages": one * -1}
    loss_of({**batch, "loss_mask": one, "sequence_lengths": one}, "sequence", 1, clip_eps=10, kl_coef=0.0)[0].backward()
    assert logprobs.grad.item() != 0


@pytest.mark.parametrize("normalization", ["sequence", "token"])
def test_any_split_adds_up_to_the_same_loss_and_gradient(normalization):
    batch = make_batch(rows=8)
    denominator = 8 if normalization == "sequence" else batch["loss_mask"].sum().item()
    whole = batch["logprobs"].clone().requires_grad_()
    loss, _ = loss_of({**batch, "logprobs": whole}, normalization, denominator)
    loss.backward()
    for sizes in ([1] * 8, [3, 5], [2, 2, 4]):
        parts = batch["logprobs"].clone().requires_grad_()
        total, start = 0.0, 0
        for size in sizes:
            rows = slice(start, start + size)
            part = {k: v[rows] for k, v in batch.items()}
            piece, _ = loss_of({**part, "logprobs": parts[rows]}, normalization, denominator)
            piece.backward()
            total, start = total + piece.item(), start + size
        assert total == pytest.approx(loss.item(), rel=1e-12)
        assert torch.allclose(parts.grad, whole.grad, atol=1e-15)


def test_zero_variance_group_has_exactly_no_gradient():
    batch = make_batch()
    advantages = group_advantages(torch.full((6,), 0.7))[:, None].expand(6, 9)
    logprobs = batch["logprobs"].clone().requires_grad_()
    loss, _ = loss_of({**batch, "logprobs": logprobs, "advantages": advantages, "ref_logprobs": None}, "sequence", 6, kl_coef=0.0)
    loss.backward()
    assert loss.item() == 0 and logprobs.grad.abs().max() == 0


def test_prompt_and_padding_positions_never_matter():
    batch = make_batch()
    outside = batch["loss_mask"] == 0
    poisoned = {**batch, "logprobs": torch.where(outside, -300.0, batch["logprobs"]).requires_grad_()}
    loss, _ = loss_of(poisoned, "sequence", 6)
    loss.backward()
    assert loss.item() == loss_of(batch, "sequence", 6)[0].item()
    assert poisoned["logprobs"].grad[outside].abs().max() == 0


def test_a_micro_batch_that_is_all_padding_adds_nothing():
    batch = make_batch()
    empty = {**batch, "loss_mask": torch.zeros_like(batch["loss_mask"]), "sequence_lengths": torch.ones_like(batch["loss_mask"])}
    loss, metrics = loss_of(empty, "sequence", 6)
    assert loss.item() == 0 and {name: metric.value.item() for name, metric in metrics.items()} == dict.fromkeys(metrics, 0.0)
