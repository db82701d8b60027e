"""Initial weights that depend on the seed and the parameter's name only, so that every layout starts from the same model."""

from __future__ import annotations

import re
import zlib

import torch

from megatron_r1.mcore.active import require_active

require_active()

from megatron.core import parallel_state

_VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")
_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
_EXPERT = re.compile(r"(experts\.local_experts\.|experts\.linear_fc[12]\.weight)(\d+)")


@torch.no_grad()
def initialize_weights(module: torch.nn.Module, *, std: float, seed: int, vocab_size: int) -> None:
    """Draw every matrix from N(0, std^2) (V3 section 4.2: one standard deviation for all); norms stay 1, biases 0.

    A parameter with an attribute `init_std` has its own standard deviation. Rows of embedding and output layer from `vocab_size` on
    are padding and zero.

    The full tensor is drawn on the CPU and each rank keeps its part.
    """
    for name, parameter in module.named_parameters():
        if parameter.dim() < 2 or parameter.is_meta:  # on the meta device there is nothing to draw
            continue
        is_expert = ".experts." in name
        group = parallel_state.get_expert_tensor_parallel_group() if is_expert else parallel_state.get_tensor_model_parallel_group()
        parts = group.size() if getattr(parameter, "tensor_model_parallel", False) else 1
        axis = getattr(parameter, "partition_dim", 0) if parts > 1 else 0
        shape = list(parameter.shape)
        shape[axis] *= parts
        padding = shape[0] - vocab_size if name in _VOCABULARY and parts > 1 else 0
        shape[0] -= padding
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{global_name(module, name)}".encode()))
        full = torch.empty(shape).normal_(0.0, getattr(parameter, "init_std", std), generator=generator)
        if padding:
            full = torch.cat([full, full.new_zeros(padding, shape[1])])
        parameter.copy_(_part(full, axis, parts, group.rank(), gated=".linear_fc1." in name))


def global_name(module: torch.nn.Module, name: str) -> str:
    """`name` with the model's layer and expert numbers instead of this rank's; a tied output layer is the embedding."""
    if module.share_embeddings_and_output_weights and name == "output_layer.weight":
        return "embedding.word_embeddings.weight"
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
