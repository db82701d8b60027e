"""The device that this process has prepared megatron.core for; below `host`, which prepares it, and all modules that ask."""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Literal

from megatron_r1.errors import DeviceError, one_line

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
    """Whether Transformer Engine is installed.

    Raises:
        DeviceError: it is, and does not load: to train without it must be somebody's decision.
    """
    problem = transformer_engine_problem()
    if problem is not None:
        raise DeviceError(
            f"Transformer Engine is installed and does not load: {problem}; compile it for the installed torch (docs/cluster.md), "
            "or remove it: pip uninstall transformer-engine transformer-engine-torch"
        )
    return importlib.util.find_spec("transformer_engine") is not None


@cache
def transformer_engine_problem() -> str | None:
    """Why Transformer Engine, which is installed, does not load, in one line; None: it loads, or is not there."""
    if importlib.util.find_spec("transformer_engine") is None:
        return None
    try:
        importlib.import_module("transformer_engine.pytorch")  # loads the compiled extension
    except Exception as error:  # noqa: BLE001 - compiled for another torch or CUDA it may raise anything
        return one_line(error)
    return None


def on_transformer_engine() -> bool:
    """Whether layers are Transformer Engine's: it is installed, and megatron.core is prepared for CUDA."""
    return require_active() == "cuda" and have_transformer_engine()
