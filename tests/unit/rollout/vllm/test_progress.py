"""An engine gives signs of life while it computes tokens, and none while it only goes round."""

from __future__ import annotations

from megatron_r1.rollout.vllm.progress import SignsOfProgress


def test_signs_come_only_with_progress():
    done, signs = [0], []
    watch = SignsOfProgress(lambda: done[0], lambda: signs.append(done[0]), seconds=-1.0)
    for step, computed in enumerate((0, 0, 5, 5, 2, 2)):  # a request that has to begin again computes, too
        done[0] = computed
        watch.look()
        assert len(signs) == (step > 1) + (step > 3)
    assert signs == [5, 2]


def test_signs_are_a_second_apart():
    numbers = iter(range(100))
    signs = []
    watch = SignsOfProgress(lambda: next(numbers), lambda: signs.append(1), seconds=3600.0)
    for _ in range(50):
        watch.look()
    assert not signs
