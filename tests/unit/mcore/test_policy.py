"""Policy and reference in one walk over the packed micro-batches: every number is that of two walks, to the bit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_r1.config.grpo import GrpoConfig
from megatron_r1.config.optimizer import MoeTrainingConfig, OptimizerConfig
from megatron_r1.config.rollout import RolloutConfig
from megatron_r1.config.runtime import RuntimeConfig
from megatron_r1.config.schema import Config
from megatron_r1.mcore import host
from megatron_r1.model.presets import PRESETS
from megatron_r1.pipeline.builders.models import build_policy
from megatron_r1.pipeline.session import open_session
from megatron_r1.training.grpo import update_policy
from megatron_r1.training.parity import ParityGate
from megatron_r1.training.samples import fill_logprobs, with_logprobs
from megatron_r1.types import TrainingSample
from tests.random_weights import llama_architecture

host.activate("cpu")

from megatron_r1.mcore.left_out import LeftOut
from megatron_r1.mcore.policy import MegatronPolicy, ReferencePolicy

STAGE = GrpoConfig(kl_coef=0.04)
BOUNDS = RolloutConfig(max_logprob_diff_mean=9.0, max_logprob_diff_max=90.0)
RESPONSES = ([9, 1, 30], [[5, 1, 12], [4, 4, 9], [2, 30, 30, 2]])  #: tokens of prompts, and of the responses to each


@pytest.fixture(scope="module")
def session():
    with open_session(RuntimeConfig()) as opened:
        yield opened


def make_samples() -> list[TrainingSample]:
    """Samples in groups, whose lengths tie, in the order of a minibatch, which is not that of the round."""
    rng = np.random.default_rng(0)
    samples = []
    for group, (before, lengths) in enumerate(zip(*RESPONSES, strict=True)):
        prompt = rng.integers(3, 130, before)
        for length in lengths:
            ids, targets = np.concatenate([prompt, rng.integers(3, 130, length)]), before + length - 1
            logprobs = np.where(np.arange(targets) < before - 1, 0, -6).astype(np.float32)
            samples.append(
                TrainingSample(
                    ids, slice(before - 1, targets), advantage=rng.normal(), rollout_logprobs=logprobs, group=group,
                    name=f"response {len(samples)}",
                )
            )  # fmt: skip
    return [samples[i] for i in rng.permutation(len(samples))]


def open_pair(session, preset: str, share: str, resident: str, recompute: str = "none") -> tuple[MegatronPolicy, ReferencePolicy]:
    arch = llama_architecture() if preset == "llama" else PRESETS[preset]
    config = Config(seed=3, runtime=RuntimeConfig(recompute=recompute))
    balance = MoeTrainingConfig(bias_update_rate=0.01, aux_loss_coeff=0.1) if share == "never" else MoeTrainingConfig()
    policy = build_policy(
        config, session, arch, optimizer=OptimizerConfig(lr=1e-3), moe=balance, total_updates=4,
        micro_batch_tokens=90, packed=True, temperature=0.7, share_prompts=share,
    )  # fmt: skip
    reference = ReferencePolicy(policy, resident)
    for number, tensor in enumerate(reference.state):
        tensor.mul_(1.01 + number / 1000)
    return policy, reference


@pytest.mark.parametrize(
    ("preset", "share", "recompute"),
    [("tiny", "never", "none"), ("tiny", "always", "none"), ("llama", "never", "none"), ("llama", "always", "full")],
)
def test_one_walk_gives_the_bits_of_two(session, preset: str, share: str, recompute: str) -> None:
    results = []
    for resident in ("never", "always"):
        policy, reference = open_pair(session, preset, share, resident, recompute)
        before = [tensor.clone() for tensor in reference.state]
        walks: list[int] = []
        policy._forward_backward = counting(policy._forward_backward, walks)
        both = with_logprobs(make_samples(), policy, reference)
        samples = [replace(sample) for sample in make_samples()]
        rider = reference if reference.fits_beside() else None
        if rider is None:
            fill_logprobs(samples, "ref_logprobs", reference.logprobs(samples))
        gate = ParityGate(BOUNDS, sampled_by=0, trainer=0)
        stats = [update_policy(STAGE, policy, samples, gate, rider), update_policy(STAGE, policy, both, gate)]
        assert [len(walks), rider is None] == ([3, False] if resident == "always" else [5, True])
        assert all(torch.equal(a, b) for a, b in zip(before, reference.state, strict=True)), "lent, and given back"
        fields = [[(s.old_logprobs.tolist(), s.ref_logprobs.tolist()) for s in found] for found in (both, samples)]
        results.append((stats, fields, gate.found.metrics(BOUNDS), [tensor.clone() for tensor in policy.local_state()]))
    *two, weights = results[0]
    *one, weights_of_one = results[1]
    assert one == two and one[0][0].metrics["kl/reference"].value > 0
    assert one[1][0] == one[1][1], "riding in an update, and in a pass of its own"
    assert all(torch.equal(a, b) for a, b in zip(weights, weights_of_one, strict=True))


def counting(run, walks: list[int]):
    """The schedule, which notes how many micro-batches it runs."""

    def noted(**inputs):
        walks.append(inputs["num_microbatches"])
        return run(**inputs)

    return noted


def test_a_reference_that_is_not_finite_leaves_out_the_update_that_it_rides_in(session) -> None:
    messages = []
    for resident in ("never", "always"):
        policy, reference = open_pair(session, "llama", "never", resident)
        policy.left_out = LeftOut(1, None)
        reference.state[-1].fill_(torch.nan)
        rider = reference if reference.fits_beside() else None
        samples = make_samples()
        if rider is None:
            fill_logprobs(samples, "ref_logprobs", reference.logprobs(samples))
        own = [tensor.clone() for tensor in policy.local_state()]
        skipped: list[str] = []
        policy.skip_update = lambda problem, skip=policy.skip_update, seen=skipped: (seen.append(problem), skip(problem))[1]
        stats = update_policy(STAGE, policy, samples, ParityGate(BOUNDS, sampled_by=0, trainer=0), rider)
        assert (stats.applied, policy.updates, policy.left_out.total) == (False, 1, 1)
        assert all(torch.equal(a, b) for a, b in zip(own, policy.local_state(), strict=True))
        assert all(sample.old_logprobs is not None and sample.ref_logprobs is not None for sample in samples)
        messages.append(skipped)
    assert messages[0] == messages[1] and "the reference policy's log-probability of a token of response" in messages[0][0]


def test_weights_are_given_back_when_a_forward_pass_fails(session, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, reference = open_pair(session, "llama", "never", "auto")
    own, addresses = ([f(tensor) for tensor in policy.local_state()] for f in (torch.clone, torch.Tensor.data_ptr))

    def fail(*_: object) -> None:
        assert policy.local_state()[0].data_ptr() == reference.state[0].data_ptr(), "nothing is copied"
        raise MemoryError

    monkeypatch.setattr(policy, "_per_token", fail)
    with pytest.raises(MemoryError):
        reference.logprobs_of_both(make_samples())
    assert [tensor.data_ptr() for tensor in policy.local_state()] == addresses
    assert all(torch.equal(a, b) for a, b in zip(policy.local_state(), own, strict=True))
