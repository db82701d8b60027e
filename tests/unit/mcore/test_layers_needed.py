"""A large model on CUDA needs Transformer Engine, unless somebody says that slow is good enough."""

from __future__ import annotations

import pytest

from megatron_r1.config.runtime import RuntimeConfig
from megatron_r1.errors import ConfigError
from megatron_r1.mcore import layers_needed
from megatron_r1.model.presets import PRESETS

FLAT, SLOW = RuntimeConfig(), RuntimeConfig(large_without_transformer_engine=True)


def pretend(monkeypatch, device: str, has_engine: bool) -> None:
    monkeypatch.setattr(layers_needed, "require_active", lambda: device)
    monkeypatch.setattr(layers_needed, "on_transformer_engine", lambda: device == "cuda" and has_engine)


@pytest.mark.parametrize("preset", ["16b", "671b"])
def test_a_large_model_is_refused_on_cuda_without_it(monkeypatch, preset):
    pretend(monkeypatch, "cuda", has_engine=False)
    with pytest.raises(ConfigError, match="billion parameters needs Transformer Engine") as refused:
        layers_needed.require_layers_for(PRESETS[preset], FLAT)
    assert "\n" not in str(refused.value) and "runtime.large_without_transformer_engine=true" in str(refused.value)
    layers_needed.require_layers_for(PRESETS[preset], SLOW)


def test_small_models_other_devices_and_machines_that_have_it_are_left_alone(monkeypatch):
    pretend(monkeypatch, "cuda", has_engine=False)
    for preset in ("tiny", "small"):
        layers_needed.require_layers_for(PRESETS[preset], FLAT)
    pretend(monkeypatch, "cuda", has_engine=True)
    layers_needed.require_layers_for(PRESETS["671b"], FLAT)
    pretend(monkeypatch, "cpu", has_engine=False)
    layers_needed.require_layers_for(PRESETS["671b"], FLAT)
