"""What a conversion of a model would do, from its config.json alone: every tensor, and which rank of a layout holds it."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from megatron_r1.config.model import ParallelConfig
from megatron_r1.errors import CheckpointError
from megatron_r1.mcore.ask_ranks import shards_of_layout
from megatron_r1.mcore.layout import smallest_layout
from megatron_r1.model.architecture import Architecture
from megatron_r1.model.hf_config import read_hf_config
from megatron_r1.runtime.files import write_atomically
from megatron_r1.weights.fp8 import SCALE_SUFFIX
from megatron_r1.weights.hf import check_quantization
from megatron_r1.weights.hf_export import hf_tensors
from megatron_r1.weights.mapping import hf_shapes, model_entries
from megatron_r1.weights.safetensors_file import DTYPE_NAMES, HfTensor

_COLUMNS = ("Hugging Face tensor", "shape", "dtype", "Megatron tensor", "ranks")


def dry_run(config: Path, sizes: ParallelConfig, dtype: torch.dtype | None, table: Path | None) -> str:
    """Work out every tensor of the model and build every rank of the layout on the meta device. One process.

    Args:
        config: a config.json, published or exported.
        sizes: of the layout.
        dtype: of the Hugging Face folder; None: as the config says.
        table: takes a line for every tensor, tab-separated.

    Returns:
        A summary of several lines: a row for each kind of tensor, the totals, and what the ranks hold.

    Raises:
        CheckpointError: a config that cannot be read or is of another architecture.
        ConversionError: the ranks do not hold each element exactly once.
    """
    raw, arch = _read_config(config)
    tensors = hf_tensors(hf_shapes(arch), dtype or _stored_dtype(config, raw))
    entries = model_entries(arch)
    entry_of = {name: i for i, entry in enumerate(entries) for name in (*entry.hf, *entry.copies)}

    layout = smallest_layout(sizes, arch)
    shards = shards_of_layout(arch, layout)

    def megatron_name(tensor: HfTensor) -> str:
        if tensor.name.endswith(SCALE_SUFFIX):
            return "(scales)"
        entry = entries[entry_of[tensor.name]]
        return entry.megatron[0] + (" (copy)" if tensor.name in entry.copies else "")

    if table is not None:
        rows = [_COLUMNS]
        for tensor in tensors:
            holders = shards.holders[entry_of[tensor.name.removesuffix(SCALE_SUFFIX)]]
            rows.append((tensor.name, *_describe_tensor(tensor), megatron_name(tensor), _ranges(holders)))
        write_atomically(table, "".join("\t".join(row) + "\n" for row in rows))
    elements = sum(math.prod(tensor.shape) for tensor in tensors)
    nbytes = sum(tensor.nbytes for tensor in tensors)
    fewest, most = (pick(shards.elements, key=shards.elements.__getitem__) for pick in (min, max))
    held = [f"rank {rank} {shards.elements[rank]:,} ({shards.elements[rank] * 2 / 1e9:.2f} GB)" for rank in (fewest, most)]
    sizes_used = f"tp={layout.tp} pp={layout.pp} vpp={layout.vpp} ep={layout.ep} etp={layout.etp}"
    summary = [
        f"{len(tensors):,} tensors, {elements:,} elements, {nbytes:,} bytes",
        f"{sizes_used}: {layout.world_size:,} ranks built, {len(entries):,} Megatron tensors covered exactly once",
        f"elements per rank (bytes in bf16): fewest {held[0]}, most {held[1]}",
    ]
    return "\n".join([*_kinds(tensors, megatron_name), *summary])


def _read_config(path: Path) -> tuple[dict[str, Any], Architecture]:
    try:
        raw = json.loads(path.read_text())
        return raw, read_hf_config(raw)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except RecursionError:
        raise CheckpointError(f"{path} cannot be used: it is nested too deeply") from None
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be used: {error}") from error


def _stored_dtype(path: Path, config: dict[str, Any]) -> torch.dtype:
    check_quantization(path, config.get("quantization_config"))
    if config.get("quantization_config"):
        return torch.float8_e4m3fn
    name = config.get("dtype") or config.get("torch_dtype") or "float32"
    known = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPE_NAMES if dtype.itemsize in (2, 4)}
    if not isinstance(name, str) or name.removeprefix("torch.") not in known:
        raise CheckpointError(
            f"{path}: dtype or torch_dtype is {name!r}, weights are one of {', '.join(sorted(known))}: or give --dtype"
        )
    return known[name.removeprefix("torch.")]


def _describe_tensor(tensor: HfTensor) -> tuple[str, str]:
    return str(list(tensor.shape)), DTYPE_NAMES[tensor.dtype]


def _kinds(tensors: Iterable[HfTensor], megatron_name: Callable[[HfTensor], str]) -> list[str]:
    """A row for all tensors that differ in the numbers of layer and expert only, with their count."""
    counts: Counter[tuple[str, ...]] = Counter()
    for tensor in tensors:
        hf, megatron = (re.sub(r"(?<=\.)\d+", "N", name) for name in (tensor.name, megatron_name(tensor)))
        counts[hf, *_describe_tensor(tensor), megatron] += 1
    rows = [("count", *_COLUMNS[:-1]), *((f"{count:,}", *kind) for kind, count in counts.items())]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _ranges(ranks: Iterable[int]) -> str:
    """Ranks in short: `0-63,128`."""
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
