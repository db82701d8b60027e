"""What the trainer needs of a device, run small: collectives of both kinds, and the three operations that layers are made of.

Every operation is compared with a plain formula in float32, forward and backward. The layers are those that would be trained with:
Transformer Engine's, or without it our own, so the same checks run on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.attention import SDPBackend

from megatron_r1.mcore.active import have_transformer_engine, on_transformer_engine
from megatron_r1.mcore.host import activate
from megatron_r1.runtime.device import Device, resolve_device
from megatron_r1.runtime.doctor import DeviceCheck

#: Largest difference, as a share of the largest number of a tensor: rounding, not another formula.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
EPS = 1e-6
QUERY_DIM, VALUE_DIM = 192, 128  #: DeepSeek-V3's heads

RunLayer = Callable[..., torch.Tensor]


class CheckedLayers(Protocol):
    """The operations of one library. Each is given its weights and gives a function, and the parameters that it is derived by."""

    def norm_linear(self, gain: torch.Tensor, weight: torch.Tensor) -> tuple[RunLayer, list[torch.Tensor]]:
        """RMSNorm, then a linear layer without bias: [n, in] -> [n, out]."""

    def grouped_product(self, weights: Sequence[torch.Tensor], counts: list[int]) -> tuple[RunLayer, list[torch.Tensor]]:
        """The first counts[0] rows times the first weight, and so on: [n, in] -> [n, out]."""

    def packed_attention(self, cu_seqlens: torch.Tensor, longest: int) -> RunLayer:
        """Causal attention within each sequence: [n, heads, 192], the same, [n, heads, 128] -> [n, heads * 128]."""

    def attention_kernel(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> str:
        """What the attention before this call ran on."""


class TransformerEngineLayers:
    """The classes that Megatron-Core wraps."""

    def norm_linear(self, gain: torch.Tensor, weight: torch.Tensor) -> tuple[RunLayer, list[torch.Tensor]]:
        """See `CheckedLayers`."""
        from transformer_engine.pytorch import LayerNormLinear

        module = LayerNormLinear(
            weight.shape[1], weight.shape[0], eps=EPS, bias=False, normalization="RMSNorm", params_dtype=weight.dtype,
            device=weight.device,
        )  # fmt: skip
        return module, _fill_parameters([module.layer_norm_weight, module.weight], [gain, weight])

    def grouped_product(self, weights: Sequence[torch.Tensor], counts: list[int]) -> tuple[RunLayer, list[torch.Tensor]]:
        """See `CheckedLayers`."""
        from transformer_engine.pytorch import GroupedLinear

        out, into = weights[0].shape
        module = GroupedLinear(
            len(weights), into, out, bias=False, params_dtype=weights[0].dtype, device=weights[0].device
        )  # fmt: skip
        parameters = [getattr(module, f"weight{number}") for number in range(len(weights))]
        return partial(module, m_splits=counts), _fill_parameters(parameters, weights)

    def packed_attention(self, cu_seqlens: torch.Tensor, longest: int) -> RunLayer:
        """See `CheckedLayers`."""
        from transformer_engine.pytorch import DotProductAttention

        def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            module = DotProductAttention(
                query.shape[1], (QUERY_DIM, VALUE_DIM), qkv_format="thd", attn_mask_type="padding_causal",
                softmax_scale=QUERY_DIM**-0.5,
            )  # fmt: skip
            return module(
                query, key, value, qkv_format="thd", attn_mask_type="padding_causal", cu_seqlens_q=cu_seqlens,
                cu_seqlens_kv=cu_seqlens, max_seqlen_q=longest, max_seqlen_kv=longest,
            )  # fmt: skip

        return attend

    def attention_kernel(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> str:
        """See `CheckedLayers`. Transformer Engine keeps its choice in a dict that is not public."""
        from transformer_engine.pytorch.attention import dot_product_attention

        chosen = getattr(dot_product_attention, "_attention_backends", {})
        if chosen.get("use_flash_attention"):
            return f"FlashAttention {chosen.get('flash_attention_backend')}"
        if chosen.get("use_fused_attention"):
            return f"cuDNN's fused attention ({chosen.get('fused_attention_backend')})"
        return "unfused attention, slow" if chosen.get("use_unfused_attention") else "a kernel that it does not tell"


class TorchLayers:
    """Our own layers, which train where Transformer Engine is not."""

    def norm_linear(self, gain: torch.Tensor, weight: torch.Tensor) -> tuple[RunLayer, list[torch.Tensor]]:
        """See `CheckedLayers`."""
        from megatron_r1.mcore.layers import RMSNorm

        norm = RMSNorm(SimpleNamespace(params_dtype=weight.dtype, sequence_parallel=False), len(gain), eps=EPS).to(weight.device)
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype, device=weight.device)
        return lambda x: linear(norm(x)), _fill_parameters([norm.weight, linear.weight], [gain, weight])

    def grouped_product(self, weights: Sequence[torch.Tensor], counts: list[int]) -> tuple[RunLayer, list[torch.Tensor]]:
        """See `CheckedLayers`: as `LeanExperts` splits its tokens."""
        parameters = [torch.nn.Parameter(weight.clone()) for weight in weights]

        def run(x: torch.Tensor) -> torch.Tensor:
            return torch.cat([F.linear(part, weight) for part, weight in zip(x.split(counts), parameters, strict=True)])

        return run, parameters

    def packed_attention(self, cu_seqlens: torch.Tensor, longest: int) -> RunLayer:
        """See `CheckedLayers`."""
        from megatron_r1.mcore.layers import CoreAttention

        one_rank = SimpleNamespace(cp=SimpleNamespace(size=lambda: 1, rank=lambda: 0))
        attention = CoreAttention(SimpleNamespace(), softmax_scale=QUERY_DIM**-0.5, pg_collection=one_rank)
        packing = SimpleNamespace(cu_seqlens_q=cu_seqlens)
        return lambda query, key, value: attention(query, key, value, packed_seq_params=packing).flatten(1)

    def attention_kernel(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> str:
        """See `CheckedLayers`: what torch takes for one sequence of these heads."""
        rows = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))
        choice = SDPBackend(torch._fused_sdp_choice(*rows, None, 0.0, True, scale=QUERY_DIM**-0.5))
        return f"torch's {choice.name.lower().replace('_', ' ')}"


def device_checks(kind: str) -> list[DeviceCheck]:
    """The checks of a device, "cpu" or "cuda", for `runtime.doctor`. Each fails alone."""
    where = partial(_prepare_device, kind)
    return [
        DeviceCheck("Layers", lambda: name_layers(where()), "see docs/cluster.md for the installation"),
        DeviceCheck(
            "Collectives", lambda: check_collectives(where()),
            "look at NCCL_DEBUG=INFO, NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME",
        ),
        DeviceCheck(
            "Norm and linear", lambda: check_norm_linear(_layers_here(where()), where()),
            "Transformer Engine may be compiled for another torch, CUDA or GPU: compile it again (docs/cluster.md)",
        ),
        DeviceCheck(
            "Grouped product", lambda: check_grouped_product(_layers_here(where()), where()),
            "Transformer Engine may be compiled for another torch, CUDA or GPU: compile it again (docs/cluster.md)",
        ),
        DeviceCheck(
            "Packed attention 192/128", lambda: check_packed_attention(_layers_here(where()), where()),
            "cuDNN 9.5 or newer takes these heads; NVTE_DEBUG=1 NVTE_DEBUG_LEVEL=2 says why Transformer Engine takes no kernel",
        ),
    ]  # fmt: skip


def name_layers(device: Device) -> str:
    """Whose layers are trained with. Raises DeviceError if Transformer Engine is there and does not load."""
    if on_transformer_engine():
        return "Transformer Engine's"
    there = ", Transformer Engine is not used on the CPU" if device.kind == "cpu" and have_transformer_engine() else ""
    return f"torch's{there}"


def check_collectives(device: Device) -> str:
    """Tensors of the device and of the host, and objects, over one process group of this process alone."""
    with _world_of_one(device):
        for where in {torch.device("cpu"), device.torch_device}:
            numbers = torch.arange(1.0, 9.0, device=where)
            dist.all_reduce(numbers)
            _require_right(numbers.sum().item() == 36.0 * dist.get_world_size(), f"a sum over the ranks is wrong on {where}")
        gathered: list[object] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, {"rank": dist.get_rank()})
        _require_right(gathered[dist.get_rank()] == {"rank": dist.get_rank()}, "an object does not come back from a gather")
        box = [("from", 0)] if dist.get_rank() == 0 else [None]
        dist.broadcast_object_list(box, src=0)
        _require_right(box == [("from", 0)], "an object does not come out of a broadcast")
    return "tensors over NCCL and gloo, objects over gloo" if device.kind == "cuda" else "tensors and objects over gloo"


def check_norm_linear(layers: CheckedLayers, device: Device) -> str:
    """RMSNorm with linear layer against its formula."""
    draw = _DrawNormal(device)
    gain, weight, x = 1 + draw(256) / 10, draw(512, 256) / 16, draw(64, 256)
    run, parameters = layers.norm_linear(gain, weight)

    def formula(x: torch.Tensor, gain: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return (x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * gain) @ weight.T

    return _compare_with_formula(run, [x], parameters, [gain, weight], formula)


def check_grouped_product(layers: CheckedLayers, device: Device) -> str:
    """Rows of several experts, one of which has none, against a product of every row with its own weight."""
    draw, counts = _DrawNormal(device), [3, 0, 17, 44]
    weights, x = [draw(96, 128) / 11 for _ in counts], draw(sum(counts), 128)
    run, parameters = layers.grouped_product(weights, counts)
    expert = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)).to(device.torch_device)

    def formula(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        return torch.einsum("ni,noi->no", x, torch.stack(weights)[expert])

    return _compare_with_formula(run, [x], parameters, weights, formula)


def check_packed_attention(layers: CheckedLayers, device: Device) -> str:
    """Sequences behind each other (thd) against one softmax with a mask of blocks. Says which kernel ran."""
    draw, lengths = _DrawNormal(device), [1, 5, 64, 58]
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=device.torch_device)
    query, key, value = draw(sum(lengths), 4, QUERY_DIM), draw(sum(lengths), 4, QUERY_DIM), draw(sum(lengths), 4, VALUE_DIM)
    position = torch.arange(sum(lengths), device=device.torch_device)
    sequence = torch.bucketize(position, bounds[1:], right=True)
    seen = (sequence[:, None] == sequence) & (position[:, None] >= position)

    def formula(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        scores = torch.einsum("qhd,khd->hqk", query, key) * QUERY_DIM**-0.5
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        return torch.einsum("hqk,khd->qhd", weights, value).flatten(1)

    compared = _compare_with_formula(layers.packed_attention(bounds, max(lengths)), [query, key, value], [], [], formula)
    return f"{layers.attention_kernel(query, key, value)}: {compared}"


def _prepare_device(kind: str) -> Device:
    device = resolve_device("cuda" if kind == "cuda" else "cpu")
    activate(device.kind)
    return device


def _layers_here(device: Device) -> CheckedLayers:
    return TransformerEngineLayers() if on_transformer_engine() else TorchLayers()


class _DrawNormal:
    """Normal numbers, the same at every start, in the device's own format of training."""

    def __init__(self, device: Device) -> None:
        self.device, self.generator = device, torch.Generator().manual_seed(0)
        self.dtype = torch.bfloat16 if device.kind == "cuda" else torch.float32

    def __call__(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.device.torch_device, self.dtype)


def _fill_parameters(parameters: list[torch.Tensor], values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)
    return parameters


def _compare_with_formula(
    run: RunLayer, inputs: list[torch.Tensor], parameters: list[torch.Tensor], values: list[torch.Tensor], formula: RunLayer
) -> str:
    """Hold output and gradients of `run` against those of a formula in float32. Raises RuntimeError with what is wrong.

    Args:
        parameters: by which `run` is derived beside its inputs.
        values: what they should be.
    """
    inputs = [x.requires_grad_() for x in inputs]
    exact = [x.detach().float().requires_grad_() for x in (*inputs, *values)]
    expected = formula(*exact)
    upstream = torch.linspace(-1, 1, expected.numel(), device=expected.device).view_as(expected)
    expected.backward(upstream)
    output = run(*inputs)
    output.backward(upstream.to(output.dtype).view_as(output))
    found = [("output", output, expected)]
    found += [
        (f"gradient {n}", got.grad, want.grad) for n, (got, want) in enumerate(zip((*inputs, *parameters), exact, strict=True))
    ]
    worst = 0.0
    for name, got, want in found:
        _require_right(got is not None and got.shape == want.shape, f"the {name} is missing or has another shape")
        off = ((got.float() - want).abs().max() / want.abs().max().clamp_min(1e-30)).item()
        _require_right(off <= TOLERANCE[inputs[0].dtype], f"the {name} is off by {off:.1e} of its largest number")
        worst = max(worst, off)
    return f"right to {worst:.0e}, forward and backward, in {str(inputs[0].dtype).removeprefix('torch.')}"


def _require_right(is_right: bool, what: str) -> None:
    if not is_right:
        raise RuntimeError(what)


@contextmanager
def _world_of_one(device: Device) -> Iterator[None]:
    """The process group that is there, or one of this process alone for the block."""
    if dist.is_initialized():
        yield
        return
    dist.init_process_group(device.backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
