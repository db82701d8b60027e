"""Finds the Hugging Face tensors in vLLM's fused, stacked and repacked weights, to read and to write them bit for bit."""

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
    memory: torch.Tensor  #: view of the live parameter: of its shape, or flat if there are `places`
    source: torch.Tensor  #: the parameter that it is part of
    axis: int | None = None  #: axis on which vLLM shards it; None: the whole tensor
    start: int = 0  #: index of the shard's first entry on that axis
    places: torch.Tensor | None = None  #: of its shape: where each entry stands in `memory`, if a kernel has rearranged them

    @property
    def shape(self) -> torch.Size:
        """Of the tensor, or of this worker's shard."""
        return self.memory.shape if self.places is None else self.places.shape

    def read(self) -> torch.Tensor:
        """Its values; a view of the live parameter where that is possible."""
        return self.memory if self.places is None else self.memory.take(self.places)

    def write(self, whole: torch.Tensor) -> None:
        """Overwrite it in place with its part of the whole tensor, which may lie on another device and be of another type.

        Raises ValueError if the tensor does not have the shape of the one that is held.
        """
        part = whole if self.axis is None else whole.narrow(self.axis, self.start, self.shape[self.axis])
        if part.shape != self.shape:
            raise ValueError(f"{self.name} {list(whole.shape)} does not fit the engine's {list(self.shape)}")
        if self.places is None:
            self.memory.copy_(part)
        else:
            self.memory[self.places] = part.to(self.memory.device, self.memory.dtype)


def read_held(model: torch.nn.Module) -> Iterator[Held]:
    """Every Hugging Face tensor that the model holds; of copies that vLLM keeps of one tensor each is found, each place once.

    Tied output weights have no tensor of their own in Hugging Face. Where vLLM did not leave them the embedding's very parameter,
    they are one more copy of it.
    """
    seen: set[tuple[str, int, int]] = set()
    for held in _read_modules(model):
        place = (held.name, held.memory.data_ptr(), id(held.source))
        if place not in seen:
            seen.add(place)
            yield held


def _read_modules(model: torch.nn.Module) -> Iterator[Held]:
    """What each module holds. A parameter that two of them share comes twice."""
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
    half = module.w13_weight.shape[1] // 2
    axis_0, axis_1 = (0, 1) if parallel.tp_size > 1 else (None, None)
    start = parallel.tp_rank * width
    experts = name.removesuffix(".routed_experts")
    first, second = slice(width), slice(half, half + width)
    for e in range(module.w13_weight.shape[0]):
        yield _expert(module, f"{experts}.{e}.gate_proj.weight", module.w13_weight, e, (first, slice(hidden)), axis_0, start)
        yield _expert(module, f"{experts}.{e}.up_proj.weight", module.w13_weight, e, (second, slice(hidden)), axis_0, start)
        yield _expert(module, f"{experts}.{e}.down_proj.weight", module.w2_weight, e, (slice(hidden), first), axis_1, start)
    if module.e_score_correction_bias is not None:
        yield _router_bias(experts, module.e_score_correction_bias)


def _router_bias(experts_name: str, bias: torch.Tensor) -> Held:
    return Held(experts_name.removesuffix(".experts") + ".gate.e_score_correction_bias", bias, bias)


def _shard(name: str, tensor: torch.Tensor, source: torch.Tensor, module: torch.nn.Module, axis: int, size: int) -> Held:
    return Held(name, tensor, source, axis if module.tp_size > 1 else None, module.tp_rank * size)


def _expert(
    module: RoutedExperts, name: str, weight: torch.Tensor, e: int, part: tuple[slice, slice], axis: int | None, start: int
) -> Held:
    """A part of expert e's matrix, whose entries the CPU kernel keeps in an order of its own."""
    kernel = module.quant_method.moe_kernel.fused_experts
    if not isinstance(kernel, CPUUnquantizedExperts):
        return Held(name, weight[e][part], weight, axis, start)
    rows, columns = weight.shape[1:]
    places = _packed_places(rows, columns, weight.dtype, kernel.isa).view(rows, columns)[part]
    return Held(name, weight[e].view(-1), weight, axis, start, places)


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
