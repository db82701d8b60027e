import pytest
import torch

from megatron_r1.algorithms.advantage import group_advantages


def test_closed_form():
    advantages = group_advantages(torch.tensor([1.0, 0.0, 0.0, 0.0]))
    assert advantages.tolist() == pytest.approx([3**0.5, -(3**-0.5), -(3**-0.5), -(3**-0.5)], abs=1e-12)


def test_sample_standard_deviation_divides_by_one_less():
    rewards = torch.tensor([2.0, 1.0, 0.5, 0.0, 3.0])
    ratio = group_advantages(rewards, std="population") / group_advantages(rewards, std="sample")
    assert ratio.tolist() == pytest.approx([(5 / 4) ** 0.5] * 5)


@pytest.mark.parametrize("value, size", [(0.7, 7), (1.3, 16), (0.1 + 0.2, 3), (0.0, 4)])
def test_equal_rewards_give_exactly_zero(value, size):
    assert group_advantages(torch.full((size,), value)).tolist() == [0.0] * size


def test_mean_zero_and_std_one():
    advantages = group_advantages(torch.rand(16, generator=torch.Generator().manual_seed(0)))
    assert advantages.mean().item() == pytest.approx(0, abs=1e-12)
    assert advantages.std(correction=0).item() == pytest.approx(1, abs=1e-12)


def test_scale_and_shift_of_rewards_do_not_matter():
    rewards = torch.rand(8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert torch.allclose(group_advantages(3 * rewards + 5), group_advantages(rewards), atol=1e-12)


@pytest.mark.parametrize(
    "terms, magnitude",
    [
        ([(0.3, 0.1, 0.2), (0.1, 0.2, 0.3), (0.2, 0.1, 0.3)], 0.0),
        ([(0.1, 0.2), (0.3,)], 0.0),
        ([(0.1,) * 10, (1.0,)], 0.0),
        ([(1e6, 0.1, 0.2), (1e6, 0.3)], 0.0),
        ([(-0.1, -0.2), (-0.3,)], 0.0),
        ([(0.3, -0.1, -0.2), (0.0,), (-0.1, -0.2, 0.3)], 0.6),  # all that is left is rounding
        ([(3e5, -1e5, -2e5), (1e5, 2e5, -3e5), (0.3e6, -0.1e6, -0.2e6)], 6e5),
    ],
)
def test_totals_that_differ_by_their_rounding_are_equal(terms, magnitude):
    totals = [sum(row) for row in terms] + [sum(terms[0])]
    assert group_advantages(torch.tensor(totals, dtype=torch.float64), magnitude=magnitude).tolist() == [0.0] * len(totals)


def test_totals_of_float32_are_equal_up_to_its_last_bits():
    tenths = torch.zeros(2)
    for _ in range(10):
        tenths[0] += 0.1
    totals = tenths + torch.tensor([0.0, 1.0])
    assert totals[0] != totals[1] and group_advantages(totals).tolist() == [0.0, 0.0]
    assert group_advantages(torch.tensor([1, 0, 1])).tolist() == pytest.approx([0.5**0.5, -(2**0.5), 0.5**0.5])


@pytest.mark.parametrize("difference", [1e-9, 1e-6, 1e-3])
def test_small_true_differences_keep_their_advantages(difference):
    rewards = torch.tensor([1.0, 1.0 + difference], dtype=torch.float64)
    assert group_advantages(rewards, magnitude=2.0).tolist() == pytest.approx([-1.0, 1.0])
    tiny = torch.tensor([0.0, difference * 1e-9], dtype=torch.float64)
    assert group_advantages(tiny).tolist() == pytest.approx([-1.0, 1.0]), "the scale of rewards does not matter"


def test_every_group_sums_to_zero():
    generator = torch.Generator().manual_seed(3)
    for size in (2, 3, 7, 16, 61):
        for scale, shift in ((1.0, 0.0), (1e-3, 1e9), (1.0, 1e12), (0.3, -7.0)):
            rewards = scale * torch.rand(size, generator=generator, dtype=torch.float64) + shift
            for std in ("population", "sample"):
                advantages = group_advantages(rewards, std=std)
                assert advantages.abs().sum() == 0 or advantages.sum().abs() <= 1e-13 * advantages.abs().sum()
