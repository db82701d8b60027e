"""One token that breaks an update, in every stage and both dtypes on one rank; two ranks: tests/distributed/reward_ranks.py."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from megatron_r1.algorithms.losses.contract import PolicyBatch, PolicySettings
from megatron_r1.config.model import ParallelConfig
from megatron_r1.config.runtime import RuntimeConfig
from megatron_r1.errors import CheckpointError, ConversionError, NonFiniteUpdate
from megatron_r1.pipeline.session import open_session
from megatron_r1.training.pretrain import loss_over
from megatron_r1.types import TrainingSample
from megatron_r1.weights.hf_export import export_hf
from tests.nonfinite_cases import (
    ARCHITECTURE,
    ENGINE,
    HOT,
    MOE,
    ONE_RANK,
    OPTIMIZER,
    Case,
    check_infinite_weight,
    check_stage,
    heat,
    run_case,
)

SAMPLES = [TrainingSample([2, 3, 4, 5, 6], [1] * 4, name=f"sample {n}") for n in range(3)]


@pytest.fixture(scope="module")
def session():
    with open_session(RuntimeConfig(device="cpu")) as opened:
        yield opened


def make_policy(skip: int = 0, clip_grad: float = 1.0, dtype: str = "fp32", longest: float | None = None):
    from megatron_r1.mcore import parallel
    from megatron_r1.mcore.policy import MegatronPolicy

    layout = parallel.resolve_layout(ParallelConfig(), ARCHITECTURE, 1, mtp=False)
    parallel.build_process_groups(layout, seed=1)
    return MegatronPolicy(
        ARCHITECTURE, layout, RuntimeConfig(device="cpu", dtype=dtype, skip_nonfinite_updates=skip), MOE,
        optimizer=OPTIMIZER.model_copy(update={"clip_grad": clip_grad, "skip_grad_norm": longest}), total_updates=4, seed=7,
        device=torch.device("cpu"), micro_batch_tokens=4,
    )  # fmt: skip


def copy_of(policy) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in policy.local_state()]


@pytest.mark.parametrize("case", [*ONE_RANK, ENGINE], ids=lambda case: f"{case.stage}-{case.dtype}-{case.engine_lies_at}")
def test_a_run_stops_or_leaves_the_update_out(session, tmp_path: Path, case: Case) -> None:
    check_stage(case, tmp_path, thorough=case.dtype == "fp32")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_weight_that_an_update_breaks_is_neither_synced_nor_saved(session, tmp_path: Path, dtype: str) -> None:
    check_infinite_weight(dtype, {}, tmp_path)


def test_what_the_look_before_a_sync_costs(session, monkeypatch) -> None:
    from megatron_r1.mcore import nonfinite

    policy, read = make_policy(dtype="bf16"), []
    monkeypatch.setattr(nonfinite, "doubt_of", lambda tensors, like: (read.extend(t.nbytes for t in tensors), torch.zeros(()))[1])
    policy.check_weights()
    per_parameter = sum(read) / sum(tensor.numel() for tensor in policy.local_state())
    assert per_parameter == pytest.approx(2, rel=0.01)
    fullest = 1_585e6  # parameters of one of 512 ranks of 671B: tp 8, pp 16, ep 32
    assert per_parameter * fullest / 3.35e12 < 2e-3, "seconds a round on an H800, against 16 such passes in its 16 updates"


def test_a_gradient_that_megatron_keeps_beside_the_parameter_is_clipped(session) -> None:
    """As its precision-aware optimizer keeps it, which needs Transformer Engine."""
    from megatron_r1.mcore import nonfinite

    policy = make_policy()
    policy.train_step(SAMPLES, loss_over(12))
    parts = policy.optimizer.chained_optimizers
    norm = nonfinite.gradient_norm(policy.optimizer, torch.zeros(()))
    for part in parts:
        part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8 = True
        part.config.clip_grad = norm / 4
        for parameter in part.get_parameters():
            parameter.grad = None
        part.step_with_ready_grads = lambda: True
    assert nonfinite.gradient_norm(policy.optimizer, torch.zeros(())) == norm
    nonfinite.apply_gradients(policy.optimizer, norm)
    clipped = torch.stack([p.decoupled_grad.norm() for part in parts for p in part.get_parameters()]).norm()
    assert clipped.item() == pytest.approx(norm / 4, rel=1e-4)
    parts[0].get_parameters()[0].decoupled_grad[0] = math.nan
    assert math.isnan(nonfinite.gradient_norm(policy.optimizer, torch.zeros(())))


def first_is(value: float):
    """A loss that is `value` at the sample of the first micro-batch alone, with an ordinary gradient."""
    calls = []

    def compute(logprobs, micro_batch):
        calls.append(None)
        loss = -(logprobs * micro_batch.loss_mask).sum() / 12
        return (loss + value if len(calls) == 1 else loss), {}

    return compute


def with_broken_gradient(logprobs, micro_batch):
    """A finite loss whose derivative by the first token is 0 x inf."""
    safe = torch.where(torch.arange(logprobs.shape[1]) == 0, logprobs, 0.0)
    return -(logprobs * micro_batch.loss_mask).sum() + torch.where(safe != 0, 0.0, safe.sqrt()).sum(), {}


@pytest.mark.parametrize(
    ("make_loss", "says"),
    [
        (lambda: first_is(math.inf), r"the loss is NaN or infinite in the micro-batch of sample \d;"),
        (lambda: first_is(math.nan), r"the loss is NaN or infinite in the micro-batch of sample \d;"),
        (lambda: with_broken_gradient, "its gradient by the log-probability of a token is NaN or infinite in sample"),
        (lambda: lambda logprobs, _: ((logprobs * 1e25).sum(), {}), "the norm of the gradient is beyond float32"),
    ],
)
@pytest.mark.parametrize("clip_grad", [1.0, 0.0])
def test_whatever_is_not_finite_is_said_before_a_weight_is_touched(session, make_loss, says: str, clip_grad: float) -> None:
    policy = make_policy(clip_grad=clip_grad)
    before = copy_of(policy)
    with pytest.raises(NonFiniteUpdate, match=says) as caught:
        policy.train_step(SAMPLES, make_loss())
    assert caught.value.exit_code == 1 and "\n" not in str(caught.value)
    assert all(torch.equal(a, b) for a, b in zip(policy.local_state(), before, strict=True)), "router biases included"


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("place", ["an unused token's embedding", "an expert", "router bias"])
def test_a_weight_that_is_not_finite_ends_the_run_even_where_nothing_reads_it(session, value: float, place: str) -> None:
    policy = make_policy(skip=5)
    word = {"an expert": "linear_fc2.weight", "router bias": "expert_bias"}.get(place, "word_embeddings.weight")
    from megatron_r1.mcore.nonfinite import named_state

    name, tensor = [entry for entry in named_state(policy.modules) if entry[0].endswith(word)][-1]
    tensor.view(-1)[-1] = value
    with pytest.raises(NonFiniteUpdate, match=f"update 1 is not finite: weight {name} holds NaN or infinite values"):
        policy.train_step(SAMPLES, loss_over(12))


def test_an_ordinary_update_is_megatrons_own_to_the_bit_with_its_collectives_alone(session, monkeypatch) -> None:
    collectives = []
    for name in ("all_reduce", "broadcast", "all_gather_object", "broadcast_object_list", "all_gather_into_tensor"):
        own = getattr(torch.distributed, name)
        monkeypatch.setattr(
            torch.distributed, name, lambda *a, _own=own, _name=name, **k: (collectives.append(_name), _own(*a, **k))[1]
        )
    from megatron_r1.mcore.counts import count_minibatch
    from megatron_r1.mcore.reduce_metrics import reduce_metrics

    ours, plain = make_policy(), make_policy()
    for _ in range(3):
        collectives.clear()
        stats = ours.train_step(SAMPLES, loss_over(12))
        made = list(collectives)
        collectives.clear()
        for chunk in plain.chunks:
            chunk.zero_grad_buffer()
        plain.optimizer.zero_grad()
        micro_batches = list(plain._pack(SAMPLES))
        sequences = count_minibatch(micro_batches, plain.device, plain.groups.dp).sequences
        plain._balance.begin(tokens=1, sequences=1)
        results = plain._run(
            micro_batches, loss_over(12), sum(m.num_tokens for m in micro_batches), forward_only=False, beside=None
        )
        plain._take_rates()
        plain.updates += 1
        plain._kinds.measure({})  # a sum that is ours
        _, norm, _ = plain.optimizer.step()
        reduce_metrics(results, plain.groups)
        plain._balance.report(sequences, plain.groups.pp)
        plain._balance.move_biases()
        assert norm == stats.grad_norm and stats.applied and stats.skipped is None
        assert made == collectives and "all_reduce" in made
    assert all(torch.equal(a, b) for a, b in zip(ours.local_state(), plain.local_state(), strict=True))


def test_the_watch_holds_two_numbers_a_token(session, monkeypatch) -> None:
    from megatron_r1.mcore import nonfinite

    held = []
    doubt = nonfinite.UpdateWatch.doubt

    def measure(watch, weights):
        held.append(sum(seen.outputs.nbytes + seen.gradient.nbytes for seen in watch._seen))
        return doubt(watch, weights)

    monkeypatch.setattr(nonfinite.UpdateWatch, "doubt", measure)
    stats = make_policy().train_step(SAMPLES, loss_over(12))
    bytes_per_token = held[0] / stats.tokens
    assert bytes_per_token == 8
    minibatch, data_parallel = 512 * 32_768, 512 // 16  # R1's minibatch, on 512 ranks of which 16 share a pipeline
    assert minibatch / data_parallel * bytes_per_token < 5e6, "bytes on the device"


def test_a_loaded_checkpoint_is_looked_at_and_one_with_a_nan_is_never_sealed(session, tmp_path: Path) -> None:
    from megatron_r1.mcore.checkpoint import load_policy, load_policy_weights, save_policy
    from megatron_r1.runtime.saving import PendingCheckpoint

    policy = make_policy(dtype="bf16")
    for folder in ("good", "bad"):
        (tmp_path / folder).mkdir()
    save_policy(policy, tmp_path / "good")
    policy.train_step(SAMPLES, loss_over(12))
    moments = next(part.optimizer.state for part in policy.optimizer.chained_optimizers)
    own = next(iter(moments.values()))["exp_avg_sq"]
    for tensor, name in ((own, "exp_avg_sq"), (policy.modules[0].decoder.final_layernorm.weight.data, "final_layernorm.weight")):
        kept = tensor.clone()
        tensor.view(-1)[3] = math.inf
        for asynchronous in (False, True):
            from megatron_r1.mcore.checkpoint import plan_policy

            with pytest.raises(CheckpointError, match=f"step_000002 cannot be written: tensor .*{name}.* holds NaN or infinite"):
                PendingCheckpoint(tmp_path, 2, lambda to: plan_policy(policy, to), {}, asynchronous=asynchronous).seal()
            assert not list(tmp_path.glob("*step_000002*")), "nothing is left of it"
        tensor.copy_(kept)
    policy.modules[0].embedding.word_embeddings.weight.data[HOT, 0] = math.nan
    with pytest.raises(
        ConversionError, match=r"tensor model.embed_tokens.weight for .* holds NaN or infinite values, as torch.bfloat16"
    ):
        export_hf(policy.weights(), policy.arch, tmp_path / "hf", bos_token_id=0, eos_token_id=1)
    assert not (tmp_path / "hf").exists()

    from megatron_r1.mcore import checkpoint_files

    with pytest.MonkeyPatch.context() as patch:  # as an earlier version wrote it
        patch.setattr(checkpoint_files, "first_nonfinite", lambda _: None)
        save_policy(policy, tmp_path / "bad")
    for load in (load_policy, load_policy_weights):
        load(policy, tmp_path / "good")
        with pytest.raises(CheckpointError, match="bad: weight embedding.word_embeddings.weight holds NaN or infinite"):
            load(policy, tmp_path / "bad")


def test_what_the_look_at_a_checkpoint_costs(session, tmp_path: Path) -> None:
    from megatron_r1.mcore import checkpoint_files
    from megatron_r1.mcore.checkpoint import save_policy

    policy, read = make_policy(dtype="bf16"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint_files, "first_nonfinite", lambda tensors: read.extend(t.nbytes for _, t in tensors))
        save_policy(policy, tmp_path)
    per_parameter = sum(read) / sum(tensor.numel() for tensor in policy.local_state())
    assert per_parameter == pytest.approx(2 + 3 * 4, rel=0.01), "bf16 weights; fp32 master weights and both moments"
    seconds = 671e9 * per_parameter / 512 / 5e9  # over 512 ranks, at 5 GB/s of one core: `is_finite` reads each byte once
    assert seconds < 5, "of the process that writes, while training goes on"


def test_the_updates_left_out_are_counted_apart_from_adams(session, tmp_path: Path) -> None:
    from megatron_r1.mcore.checkpoint import load_policy, save_policy

    policy = make_policy(skip=3)
    heat(policy)
    hot = [*SAMPLES[:2], TrainingSample([2, 3, HOT, 5, 6], [1] * 4, name="hot")]
    stats = [policy.train_step(samples, loss_over(12)) for samples in (SAMPLES, hot, SAMPLES)]
    stats.append(policy.skip_update("the advantage of x is nan"))
    assert [(s.applied, s.skipped) for s in stats] == [(True, 0), (False, 1), (True, 1), (False, 2)]
    assert policy.updates == 4 and math.isnan(stats[1].loss) and stats[1].metrics == {}
    save_policy(policy, tmp_path)
    again = make_policy(skip=3)
    load_policy(again, tmp_path)
    assert (again.updates, again.left_out.total) == (4, 2)
    counts = {int(s["step"]) for part in again.optimizer.chained_optimizers for s in part.optimizer.state.values()}
    assert counts == {2}
    assert again.train_step(SAMPLES, loss_over(12)) == policy.train_step(SAMPLES, loss_over(12))
    assert all(torch.equal(a, b) for a, b in zip(again.local_state(), policy.local_state(), strict=True))


def test_a_spike_is_left_out_with_its_samples_told_and_counted_apart(session, tmp_path: Path, capfd) -> None:
    from megatron_r1.mcore.checkpoint import load_policy, save_policy

    def spiked(logprobs, micro_batch):
        loss, metrics = loss_over(12)(logprobs, micro_batch)
        return loss * (1000 if 1 in micro_batch.sample_ids else 1), metrics

    plain = make_policy()
    norm = plain.train_step(SAMPLES, loss_over(12)).grad_norm
    policy = make_policy(skip=1, longest=2 * norm)
    before = copy_of(policy)
    stats = policy.train_step(SAMPLES, spiked)
    assert not stats.applied and stats.skipped == 1 and stats.grad_norm > 2 * norm and math.isfinite(stats.loss)
    assert all(torch.equal(a, b) for a, b in zip(policy.local_state(), before, strict=True)), "router biases included"
    told = capfd.readouterr().err
    assert f"update 1 is left out (spike 1): the norm of its gradient, {stats.grad_norm:.4g}, is above" in told
    assert told.strip().endswith("; the largest part of its loss is of sample 1") and told.count("\n") == 1
    save_policy(policy, tmp_path)
    again = make_policy(skip=1, longest=2 * norm)
    load_policy(again, tmp_path)
    assert (again.updates, again.left_out.total, again.left_out.spikes) == (1, 1, 1)
    for model in (policy, again):
        stats = model.train_step(SAMPLES, loss_over(12))
        assert stats.applied and stats.skipped == 1 and stats.grad_norm == norm
        assert all(torch.equal(a, b) for a, b in zip(model.local_state(), plain.local_state(), strict=True)), "Adam's first update"
        assert model.skip_update("a first one").skipped == 2, "a spike is none of those that may be left out as not finite"
        with pytest.raises(NonFiniteUpdate, match="skip_nonfinite_updates=1 allows no more"):
            model.skip_update("a second one")


def test_a_ratio_beyond_float32_breaks_an_update_only_if_its_gradient_does(session) -> None:
    from dataclasses import replace

    from megatron_r1.config.grpo import GrpoConfig
    from megatron_r1.training.grpo import loss_of

    stage = GrpoConfig(kl_coef=0.0)
    far = torch.tensor([-4.0, -4.0, -300.0, -4.0])
    for advantage, broken in ((1.0, False), (0.0, False), (-1.0, True)):
        policy = make_policy(skip=1)
        samples = [
            replace(s, advantage=advantage, old_logprobs=far if s.name == "sample 1" else far.clamp(min=-5), rollout_logprobs=far)
            for s in SAMPLES
        ]
        stats = policy.train_step(samples, loss_of(stage, samples))
        assert stats.applied != broken and all(weight.isfinite().all() for weight in policy.local_state())


def test_a_users_loss_that_is_infinite_names_the_sample(session) -> None:
    def own_loss(batch: PolicyBatch, settings: PolicySettings):
        return (1.0 / batch.advantages.sum() * batch.logprobs).sum(), {}

    from megatron_r1.algorithms.losses import registry
    from megatron_r1.config.grpo import GrpoConfig
    from megatron_r1.training.grpo import loss_of
    from megatron_r1.training.samples import with_logprobs

    policy = make_policy()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry.POLICY_LOSSES, "own", own_loss)
        samples = with_logprobs(
            [TrainingSample(s.token_ids, s.loss_mask, rollout_logprobs=torch.zeros(4), name=s.name) for s in SAMPLES], policy, None
        )
        with pytest.raises(NonFiniteUpdate, match="the loss is NaN or infinite in the micro-batch of sample"):
            policy.train_step(samples, loss_of(GrpoConfig(loss="own", kl_coef=0.0), samples))


def test_several_inner_epochs_with_kl_measured_and_not_penalised(session, tmp_path: Path) -> None:
    def run(name: str, **settings):
        return run_case(Case("grpo", hot_steps=(), settings=settings), tmp_path / name, skip=0)

    plain, measured = run("plain"), run("measured", measure_kl=True, reference_update_interval=0)
    assert all(torch.equal(a, b) for a, b in zip(plain.weights, measured.weights, strict=True)), "nothing is penalised"
    assert [line["kl/reference"] for line in plain.lines] == [0.0] * 4
    assert measured.lines[0]["kl/reference"] == 0.0 and all(line["kl/reference"] > 0 for line in measured.lines[1:])
    twice = run("twice", measure_kl=True, inner_epochs=2, reference_update_interval=0)
    assert [line["updates"] for line in twice.lines] == [2, 4, 6, 8] and twice.updates == 8
    assert twice.lines[0]["kl/reference"] > 0, "the second epoch is off the policy that sampled"
    assert twice.lines[0]["ratio/max"] > 1.0 == plain.lines[0]["ratio/max"]
