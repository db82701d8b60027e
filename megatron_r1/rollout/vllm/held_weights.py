"""Finds the Hugging Face tensors in vLLM's fused, stacked and repacked weights, to read and to write them bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
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
from megatron_r1.rollout.vllm.kernel_order import KernelOrder, find_order
from megatron_r1.weights.boxes import Box, box_shape, slices_within

FUSED_PARTS = vllm_fused_parts()

#: Buffers that follow from the config alone: no update may change them.
CONSTANT_BUFFERS = ("cos_sin_cache", "_q_scale", "_k_scale", "_v_scale", "_prob_scale")


@dataclass(frozen=True)
class Held:
    """A Hugging Face tensor, or this worker's shard of it, as found in vLLM's memory."""

    name: str  #: Hugging Face name
    memory: torch.Tensor  #: view of the live parameter: of its shape, or flat if there is an `order`
    source: torch.Tensor  #: the parameter that it is part of
    axis: int | None = None  #: axis on which vLLM shards it; None: the whole tensor
    start: int = 0  #: index of the shard's first entry on that axis
    order: KernelOrder | None = None  #: in which a kernel keeps the matrix that it is part of
    part: tuple[slice, slice] = (slice(None), slice(None))  #: of that matrix

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor, or of this worker's shard."""
        return tuple(self.memory.shape) if self.order is None else tuple(side.stop - side.start for side in self.part)

    @property
    def box(self) -> Box:
        """The part of the whole tensor that it is."""
        spans = ((self.start, self.start + size) if at == self.axis else (0, size) for at, size in enumerate(self.shape))
        return tuple(spans)

    def read(self, box: Box | None = None) -> torch.Tensor:
        """Its values, or those of a box within the whole tensor; a view of the live parameter where that is possible."""
        where = self._find(box or self.box)
        if self.order is None:
            return self.memory[where]
        (rows, columns), (row, column) = box_shape(box or self.box), self._corner(where)
        return self.order.read(self.memory, row, column, rows, columns)

    def write(self, values: torch.Tensor, box: Box | None = None) -> None:
        """Overwrite it, or a box within the whole tensor, in place with values of any dtype, from any device.

        Raises ValueError if values have another shape than the box, or the box is not part of what is held.
        """
        where = self._find(box or self.box)
        if tuple(values.shape) != box_shape(box or self.box):
            raise ValueError(f"{self.name}: values of shape {list(values.shape)} do not fit {list(box_shape(box or self.box))}")
        if self.order is None:
            self.memory[where].copy_(values)
        else:
            self.order.write(self.memory, *self._corner(where), values.to(self.memory.device, self.memory.dtype))

    def _find(self, box: Box) -> tuple[slice, ...]:
        """Where a box stands in what is held."""
        own = self.box
        if len(box) != len(own) or any(a < first or b > last for (a, b), (first, last) in zip(box, own, strict=True)):
            raise ValueError(f"{self.name} {box} is not part of what the engine holds of it, {own}")
        return slices_within(box, own)

    def _corner(self, where: tuple[slice, ...]) -> tuple[int, int]:
        """First row and column in the kernel's matrix."""
        rows, columns = self.part
        return rows.start + where[0].start, columns.start + where[1].start


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
    first, second, all_ = slice(0, width), slice(half, half + width), slice(0, hidden)
    for e in range(module.w13_weight.shape[0]):
        yield _expert(module, f"{experts}.{e}.gate_proj.weight", module.w13_weight, e, (first, all_), axis_0, start)
        yield _expert(module, f"{experts}.{e}.up_proj.weight", module.w13_weight, e, (second, all_), axis_0, start)
        yield _expert(module, f"{experts}.{e}.down_proj.weight", module.w2_weight, e, (all_, first), axis_1, start)
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
    return Held(name, weight[e].view(-1), weight, axis, start, find_order(rows, columns, weight.dtype, kernel.isa), part)


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
