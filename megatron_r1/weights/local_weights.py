"""The weights of this rank's Megatron modules under global names: the meeting point of modules and mapping table."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.distributed as dist

from megatron_r1.errors import ConversionError
from megatron_r1.model.architecture import Architecture
from megatron_r1.model.rows import Split
from megatron_r1.weights.groups import WeightGroups, group_rank, group_size
from megatron_r1.weights.mapping import Entry, model_entries

_NAMED = 5  # tensors named in one message
_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
_EXPERT = re.compile(r"(?<=\.experts\.)(local_experts\.|linear_fc[12]\.weight)(\d+)")


@dataclass(frozen=True)
class LocalWeights:
    """What this rank holds of the model."""

    entries: list[Entry]  #: the whole model, in streaming order
    tensors: dict[int, list[torch.Tensor]]  #: index in `entries` -> this rank's shard; a shared embedding has two


def local_weights(modules: Sequence[torch.nn.Module], arch: Architecture, groups: WeightGroups) -> LocalWeights:
    """Find every parameter and persistent buffer of the modules in the mapping table. Not collective.

    Args:
        modules: Megatron GPT models without wrappers, one per virtual pipeline stage.
        arch: the model's shape.
        groups: this rank's process groups.

    Raises:
        ConversionError: a tensor that the table does not have, that has another shape than the table says, or that is there twice.
    """
    entries, index = entries_by_name(arch)
    tensors: dict[int, list[torch.Tensor]] = {}
    problems: list[str] = []
    for module in modules:
        for name, tensor in _named_weights(module, arch, groups):
            if name not in index:
                problems.append(f"{name} has no Hugging Face counterpart")
                continue
            entry = entries[index[name]]
            wanted = shard_shape(entry, groups)
            if not _fits(tuple(tensor.shape), wanted, entry):
                problems.append(f"{name} has shape {list(tensor.shape)}, expected {list(wanted)}")
            held = tensors.setdefault(index[name], [])
            held.append(tensor)
            if len(held) > 1 and entry.split is not Split.VOCAB:
                problems.append(f"{name} is there twice")
    if problems:
        raise ConversionError(f"Megatron weights do not match the model: {name_some(problems)}")
    return LocalWeights(entries, tensors)


@lru_cache(maxsize=1)  # 46,000 entries for DeepSeek-V3: a second's work, and a conversion asks for every rank of a layout
def entries_by_name(arch: Architecture) -> tuple[list[Entry], dict[str, int]]:
    """The whole model in streaming order, and where each Megatron name stands in it."""
    entries = model_entries(arch)
    return entries, {name: i for i, entry in enumerate(entries) for name in entry.megatron}


def tensor_group(entry: Entry, groups: WeightGroups) -> dist.ProcessGroup | None:
    """The group over which the tensor itself is cut."""
    if entry.split is Split.REPLICATED:
        return None
    return groups.tp if entry.expert is None else groups.etp


def split_axis(entry: Entry) -> int | None:
    """The axis along which tensor parallelism cuts the Megatron tensor; None if every rank has it whole."""
    if entry.split is Split.REPLICATED:
        return None
    return 1 if entry.split is Split.ROW else 0


def expert_owner(entry: Entry, arch: Architecture, groups: WeightGroups) -> int:
    """Expert-parallel rank that holds the entry; 0 for what is no expert's."""
    return 0 if entry.expert is None else entry.expert // _experts_per_rank(arch, groups)


def _experts_per_rank(arch: Architecture, groups: WeightGroups) -> int:
    return (arch.experts.count if arch.experts else 0) // group_size(groups.ep)


def shard_shape(entry: Entry, groups: WeightGroups) -> tuple[int, ...]:
    """Shape of one rank's shard; of a vocabulary's, without padding and rounded up."""
    shape, axis = list(entry.full_shape), split_axis(entry)
    if axis is not None:
        shape[axis] = -(-shape[axis] // group_size(tensor_group(entry, groups)))
    return tuple(shape)


def name_some(names: Sequence[str]) -> str:
    """The first few names of a list, and how many more there are."""
    more = f"; and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return "; ".join(names[:_NAMED]) + more


def _fits(shape: tuple[int, ...], wanted: tuple[int, ...], entry: Entry) -> bool:
    if entry.split is Split.VOCAB:
        return len(shape) == 2 and shape[0] >= wanted[0] and shape[1] == wanted[1]
    return shape == wanted


def _named_weights(module: torch.nn.Module, arch: Architecture, groups: WeightGroups) -> Iterator[tuple[str, torch.Tensor]]:
    first_expert = group_rank(groups.ep) * _experts_per_rank(arch, groups)
    decoder = getattr(module, "decoder", None)
    layers = [layer.layer_number - 1 for layer in decoder.layers] if decoder is not None else []
    persistent = {id(b) for b in module.state_dict(keep_vars=True).values() if isinstance(b, torch.Tensor)}
    buffers = ((name, buffer) for name, buffer in module.named_buffers() if id(buffer) in persistent)
    for name, tensor in (*module.named_parameters(), *buffers):
        name = _LAYER.sub(lambda match: f"decoder.layers.{layers[int(match[1])]}.", name)
        name = _EXPERT.sub(lambda match: f"{match[1]}{first_expert + int(match[2])}", name)
        yield name, tensor.data
