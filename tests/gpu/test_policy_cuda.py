"""The policy on one GPU: it learns a batch, and its log-probs are those of transformers on the exported folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.gpu.hour.training import FAMILIES, learn_and_compare

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def session():
    from megatron_r1.config.runtime import RuntimeConfig
    from megatron_r1.pipeline.session import open_session

    with open_session(RuntimeConfig(device="cuda")) as opened:
        yield opened


@pytest.mark.parametrize("family", FAMILIES)
def test_policy_learns_a_batch_and_agrees_with_transformers(session, tmp_path: Path, family: str) -> None:
    first, last, off = learn_and_compare(session, family, tmp_path / "hf", updates=20)
    assert last < 0.8 * first
    assert off < 1e-3


def test_an_update_that_is_not_finite_touches_no_weight(session) -> None:
    from megatron_r1.config.optimizer import MoeTrainingConfig, OptimizerConfig
    from megatron_r1.config.schema import Config
    from megatron_r1.errors import NonFiniteUpdate
    from megatron_r1.pipeline.builders.models import build_architecture, build_policy
    from megatron_r1.training.pretrain import loss_over
    from megatron_r1.types import TrainingSample
    from tests.nonfinite_cases import HOT, heat

    config = Config()
    policy = build_policy(
        config,
        session,
        build_architecture(config.model),
        optimizer=OptimizerConfig(lr=1e-3),
        moe=MoeTrainingConfig(bias_update_rate=0.01),
        total_updates=20,
        micro_batch_tokens=1024,
        packed=True,
    )
    heat(policy)
    before = [tensor.clone() for tensor in policy.local_state()]
    samples = [TrainingSample([3, 4, HOT, 5], [1] * 3, name="hot"), TrainingSample([3, 4, 6, 5], [1] * 3, name="cold")]
    with pytest.raises(NonFiniteUpdate, match="update 1 is not finite: .* from hot;"):
        policy.train_step(samples, loss_over(6))
    assert all(torch.equal(a, b) for a, b in zip(policy.local_state(), before, strict=True))
    assert policy.train_step(samples[1:], loss_over(3)).applied


def test_a_checkpoint_has_the_names_that_the_converter_knows(session, tmp_path: Path) -> None:
    """With Transformer Engine's layers, too; what they keep beside their weights is not saved, of policy or reference."""
    from megatron_r1.config.optimizer import MoeTrainingConfig, OptimizerConfig
    from megatron_r1.config.schema import Config
    from megatron_r1.mcore.ask_ranks import shards_of_layout
    from megatron_r1.mcore.checkpoint import load_policy, save_policy
    from megatron_r1.mcore.layout import Layout
    from megatron_r1.mcore.policy import ReferencePolicy
    from megatron_r1.pipeline.builders.models import build_architecture, build_policy
    from megatron_r1.runtime.checkpoint_index import read_index

    config = Config()
    arch = build_architecture(config.model)
    policy = build_policy(
        config, session, arch, optimizer=OptimizerConfig(lr=1e-3), moe=MoeTrainingConfig(), total_updates=1,
        micro_batch_tokens=1024, packed=True,
    )  # fmt: skip
    reference = ReferencePolicy(policy)
    save_policy(policy, tmp_path, reference)
    load_policy(policy, tmp_path, reference)
    for folder in ("policy", "reference"):
        names = {name for name in read_index(tmp_path / folder / ".metadata").state_dict_metadata if not name.startswith("rng")}
        stored = {name for name in names if not name.startswith("optimizer.")}
        assert stored == {piece.key for piece in shards_of_layout(arch, Layout()).pieces}


def test_the_cross_entropy_is_torchs_at_any_temperature_and_keeps_the_logits_alone(session) -> None:
    from megatron_r1.mcore import parallel
    from megatron_r1.mcore.activation_bytes import WIDE_LOGITS
    from megatron_r1.mcore.cross_entropy import vocab_parallel_cross_entropy
    from tests.cross_entropy_cases import check_temperatures

    group = parallel.groups().tp
    check_temperatures(group, "cuda")
    tokens, vocabulary, width = 16_384, 151_936, 64
    hidden = torch.randn(tokens, 1, width, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    weight = torch.randn(vocabulary, width, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    labels = torch.randint(vocabulary, (tokens, 1), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    vocab_parallel_cross_entropy(hidden @ weight.t(), labels, temperature=0.7, group=group).sum().backward()
    own = 2 * tokens * vocabulary + 4 * weight.numel()
    assert torch.cuda.max_memory_allocated() - before < own + 3 * 4 * WIDE_LOGITS, "the logits once, and some rows of float32"


def test_tiles_are_torchs_and_take_no_logits(session) -> None:
    import torch.distributed as dist

    from megatron_r1.mcore.fused_head import Head, token_losses
    from megatron_r1.mcore.head_bytes import TILE_ON_CUDA
    from tests.head_cases import check_head

    check_head(dist.group.WORLD, device="cuda", dtypes=(torch.bfloat16,))
    torch.backends.cuda.matmul.allow_tf32 = False
    check_head(dist.group.WORLD, device="cuda", dtypes=(torch.float32,))
    tokens, vocabulary, width = 16_384, 151_936, 64
    hidden = torch.randn(tokens, width, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    weight = torch.randn(vocabulary, width, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    labels = torch.randint(vocabulary, (tokens,), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    token_losses(hidden, weight, labels, Head(0.7, dist.group.WORLD, vocabulary))[0].sum().backward()
    beside = 3 * 2 * TILE_ON_CUDA + 12 * weight.numel() + 16 * hidden.numel()
    assert torch.cuda.max_memory_allocated() - before < beside < 2 * tokens * vocabulary / 2
