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
