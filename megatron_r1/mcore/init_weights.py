"""Initial weights that depend on the seed and the parameter's name only, so that every layout starts from the same model."""

from __future__ import annotations

import re
import zlib

import torch

from megatron_r1.errors import ConversionError
from megatron_r1.mcore.active import require_active
from megatron_r1.model.architecture import Architecture
from megatron_r1.model.rows import Split
from megatron_r1.weights.local_weights import entries_by_name, split_axis

require_active()

from megatron.core import parallel_state

_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
_EXPERT = re.compile(r"(experts\.local_experts\.|experts\.linear_fc[12]\.weight)(\d+)")


@torch.no_grad()
def initialize_weights(module: torch.nn.Module, arch: Architecture, *, seed: int) -> None:
    """Draw every matrix from N(0, `arch.init_std`^2) (V3 section 4.2: one standard deviation for all); norms stay 1, biases 0.

    A parameter with an attribute `init_std` has its own standard deviation. Rows of embedding and output layer from
    `arch.vocab_size` on are padding and zero.

    The full tensor is drawn on the CPU and each rank keeps its part. What that is, the mapping table says, and the parameters are
    marked for Megatron-Core accordingly: Transformer Engine marks weights as split that every rank has whole (the latent
    attention's down-projections). Their ranks would start from different values, and the gradient's norm count each of them.

    Raises:
        ConversionError: a parameter that the mapping table does not have.
    """
    entries, index = entries_by_name(arch)
    for name, parameter in module.named_parameters():
        known = global_name(module, name)
        if known not in index:
            raise ConversionError(f"{known} has no Hugging Face counterpart")
        entry = entries[index[known]]
        axis = split_axis(entry)
        _mark(parameter, axis)
        if parameter.dim() < 2 or parameter.is_meta:  # on the meta device there is nothing to draw
            continue
        is_expert = entry.expert is not None
        group = parallel_state.get_expert_tensor_parallel_group() if is_expert else parallel_state.get_tensor_model_parallel_group()
        parts = 1 if axis is None else group.size()
        shape = list(parameter.shape)
        shape[axis or 0] *= parts
        padding = shape[0] - arch.vocab_size if entry.split is Split.VOCAB and parts > 1 else 0
        shape[0] -= padding
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{entry.megatron[0]}".encode()))
        full = torch.empty(shape).normal_(0.0, getattr(parameter, "init_std", arch.init_std), generator=generator)
        if padding:
            full = torch.cat([full, full.new_zeros(padding, shape[1])])
        parameter.copy_(_part(full, axis or 0, parts, group.rank(), gated=entry.split is Split.GLU))


def _mark(parameter: torch.nn.Parameter, axis: int | None) -> None:
    if axis is not None:
        parameter.tensor_model_parallel, parameter.partition_dim = True, axis
        return
    for mark in ("tensor_model_parallel", "partition_dim", "partition_stride"):
        if hasattr(parameter, mark):
            delattr(parameter, mark)


def global_name(module: torch.nn.Module, name: str) -> str:
    """`name` with the model's layer and expert numbers instead of this rank's."""
    layer = _LAYER.match(name)
    if layer:
        number = module.decoder.layers[int(layer[1])].layer_number - 1
        name = f"decoder.layers.{number}.{name[layer.end() :]}"
    expert = _EXPERT.search(name)
    if expert:
        local_experts = module.config.num_moe_experts // parallel_state.get_expert_model_parallel_world_size()
        number = int(expert[2]) + parallel_state.get_expert_model_parallel_rank() * local_experts
        name = f"{name[: expert.start(2)]}{number}{name[expert.end(2) :]}"
    return name


def _part(full: torch.Tensor, axis: int, parts: int, rank: int, gated: bool) -> torch.Tensor:
    """This rank's part; a gated projection stacks gate and up, and each is split on its own."""
    if parts == 1:
        return full
    pieces = full.chunk(2, dim=axis) if gated else [full]
    return torch.cat([piece.chunk(parts, dim=axis)[rank] for piece in pieces], dim=axis)
