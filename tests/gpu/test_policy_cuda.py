"""The policy on one GPU: it learns a batch, and its log-probs are those of transformers on the exported folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def session():
    from megatron_r1.config.runtime import RuntimeConfig
    from megatron_r1.pipeline.session import open_session

    with open_session(RuntimeConfig(device="cuda")) as opened:
        yield opened


def test_policy_learns_a_batch_and_agrees_with_transformers(session, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from megatron_r1.config.optimizer import MoeTrainingConfig, OptimizerConfig
    from megatron_r1.config.schema import Config
    from megatron_r1.data.tally.tokenizer import train_tally_tokenizer
    from megatron_r1.pipeline.builders.export import export_policy
    from megatron_r1.pipeline.builders.models import build_architecture, build_policy
    from megatron_r1.training.pretrain import loss_over
    from megatron_r1.types import TrainingSample

    config = Config()
    policy = build_policy(
        config,
        session,
        build_architecture(config.model),
        optimizer=OptimizerConfig(lr=1e-3),
        moe=MoeTrainingConfig(),
        total_updates=20,
        micro_batch_tokens=1024,
        packed=True,
    )
    generator = torch.Generator().manual_seed(0)
    samples = [TrainingSample(torch.randint(3, 448, (24,), generator=generator).tolist(), [1] * 23) for _ in range(8)]
    losses = [policy.train_step(samples, loss_over(8 * 23)).loss for _ in range(20)]
    assert losses[-1] < 0.8 * losses[0]
    export_policy(policy, train_tally_tokenizer(), tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    ids = torch.tensor([s.token_ids for s in samples])
    with torch.no_grad():
        expected = model(ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    assert (torch.stack(policy.logprobs(samples)) - expected).abs().max() < 1e-3
