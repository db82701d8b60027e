"""Balance loss, expert counts, router biases and multi-token prediction: V3's equations, whatever the packing.

Two ranks: tests/distributed/test_layouts.py.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch

from megatron_r1.config.optimizer import MoeTrainingConfig
from megatron_r1.config.runtime import RuntimeConfig
from megatron_r1.data.packing import pack_samples
from megatron_r1.mcore import host
from megatron_r1.types import TrainingSample
from tests.balance_cases import BALANCED, LENGTHS, build_model, compare, one_update
from tests.one_rank import one_rank_world
from tests.random_weights import full_architecture

host.activate("cpu")

from megatron_r1.mcore import parallel, provider
from megatron_r1.mcore.balance import Balance
from megatron_r1.mcore.packing import decode_sequences, encode_sequences
from megatron_r1.mcore.routing import Router, packed_sequences
from megatron_r1.training.pretrain import loss_over

ALL_IN_ONE = sum(LENGTHS) + 1
EXPERTS, CHOSEN, GROUPS, GROUPS_CHOSEN = 8, 4, 4, 2  # of `full_architecture`


@pytest.fixture(scope="module", autouse=True)
def one_rank() -> None:
    one_rank_world()


def router_of(moe: MoeTrainingConfig) -> Router:
    layout = parallel.Layout()
    parallel.build_process_groups(layout, seed=1)
    module = provider.build_model(full_architecture(mtp=0), layout, RuntimeConfig(), moe, seed=1)[0]
    return module.decoder.layers[1].mlp.router


def packed_row(lengths: tuple[int, ...], capacity: int):
    """The first micro-batch of random samples."""
    samples = [TrainingSample([3] * (length + 1), [1] * length) for length in lengths]
    return pack_samples(samples, max_tokens=capacity, dp_size=1, pad_multiple=capacity)[0][0]


@cache
def reference(stage: str) -> dict:
    return one_update(stage, build_model(stage, micro_batch_tokens=max(LENGTHS) * (1 + (stage == "reward_model")) + 8))


@pytest.mark.parametrize(
    ("stage", "micro_batch_tokens", "recompute"),
    [
        ("sft", 64, "none"),
        ("sft", ALL_IN_ONE, "none"),
        ("sft", 100, "full"),
        ("sft", ALL_IN_ONE, "selective"),
        ("grpo", 64, "none"),
        ("grpo", ALL_IN_ONE, "full"),
        ("reward_model", ALL_IN_ONE + 16, "none"),
    ],
)
def test_one_batch_in_any_packing(stage: str, micro_batch_tokens: int, recompute: str) -> None:
    got = one_update(stage, build_model(stage, micro_batch_tokens=micro_batch_tokens, recompute=recompute))
    compare(got, reference(stage))
    assert {"moe/balance_loss", "moe/max_load"} < got.keys() and ("mtp/loss" in got) == (stage != "reward_model")
    loads = {name: value for name, value in got.items() if name.startswith("moe/load/")}
    layers = [1, 2, 3, 4] + [5] * (stage != "reward_model")  # the first is dense, the last predicts a second token
    assert list(loads) == [f"moe/load/layer_{layer}" for layer in layers] and max(loads.values()) == got["moe/max_load"]
    assert got["moe/bias_spread"] == 0.0, "the first update's biases have not moved yet"


def test_packings_of_the_test_above_differ() -> None:
    samples = [TrainingSample([3] * (length + 1), [1] * length) for length in LENGTHS]
    rows = [pack_samples(samples, max_tokens=n, dp_size=1, pad_multiple=2)[0] for n in (max(LENGTHS) + 8, 64, 100, ALL_IN_ONE)]
    assert [[sum(m.is_real) for m in row] for row in rows] == [[2, 2, 2, 2], [2, 3, 3], [3, 5], [8]]
    assert all(any(not all(m.is_real) for m in row) for row in rows), "each has padding"


@pytest.mark.parametrize("real", [[True, True, True], [True, False, True], [False, False, False]])
def test_sequences_in_bits(real: list[bool]) -> None:
    bounds = torch.tensor([0, 3, 3, 5])
    names = [number * keep for number, keep in enumerate(real, 1)]
    bits = encode_sequences(bounds, real, 7)
    assert decode_sequences(bits).tolist() == [names[0]] * 3 + [names[2]] * 2 + [0] * 2
    many = torch.arange(8193)
    bits = encode_sequences(many, [True] * 8192, 8192)
    assert bits.shape == (8192, 14), "a byte per token and bit: what a micro-batch of one-token sequences costs"
    assert torch.equal(decode_sequences(bits), many[1:])


def test_balance_loss_of_a_packed_row_is_that_of_the_report() -> None:
    """alpha sum_i f_i P_i of every sequence (V3 equations 17 to 20), times `sequence_weight`; padding has none."""
    alpha, lengths = 0.1, (11, 1, 20)
    router = router_of(MoeTrainingConfig(aux_loss_coeff=alpha))
    row = packed_row(lengths, 40)
    assert len(row.is_real) > len(lengths), "there is padding"
    bits = packed_sequences(row, parallel.Layout(), parallel.groups()).sequence_bits
    hidden = torch.randn(40, 1, 64, generator=torch.Generator().manual_seed(0))
    router.sequence_weight = 2.5
    probs, chosen = router(hidden, bits.transpose(0, 1))
    (probs.sum() * 0.0).backward()

    weight = router.weight.detach().clone().requires_grad_()
    total, counts = 0.0, torch.zeros(EXPERTS)
    start = 0
    for number in row.sample_ids[: len(lengths)]:
        scores = (hidden[start : start + lengths[number], 0] @ weight.T).sigmoid()
        best = torch.zeros_like(scores).scatter(-1, scores.topk(CHOSEN, dim=-1).indices, 1.0)
        f = best.sum(0) * EXPERTS / (CHOSEN * lengths[number])
        total = total + (f * (scores / scores.sum(-1, keepdim=True)).mean(0)).sum()
        counts += chosen[start : start + lengths[number]].sum(0)
        start += lengths[number]
    (alpha * 2.5 * total).backward()
    torch.testing.assert_close(router.weight.grad, weight.grad, atol=1e-6, rtol=1e-5)
    assert router.balance_loss.item() == pytest.approx(total.item(), rel=1e-6)
    assert torch.equal(router.choices, counts.long())
    with torch.no_grad():
        router(hidden, bits.transpose(0, 1))
    assert torch.equal(router.choices, counts.long()), "evaluation and the first pass of a recomputed layer do not count"


def test_bias_moves_by_gamma_against_the_load() -> None:
    """V3 section 2.1.2, and Balance's numbers beside it."""
    router = router_of(MoeTrainingConfig(bias_update_rate=0.01))
    balance = Balance([router], MoeTrainingConfig(bias_update_rate=0.01), torch.device("cpu"))
    balance.begin(tokens=1, sequences=1)
    router.choices = torch.tensor([9, 5, 5, 5, 4, 4, 4, 4])
    metrics = balance.report(1, parallel.groups().pp)
    assert metrics.keys() == {"moe/max_load", "moe/load/layer_1", "moe/bias_spread"} and metrics["moe/max_load"].value == 9 / 5
    balance.move_biases()
    assert router.expert_bias.tolist() == pytest.approx([-0.01, 0, 0, 0, 0.01, 0.01, 0.01, 0.01])
    balance.begin(tokens=1, sequences=1)
    balance.move_biases()
    assert router.expert_bias[0] == pytest.approx(-0.01), "an update without passes moves nothing"
    # More tokens than float32 counts: one choice too many is still seen.
    router.choices = torch.tensor([2**30 + 1, *[2**30] * 6, 2**30 - 1])
    balance.report(1, parallel.groups().pp)
    balance.move_biases()
    assert router.expert_bias.tolist() == pytest.approx([-0.02, 0, 0, 0, 0.01, 0.01, 0.01, 0.02])


def test_an_update_that_is_left_out_moves_no_bias() -> None:
    model = build_model("sft", micro_batch_tokens=64)
    samples = [TrainingSample([5, 6, 7, 8], [1, 1, 1])]
    assert not model.train_step(samples, lambda logprobs, _: (logprobs.sum() * torch.nan, {})).applied
    assert not any(router.expert_bias.any() for router in model._balance.routers)
    assert model.train_step(samples, loss_over(3)).applied
    moved = torch.stack([router.expert_bias for router in model._balance.routers])
    assert moved.abs().max() == pytest.approx(1e-3), "once, not twice"


def test_a_head_whose_gradient_is_not_finite_is_seen_beside_the_norm() -> None:
    model = build_model("sft", micro_batch_tokens=64)
    before = [tensor.clone() for tensor in model.local_state()]
    hook = model.modules[0].mtp.layers[0].eh_proj.weight.register_hook(lambda gradient: gradient * torch.inf)
    samples = [TrainingSample([5, 6, 7, 8], [1, 1, 1])]
    assert not model.train_step(samples, loss_over(3)).applied
    assert all(torch.equal(a, b) for a, b in zip(before, model.local_state(), strict=True))
    hook.remove()
    assert model.train_step(samples, loss_over(3)).applied


def test_routing_is_limited_to_the_best_groups() -> None:
    """V3 sections 2.1.2 and 2.1.3: the bias chooses; a group's score is that of its best K_r / M experts; weights have no bias."""
    router = router_of(MoeTrainingConfig())
    router.expert_bias.copy_(
        torch.linspace(-0.3, 0.3, EXPERTS)[torch.randperm(EXPERTS, generator=torch.Generator().manual_seed(1))]
    )
    hidden = torch.randn(300, 1, 64, generator=torch.Generator().manual_seed(0)) * 4
    probs, chosen = router(hidden)
    scores = (hidden[:, 0] @ router.weight.T).sigmoid()
    for token in range(300):
        biased = (scores[token] + router.expert_bias).tolist()
        per_group = EXPERTS // GROUPS
        members = [range(group * per_group, (group + 1) * per_group) for group in range(GROUPS)]
        best = sorted(members, key=lambda m: -sum(sorted((biased[e] for e in m), reverse=True)[: CHOSEN // GROUPS_CHOSEN]))
        allowed = [expert for group in best[:GROUPS_CHOSEN] for expert in group]
        want = sorted(sorted(allowed, key=lambda e: -biased[e])[:CHOSEN])
        assert chosen[token].nonzero().flatten().tolist() == want
        expected = scores[token, want] / scores[token, want].sum() * 2.5
        torch.testing.assert_close(probs[token, want], expected, atol=1e-6, rtol=1e-5)


def trained_twice(moe: MoeTrainingConfig, clip: float = 1.0) -> dict[str, torch.Tensor]:
    model = build_model("sft", micro_batch_tokens=64, moe=moe)
    for optimizer in model.optimizer.chained_optimizers:
        optimizer.config.clip_grad = clip
    samples = [TrainingSample(list(range(i, i + 20)), [1] * 19) for i in range(6)]
    for _ in range(2):
        stats = model.train_step(samples, loss_over(6 * 19))
    assert stats.grad_norm > clip, "clipping has an effect"
    return dict(model.weights())


def test_policy_does_not_move_by_multi_token_prediction_unless_asked() -> None:
    """Bit by bit, also when gradients are clipped; the head itself learns."""
    settings = BALANCED.model_dump()
    without, beside, together = (
        trained_twice(MoeTrainingConfig(**settings | change))
        for change in ({"mtp_loss_scale": 0.0}, {}, {"mtp_trains_trunk": True})
    )
    head = {name for name in without if name.startswith("model.layers.5.") and not torch.equal(beside[name], without[name])}
    assert len(head) > 30
    # The layer's copies of embedding and head are the model's own.
    trunk = without.keys() - {name for name in without if name.startswith("model.layers.5.")}
    assert all(torch.equal(beside[name], without[name]) for name in trunk)
    assert not torch.equal(together["model.layers.0.mlp.down_proj.weight"], without["model.layers.0.mlp.down_proj.weight"])


def test_mtp_loss_is_that_of_the_report_and_stays_in_its_sequence() -> None:
    """V3 equations 24 and 25 over trained tokens: position i predicts token i + 2 of its own sequence, or nothing."""
    moe = MoeTrainingConfig(mtp_loss_scale=0.3)
    generator = torch.Generator().manual_seed(5)
    first, second = (torch.randint(130, (n,), generator=generator).tolist() for n in (12, 9))
    masked = [0] * 5 + [1] * 6

    def loss(*samples: TrainingSample) -> float:
        model = build_model("sft", micro_batch_tokens=64, moe=moe)
        return model.train_step(list(samples), loss_over(1)).metrics["mtp/loss"].value

    alone = loss(TrainingSample(first, masked)), loss(TrainingSample(second, [1] * 8))
    both = loss(TrainingSample(first, masked), TrainingSample(second, [1] * 8))
    assert both == pytest.approx((alone[0] * 6 + alone[1] * 8) / 14, rel=1e-6)
    # Tokens with loss that no position predicts: the first two targets of a sequence.
    assert loss(TrainingSample(first, [1] + [0] * 10)) == 0.0
    model = build_model("sft", micro_batch_tokens=64, moe=moe)
    (module,) = model.modules
    seen: list[torch.Tensor] = []
    module.output_layer.register_forward_hook(lambda _, args, output: seen.append(output[0].detach().clone()))
    model.train_step([TrainingSample(first, masked)], loss_over(1))
    logits = seen[0][: len(first) - 1, 0]  # of the prediction head; those of the model come second
    nll = [-logits[i].log_softmax(-1)[first[i + 2]].item() for i in range(len(first) - 2) if masked[i + 1]]
    assert alone[0] == pytest.approx(sum(nll) / sum(masked), rel=1e-5)


def test_mtp_gradient_is_lambda_over_trained_tokens() -> None:
    """Twice lambda is twice the head's gradient, and nothing of it depends on padding."""
    samples = [TrainingSample(list(range(20, 40)), [1] * 19)]
    found = []
    for scale, width in ((0.3, 19), (0.6, 19), (0.3, 64)):
        model = build_model("sft", micro_batch_tokens=64, moe=MoeTrainingConfig(mtp_loss_scale=scale))
        model.train_on_micro_batches(pack_samples(samples, max_tokens=64, dp_size=1, pad_multiple=width)[0], loss_over(19))
        found.append(model.modules[0].mtp.layers[0].eh_proj.weight.main_grad.clone())
    assert found[0].norm() > 1e-3
    torch.testing.assert_close(found[1], 2 * found[0], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(found[2], found[0], rtol=1e-4, atol=1e-7)
