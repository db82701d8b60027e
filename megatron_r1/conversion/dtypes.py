"""The dtypes that conversions write."""

from __future__ import annotations

import torch

from megatron_r1.errors import ConversionError
from megatron_r1.weights.hf import HfFolder
from megatron_r1.weights.mapping import ROUTER_BIAS, Entry

BY_NAME = {"fp8": torch.float8_e4m3fn, "bf16": torch.bfloat16, "fp32": torch.float32}


def import_dtype(entry: Entry, source: HfFolder, wanted: torch.dtype | None) -> torch.dtype:
    """Of an entry's Megatron tensor: `wanted`, else as it is stored, and bfloat16 for FP8.

    Raises:
        ConversionError: the entry's tensors are stored in several dtypes and none is wanted.
    """
    if entry.name.endswith(ROUTER_BIAS):
        return torch.float32
    if wanted is not None:
        return wanted
    stored = {torch.bfloat16 if (d := source.dtype(name)) is torch.float8_e4m3fn else d for name in entry.hf}
    if len(stored) > 1:
        raise ConversionError(f"tensors {', '.join(entry.hf)} of {source.folder} have different dtypes: choose one with --dtype")
    return stored.pop()
