"""Part 6: one layer of the 671B model as one GPU of tp8, ep32 has it, without the collectives: time, memory, and what experts cost.

A GPU of the preset has 16 of 128 heads over all 32,768 tokens of a micro-batch, an eighth of the rows outside attention, and 8 of
256 experts. With balanced routing they get as many tokens as the micro-batch has; twice the tokens is what imbalance brings.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from tests.gpu.hour.ground import Ground


@dataclass(frozen=True)
class Shape:
    """Sizes of one GPU's share."""

    tokens: int  #: of a micro-batch, which attention sees whole
    sequence: int  #: tokens of each of its sequences
    parts: int = 8  #: tensor-parallel ranks
    hidden: int = 7168
    query_rank: int = 1536
    key_rank: int = 512
    heads: int = 16
    nope: int = 128
    rope: int = 64
    value: int = 128
    experts: int = 8
    width: int = 2048


FULL = Shape(32768, 8192)
SMALL = Shape(64, 32, hidden=64, query_rank=32, key_rank=32, heads=2, nope=16, rope=8, value=16, experts=4, width=32)


class Layer(torch.nn.Module):
    """Latent attention, a shared expert and routed experts, as plain matrix products on the project's own parts."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        from megatron_r1.mcore.layers import CoreAttention

        super().__init__()
        s = self.shape = shape
        sizes = {
            "query_down": (s.query_rank, s.hidden), "query_up": (s.heads * (s.nope + s.rope), s.query_rank),
            "key_down": (s.key_rank + s.rope, s.hidden), "key_up": (s.heads * (s.nope + s.value), s.key_rank),
            "output": (s.hidden, s.heads * s.value), "shared_in": (2 * s.width // s.parts, s.hidden),
            "shared_out": (s.hidden, s.width // s.parts), "router": (s.experts, s.hidden),
        }  # fmt: skip
        for name, (rows, columns) in sizes.items():
            self.register_parameter(name, torch.nn.Parameter(_draw(rows, columns, device)))
        self.experts_in = torch.nn.ParameterList(_draw(2 * s.width, s.hidden, device) for _ in range(s.experts))
        self.experts_out = torch.nn.ParameterList(_draw(s.hidden, s.width, device) for _ in range(s.experts))
        one_rank = SimpleNamespace(cp=SimpleNamespace(size=lambda: 1, rank=lambda: 0))
        self.attention = CoreAttention(SimpleNamespace(), softmax_scale=(s.nope + s.rope) ** -0.5, pg_collection=one_rank)
        bounds = torch.arange(0, s.tokens + 1, s.sequence, dtype=torch.int32, device=device)
        self.packing = SimpleNamespace(cu_seqlens_q=bounds)

    def forward(self, x: torch.Tensor, dispatched: int) -> torch.Tensor:
        """[tokens, hidden] -> the same; `dispatched` rows go through the experts."""
        x = x + self.attend(F.rms_norm(x, x.shape[-1:]))
        normed = F.rms_norm(x, x.shape[-1:])
        gate, up = F.linear(normed, self.shared_in).chunk(2, -1)
        shared = F.linear(F.silu(gate) * up, self.shared_out)
        rows, probs = self.dispatch(normed, dispatched)
        routed = self.experts(rows, probs)
        own = x.shape[0] // self.shape.parts
        combined = routed.view(-1, own, routed.shape[-1]).sum(0)
        return x + shared + F.pad(combined, (0, 0, 0, x.shape[0] - own))

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        """The down-projections of this rank's rows, the rest of all."""
        s, own = self.shape, x[: x.shape[0] // self.shape.parts]
        query_rank = F.linear(own, self.query_down).repeat(s.parts, 1)  # what a gather over the ranks gives
        key_rank, rope = F.linear(own, self.key_down).repeat(s.parts, 1).split([s.key_rank, s.rope], -1)
        query = F.linear(query_rank, self.query_up).view(s.tokens, s.heads, -1)
        key, value = F.linear(key_rank, self.key_up).view(s.tokens, s.heads, -1).split([s.nope, s.value], -1)
        key = torch.cat([key, rope.unsqueeze(1).expand(-1, s.heads, -1)], -1)
        mixed = self.attention(query, key, value.contiguous(), packed_seq_params=self.packing)
        return F.linear(mixed.flatten(1), self.output)

    def dispatch(self, x: torch.Tensor, dispatched: int) -> tuple[torch.Tensor, torch.Tensor]:
        """As many rows as experts are sent, from this rank's own."""
        own = x[: x.shape[0] // self.shape.parts]
        probs = F.linear(own.float(), self.router.float()).sigmoid().amax(-1)
        times = dispatched // own.shape[0]
        return own.repeat(times, 1), probs.repeat(times)

    def experts(self, rows: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
        """The project's own loop over experts."""
        from megatron_r1.mcore.layers import LeanExperts

        local = [
            SimpleNamespace(linear_fc1=_linear(into), linear_fc2=_linear(out))
            for into, out in zip(self.experts_in, self.experts_out, strict=True)
        ]
        own = SimpleNamespace(tp_group=SimpleNamespace(size=lambda: 1), local_experts=local)
        return LeanExperts.forward(own, rows, _even(rows.shape[0], self.shape.experts), probs)[0]


def _linear(weight: torch.nn.Parameter) -> torch.nn.Module:
    """A module that holds a weight."""
    module = torch.nn.Module()
    module.weight = weight
    return module


def run(ground: Ground) -> None:
    """The layer, with balanced routing and with twice the tokens; then experts alone, in three ways."""
    from megatron_r1.mcore.device_checks import device_checks

    device_checks(ground.kind)[0].run()  # prepares Megatron-Core for the device
    shape = ground.pick(FULL, SMALL)
    torch.manual_seed(0)
    layer = Layer(shape, ground.device)
    ground.say("weights", sum(p.numel() for p in layer.parameters()) / 1e6, "million")
    for times, name in ((1, "balanced"), (2, "twice the tokens")):
        dispatched = times * shape.tokens
        x = torch.randn(shape.tokens, shape.hidden, device=ground.device, dtype=torch.bfloat16, requires_grad=True)

        def forward(x: torch.Tensor = x, dispatched: int = dispatched) -> None:
            with torch.no_grad():
                layer(x, dispatched)

        def train(x: torch.Tensor = x, dispatched: int = dispatched) -> None:
            layer(x, dispatched).sum().backward()

        def recompute(x: torch.Tensor = x, dispatched: int = dispatched) -> None:
            checkpoint(layer, x, dispatched, use_reentrant=False).sum().backward()

        for what, work in (("forward", forward), ("forward and backward", train), ("the same, recomputed", recompute)):
            ground.say(f"{name}: {what}", ground.seconds(work) * 1e3, "ms")
        ground.say_peak(f"{name}: peak of forward and backward", train)
        ground.say_peak(f"{name}: peak recomputed", recompute)
        layer.zero_grad(set_to_none=True)
    ground.check("gradients are finite", _is_finite(layer, shape))
    _measure_experts(ground, layer, shape)


def _measure_experts(ground: Ground, layer: Layer, shape: Shape) -> None:
    rows = torch.randn(shape.tokens, shape.hidden, device=ground.device, dtype=torch.bfloat16)
    probs = torch.rand(shape.tokens, device=ground.device)
    into = torch.stack(list(layer.experts_in)).detach().transpose(1, 2)
    out = torch.stack(list(layer.experts_out)).detach().transpose(1, 2)
    ends = _even(shape.tokens, shape.experts).cumsum(0).to(ground.device, torch.int32)
    with torch.no_grad():
        loop = layer.experts(rows, probs)
        ground.say("experts forward: a loop", ground.seconds(lambda: layer.experts(rows, probs)) * 1e3, "ms")

        def grouped(activate: object) -> torch.Tensor:
            return torch._grouped_mm(activate(torch._grouped_mm(rows, into, offs=ends)), out, offs=ends)

        def plain(x: torch.Tensor) -> torch.Tensor:
            gate, up = x.chunk(2, -1)
            return (F.silu(gate) * up * probs.unsqueeze(-1)).to(x.dtype)

        def fused(x: torch.Tensor) -> torch.Tensor:
            from megatron.core.fusions.fused_bias_swiglu import weighted_bias_swiglu_impl

            return weighted_bias_swiglu_impl(x, None, probs.unsqueeze(-1))

        for name, activate in (("a grouped product", plain), ("a grouped product, SwiGLU fused", fused)):
            ground.attempt(f"experts forward: {name}", partial(_compare, ground, name, partial(grouped, activate), loop))


def _compare(ground: Ground, name: str, work: partial, loop: torch.Tensor) -> None:
    off = ((work().float() - loop.float()).abs().max() / loop.float().abs().max()).item()
    ground.check(f"experts: {name} gives what the loop gives", off < 3e-2, f"off by {off:.1e}")
    ground.say(f"experts forward: {name}", ground.seconds(work) * 1e3, "ms")


def _is_finite(layer: Layer, shape: Shape) -> bool:
    x = torch.randn(shape.tokens, shape.hidden, device=layer.output.device, dtype=torch.bfloat16)
    layer(x, shape.tokens).sum().backward()
    return all(bool(p.grad.isfinite().all()) for p in layer.parameters() if p.grad is not None)


def _even(tokens: int, experts: int) -> torch.Tensor:
    return torch.tensor([tokens // experts] * experts)


def _draw(rows: int, columns: int, device: torch.device) -> torch.Tensor:
    return torch.randn(rows, columns, device=device, dtype=torch.bfloat16) * columns**-0.5
