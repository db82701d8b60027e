"""How large buckets are and what they take, at the size of V3 and at that of a test."""

from __future__ import annotations

from megatron_r1.model.presets import PRESETS
from megatron_r1.rollout.options import engine_weight_bytes
from megatron_r1.rollout.weight_buckets import bucket_bytes, update_memory

EMBEDDING = 129280 * 7168 * 2  # V3's largest tensor, in bf16


def test_buckets_grow_with_the_model_and_the_setting_wins():
    v3 = engine_weight_bytes(PRESETS["671b"], "bfloat16")
    assert v3 == 2 * 671_026_419_200
    assert bucket_bytes(None, v3) == 1 << 30 and v3 / bucket_bytes(None, v3) < 1300  # calls
    assert bucket_bytes(None, engine_weight_bytes(PRESETS["tiny"], "float32")) == 64 << 20
    assert bucket_bytes(None, 200 << 30) == 200 << 20
    assert bucket_bytes(5, v3) == 5 << 20


def test_what_an_update_of_v3_takes_beside_the_weights():
    assert update_memory("nccl", 1 << 30, EMBEDDING) == (EMBEDDING, 0)  # 1.85 GB a worker; a layer's experts were 22.5 GB
    assert update_memory("shm", 1 << 30, EMBEDDING) == (0, EMBEDDING)  # once a node; 180 GB before
    assert update_memory("shm", 4 << 30, EMBEDDING) == (0, 4 << 30)
