"""FP8 weights with one scale for every 128 x 128 block, as DeepSeek-V3 publishes them (V3 section 3.3, README_WEIGHTS).

A weight is stored as E4M3 codes with a float32 `weight_scale_inv` beside it; the last block of a row or column may be ragged.
The value is code * scale, computed in float32 and rounded once to the dtype that is asked for.
"""

from __future__ import annotations

import re

import torch

from megatron_r1.errors import ConversionError

BLOCK = 128  #: rows and columns of a block
SCALE_SUFFIX = "_scale_inv"
LARGEST = 448.0  #: of E4M3
_NAN = 0x7F  # code of NaN without its sign

_FP8_WEIGHTS = re.compile(
    r"\.(self_attn\.(q_proj|q_a_proj|q_b_proj|kv_a_proj_with_mqa|kv_b_proj|o_proj)"
    r"|mlp\.(experts\.\d+\.|shared_experts\.)?(gate_proj|up_proj|down_proj))\.weight$"
)


def is_fp8_weight(name: str) -> bool:
    """Whether a published deepseek_v3 checkpoint holds the tensor in FP8: every projection of attention and feed-forward.

    Embedding, output layer, router, norms and the projection of multi-token prediction stay in BF16.
    """
    return _FP8_WEIGHTS.search(name) is not None


def scale_name(name: str) -> str:
    """The tensor that holds the scales of weight `name`."""
    return name + SCALE_SUFFIX


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Blocks of a weight of this shape, rounded up."""
    return tuple(-(-size // BLOCK) for size in shape)


def dequantize(weight: torch.Tensor, scale_inv: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Values of a whole weight.

    Args:
        weight: [rows, columns] float8_e4m3fn.
        scale_inv: [ceil(rows / 128), ceil(columns / 128)] float32.
        dtype: of the result, float32, bfloat16 or float16.

    Raises:
        ConversionError: scales of another shape.
    """
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    dequantize_into(out, weight, scale_inv)
    return out


def dequantize_into(
    out: torch.Tensor, weight: torch.Tensor, scale_inv: torch.Tensor, first_row: int = 0, first_column: int = 0
) -> None:
    """Values of a weight, or of a piece that begins inside a block, into `out`. NaN codes give NaN.

    Args:
        out: [rows, columns] float32, bfloat16 or float16.
        weight: [rows, columns] float8_e4m3fn.
        scale_inv: float32, the blocks that the piece touches.
        first_row: of the piece, counted from the first row of the first block.
        first_column: likewise.

    Raises:
        ConversionError: scales of another shape.
    """
    rows, columns = weight.shape
    blocks = scale_shape((first_row + rows, first_column + columns))
    if tuple(scale_inv.shape) != blocks:
        raise ConversionError(f"FP8 scales have shape {list(scale_inv.shape)}, expected {list(blocks)}")
    if weight.numel() == 0:
        return
    if weight.is_cuda:
        scales = scale_inv.repeat_interleave(BLOCK, 0)[first_row : first_row + rows]
        out.copy_(weight.float() * scales.repeat_interleave(BLOCK, 1)[:, first_column : first_column + columns])
        return
    from megatron_r1.weights import fp8_cpu

    values = out if out.is_contiguous() else torch.empty_like(out, memory_format=torch.contiguous_format)
    fp8_cpu.decode_fp8(weight.contiguous(), scale_inv, first_row, first_column, values)
    if values is not out:
        out.copy_(values)


def prepare_decoder() -> None:
    """Import what decodes on a CPU, whose compiler takes a second; `dequantize_into` does so itself if nobody has."""
    from megatron_r1.weights import fp8_cpu  # noqa: F401


def may_hold_nan(weight: torch.Tensor, scale_inv: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether any value, in `dtype`, may be NaN or infinite. Looks at the codes, which takes less time than looking at the values.

    Args:
        weight: [rows, columns] float8_e4m3fn.
        scale_inv: float32, of its blocks.
        dtype: in which the values are to be held.
    """
    largest = float(scale_inv.abs().max()) * LARGEST if scale_inv.numel() else 0.0
    is_nan = weight.numel() > 0 and int(weight.view(torch.uint8).bitwise_and(_NAN).max()) == _NAN
    return is_nan or not largest <= torch.finfo(dtype).max


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of a weight: the largest value of a block becomes 448, the others are rounded to nearest even.

    Quantising what was dequantised from a weight whose blocks all hold a code of 448, as this function makes them, gives the
    same codes, from float32 and from bfloat16; and the same scales if the first weight was itself bfloat16, as
    DeepSeek's was. A block whose largest value is below 448 * 2^-126, or 0, becomes zeros with scale 1.

    Args:
        weight: [rows, columns], any floating dtype.

    Returns:
        [rows, columns] float8_e4m3fn and [ceil(rows / 128), ceil(columns / 128)] float32.

    Raises:
        ConversionError: a value that is NaN or infinite.
    """
    rows, columns = weight.shape
    blocks = scale_shape((rows, columns))
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device=weight.device)
    scales = torch.empty(blocks, dtype=torch.float32, device=weight.device)
    for block in range(blocks[0]):
        stripe = weight[block * BLOCK : (block + 1) * BLOCK]
        largest = torch.maximum(stripe.amax(0), stripe.amin(0).neg()).float()  # of every column; NaN stays NaN
        largest = torch.nn.functional.pad(largest, (0, blocks[1] * BLOCK - columns)).view(-1, BLOCK).amax(1)
        scale = largest / LARGEST
        scales[block] = torch.where(scale < torch.finfo(torch.float32).tiny, 1.0, scale)
        divisor = scales[block].repeat_interleave(BLOCK)[:columns]
        codes[block * BLOCK : (block + 1) * BLOCK].copy_(stripe / divisor)
    if not torch.isfinite(scales).all():
        raise ConversionError("a weight that is to be quantised to FP8 holds NaN or infinite values")
    return codes, scales
