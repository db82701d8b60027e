"""Reads vLLM's fused, stacked and repacked weights back as Hugging Face tensors, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from vllm._custom_ops import cpu_prepack_moe_weight
from vllm.model_executor.layers.attention.mla_attention import MLAAttention
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from megatron_r1.model.registry import vllm_fused_parts

FUSED_PARTS = vllm_fused_parts()

#: Buffers that follow from the config alone: no update may change them.
CONSTANT_BUFFERS = ("cos_sin_cache", "_q_scale", "_k_scale", "_v_scale", "_prob_scale")


@dataclass(frozen=True)
class Held:
    """A Hugging Face tensor, or this worker's shard of it, as found in vLLM's memory."""

    name: str  #: Hugging Face name
    tensor: torch.Tensor
    source: torch.Tensor  #: the parameter that it was read from
    axis: int | None = None  #: axis on which vLLM shards it; None: the whole tensor
    start: int = 0  #: index of the shard's first entry on that axis


def read_held(model: torch.nn.Module) -> Iterator[Held]:
    """Every Hugging Face tensor that the model holds; copies that vLLM keeps of one tensor are all read.

    Tied output weights are read as one more copy of the embedding: Hugging Face has no tensor of their own.
    """
    for name, module in model.named_modules():
        if name == "lm_head" and model.config.tie_word_embeddings:
            name = "model.embed_tokens"
        for kind, reader in _READERS:
            if isinstance(module, kind):
                yield from reader(name, module)
                break
        for router in vars(module).values():
            if isinstance(router, BaseRouter) and getattr(router, "e_score_correction_bias", None) is not None:
                yield _router_bias(name, router.e_score_correction_bias)


def read_derived(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """(name, held, expected) of the weights that vLLM computes from others: MLA's absorbed key and value projections."""
    for name, module in model.named_modules():
        if isinstance(module, MLAAttention):
            heads, nope, value = module.num_heads, module.qk_nope_head_dim, module.v_head_dim
            kv_b = module.kv_b_proj.weight.view(heads, nope + value, module.kv_lora_rank)
            yield f"{name}.W_UK_T", module.W_UK_T, kv_b[:, :nope]
            yield f"{name}.W_UV", module.W_UV, kv_b[:, nope:].transpose(1, 2)


def _read_vocab(name: str, module: VocabParallelEmbedding) -> Iterator[Held]:
    shard = module.shard_indices
    rows = module.weight[: shard.num_org_elements]
    yield Held(f"{name}.weight", rows, module.weight, 0 if module.tp_size > 1 else None, shard.org_vocab_start_index)


def _read_merged(name: str, module: MergedColumnParallelLinear | QKVParallelLinear) -> Iterator[Held]:
    parent, _, leaf = name.rpartition(".")
    sizes = [size // module.tp_size for size in module.output_sizes]
    for kind, parameter in module.named_parameters(recurse=False):
        for part, size, rows in zip(FUSED_PARTS[leaf], sizes, parameter.split(sizes), strict=True):
            yield _shard(f"{parent}.{part}.{kind}", rows, parameter, module, 0, size)


def _read_column(name: str, module: ColumnParallelLinear) -> Iterator[Held]:
    for kind, parameter in module.named_parameters(recurse=False):
        yield _shard(f"{name}.{kind}", parameter, parameter, module, 0, parameter.shape[0])


def _read_row(name: str, module: RowParallelLinear) -> Iterator[Held]:
    yield _shard(f"{name}.weight", module.weight, module.weight, module, 1, module.weight.shape[1])
    if module.bias is not None:
        yield Held(f"{name}.bias", module.bias, module.bias)


def _read_replicated(name: str, module: torch.nn.Module) -> Iterator[Held]:
    for kind, parameter in module.named_parameters(recurse=False):
        yield Held(f"{name}.{kind}", parameter, parameter)


def _read_experts(name: str, module: RoutedExperts) -> Iterator[Held]:
    config = module.moe_config
    parallel = config.moe_parallel_config
    width, hidden = config.intermediate_size_per_partition_unpadded, config.hidden_dim_unpadded
    w13, w2 = _plain_layout(module, module.w13_weight), _plain_layout(module, module.w2_weight)
    half = w13.shape[1] // 2
    axis_0, axis_1 = (0, 1) if parallel.tp_size > 1 else (None, None)
    start = parallel.tp_rank * width
    experts = name.removesuffix(".routed_experts")
    for e in range(w13.shape[0]):
        yield Held(f"{experts}.{e}.gate_proj.weight", w13[e, :width, :hidden], module.w13_weight, axis_0, start)
        yield Held(f"{experts}.{e}.up_proj.weight", w13[e, half : half + width, :hidden], module.w13_weight, axis_0, start)
        yield Held(f"{experts}.{e}.down_proj.weight", w2[e, :hidden, :width], module.w2_weight, axis_1, start)
    if module.e_score_correction_bias is not None:
        yield _router_bias(experts, module.e_score_correction_bias)


def _router_bias(experts_name: str, bias: torch.Tensor) -> Held:
    return Held(experts_name.removesuffix(".experts") + ".gate.e_score_correction_bias", bias, bias)


def _shard(name: str, tensor: torch.Tensor, source: torch.Tensor, module: torch.nn.Module, axis: int, size: int) -> Held:
    return Held(name, tensor, source, axis if module.tp_size > 1 else None, module.tp_rank * size)


def _plain_layout(module: RoutedExperts, weight: torch.Tensor) -> torch.Tensor:
    """[E, rows, columns] in checkpoint order, from the order in which the CPU kernel keeps them."""
    kernel = module.quant_method.moe_kernel.fused_experts
    if not isinstance(kernel, CPUUnquantizedExperts):
        return weight
    places = _packed_places(weight.shape[1], weight.shape[2], weight.dtype, kernel.isa)
    return weight.flatten(1)[:, places].view(weight.shape)


@lru_cache(maxsize=8)
def _packed_places(rows: int, columns: int, dtype: torch.dtype, isa: str) -> torch.Tensor:
    """[rows * columns] the place to which the kernel's packing moves each entry of an expert's matrix.

    Found by packing a matrix whose entries are their own positions; 16-bit types carry the position in two halves.
    """
    position = torch.arange(rows * columns)
    integer, bits = (torch.int32, 31) if dtype.itemsize == 4 else (torch.int16, 15)
    packed = torch.zeros_like(position)
    for shift in range(0, 31, bits):
        digits = ((position >> shift) & ((1 << bits) - 1)).to(integer).view(dtype).view(1, rows, columns)
        packed |= cpu_prepack_moe_weight(digits, isa).view(integer).flatten().long() << shift
    order, places = packed.sort()
    if not torch.equal(order, position):
        raise RuntimeError(f"packing [{rows}, {columns}] {dtype} for {isa} is not a rearrangement")
    return places


#: The first kind that matches reads the module.
_READERS = (
    (VocabParallelEmbedding, _read_vocab),
    (MergedColumnParallelLinear, _read_merged),
    (QKVParallelLinear, _read_merged),
    (ColumnParallelLinear, _read_column),
    (RowParallelLinear, _read_row),
    (ReplicatedLinear, _read_replicated),
    (RMSNorm, _read_replicated),
    (RoutedExperts, _read_experts),
)
