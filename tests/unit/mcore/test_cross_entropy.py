"""The policy's log-probs: temperature in float32, Megatron-Core's bits at temperature 1, and what they cost in memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from megatron_r1.mcore import host
from tests.cross_entropy_cases import check_temperatures, draw, run
from tests.one_rank import one_rank_world
from tests.random_weights import full_architecture, qwen2_architecture

host.activate("cpu")

from megatron.core.tensor_parallel import vocab_parallel_cross_entropy as megatrons_own

from megatron_r1.config.model import ParallelConfig
from megatron_r1.config.optimizer import MoeTrainingConfig
from megatron_r1.config.runtime import RuntimeConfig
from megatron_r1.mcore import cross_entropy, parallel, provider


@pytest.fixture(scope="module")
def group() -> dist.ProcessGroup:
    one_rank_world()
    layout = parallel.resolve_layout(ParallelConfig(), full_architecture(), 1, mtp=False)
    parallel.build_process_groups(layout, seed=1)
    return parallel.groups().tp


@pytest.mark.parametrize("tied", [False, True], ids=["head", "tied"])
@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_the_model_divides_logits_in_float32(group: dist.ProcessGroup, tied: bool, temperature: float) -> None:
    arch = qwen2_architecture(tied=True) if tied else full_architecture()
    layout = parallel.resolve_layout(ParallelConfig(), arch, 1, mtp=False)
    model = provider.build_model(arch, layout, RuntimeConfig(dtype="bf16"), MoeTrainingConfig(), seed=1)[0].bfloat16()
    model.logit_temperature = temperature
    for parameter in model.parameters():
        parameter.data.mul_(3.0)  # logits of a trained model
    ids, labels = torch.randint(arch.vocab_size, (2, 2, 24)).unbind()
    positions = torch.arange(24).expand(2, 24).contiguous()
    with torch.no_grad():
        logits = model(ids, positions, None)
        loss = model(ids, positions, None, labels=labels)
    assert logits.dtype == torch.bfloat16 and logits.abs().max() > 4
    want = -(logits.float() / temperature).log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    assert (loss - want).abs().max() < 1e-5, "what bfloat16 loses is a thousand times that"


def test_loss_and_gradient_are_torchs_at_any_temperature(group: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    check_temperatures(group)
    monkeypatch.setattr(cross_entropy, "WIDE_LOGITS", 7 * 96 + 1)
    check_temperatures(group)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("at_a_time", [2**26, 10 * 96, 1])
def test_at_temperature_1_they_are_megatrons_to_the_bit(
    group: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, at_a_time: int
) -> None:
    monkeypatch.setattr(cross_entropy, "WIDE_LOGITS", at_a_time)
    logits, labels, upstream = draw(dtype)
    logits[..., -5:] = -torch.inf  # rows that make the vocabulary divide
    labels.clamp_(max=90)
    ours = run(cross_entropy.vocab_parallel_cross_entropy, logits, labels, upstream, temperature=1.0, group=group)
    theirs = run(megatrons_own, logits, labels, upstream)
    assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])


def test_logits_are_written_over_once(group: dist.ProcessGroup) -> None:
    logits, labels, _ = draw(torch.float32)
    loss = cross_entropy.vocab_parallel_cross_entropy(logits.requires_grad_(), labels, temperature=1.0, group=group).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def most_bytes(work: Callable[[], object]) -> int:
    """By torch's own account of allocations: the most that is held at a time, beyond what was there."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        work()
    held = most = 0
    for event in watched.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def test_nothing_as_large_as_the_logits_is_held_beside_them(group: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, vocabulary, at_a_time = 512, 4096, 2**16
    monkeypatch.setattr(cross_entropy, "WIDE_LOGITS", at_a_time)
    logits = torch.randn(tokens, 1, vocabulary, dtype=torch.bfloat16)
    labels = torch.randint(vocabulary, (tokens, 1))

    def work(compute: Callable[..., torch.Tensor], **more: object) -> int:
        leaf = logits.clone().requires_grad_()
        return most_bytes(lambda: compute(leaf * 1, labels, **more).sum().backward())

    own = logits.nbytes
    for temperature in (1.0, 0.7):
        ours = work(cross_entropy.vocab_parallel_cross_entropy, temperature=temperature, group=group)
        wide, numbers = 4 * at_a_time, 64 * tokens  # some rows of float32 at a time, a few numbers a token
        assert own < ours < own + own + wide + numbers, "the logits, and the gradient of the leaf that they are made of here"
    assert work(megatrons_own) > 3 * own
