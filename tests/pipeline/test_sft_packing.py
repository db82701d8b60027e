"""Nothing leaks between samples that share a packed micro-batch: neither attention nor positions, forward or backward.

Packed samples are compared with rows of a plain [B, T] batch, which hold one sample each and go through attention without any
sequence boundaries.
"""

from __future__ import annotations

import random

import pytest
import torch

from megatron_r1.config.optimizer import MoeTrainingConfig, OptimizerConfig
from megatron_r1.config.schema import Config
from megatron_r1.data.chat.load import load_chat_template
from megatron_r1.data.chat.messages import Message
from megatron_r1.data.chat.template import encode_conversation
from megatron_r1.data.packing import pack_samples
from megatron_r1.data.tally.tokenizer import train_tally_tokenizer
from megatron_r1.model.architecture import Architecture
from megatron_r1.model.families.qwen2 import Qwen2
from megatron_r1.model.presets import resolve_architecture
from megatron_r1.pipeline.builders.models import build_policy
from megatron_r1.pipeline.session import open_session
from megatron_r1.training.pretrain import loss_over
from megatron_r1.types import MicroBatch, TrainingSample

CONFIG = Config()
ARCHITECTURES = {
    "moe": resolve_architecture("tiny"),
    "dense": Qwen2(
        vocab_size=448, hidden_size=64, num_hidden_layers=2, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=256,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def session():
    with open_session(CONFIG.runtime) as opened:
        yield opened


def make_policy(session, arch: Architecture):
    return build_policy(
        CONFIG,
        session,
        arch,
        optimizer=OptimizerConfig(lr=1e-2, weight_decay=0.0),
        moe=MoeTrainingConfig(),
        total_updates=10,
        micro_batch_tokens=160,
        packed=True,
    )


def make_samples() -> list[TrainingSample]:
    """Conversations of one to three turns."""
    template, rng = load_chat_template("r1_chat", train_tally_tokenizer(template="r1_chat")), random.Random(0)
    samples = []
    for _ in range(8):
        messages = []
        for _ in range(rng.randint(1, 3)):
            messages += [
                Message("user", f"first {rng.randint(0, 99)}"),
                Message("assistant", f"{rng.randint(0, 99)} " * rng.randint(1, 9)),
            ]
        samples += encode_conversation(messages, template)
    return samples


def as_rows(samples: list[TrainingSample]) -> MicroBatch:
    """One sample a row; what is behind its end can reach nothing before it, attention being causal."""
    width = max(sample.num_targets for sample in samples)
    shape = (len(samples), width)
    tokens, labels, mask = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64), torch.zeros(shape)
    for row, sample in enumerate(samples):
        ids, length = torch.tensor(sample.token_ids), sample.num_targets
        tokens[row, :length], labels[row, :length] = ids[:-1], ids[1:]
        mask[row, :length] = torch.tensor(sample.loss_mask, dtype=torch.float32)
    return MicroBatch(tokens, labels, mask, torch.arange(width).repeat(len(samples), 1))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packed_is_unpacked(session, name: str) -> None:
    samples = make_samples()
    packed, plain = (make_policy(session, ARCHITECTURES[name]) for _ in range(2))
    assert len({len(sample.token_ids) for sample in samples}) > 4
    micro_batches = pack_samples(samples, max_tokens=packed.micro_batch_tokens, dp_size=1, pad_multiple=2)[0]
    assert len(micro_batches) < len(samples) / 2, "samples do share micro-batches"
    expected = packed.logprobs(samples)
    rows, captured = as_rows(samples), []
    loss_fn = loss_over(sum(sample.num_trained for sample in samples))

    def capture(logprobs, micro_batch):
        captured.append(logprobs.detach().clone())
        return loss_fn(logprobs, micro_batch)

    unpacked = plain.train_on_micro_batches([rows], capture)
    for row, (sample, logprobs) in enumerate(zip(samples, expected, strict=True)):
        assert torch.allclose(captured[0][row, : sample.num_targets], logprobs, atol=2e-5)
    stats = packed.train_step(samples, loss_fn)
    assert stats.loss == pytest.approx(unpacked.loss, rel=1e-5)
    assert stats.grad_norm == pytest.approx(unpacked.grad_norm, rel=1e-4)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_neighbour_changes_nothing(session, name: str) -> None:
    """The others of the micro-batch get other tokens, of the same lengths."""
    policy, samples = make_policy(session, ARCHITECTURES[name]), make_samples()
    rng = random.Random(1)
    others = [TrainingSample([rng.randint(3, 447) for _ in s.token_ids], s.loss_mask) for s in samples]
    before = policy.logprobs(samples)
    for kept in range(0, len(samples), 3):
        mixed = [sample if index == kept else other for index, (sample, other) in enumerate(zip(samples, others, strict=True))]
        after = policy.logprobs(mixed)
        assert torch.allclose(after[kept], before[kept], atol=2e-6)
        assert not torch.allclose(after[kept - 1], before[kept - 1], atol=1e-2)


def test_the_comparison_would_notice_a_leak(session) -> None:
    """Without the boundary between them, two samples are one: log-probs of the second are far off."""
    policy, samples = make_policy(session, ARCHITECTURES["moe"]), make_samples()[:2]
    first, second = samples
    leaking = TrainingSample([*first.token_ids[:-1], *second.token_ids], [0] * first.num_targets + second.loss_mask.tolist())
    (together,) = policy.logprobs([leaking])
    assert not torch.allclose(together[first.num_targets :], policy.logprobs([second])[0], atol=1e-3)
