"""A prompt that is computed once for its responses: log-probs, loss and gradients are those of separate sequences."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_r1.config.grpo import GrpoConfig
from megatron_r1.config.model import ModelConfig
from megatron_r1.config.optimizer import MoeTrainingConfig, OptimizerConfig
from megatron_r1.config.runtime import RuntimeConfig
from megatron_r1.config.schema import Config
from megatron_r1.data.packing import pack_samples
from megatron_r1.data.shared_prompts import shared_tokens
from megatron_r1.errors import ConfigError
from megatron_r1.mcore.layout import Layout
from megatron_r1.mcore.packing import RowGroup, cut_rows, local_token_indices, packed_positions, share_rows
from megatron_r1.mcore.shared_prompts import shares_prompts
from megatron_r1.model.presets import PRESETS
from megatron_r1.pipeline.builders.models import build_architecture, build_policy
from megatron_r1.pipeline.session import open_session
from megatron_r1.training.grpo import loss_of
from megatron_r1.training.samples import with_logprobs
from megatron_r1.types import PROMPT, TrainingSample


@pytest.fixture(scope="module")
def session():
    with open_session(RuntimeConfig()) as opened:
        yield opened


def make_groups(prompts: list[int], responses: list[list[int]], vocabulary: int = 400) -> list[TrainingSample]:
    """Groups with prompts and responses of these lengths, one sample after the other as a rollout gives them."""
    rng = np.random.default_rng(0)
    samples = []
    for group, (before, lengths) in enumerate(zip(prompts, responses, strict=True)):
        prompt = rng.integers(3, vocabulary, before)
        for length in lengths:
            ids, targets = np.concatenate([prompt, rng.integers(3, vocabulary, length)]), before + length - 1
            logprobs = np.zeros(targets, np.float32)
            logprobs[before - 1 :] = -6
            samples.append(
                TrainingSample(
                    ids,
                    slice(before - 1, targets),
                    advantage=rng.normal(),
                    rollout_logprobs=logprobs,
                    group=group,
                    name=f"response {len(samples)}",
                )
            )
    return samples


#: groups of one, prompts of one token, responses of one token, several widths, a prompt longer than all responses
GROUPS = ([9, 1, 40, 6, 2], [[5, 1, 12, 70], [4, 4, 9], [3, 3, 3, 3, 3, 3], [8], [2, 30, 31]])


@pytest.mark.parametrize(("preset", "recompute"), [("tiny_qwen2", "none"), ("tiny_qwen2", "full"), ("tiny", "selective")])
@pytest.mark.parametrize("micro_batch_tokens", [4096, 130])
def test_separate_sequences_and_shared_prompts_agree(session, preset: str, recompute: str, micro_batch_tokens: int) -> None:
    samples = make_groups(*GROUPS)
    config = Config(seed=3, model=ModelConfig(preset=preset), runtime=RuntimeConfig(recompute=recompute))
    stage = GrpoConfig(kl_coef=0.0, clip_eps=0.5)
    results = []
    for choice in ("never", "always"):
        policy = build_policy(
            config, session, build_architecture(config.model), optimizer=OptimizerConfig(lr=1e-4), moe=MoeTrainingConfig(),
            total_updates=4, micro_batch_tokens=micro_batch_tokens, packed=True, temperature=0.7, share_prompts=choice,
        )  # fmt: skip
        full = with_logprobs(samples, policy, None)
        stats = [policy.train_step(full, loss_of(stage, full)) for _ in range(2)]
        gradients = [p.main_grad.clone() for m in policy.modules for p in m.parameters() if p.requires_grad]
        results.append((full, stats, gradients))
    (plain, want, want_gradients), (shared, got, got_gradients) = results
    for one, other in zip(plain, shared, strict=True):
        np.testing.assert_allclose(other.old_logprobs, one.old_logprobs, atol=2e-5, err_msg=one.name)
    for one, other in zip(want, got, strict=True):
        assert other.loss == pytest.approx(one.loss, abs=1e-5)
        assert other.grad_norm == pytest.approx(one.grad_norm, rel=1e-4)
        assert other.metrics["ratio/max"].value == pytest.approx(one.metrics["ratio/max"].value, rel=1e-4)
        assert other.tokens < 0.85 * one.tokens, "prompts are computed once"
    largest = max(g.abs().max() for g in want_gradients)
    for one, other in zip(want_gradients, got_gradients, strict=True):
        torch.testing.assert_close(other / largest, one / largest, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dp_size", [1, 3])
@pytest.mark.parametrize(("max_tokens", "multiple"), [(1000, 1), (115, 1), (1000, 6), (109, 6)])
def test_a_row_holds_prompts_once_and_every_response_after_its_own(dp_size: int, max_tokens: int, multiple: int) -> None:
    """With room for a multiple of each sequence, a response may lack room beside its prompt; then it shares nothing."""
    samples = make_groups(*GROUPS)
    pad_multiple = 2 * multiple
    ranks = pack_samples(
        samples, max_tokens=max_tokens, dp_size=dp_size, pad_multiple=pad_multiple, sequence_multiple=multiple, share_prompts=True
    )
    found = []
    for batch in (batch for batches in ranks for batch in batches):
        assert batch.num_tokens == ranks[0][0].num_tokens < max_tokens + pad_multiple
        assert not (batch.cu_seqlens % multiple).any()
        starts, before = batch.cu_seqlens.tolist(), batch.prompt_tokens().tolist()
        bounds = [*zip(starts[:-1], batch.sequence_tokens().tolist(), strict=True)]
        both = torch.stack([batch.cu_seqlens.long(), torch.tensor([*before, 0])])
        places = batch.of_samples()
        assert packed_positions(both, batch.num_tokens)[places[0]].tolist() == batch.position_ids[places].tolist()
        assert batch.loss_mask.sum() == sum(samples[n].num_trained for n in batch.sample_ids if n >= 0)
        for place, number in enumerate(batch.sample_ids):
            ids, labels = (x[0, bounds[place][0] : sum(bounds[place])].tolist() for x in (batch.token_ids, batch.labels))
            if number >= 0:
                found.append(number)
                assert ids == samples[number].token_ids[before[place] : -1].tolist()
                assert labels == samples[number].token_ids[before[place] + 1 :].tolist()
            if number == PROMPT:
                sharers = [s for s, p in zip(batch.sample_ids, batch.prompts, strict=True) if p == place and s != PROMPT]
                assert len(sharers) > 1, "a prompt that nobody shares stays with its response"
                assert all(samples[s].token_ids[: len(ids)].tolist() == ids for s in sharers)
                assert batch.sample_at(starts[place]) == sharers[0], "for messages"
    assert sorted(found) == list(range(len(samples)))


def test_samples_without_a_group_or_with_another_mask_share_nothing() -> None:
    samples = make_groups([9], [[5, 5]])
    assert shared_tokens(samples[0]) == 8
    for change in ({"group": None}, {"loss_mask": [0] * 8 + [1] * 5}):
        changed = [TrainingSample(**{**vars(sample), **change}) for sample in samples]
        (batches,) = pack_samples(changed, max_tokens=99, dp_size=1, pad_multiple=1, share_prompts=True)
        assert batches[0].prompts == [] and batches[0].num_tokens == sum(s.num_targets for s in samples)
    long = TrainingSample(np.zeros(20_000, np.int32), slice(100, 19_999), group=0)
    assert shared_tokens(long) == 0, "its mask would take gigabytes"


def test_masks_of_many_responses_are_bounded() -> None:
    lengths, prompts = [50, *[1200] * 100], [0] * 101
    groups = share_rows(torch.tensor([0, *lengths]).cumsum(0).int(), prompts)
    masks = [group.mask for group in groups if not isinstance(group, RowGroup)]
    assert sum(len(mask) for mask in masks) == 100 and max(mask.numel() for mask in masks) <= 1 << 24


def test_context_parallel_ranks_see_what_one_rank_sees() -> None:
    """A prompt of 5 tokens in room for 8, whose 3 places of padding its responses do not see."""
    lengths, real, prompts = [8, 12, 4, 8, 4], torch.tensor([5, 10, 2, 7, 4]), [0, 0, 0, 3, 3]
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    starts = bounds[:-1].tolist()
    groups = share_rows(bounds, prompts, real)
    for rank in range(2):
        held, seen = local_token_indices(bounds, 2, rank), {}
        for group in cut_rows(groups, bounds, 2, rank):
            keys = torch.arange(36) if group.keys.tokens is None else group.keys.tokens
            row_of_key, place_of_key = group.keys.cells // group.keys.width, group.keys.cells % group.keys.width
            for query, cell in zip(group.queries.tokens.tolist(), group.queries.cells.tolist(), strict=True):
                mask = group.mask[cell // group.queries.width, 0, cell % group.queries.width]
                of_row = row_of_key == cell // group.queries.width
                seen[held[query].item()] = sorted(keys[of_row & mask[place_of_key]].tolist())
        assert sorted(seen) == sorted(held.tolist())
        for token, keys in seen.items():
            number = int(torch.searchsorted(bounds, token, right=True)) - 1
            prompt = prompts[number]
            before = range(starts[prompt], starts[prompt] + int(real[prompt])) if prompt != number else ()
            assert keys == [*before, *range(starts[number], token + 1)], token


@pytest.mark.parametrize(
    ("preset", "layout", "moe", "device", "auto", "reason"),
    [
        ("tiny_qwen2", {}, {}, "cpu", True, None),
        ("tiny_qwen2", {"tp": 2, "pp": 2, "dp": 2}, {}, "cpu", True, None),
        ("tiny_qwen2", {}, {}, "cuda", False, "on CUDA"),
        ("tiny_qwen2", {"cp": 2}, {}, "cpu", True, None),
        ("tiny", {}, {}, "cpu", False, None),
        ("tiny", {}, {"aux_loss_coeff": 1e-4}, "cpu", False, "aux_loss_coeff and bias_update_rate"),
        ("tiny", {}, {"bias_update_rate": 1e-3}, "cpu", False, "aux_loss_coeff and bias_update_rate"),
        ("671b", {}, {"mtp_loss_scale": 0.1}, "cpu", False, "mtp_loss_scale"),
    ],
)
def test_where_prompts_are_shared(preset, layout, moe, device, auto, reason) -> None:
    where = (PRESETS[preset], Layout(**layout), MoeTrainingConfig(**moe), device)
    assert shares_prompts("auto", *where) is auto
    assert shares_prompts("never", *where) is False
    if reason is None:
        assert shares_prompts("always", *where)
    else:
        with pytest.raises(ConfigError, match=reason):
            shares_prompts("always", *where)
