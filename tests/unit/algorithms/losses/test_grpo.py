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
    positive = batch["advantages"][batch["loss_mask"] > 0] > 0
    binds = torch.where(positive, ratios > 1 + EPS, ratios < 1 - EPS)
    assert ((ratios - 1).abs() > EPS).sum() > metrics["ratio/clipped_fraction"].value.item() == binds.sum().item() > 0
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


CLIPS = [0.2, 10.0, 100.0]


def one_token_each(
    log_ratios: list[float], advantages: list[float], dtype: torch.dtype, clip_eps: float, kl_coef: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor, Metrics]:
    """Loss, its gradient by the log-probs, and metrics of responses of one token, with the reference where the policy was."""
    old = torch.full((len(log_ratios), 1), -1.0, dtype=dtype)
    logprobs = (old + torch.tensor(log_ratios, dtype=dtype)[:, None]).requires_grad_()
    ones = torch.ones_like(old)
    batch = {"logprobs": logprobs, "old_logprobs": old, "ref_logprobs": old, "loss_mask": ones, "sequence_lengths": ones}
    given = {**batch, "advantages": torch.tensor(advantages, dtype=dtype)[:, None]}
    loss, metrics = loss_of(given, "sequence", len(log_ratios), clip_eps=clip_eps, kl_coef=kl_coef)
    loss.backward()
    return loss.detach(), logprobs.grad.flatten(), metrics


@pytest.mark.parametrize("clip_eps", CLIPS)
@pytest.mark.parametrize("advantage", [2.0, 1e-3, 0.0])
def test_a_ratio_that_overflows_float32_has_the_gradient_of_float64(clip_eps, advantage):
    log_ratios = [-200.0, -90.0, -3.0, 0.0, 0.1, math.log1p(clip_eps), 3.0, 5.0, 20.0, 80.0, 88.8, 100.0, 300.0]
    advantages = [advantage] * len(log_ratios)
    loss, gradient, _ = one_token_each(log_ratios, advantages, torch.float32, clip_eps)
    exact_loss, exact, _ = one_token_each(log_ratios, advantages, torch.float64, clip_eps)
    assert loss.item() == pytest.approx(exact_loss.item(), rel=1e-5, abs=1e-30)
    edge = log_ratios.index(math.log1p(clip_eps))  # where a rounding decides whether the clip binds
    kept = [i for i in range(len(log_ratios)) if i != edge]
    assert torch.allclose(gradient[kept].double(), exact[kept], rtol=1e-5, atol=1e-30)
    beyond = torch.tensor(log_ratios) > math.log1p(clip_eps)
    assert not gradient[beyond].any(), "nothing is lost: the clip had taken these gradients already"


@pytest.mark.parametrize("clip_eps", CLIPS)
def test_a_negative_advantage_keeps_the_gradient_of_any_ratio(clip_eps):
    log_ratios = [-100.0, -3.0, 0.5, 4.0, 20.0, 60.0, 80.0]
    _, gradient, _ = one_token_each(log_ratios, [-1.0] * 7, torch.float32, clip_eps)
    _, exact, _ = one_token_each(log_ratios, [-1.0] * 7, torch.float64, clip_eps)
    assert torch.allclose(gradient.double(), exact, rtol=1e-4, atol=1e-30) and gradient[-1] > 1e33
    loss, gradient, _ = one_token_each([0.0, 120.0], [-1.0, -1.0], torch.float32, clip_eps)
    assert loss.isinf() and not gradient.isfinite().all(), "beyond float32 the update is not finite, and is not made"


def test_a_bound_changes_no_bit_of_ordinary_tokens():
    batch = {name: value.float() for name, value in make_batch(rows=40).items()}
    logprobs = batch["logprobs"].clone().requires_grad_()
    loss, _ = loss_of({**batch, "logprobs": logprobs}, "sequence", 40)
    loss.backward()
    plain = batch["logprobs"].clone().requires_grad_()
    masked = batch["loss_mask"] > 0
    ratio = torch.where(masked, plain - batch["old_logprobs"], 0.0).exp()
    objective = torch.minimum(ratio * batch["advantages"], ratio.clamp(1 - EPS, 1 + EPS) * batch["advantages"])
    log_ratio = torch.where(masked, batch["ref_logprobs"], plain.detach()) - plain
    objective = objective - BETA * (log_ratio.exp() - log_ratio - 1.0)
    unbounded = -(objective * (batch["loss_mask"] / batch["sequence_lengths"])).sum() / 40
    unbounded.backward()
    assert torch.equal(loss, unbounded) and torch.equal(logprobs.grad, plain.grad)


@pytest.mark.parametrize("outside", [-math.inf, math.nan, 1e30])
@pytest.mark.parametrize("kl_coef", [0.0, BETA])
def test_whatever_stands_outside_the_mask_stays_there(outside, kl_coef):
    batch = make_batch()
    without = batch["loss_mask"] == 0
    poisoned = {**batch, "logprobs": torch.where(without, outside, batch["logprobs"]).requires_grad_()}
    loss, metrics = loss_of(poisoned, "sequence", 6, kl_coef=kl_coef)
    loss.backward()
    clean, expected = loss_of(batch, "sequence", 6, kl_coef=kl_coef)
    assert loss.item() == clean.item() and poisoned["logprobs"].grad[without].abs().max() == 0
    assert {n: m.value.item() for n, m in metrics.items()} == {n: m.value.item() for n, m in expected.items()}


def test_kl_is_measured_without_being_penalised():
    batch = make_batch()
    logprobs = batch["logprobs"].clone().requires_grad_()
    loss, metrics = loss_of({**batch, "logprobs": logprobs}, "sequence", 6, kl_coef=0.0)
    loss.backward()
    alone, without = loss_of({**batch, "ref_logprobs": None}, "sequence", 6, kl_coef=0.0)
    assert loss.item() == alone.item() and "kl/reference" not in without
    penalised = loss_of(batch, "sequence", 6)[1]
    assert metrics["kl/reference"].value.item() == penalised["kl/reference"].value.item() > 0
    _, gradient, metrics = one_token_each([-300.0, 0.0], [1.0, 1.0], torch.float32, EPS)
    assert gradient.isfinite().all() and metrics["kl/reference"].value.isinf(), "what is only measured may overflow"


def test_importance_weights_scale_the_policy_term_alone_up_to_the_cap() -> None:
    batch, cap = make_batch(), 1.5
    rows, length = batch["logprobs"].shape
    off = torch.randn(rows, length, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    batch["logprobs"].requires_grad_()
    given = PolicyBatch(
        **batch,
        rollout_logprobs=(batch["old_logprobs"] - off) * batch["loss_mask"],
        sequence_ids=torch.arange(rows)[:, None].expand(rows, length),
        num_sequences=rows,
        minibatch_sequences=rows,
        minibatch_tokens=0,
    )
    masked = batch["loss_mask"] > 0
    weights = off.exp().clamp(max=cap)
    loss, metrics = grpo_loss(given, PolicySettings(EPS, BETA, "sequence", cap))
    ratio = (batch["logprobs"] - batch["old_logprobs"]).exp()
    term = torch.minimum(ratio * batch["advantages"], ratio.clamp(1 - EPS, 1 + EPS) * batch["advantages"]) * weights
    difference = batch["ref_logprobs"] - batch["logprobs"]
    want = torch.where(masked, term - BETA * (difference.exp() - difference - 1), 0.0) / batch["sequence_lengths"]
    assert loss.item() == pytest.approx(-want.sum().item() / rows)
    (gradient,) = torch.autograd.grad(loss, batch["logprobs"], retain_graph=True)
    (wanted,) = torch.autograd.grad(-want.sum() / rows, batch["logprobs"])
    assert torch.allclose(gradient, wanted)
    assert metrics["importance/capped_fraction"].value == (off.exp() > cap)[masked].sum() > 0
    assert metrics["importance/mean"].value == pytest.approx(off.exp()[masked].sum().item())
    plain, without = grpo_loss(given, PolicySettings(EPS, BETA, "sequence"))
    assert plain.item() != pytest.approx(loss.item()) and "importance/mean" not in without
