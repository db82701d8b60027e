"""The one table between Megatron-Core's parameter names and Hugging Face's, with shapes and how Megatron splits each tensor.

Import, export and the live weight sync all read it. It is filled in from the rows that a family lists (`model/families/`). The
order of the table is the order in which weights are streamed: layer by layer.

How several Hugging Face tensors make one Megatron tensor is `fused_tensors.py`'s.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from megatron_r1.model.architecture import Architecture
from megatron_r1.model.rows import Block, Row, Split

_LAYERS = ("decoder.layers.", "mtp.layers.")
_WITHIN_LAYER = re.compile(r"(?:^|\.)(?:decoder\.layers\.\d+\.|mtp\.layers\.\d+\.(?:transformer_layer\.)?)")
ROUTER_BIAS = ".e_score_correction_bias"  #: end of the names of what stays in float32: it moves by 0.001 a step


@dataclass(frozen=True)
class Entry:
    """One tensor of one model: a row with its layer and expert filled in. Numbers are global."""

    megatron: tuple[str, ...]
    hf: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]  #: of each Hugging Face tensor
    split: Split
    expert: int | None  #: global expert number
    copies: tuple[str, ...] = ()  #: further Hugging Face names of the same values
    query_groups: int = 1  #: of Split.QKV
    surplus: tuple[str, ...] = ()  #: further names of the same values that only folders of others have

    @property
    def repeats(self) -> tuple[str, ...]:
        """Names under which a folder may repeat the values; if it does they are the same."""
        return self.copies + self.surplus

    @property
    def name(self) -> str:
        """How messages call it."""
        return self.hf[0]

    @property
    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of its Hugging Face tensors, with those that a folder may have of them besides."""
        return dict(zip(self.hf, self.shapes, strict=True)) | dict.fromkeys(self.repeats, self.shapes[0])

    @property
    def full_shape(self) -> tuple[int, ...]:
        """Of the Megatron tensor before any split: all Hugging Face tensors in one, the vocabulary without padding."""
        return (sum(shape[0] for shape in self.shapes), *self.shapes[0][1:])


def model_entries(arch: Architecture) -> list[Entry]:
    """Every weight of the model once, in streaming order."""
    return [entry for block in arch.blocks() for entry in _block_entries(block, arch.experts.count if arch.experts else 0)]


def hf_shapes(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of an exported folder, in streaming order."""
    return {name: shape for entry in model_entries(arch) for name, shape in entry.hf_shapes.items() if name not in entry.surplus}


def repeated_names(arch: Architecture) -> set[str]:
    """Names of tensors that a folder may have or lack: what they hold stands elsewhere in it, too."""
    return {name for block in arch.blocks() for row in block.rows for name in row.copies + row.surplus}


def fused_names(arch: Architecture) -> dict[str, str]:
    """Further spellings of tensors within a layer -> the first, by which checkpoints call them whichever layers are used."""
    rows = (row for block in arch.blocks() if block.megatron.startswith(_LAYERS) for row in block.rows if not row.is_expert)
    return {further: row.megatron[0] for row in rows for further in row.megatron[1:]}


def checkpoint_names(stored: Iterable[str], arch: Architecture) -> dict[str, str]:
    """How a checkpoint calls tensors that it does not have under the name we store them by: our name -> its name.

    Args:
        stored: names of all its tensors; an optimizer's have a prefix before the name of the weight.
    """
    stored, fused = set(stored), fused_names(arch)
    found: dict[str, str] = {}
    for name in stored:
        layer = _WITHIN_LAYER.search(name)
        if layer is None or name[layer.end() :] not in fused:
            continue
        ours = name[: layer.end()] + fused[name[layer.end() :]]
        if ours not in stored:
            found[ours] = name
    return found


def _block_entries(block: Block, experts: int) -> list[Entry]:
    """What all tokens use, then expert by expert."""
    entries = [_fill_in_names(row, block, None) for row in block.rows if not row.is_expert]
    of_expert = [row for row in block.rows if row.is_expert]
    for e in range(experts if of_expert else 0):
        entries += [_fill_in_names(row, block, e) for row in of_expert]
    return entries


def _fill_in_names(row: Row, block: Block, expert: int | None) -> Entry:
    def fill_in(prefix: str, names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(prefix + name.replace("{e}", str(expert)) for name in names)

    return Entry(
        fill_in(block.megatron, row.megatron),
        fill_in(block.hf, row.hf),
        row.shapes,
        row.split,
        expert,
        row.copies,
        row.query_groups,
        row.surplus,
    )
