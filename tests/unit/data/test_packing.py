import random
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_r1.data.packing import assign_bins, distribute, pack_samples, unpack_token_values
from megatron_r1.errors import DataError
from megatron_r1.types import PADDING, MicroBatch, TrainingSample, hollow


def make_samples(lengths: list[int], logprobs: bool = True, seed: int = 0) -> list[TrainingSample]:
    rng = random.Random(seed)
    samples = []
    for length in lengths:
        prompt = rng.randint(1, max(1, length - 1))
        mask = [0] * (prompt - 1) + [1] * (length - prompt)
        fields = (
            {name: torch.rand(length - 1) - 1.0 for name in ("rollout_logprobs", "old_logprobs", "ref_logprobs")}
            if logprobs
            else {}
        )
        samples.append(TrainingSample([rng.randint(1, 99) for _ in range(length)], mask, rng.uniform(-1, 1), **fields))
    return samples


def check(
    samples: list[TrainingSample], ranks: list[list[MicroBatch]], max_tokens: int, dp_size: int, pad_multiple: int,
    multiple: int = 1,
) -> None:  # fmt: skip
    assert len(ranks) == dp_size
    assert len({len(batches) for batches in ranks}) == 1
    batches = [batch for rank in ranks for batch in rank]
    sizes = {batch.token_ids.shape for batch in batches}
    assert len(sizes) == 1
    rows, size = sizes.pop()
    assert rows == 1 and size % pad_multiple == 0 and size < max_tokens + pad_multiple
    assert sorted(i for b in batches for i in b.sample_ids if i != PADDING) == list(range(len(samples)))
    longest = -(-max(s.num_targets for s in samples) // multiple) * multiple
    for batch in batches:
        bounds = batch.cu_seqlens.tolist()
        assert batch.cu_seqlens.dtype == torch.int32 and bounds[0] == 0 and bounds[-1] == size
        assert len(batch.sample_ids) == len(bounds) - 1
        assert sum(samples[i].num_targets for i in batch.sample_ids if i != PADDING) <= -(-max_tokens // multiple) * multiple
        assert batch.sequence_tokens().tolist() == batch.lengths
        of_samples = torch.zeros(1, size, dtype=torch.bool)
        for sample_id, start, end, length in zip(batch.sample_ids, bounds[:-1], bounds[1:], batch.lengths, strict=True):
            assert 0 < end - start <= longest and start % multiple == 0 and length <= end - start < length + multiple
            for tensor in (batch.token_ids, batch.labels, batch.loss_mask, batch.token_fields["advantages"]):
                assert not tensor[0, start + length : end].any(), "padding"
            of_samples[0, start : start + length] = sample_id != PADDING
            end = start + length
            assert batch.position_ids[0, start:end].tolist() == list(range(end - start))
            if sample_id == PADDING:
                assert not batch.loss_mask[0, start:end].any() and not batch.token_ids[0, start:end].any()
                continue
            sample = samples[sample_id]
            assert batch.token_ids[0, start:end].tolist() == sample.token_ids[:-1].tolist()
            assert batch.labels[0, start:end].tolist() == sample.token_ids[1:].tolist()
            assert batch.loss_mask[0, start:end].tolist() == sample.loss_mask.tolist()
            assert torch.allclose(
                batch.token_fields["advantages"][0, start:end], torch.tensor(sample.advantage, dtype=torch.float32)
            )
            assert batch.token_fields["sequence_lengths"][0, start:end].eq(max(sample.num_trained, 1)).all()
            for name in ("rollout_logprobs", "old_logprobs", "ref_logprobs"):
                if getattr(sample, name) is not None:
                    assert batch.token_fields[name][0, start:end].tolist() == getattr(sample, name).tolist()
        assert torch.equal(batch.of_samples(), of_samples)


@pytest.mark.parametrize("dp_size", [1, 2, 3])
@pytest.mark.parametrize(("pad_multiple", "multiple"), [(1, 1), (8, 1), (8, 4), (24, 6)])
def test_every_sample_is_packed_once_whatever_the_lengths(dp_size, pad_multiple, multiple):
    rng = random.Random(4)
    for trial in range(15):
        samples = make_samples([rng.randint(2, 50) for _ in range(rng.randint(1, 60))], logprobs=bool(trial % 2), seed=trial)
        max_tokens = rng.randint(50, 300)
        ranks = pack_samples(samples, max_tokens=max_tokens, dp_size=dp_size, pad_multiple=pad_multiple, sequence_multiple=multiple)
        check(samples, ranks, max_tokens, dp_size, pad_multiple, multiple)
        for batch in ranks[0]:
            for number, values in unpack_token_values(batch, batch.labels).items():
                assert values.tolist() == samples[number].token_ids[1:].tolist()


def test_ranks_without_samples_get_padding_that_trains_nothing():
    samples = make_samples([9])
    ranks = pack_samples(samples, max_tokens=64, dp_size=3, pad_multiple=4)
    check(samples, ranks, 64, 3, 4)
    dummies = [batches[0] for batches in ranks if batches[0].sample_ids[0] == PADDING]
    assert len(dummies) == 2
    for batch in dummies:
        assert not batch.loss_mask.any() and batch.cu_seqlens.tolist() == [0, 8]
        assert batch.token_fields["sequence_lengths"].eq(1).all(), "a division by it stays finite"
        assert unpack_token_values(batch, torch.zeros(1, 8)) == {}


def test_padding_is_made_of_sequences_no_longer_than_a_sample():
    samples = make_samples([41, 31, 31, 31])  # bins of 40 + 30 and 30 + 30, or on two ranks 70 and 60
    ranks = pack_samples(samples, max_tokens=70, dp_size=2, pad_multiple=100)
    assert [b.token_ids.shape for batches in ranks for b in batches] == [(1, 100), (1, 100)]
    assert ranks[0][0].cu_seqlens.tolist() == [0, 40, 70, 100]
    assert ranks[1][0].cu_seqlens.tolist() == [0, 30, 60, 100]
    assert ranks[1][0].sample_ids[2:] == [PADDING]


def test_best_fit_fills_bins_that_first_fit_would_waste():
    samples = make_samples([n + 1 for n in (7, 6, 3, 2, 2)])  # 7+3 and 6+2+2
    ranks = pack_samples(samples, max_tokens=10, dp_size=1, pad_multiple=1)
    assert [sorted(b.sample_ids) for b in ranks[0]] == [[0, 2], [1, 3, 4]]
    assert all(b.loss_mask.shape == (1, 10) for b in ranks[0])


def test_ranks_carry_about_the_same_number_of_tokens():
    rng = random.Random(1)
    samples = make_samples([rng.randint(5, 200) for _ in range(256)])
    ranks = pack_samples(samples, max_tokens=512, dp_size=4, pad_multiple=1)
    loads = [sum(samples[i].num_targets for b in batches for i in b.sample_ids if i != PADDING) for batches in ranks]
    assert max(loads) - min(loads) <= 200
    total = sum(b.num_tokens for batches in ranks for b in batches)
    assert sum(loads) / total > 0.9, "under a tenth is padding"


def test_values_come_back_to_their_samples():
    samples = make_samples([5, 17, 2, 30, 9, 9])
    for batch in pack_samples(samples, max_tokens=40, dp_size=1, pad_multiple=8)[0]:
        values = unpack_token_values(batch, batch.token_fields["old_logprobs"])
        assert set(values) == {i for i in batch.sample_ids if i != PADDING}
        for sample_id, value in values.items():
            assert value.tolist() == samples[sample_id].old_logprobs.tolist()


def test_a_sample_that_does_not_fit_is_named():
    with pytest.raises(DataError, match="training sample 1 has 20 tokens, more than micro_batch_tokens=19"):
        pack_samples(make_samples([5, 21]), max_tokens=19, dp_size=1, pad_multiple=64)
    assert pack_samples(make_samples([5, 21]), max_tokens=20, dp_size=1, pad_multiple=64)


def test_absent_fields_stay_absent_and_mixed_ones_are_refused():
    samples = make_samples([5, 6], logprobs=False)
    fields = pack_samples(samples, max_tokens=20, dp_size=1, pad_multiple=1)[0][0].token_fields
    assert set(fields) == {"advantages", "sequence_lengths"}
    with pytest.raises(ValueError, match="some samples have old_logprobs"):
        pack_samples([samples[0], replace(samples[1], old_logprobs=torch.zeros(5))], max_tokens=20, dp_size=1, pad_multiple=1)


def test_packing_does_not_depend_on_chance():
    samples = make_samples([random.Random(2).randint(2, 40) for _ in range(30)])
    first, second = (pack_samples(samples, max_tokens=64, dp_size=2, pad_multiple=8) for _ in range(2))
    assert [b.sample_ids for r in first for b in r] == [b.sample_ids for r in second for b in r]


def test_number_of_micro_batches_is_rounded_up_with_padding():
    samples = [TrainingSample(list(range(10)), [1] * 9) for _ in range(3)]
    packed = pack_samples(samples, max_tokens=9, dp_size=1, pad_multiple=1, count_multiple=2)
    assert [len(rank) for rank in packed] == [4]
    assert packed[0][3].loss_mask.sum() == 0 and sorted(i for m in packed[0] for i in m.sample_ids if i >= 0) == [0, 1, 2]


def plain_distribute(lengths: list[int], dp_size: int) -> list[list[int]]:
    """The rule, written down without thought for time."""
    ranks: list[list[int]] = [[] for _ in range(dp_size)]
    loads = [0] * dp_size
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        rank = min(range(dp_size), key=lambda r: (loads[r], len(ranks[r])))
        ranks[rank].append(index)
        loads[rank] += lengths[index]
    return ranks


def plain_best_fit(lengths: list[int], order: list[int], capacity: int) -> list[list[int]]:
    """The rule, written down without thought for time."""
    bins: list[list[int]] = []
    room: list[int] = []
    for index in order:
        fitting = [b for b in range(len(bins)) if room[b] >= lengths[index]]
        chosen = min(fitting, key=room.__getitem__) if fitting else len(bins)
        if chosen == len(bins):
            bins.append([])
            room.append(capacity)
        bins[chosen].append(index)
        room[chosen] -= lengths[index]
    return bins


@pytest.mark.parametrize("dp_size", [1, 3])
def test_the_plan_is_that_of_the_plain_rule(dp_size):
    rng = random.Random(dp_size)
    for _ in range(60):
        capacity = rng.randint(1, 60)
        lengths = [rng.randint(0, min(capacity, rng.choice([3, 60]))) for _ in range(rng.randint(1, 80))]
        bins, _ = assign_bins(lengths, max_tokens=capacity, dp_size=dp_size, pad_multiple=1, count_multiple=1)
        want = [plain_best_fit(lengths, chosen, capacity) for chosen in plain_distribute(lengths, dp_size)]
        assert [[chosen for chosen in of_rank if chosen] for of_rank in bins] == want


def test_samples_stay_at_home():
    samples = [replace(sample, home=number % 2) for number, sample in enumerate(make_samples([9, 30, 4, 17, 17, 8]))]
    check(samples, ranks := pack_samples(samples, max_tokens=40, dp_size=2, pad_multiple=4), 40, 2, 4)
    for home, batches in enumerate(ranks):
        assert {number % 2 for batch in batches for number in batch.sample_ids if number != PADDING} == {home}
    with pytest.raises(ValueError, match="some samples have a home"):
        pack_samples([samples[0], replace(samples[1], home=None)], max_tokens=40, dp_size=2, pad_multiple=4)


def test_a_rank_reads_its_own_samples_only():
    samples = make_samples([9, 30, 4, 17, 17, 8], logprobs=False)
    homes = distribute([sample.num_targets for sample in samples], 2)
    mine = [
        s if home == 0 else replace(s, token_ids=hollow(len(s.token_ids), np.int32)) for s, home in zip(samples, homes, strict=True)
    ]
    want, got = (pack_samples(of, max_tokens=40, dp_size=2, pad_multiple=4)[0] for of in (samples, mine))
    assert [batch.token_ids.tolist() for batch in got] == [batch.token_ids.tolist() for batch in want]
    assert got[0] is not got[0], "a micro-batch is filled when it is read, and not kept"


def test_planning_is_about_linear():
    """100,000 samples take about 12 times as long as 8,192; comparing each with every bin would take 150 times as long."""
    rng = random.Random(0)
    seconds = []
    for count in (8192, 100_000):
        lengths = [min(32_768, int(rng.lognormvariate(9, 0.6))) for _ in range(count)]
        started = time.process_time()
        assign_bins(lengths, max_tokens=34_816, dp_size=4, pad_multiple=16, count_multiple=1)
        seconds.append(time.process_time() - started)
    assert seconds[1] < 40 * seconds[0], seconds
