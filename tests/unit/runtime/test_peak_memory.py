"""Peaks of parts, also of parts within parts."""

from __future__ import annotations

import pytest

from megatron_r1.runtime.device import CPU
from megatron_r1.runtime.peak_memory import PeakMemory


def test_each_part_has_the_peak_of_its_own_time() -> None:
    peaks = iter((99, 10, 5, 30, 7, 20, 1, 3))  # between one reading and the next
    memory = PeakMemory(lambda: next(peaks))
    with memory.part("rollout"):
        pass
    with memory.part("train"), memory.part("step"):
        pass
    with memory.part("sync"):
        pass
    assert memory.take() == {"memory/rollout": 10, "memory/train": 30, "memory/step": 7, "memory/sync": 3}
    assert memory.take() == {}


def test_a_part_that_comes_twice_or_fails_keeps_its_largest() -> None:
    peaks = iter((0, 40, 0, 10))
    memory = PeakMemory(lambda: next(peaks))
    for raises in (False, True):
        with pytest.raises(KeyError) if raises else memory.part("train"):
            if raises:
                with memory.part("train"):
                    raise KeyError
    assert memory.take() == {"memory/train": 40}


def test_a_cpu_has_no_peaks() -> None:
    memory = PeakMemory(CPU.peak_memory)
    with memory.part("train"):
        pass
    assert memory.take() == {}
