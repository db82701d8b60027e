"""The policy on one rank: splits that must not matter, an on-policy ratio of one, the reference, and checkpoints."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from megatron_r1.config.grpo import GrpoConfig
from megatron_r1.config.model import ModelConfig
from megatron_r1.config.optimizer import MoeTrainingConfig, OptimizerConfig
from megatron_r1.config.rollout import RolloutConfig
from megatron_r1.config.runtime import RuntimeConfig
from megatron_r1.config.schema import Config
from megatron_r1.errors import CheckpointError, NonFiniteUpdate, WeightSyncError
from megatron_r1.mcore.state_bytes import StateBytes
from megatron_r1.pipeline.builders.models import build_architecture, build_policy
from megatron_r1.pipeline.session import open_session
from megatron_r1.training.grpo import loss_of, update_policy
from megatron_r1.training.parity import ParityGate
from megatron_r1.training.samples import fill_logprobs, with_logprobs
from megatron_r1.types import TrainingSample
from tests.allocations import peak_bytes

if TYPE_CHECKING:
    from megatron_r1.mcore.policy import MegatronPolicy, StepStats

CONFIG = Config()
STAGE = GrpoConfig(kl_coef=0.04)


@pytest.fixture(scope="module")
def session():
    with open_session(CONFIG.runtime) as opened:
        yield opened


def make_policy(session, micro_batch_tokens: int = 4096, temperature: float = 1.0, config: Config = CONFIG, mtp: float = 0.0):
    return build_policy(
        config,
        session,
        build_architecture(config.model),
        optimizer=OptimizerConfig(lr=1e-3, weight_decay=0.1, warmup_steps=3),
        moe=MoeTrainingConfig(mtp_loss_scale=mtp),
        total_updates=10,
        micro_batch_tokens=micro_batch_tokens,
        packed=True,
        temperature=temperature,
    )


def make_samples(count: int = 12, seed: int = 0) -> list[TrainingSample]:
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for i in range(count):
        length = int(torch.randint(6, 30, (), generator=generator))
        ids = torch.randint(3, 448, (length,), generator=generator).tolist()
        mask = [0] * 4 + [1] * (length - 5)
        samples.append(TrainingSample(ids, mask, advantage=float(i % 3 - 1), rollout_logprobs=torch.zeros(length - 1)))
    return samples


def test_first_minibatch_is_on_policy(session) -> None:
    from megatron_r1.mcore.policy import ReferencePolicy

    policy = make_policy(session)
    samples = with_logprobs(make_samples(), policy, ReferencePolicy(policy))
    ratios = []

    def watch(logprobs, micro_batch):
        ratios.append(
            ((logprobs - micro_batch.token_fields["old_logprobs"]).exp() - 1)[micro_batch.loss_mask > 0].abs().max().item()
        )
        return loss_of(STAGE, samples)(logprobs, micro_batch)

    stats = policy.train_step(samples, watch)
    assert max(ratios) == 0.0
    metrics = {name: metric.value for name, metric in stats.metrics.items()}
    norms = [metrics.pop(name) for name in list(metrics) if name.startswith("grad_norm/")]
    assert sum(norm**2 for norm in norms) ** 0.5 == pytest.approx(stats.grad_norm)
    assert metrics == {"kl/reference": 0.0, "ratio/clipped_fraction": 0.0, "ratio/max": 1.0}
    # At ratio one the loss is minus the mean advantage.
    assert stats.loss == pytest.approx(-sum(s.advantage for s in samples) / len(samples), abs=1e-6)
    stats = policy.train_step(samples, loss_of(STAGE, samples))
    assert stats.metrics["kl/reference"].value > 0


def moments_of(policy) -> list[torch.Tensor]:
    from megatron_r1.mcore.adam_state import distributed_optimizers, state_tensors

    return [tensor.clone() for part in distributed_optimizers(policy.optimizer) for tensor in state_tensors(part)]


@pytest.mark.parametrize("cap", [0.0, 1.5])
def test_an_update_that_finds_its_old_logprobs_itself_is_the_same(session, cap: float) -> None:
    from megatron_r1.mcore.policy import ReferencePolicy

    stage, bounds = (
        GrpoConfig(kl_coef=0.04, importance_cap=cap),
        RolloutConfig(max_logprob_diff_mean=9.0, max_logprob_diff_max=90.0),
    )
    samples = [replace(s, rollout_logprobs=s.rollout_logprobs - 6.0 - i) for i, s in enumerate(make_samples())]
    results = []
    for alone in (False, True):
        policy = make_policy(session, 64)
        reference = ReferencePolicy(policy)
        reference.state[0].mul_(1.01)
        gate = ParityGate(bounds, sampled_by=0, trainer=0)
        if alone:
            minibatch = [replace(sample) for sample in samples]
            fill_logprobs(minibatch, "ref_logprobs", reference.logprobs(minibatch))
        else:
            minibatch = with_logprobs(samples, policy, reference)
            gate.check(minibatch, True)
        stats = update_policy(stage, policy, minibatch, gate)
        results.append((stats, gate.found.metrics(bounds), [s.old_logprobs.tolist() for s in minibatch], policy))
    (stats, parity, logprobs, policy), (other_stats, other_parity, other_logprobs, other) = results
    assert stats == other_stats and stats.metrics["kl/reference"].value > 0 and stats.metrics["ratio/max"].value == 1.0
    assert ("importance/mean" in stats.metrics) == (cap > 0)
    assert parity == other_parity and logprobs == other_logprobs
    assert all(torch.equal(a, b) for a, b in zip(policy.local_state(), other.local_state(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(moments_of(policy), moments_of(other), strict=True))


def test_a_gate_that_fails_leaves_everything_as_it_was(session) -> None:
    policy, samples = make_policy(session), make_samples()
    policy.train_step(samples, loss_of(STAGE, samples))
    state = [tensor.clone() for tensor in (*policy.local_state(), *moments_of(policy))]
    counted = (policy.updates, policy.left_out.total)
    with pytest.raises(WeightSyncError, match="update 1 sampled, the trainer is at 1"):
        update_policy(STAGE, policy, samples, ParityGate(RolloutConfig(), sampled_by=1, trainer=1))
    assert (policy.updates, policy.left_out.total) == counted
    assert all(torch.equal(a, b) for a, b in zip(state, (*policy.local_state(), *moments_of(policy)), strict=True))
    gate = ParityGate(RolloutConfig(max_logprob_diff_mean=9.0, max_logprob_diff_max=90.0), sampled_by=1, trainer=1)
    samples = [replace(sample, old_logprobs=None) for sample in samples]
    broken = [replace(sample, advantage=math.nan if i == 1 else 1.0, name=f"sample {i}") for i, sample in enumerate(samples)]
    with pytest.raises(NonFiniteUpdate, match="the advantage of sample 1 is nan"):
        update_policy(STAGE, policy, broken, gate)
    assert gate.found.count == sum(sample.num_trained for sample in samples), "engine and trainer are compared all the same"


@pytest.mark.parametrize("normalization", ["sequence", "token"])
def test_micro_batch_split_does_not_matter(session, normalization: str) -> None:
    stage = GrpoConfig(kl_coef=0.04, normalization=normalization)
    results = []
    for micro_batch_tokens in (4096, 64, 32):
        policy = make_policy(session, micro_batch_tokens)
        samples = [
            replace(s, old_logprobs=lp + 0.1, ref_logprobs=lp - 0.1)
            for s in make_samples()
            for lp in [torch.full((s.num_targets,), -6.0)]
        ]
        results.append([policy.train_step(samples, loss_of(stage, samples)) for _ in range(2)])
    for other in results[1:]:
        for got, expected in zip(other, results[0], strict=True):
            assert got.loss == pytest.approx(expected.loss, rel=1e-5, abs=1e-6)
            assert got.grad_norm == pytest.approx(expected.grad_norm, rel=1e-4)


@pytest.mark.parametrize("mtp", [0, 1])
def test_logits_of_positions_without_loss_may_be_left_out(session, mtp: int) -> None:
    """Of prompts, of padding, and of a micro-batch without any loss."""
    samples = [*make_samples(5), TrainingSample(list(range(3, 33)), slice(29, 29), rollout_logprobs=torch.zeros(29))]
    config = Config(model=ModelConfig(overrides={"num_nextn_predict_layers": mtp}))
    results, shapes = [], []
    for least_saved in (2**40, 1):
        policy = make_policy(session, 30, config=config, mtp=0.3 * mtp)
        (module,) = policy.modules
        module.least_saved = least_saved
        module.output_layer.register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape[0]))
        found = policy.logprobs(samples)
        stats = [policy.train_step(samples, loss_of(STAGE, samples)) for _ in range(2)]
        results.append((found, stats, list(shapes)))
        shapes.clear()
    (every, stats, rows), (some, other_stats, fewer_rows) = results
    passes = 3 + 2 * mtp  # the trunk's of three walks, and the block's of two updates
    trained = sum(sample.num_trained for sample in samples)
    assert min(rows) == 30 and sum(fewer_rows[: len(rows) // passes]) == trained and 0 in fewer_rows
    for sample, a, b in zip(samples, every, some, strict=True):
        assert torch.allclose(a[sample.trained], b[sample.trained], atol=1e-6) and b.count_nonzero() == sample.num_trained
    for a, b in zip(stats, other_stats, strict=True):
        assert b.loss == pytest.approx(a.loss, rel=1e-5, abs=1e-6) and b.grad_norm == pytest.approx(a.grad_norm, rel=1e-5)
        assert ("mtp/loss" in a.metrics) == bool(mtp)
        assert all(b.metrics[name].value == pytest.approx(m.value, rel=1e-5, abs=1e-6) for name, m in a.metrics.items())


def test_a_number_of_threads_changes_digits_and_repeats_its_own(session) -> None:
    samples, results = make_samples(40), []
    try:
        for threads in (1, 4, 4):
            torch.set_num_threads(threads)
            policy = make_policy(session)
            found = policy.logprobs(samples)
            results.append((found, [policy.train_step(samples, loss_of(STAGE, samples)) for _ in range(2)], policy.local_state()))
    finally:
        torch.set_num_threads(1)
    (one, stats, _), (four, of_four, weights), (again, of_again, weights_again) = results
    assert of_four == of_again and all(torch.equal(a, b) for a, b in zip(four, again, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(weights, weights_again, strict=True))
    for a, b in zip(one, four, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-5)
    for a, b in zip(stats, of_four, strict=True):
        assert b.loss == pytest.approx(a.loss, abs=1e-5) and b.grad_norm == pytest.approx(a.grad_norm, rel=1e-5)
        assert all(b.metrics[name].value == pytest.approx(m.value, abs=1e-5) for name, m in a.metrics.items())


def test_logprobs_do_not_depend_on_their_neighbours(session) -> None:
    policy = make_policy(session)
    samples = make_samples()
    together = policy.logprobs(samples)
    alone = [policy.logprobs([s])[0] for s in samples]
    assert [len(lp) for lp in together] == [s.num_targets for s in samples]
    for a, b in zip(together, alone, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_temperature_divides_the_logits(session) -> None:
    samples = make_samples(2)
    at_one, at_half = make_policy(session).logprobs(samples), make_policy(session, temperature=0.5).logprobs(samples)
    assert not torch.allclose(at_one[0], at_half[0], atol=1e-3)
    # With two temperatures, log p_T(a) - log p_T(b) = (log p_1(a) - log p_1(b)) / T for two targets of one context.
    first = [TrainingSample([*samples[0].token_ids[:5], token], [0, 0, 0, 0, 1]) for token in (7, 9)]
    one = [lp[-1].item() for lp in make_policy(session).logprobs(first)]
    half = [lp[-1].item() for lp in make_policy(session, temperature=0.5).logprobs(first)]
    assert half[0] - half[1] == pytest.approx((one[0] - one[1]) / 0.5, abs=1e-5)


def test_reference_stays_while_the_policy_moves(session) -> None:
    from megatron_r1.mcore.policy import ReferencePolicy

    policy = make_policy(session)
    reference = ReferencePolicy(policy)
    samples = with_logprobs(make_samples(), policy, reference)
    before = policy.logprobs(samples)
    policy.train_step(samples, loss_of(STAGE, samples))
    after = policy.logprobs(samples)
    assert all(torch.equal(a, b) for a, b in zip(reference.logprobs(samples), before, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(policy.logprobs(samples), after, strict=True))
    assert not torch.allclose(before[0], after[0], atol=1e-4)
    own, kept = [t.clone() for t in policy.local_state()], [t.clone() for t in reference.state]

    def swap() -> None:
        with policy.holding(reference.state):
            assert all(torch.equal(a, b) for a, b in zip(policy.local_state(), kept, strict=True))

    peak, _ = peak_bytes(swap)
    assert peak <= 2 * max(t.nbytes for t in own) < sum(t.nbytes for t in own) / 4, "one tensor more, and one to compare it"
    assert all(torch.equal(a, b) for a, b in zip(policy.local_state(), own, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(reference.state, kept, strict=True))
    reference.refresh()
    assert all(torch.equal(a, b) for a, b in zip(reference.logprobs(samples), after, strict=True))


def test_a_swap_that_fails_half_way_is_taken_back(session, monkeypatch) -> None:
    from megatron_r1.mcore import policy as module

    policy, calls = make_policy(session), []
    own, other = [t.clone() for t in policy.local_state()], [t + 1 for t in policy.local_state()]
    exchange = module.exchange

    def exchange_or_fail(held: torch.Tensor, live: torch.Tensor) -> None:
        calls.append(held)
        if len(calls) == 4:
            raise MemoryError
        exchange(held, live)

    monkeypatch.setattr(module, "exchange", exchange_or_fail)
    with pytest.raises(MemoryError), policy.holding(other):
        raise AssertionError("the block must not run")
    assert all(torch.equal(a, b) for a, b in zip(policy.local_state(), own, strict=True))
    assert all(torch.equal(a, b + 1) for a, b in zip(other, own, strict=True))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_policy_off_the_device_goes_on_bit_by_bit(session, tmp_path: Path, dtype: str) -> None:
    """Moved between updates, saved while it is away, and loaded into one that is away."""
    from megatron_r1.mcore.checkpoint import load_policy, save_policy
    from megatron_r1.mcore.policy import ReferencePolicy

    names = ["optimizer", "gradients", "reference"]
    config = Config(runtime=RuntimeConfig(dtype=dtype, offload=names))
    policies = [
        make_policy(session, config=config),
        make_policy(session, config=Config(runtime=RuntimeConfig(dtype=dtype, offload=[]))),
    ]
    (moved, stays), references = policies, [ReferencePolicy(policy) for policy in policies]
    samples = [with_logprobs(make_samples(), *pair) for pair in zip(policies, references, strict=True)]
    assert all(a.ref_logprobs.tolist() == b.ref_logprobs.tolist() for a, b in zip(*samples, strict=True))

    def update(policy: MegatronPolicy, times: int = 1) -> list[StepStats]:
        found = []
        for _ in range(times):
            policy.offload()
            found.append(policy.train_step(samples[0], loss_of(STAGE, samples[0])))
        return found

    assert update(moved, 2) == update(stays, 2)
    buffers = [buffer for chunk in moved.chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    gradients = sum(buffer.grad_data.nbytes for buffer in buffers)
    parameters = [p for module in moved.modules for p in module.parameters()]
    experts = sum(p.numel() for p in parameters if not getattr(p, "allreduce", True))
    dense = sum(p.numel() for p in parameters) - experts
    planned = StateBytes.of(dense, experts, bf16=dtype == "bf16", has_reference=True)
    padding = 4 * 64 * (len(parameters) + 2 * len(buffers))
    assert planned.gradients <= gradients <= planned.gradients + padding
    assert moved._state.num_bytes == planned.optimizer + gradients
    biases = sum(t.nbytes for t in references[0].state) - planned.reference
    assert (
        0 <= biases < planned.reference / 1000 and planned.moved(names) == planned.optimizer + planned.gradients + planned.reference
    )

    moved.offload()
    assert [buffer.grad_data.untyped_storage().nbytes() for buffer in buffers] == [0] * len(buffers)
    assert stays._state.num_bytes == 0
    for name, policy, reference in zip(("moved", "stays"), policies, references, strict=True):
        (tmp_path / name).mkdir()
        save_policy(policy, tmp_path / name, reference)
    resumed = make_policy(session, config=config)
    resumed.offload()
    load_policy(resumed, tmp_path / "stays", ReferencePolicy(resumed))
    again = make_policy(session, config=Config(runtime=RuntimeConfig(dtype=dtype)))
    load_policy(again, tmp_path / "moved", ReferencePolicy(again))
    expected = update(stays, 2)
    assert update(moved, 2) == update(resumed, 2) == update(again, 2) == expected
    for policy in (moved, resumed, again):
        assert all(torch.equal(a, b) for a, b in zip(policy.local_state(), stays.local_state(), strict=True))


def test_checkpoint_goes_on_bit_by_bit(session, tmp_path: Path) -> None:
    from megatron_r1.mcore.checkpoint import load_policy, save_policy
    from megatron_r1.mcore.policy import ReferencePolicy

    policy = make_policy(session)
    reference = ReferencePolicy(policy)
    samples = with_logprobs(make_samples(), policy, reference)
    for _ in range(4):
        policy.train_step(samples, loss_of(STAGE, samples))
    save_policy(policy, tmp_path, reference)
    expected = [policy.train_step(samples, loss_of(STAGE, samples)) for _ in range(3)]
    weights = [t.clone() for t in policy.local_state()]
    old_reference = [t.clone() for t in reference.state]

    resumed = make_policy(session)
    resumed_reference = ReferencePolicy(resumed)
    resumed_reference.state = [t + 1 for t in resumed_reference.state]
    load_policy(resumed, tmp_path, resumed_reference)
    assert resumed.updates == 4
    assert [resumed.train_step(samples, loss_of(STAGE, samples)) for _ in range(3)] == expected
    assert all(torch.equal(a, b) for a, b in zip(resumed.local_state(), weights, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(resumed_reference.state, old_reference, strict=True))


def test_weights_alone_are_taken_from_a_checkpoint_of_another_dtype(session, tmp_path: Path) -> None:
    from megatron_r1.mcore.checkpoint import load_policy_weights, save_policy

    saved = make_policy(session, config=Config(seed=1, runtime=RuntimeConfig(dtype="bf16")))
    save_policy(saved, tmp_path)
    policy = make_policy(session)
    load_policy_weights(policy, tmp_path)
    want = [t.float() for t in saved.local_state()]
    assert all(torch.equal(a, b) for a, b in zip(policy.local_state(), want, strict=True))
    samples = with_logprobs(make_samples(), policy, None)
    policy.train_step(samples, loss_of(GrpoConfig(kl_coef=0.0), samples))
    moved = max((a - b).abs().max().item() for a, b in zip(policy.local_state(), want, strict=True))
    assert 0 < moved < 2e-3, "one update of lr 1e-3 / 3, from these weights"


def test_a_checkpoint_of_another_model_is_refused_on_one_line(session, tmp_path: Path) -> None:
    from megatron_r1.mcore.checkpoint import load_policy_weights, save_policy

    save_policy(make_policy(session, config=Config(model=ModelConfig(overrides={"vocab_size": 512}))), tmp_path)
    with pytest.raises(CheckpointError, match="policy cannot be loaded into this model: .*512.*448.* for key embedding") as caught:
        load_policy_weights(make_policy(session), tmp_path)
    assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match="policy is missing"):
        load_policy_weights(make_policy(session), tmp_path / "nothing")


def test_zero_advantages_leave_the_policy_alone(session) -> None:
    policy = make_policy(session)
    samples = with_logprobs([replace(s, advantage=0.0) for s in make_samples()], policy, None)
    stats = policy.train_step(samples, loss_of(GrpoConfig(kl_coef=0.0), samples))
    assert stats.grad_norm == 0.0
