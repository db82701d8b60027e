"""Part 7: which of torch's attention kernels take heads of 192 and 128, and what they cost."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.gpu.hour.ground import Ground

KERNELS = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
QUERY, VALUE, HEADS = 192, 128, 16


def run(ground: Ground) -> None:
    """Forward and backward, causal, of one sequence; then flash with values padded to the width of queries."""
    cases = [(kernel, VALUE) for kernel in KERNELS] + [(SDPBackend.FLASH_ATTENTION, QUERY)]
    for length in ground.pick((8192, 32768), (64,)):
        for kernel, width in cases:
            if kernel is SDPBackend.MATH and length > 8192:
                continue  # its scores alone would be 34 GB a direction
            what = f"{_name(kernel)}{' with padded values' if width > VALUE else ''}, {length} tokens"
            ground.attempt(what, partial(_measure, ground, what, kernel, length, width))
    query, key, value = _draw(ground, 64, VALUE)
    choice = SDPBackend(torch._fused_sdp_choice(query, key, value, None, 0.0, True))
    ground.say("what torch takes by itself", _name(choice))


def _measure(ground: Ground, what: str, kernel: SDPBackend, length: int, width: int) -> None:
    query, key, value = _draw(ground, length, VALUE)

    def work() -> None:
        with sdpa_kernel(kernel):
            padded = F.pad(value, (0, width - VALUE)) if width > VALUE else value
            output = F.scaled_dot_product_attention(query, key, padded, is_causal=True)[..., :VALUE]
            output.sum().backward()

    seconds = ground.seconds(work)
    products = 3.5 * 2 * HEADS * length * length / 2 * (QUERY + VALUE)  # forward and 2.5 times it backward, half by causality
    ground.say(f"{what}: forward and backward", seconds * 1e3, "ms")
    ground.say(f"{what}: rate", products / seconds / 1e12, "TFLOP/s")
    ground.say_peak(f"{what}: peak", work)


def _draw(ground: Ground, length: int, width: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator(ground.device).manual_seed(0)
    shapes = [(1, HEADS, length, QUERY), (1, HEADS, length, QUERY), (1, HEADS, length, width)]
    drawn = [torch.randn(shape, generator=generator, device=ground.device, dtype=torch.bfloat16) for shape in shapes]
    return tuple(x.requires_grad_() for x in drawn)


def _name(kernel: SDPBackend) -> str:
    return kernel.name.lower().replace("_", " ")
