"""How large buckets are, at the size of V3 and at that of a test."""

from __future__ import annotations

from megatron_r1.model.presets import PRESETS
from megatron_r1.rollout.options import engine_weight_bytes
from megatron_r1.rollout.sync.weight_buckets import bucket_bytes


def test_buckets_grow_with_the_model_and_the_setting_wins():
    v3 = engine_weight_bytes(PRESETS["671b"], "bfloat16")
    assert v3 == 2 * 671_026_419_200
    assert bucket_bytes(None, v3) == 1 << 30 and v3 / bucket_bytes(None, v3) < 1300  # calls
    assert bucket_bytes(None, engine_weight_bytes(PRESETS["tiny"], "float32")) == 32 << 20
    assert bucket_bytes(None, 200 << 30) == 200 << 20
    assert bucket_bytes(5, v3) == 5 << 20
