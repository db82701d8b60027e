from collections import Counter

import pytest

from megatron_r1.data.mixture import Mixture


def test_without_weights_every_sample_comes_once_an_epoch():
    mixture = Mixture([5, 3], None, seed=0)
    epochs = [mixture.epoch(number) for number in range(3)]
    assert all(sorted(epoch) == [(0, i) for i in range(5)] + [(1, i) for i in range(3)] for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_weights_are_shares_of_an_epoch():
    mixture = Mixture([100, 40, 20], [1, 2, 5], seed=0)
    assert mixture.counts == [20, 40, 100] and mixture.epoch_size == 160
    assert Counter(source for source, _ in mixture.epoch(0)) == {0: 20, 1: 40, 2: 100}
    assert Mixture([10, 10, 10], [1.0, 1.0, 1.0], seed=0).counts == [10, 10, 10]
    assert Mixture([4, 3], [1e-3, 1.0], seed=0).counts == [0, 7]


@pytest.mark.parametrize("seed", range(5))
def test_samples_of_a_source_are_seen_equally_often(seed):
    mixture = Mixture([10, 7], [1, 3], seed)  # 4 and 13 an epoch
    assert mixture.counts == [4, 13]
    seen = Counter()
    for number in range(9):
        seen.update(mixture.epoch(number))
        for source, size in enumerate([10, 7]):
            times = [seen[source, index] for index in range(size)]
            assert max(times) - min(times) <= 1, f"source {source} after epoch {number}: {times}"


def test_the_order_depends_on_the_seed_and_the_epoch_alone():
    weights = [1.0, 2.0]
    late_first = Mixture([50, 60], weights, seed=3)
    fifth = late_first.epoch(5)
    other = Mixture([50, 60], weights, seed=3)
    assert [other.epoch(number) for number in range(6)][5] == fifth == late_first.epoch(5)
    assert Mixture([50, 60], weights, seed=4).epoch(5) != fifth
    sources = [source for source, _ in fifth]
    assert sources != sorted(sources), "sources are mixed, not one after the other"
