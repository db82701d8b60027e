"""All changes to vLLM that a machine without CUDA needs, as one list, for one pinned version."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import vllm
from vllm.model_executor.layers import utils as linear_utils

from megatron_r1.errors import DeviceError
from megatron_r1.rollout.vllm.packed_linear import choose_linear

VLLM_VERSION = "0.32.0"


@dataclass(frozen=True)
class Fix:
    """One change to vLLM, applied in the engine process before a model is built."""

    name: str
    reason: str
    apply: Callable[[], None]


def check_version() -> None:
    """Raises DeviceError if the installed vLLM is not the one for which the fixes and the reader of held weights were written."""
    installed = vllm.__version__.partition("+")[0]
    if installed != VLLM_VERSION:
        raise DeviceError(
            f"vllm {installed} is installed but megatron_r1 was written for {VLLM_VERSION}: "
            "install the version of the constraints file, or check rollout/vllm/ against the new one"
        )


def apply_fixes() -> None:
    """Apply every fix once per process."""
    for fix in FIXES:
        if fix.name not in _APPLIED:
            fix.apply()
            _APPLIED.add(fix.name)


def _keep_linear_weights() -> None:
    def use_plain_weight(layer: torch.nn.Module, remove_weight: bool) -> None:
        layer.cpu_linear = choose_linear(layer.weight) or torch.nn.functional.linear

    linear_utils.dispatch_cpu_unquantized_gemm = use_plain_weight


_APPLIED: set[str] = set()

FIXES = (
    Fix(
        "keep linear weights",
        "vLLM packs linear weights into opaque oneDNN handles and deletes them, so that nobody can check what it computes with; "
        "large ones are packed beside the plain weight and can be read back",
        _keep_linear_weights,
    ),
)
