"""What the benchmark of weight updates calls too slow, and the sizes of its models."""

from __future__ import annotations

from benchmarks.weight_sync import SIZES, judge, model_of
from megatron_r1.rollout.options import engine_weight_bytes


def row(seconds: float, **changes):
    usual = {"layout": "tp2", "verifies": False, "bytes": 10**9, "seconds": [seconds], "copy_seconds": [0.1]}
    return usual | {"received": [101], "held": [100]} | changes


def test_bars_are_for_large_models_and_bytes_for_all():
    assert judge({"1 GB, fp32, engine of 1": [row(0.39), row(0.8, verifies=True)]}) == []
    (slow,) = judge({"1 GB, fp32, engine of 1": [row(0.41)]})
    assert slow == "1 GB, fp32, engine of 1, tp2: 0.244 of the copy's speed, below 0.25"
    assert "checksums: 0.118 of the copy" in judge({"1 GB, fp32, engine of 1": [row(0.85, verifies=True)]})[0]
    assert judge({"10 MB, fp32, engine of 1": [row(9.0, bytes=10**7)]}) == []
    assert (
        "more than 1.02 times"
        in judge({"10 MB, fp32, engine of 1": [row(9.0, bytes=10**7, received=[100, 103], held=[100, 100])]})[0]
    )


def test_a_byte_takes_as_long_in_a_larger_model():
    def of(seconds: float):
        return {
            "1 GB, fp32, engine of 2": [row(0.3)], "2 GB, fp32, engine of 2": [row(seconds, bytes=2 * 10**9, copy_seconds=[0.25])],
            "2 GB, bf16, engine of 2": [row(0.3)],
        }  # fmt: skip

    assert judge(of(0.77)) == []
    assert "takes 1.33 times as long" in judge(of(0.8))[0]


def test_models_have_the_sizes_of_their_names():
    for size in SIZES:
        number, unit = size.split()
        wanted = int(number) * {"MB": 1e6, "GB": 1e9}[unit]
        assert 0.9 * wanted < engine_weight_bytes(model_of(size), "float32") < 1.4 * wanted, size
