"""Layers on a CPU: attention whose values have another width than keys has torch's own bits; experts in bf16 have few shapes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_r1.mcore import host

host.activate("cpu")

from megatron_r1.mcore import layers


@pytest.mark.parametrize("tokens", [1, 41])
@pytest.mark.parametrize("scale", [None, 0.13])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unfused_attention_has_torchs_bits(tokens, scale, dtype):
    generator = torch.Generator().manual_seed(0)
    query, key, value, gradient = (torch.randn(3, 2, tokens, width, generator=generator).to(dtype) for width in (96, 96, 32, 32))
    inputs = [x.requires_grad_() for x in (query, key, value)]
    expected = F.scaled_dot_product_attention(*inputs, is_causal=True, scale=scale)
    found = layers._attend_unfused(*inputs, scale)
    assert torch.equal(found, expected)
    own, torchs = (torch.autograd.grad(output, inputs, gradient) for output in (found, expected))
    assert all(torch.equal(*pair) for pair in zip(own, torchs, strict=True))


class LargestTensor(TorchDispatchMode):
    """Most numbers of a tensor that is made while it watches."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            self.numbers = max(self.numbers, tensor.numel() if isinstance(tensor, torch.Tensor) else 0)
        return made


@pytest.mark.parametrize("widths", [(24, 16), (16, 24), (16, 16)], ids=["narrow values", "wide values", "one width"])
@pytest.mark.parametrize("scale", [None, 0.13])
@pytest.mark.parametrize("kind", ["causal", "masked", "grouped"])
def test_long_rows_are_attended_to_without_all_their_scores(widths, scale, kind):
    generator, tokens, rows, heads = torch.Generator().manual_seed(0), layers._LONGEST_UNFUSED + 45, 2, 4
    of_keys = 2 if kind == "grouped" else heads
    shapes = ((heads, widths[0]), (of_keys, widths[0]), (of_keys, widths[1]))
    inputs = [torch.randn(tokens, rows, *shape, generator=generator).requires_grad_() for shape in shapes]
    gradient = torch.randn(tokens, rows, heads, widths[1], generator=generator)
    sees = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    mask = sees.expand(rows, 1, tokens, tokens) if kind == "masked" else None
    layer = SimpleNamespace(scale=scale)
    with LargestTensor() as watch:
        found = layers.CoreAttention._attend(layer, *inputs, mask)
        own = torch.autograd.grad(found, inputs, gradient)
    assert watch.numbers < rows * heads * tokens**2  # the mask itself has rows * tokens^2
    query, key, value = exact = [x.detach().double().requires_grad_() for x in inputs]
    key, value = (x.repeat_interleave(heads // of_keys, 2) for x in (key, value))
    scores = torch.einsum("sbhd,tbhd->bhst", query, key) * (widths[0] ** -0.5 if scale is None else scale)
    expected = torch.einsum("bhst,tbhd->sbhd", scores.masked_fill(~sees, -torch.inf).softmax(-1), value)
    for a, b in zip((found, *own), (expected, *torch.autograd.grad(expected, exact, gradient.double())), strict=True):
        assert torch.allclose(a.double(), b, rtol=1e-5, atol=1e-5 * b.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_of_experts_in_bf16_have_few_shapes(dtype):
    generator = torch.Generator().manual_seed(0)
    counts, hidden, width = [33, 0, 64, 7], 16, 8
    weights = [[torch.randn(shape, generator=generator) / 4 for shape in ((2 * width, hidden), (hidden, width))] for _ in counts]
    weights = [[weight.to(dtype).requires_grad_() for weight in pair] for pair in weights]
    linears = [[SimpleNamespace(weight=weight, _forward_pre_hooks={}) for weight in pair] for pair in weights]
    experts = [SimpleNamespace(linear_fc1=first, linear_fc2=second) for first, second in linears]
    layer = SimpleNamespace(tp_group=SimpleNamespace(size=lambda: 1), local_experts=experts)
    x = torch.randn(sum(counts), hidden, generator=generator).to(dtype).requires_grad_()
    probs = torch.rand(sum(counts), generator=generator).requires_grad_()
    rows = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.mm.default and args[0].shape[1] in (hidden, width, 2 * width):
                rows.add(args[0].shape[0])
            return func(*args, **(kwargs or {}))

    with Watch():
        output, _ = layers.LeanExperts.forward(layer, x, torch.tensor(counts), probs)
    assert rows == ({64, 32, 0} if dtype == torch.bfloat16 else set(counts)) and output.shape == x.shape
    leaves = [x, probs, *(weight for pair in weights for weight in pair)]
    found = torch.autograd.grad(output.float().square().sum(), leaves)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    parts, chosen = exact[0].split(counts), exact[1].unsqueeze(-1).split(counts)
    outputs = []
    for part, p, first, second in zip(parts, chosen, exact[2::2], exact[3::2], strict=True):
        gate, up = F.linear(part, first).chunk(2, -1)
        outputs.append(F.linear(F.silu(gate) * up * p, second))
    whole = torch.cat(outputs)
    bound = 2e-2 if dtype == torch.bfloat16 else 1e-5
    assert (output - whole).norm() < bound * whole.norm()
    for one, other in zip(found, torch.autograd.grad(whole.square().sum(), exact), strict=True):
        assert (one - other).norm() <= bound * other.norm()
