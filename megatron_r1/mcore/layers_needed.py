"""Which models are too large for the layers that torch alone gives on CUDA."""

from __future__ import annotations

from megatron_r1.config.runtime import RuntimeConfig
from megatron_r1.errors import ConfigError
from megatron_r1.mcore.active import on_transformer_engine, require_active
from megatron_r1.model.architecture import Architecture
from megatron_r1.model.size import count_parameters

#: DeepSeek-V2-Lite, which is called 16B, has 15.7 billion.
LARGE = 15_000_000_000


def require_layers_for(arch: Architecture, runtime: RuntimeConfig) -> None:
    """Refuse a large model on CUDA without Transformer Engine, before any process group or weight is made.

    Raises:
        ConfigError: it is large, and `runtime.large_without_transformer_engine` does not allow it.
        DeviceError: Transformer Engine is installed and does not load.
    """
    if require_active() == "cpu" or on_transformer_engine() or runtime.large_without_transformer_engine:
        return
    parameters = count_parameters(arch)
    if parameters >= LARGE:
        raise ConfigError(
            f"a model of {parameters / 1e9:.1f} billion parameters needs Transformer Engine on CUDA, which is not installed: see "
            f"docs/cluster.md, or set runtime.large_without_transformer_engine=true to train with torch's layers, slowly"
        )
