"""The device that this process has prepared megatron.core for; below `host`, which prepares it, and all modules that ask."""

from __future__ import annotations

import importlib.util
from typing import Literal

Device = Literal["cpu", "cuda"]
_device: Device | None = None


def prepared_device() -> Device | None:
    """The device that megatron.core is prepared for; None: it is not prepared yet."""
    return _device


def mark_prepared(device: Device) -> None:
    """Remember that `host.activate` has prepared megatron.core for this device."""
    global _device
    _device = device


def require_active() -> Device:
    """The device that megatron.core is prepared for.

    Raises:
        RuntimeError: `host.activate` was not called.
    """
    if _device is None:
        raise RuntimeError("call megatron_r1.mcore.host.activate('cpu' or 'cuda') before importing megatron_r1.mcore modules")
    return _device


def have_transformer_engine() -> bool:
    """Whether Transformer Engine is installed."""
    return importlib.util.find_spec("transformer_engine") is not None


def on_transformer_engine() -> bool:
    """Whether layers are Transformer Engine's: it is installed, and megatron.core is prepared for CUDA."""
    return require_active() == "cuda" and have_transformer_engine()
