"""Block-scaled FP8: every code, ragged edges, slices inside blocks, and what quantising twice keeps."""

from __future__ import annotations

import pytest
import torch

from megatron_r1.errors import ConversionError
from megatron_r1.model.presets import PRESETS
from megatron_r1.weights.fp8 import (
    BLOCK,
    dequantize,
    dequantize_into,
    is_fp8_weight,
    quantize,
    scale_name,
    scale_shape,
)
from megatron_r1.weights.hf_export import hf_tensors
from megatron_r1.weights.mapping import hf_shapes

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def spread(scale_inv: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """The scale of every element."""
    return scale_inv.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[: shape[0], : shape[1]]


def plain(weight: torch.Tensor, scale_inv: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The definition, in torch's own words."""
    return (weight.float() * spread(scale_inv, weight.shape)).to(dtype)


def random_codes(shape: tuple[int, int], seed: int, *, nan: bool = False) -> torch.Tensor:
    codes = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    if not nan:
        codes[(codes & 127) == 127] = 0
    return codes.view(torch.float8_e4m3fn)


def random_scales(shape: tuple[int, int], seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.randint(-20, 4, scale_shape(shape), generator=generator)
    return torch.ldexp(torch.rand(scale_shape(shape), generator=generator) + 0.5, exponents)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 3e-4, 1e20, 1e-38, float("inf"), float("nan")])
def test_every_code_is_exact(dtype, scale):
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).expand(3, 256)
    scale_inv = torch.tensor([[scale, scale / 3]])
    got, want = dequantize(codes, scale_inv, dtype), plain(codes, scale_inv, dtype)
    assert torch.equal(got.isnan(), want.isnan()) and got.isnan().any()
    integers = torch.int32 if dtype is torch.float32 else torch.int16
    number = ~want.isnan()
    assert torch.equal(got.view(integers)[number], want.view(integers)[number])  # bits: also the sign of zero


@pytest.mark.parametrize("shape", [(1, 1), (128, 128), (576, 300), (130, 7168), (257, 129), (0, 128), (5, 200_000)])
def test_ragged_shapes_are_exact(shape):
    codes, scales = random_codes(shape, 0), random_scales(shape, 1)
    for dtype in DTYPES:
        assert torch.equal(dequantize(codes, scales, dtype), plain(codes, scales, dtype))


def test_a_single_nan_code_is_found():
    codes = random_codes((300, 300), 0)
    for code in (0x7F, 0xFF):
        codes.view(torch.uint8)[299, 299] = code
        values = dequantize(codes, random_scales((300, 300), 1), torch.bfloat16)
        assert values.isnan().nonzero().tolist() == [[299, 299]]


def test_a_piece_need_not_be_aligned():
    codes, scales = random_codes((576, 600), 0), random_scales((576, 600), 1)
    whole = dequantize(codes, scales, torch.bfloat16)
    for rows, columns in ((slice(100, 400), slice(130, 390)), (slice(127, 129), slice(0, 1)), (slice(570, 576), slice(599, 600))):
        blocks = [slice(part.start // BLOCK, -(-part.stop // BLOCK)) for part in (rows, columns)]
        out = torch.empty_like(whole[rows, columns])
        dequantize_into(out, codes[rows, columns], scales[blocks[0], blocks[1]], rows.start % BLOCK, columns.start % BLOCK)
        assert torch.equal(out, whole[rows, columns])


def test_scales_of_another_shape_are_refused():
    with pytest.raises(ConversionError, match=r"shape \[4, 1\], expected \[5, 1\]"):
        dequantize(random_codes((576, 128), 0), torch.ones(4, 1), torch.bfloat16)


@pytest.mark.parametrize("shape", [(128, 128), (576, 300), (1, 129)])
def test_rounding_error_is_bounded(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02
    codes, scales = quantize(weight)
    largest = torch.nn.functional.pad(weight.abs(), (0, -shape[1] % BLOCK, 0, -shape[0] % BLOCK))
    largest = largest.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK)).amax((1, 3))
    assert torch.equal(scales, largest / 448)
    error = (dequantize(codes, scales, torch.float32) - weight).abs()
    # Half a step: 2^-4 of the value for normal codes, 2^-10 of the scale below them.
    assert (error <= torch.maximum(weight.abs() / 16, spread(scales, shape) / 1024) * (1 + 1e-6)).all()


def test_codes_are_rounded_to_nearest_even():
    weight = torch.zeros(128, 128)
    weight[0, :6] = torch.tensor([448.0, 17.0, 19.0, -17.0, 17.01, 16.99])  # codes near 17 are 16 and 18
    codes, _ = quantize(weight)
    assert codes[0, :6].float().tolist() == [448, 16, 20, -16, 18, 16]


def test_zeros_get_scale_one():
    weight = torch.zeros(130, 128)
    weight[0, 0] = 1e-37  # in a block whose scale would have too few bits
    codes, scales = quantize(weight)
    assert scales.tolist() == [[1.0], [1.0]] and not codes.float().any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_no_numbers_are_not_quantised(bad):
    weight = torch.zeros(200, 200)
    weight[199, 3] = bad
    with pytest.raises(ConversionError, match="NaN or infinite"):
        quantize(weight)


def test_quantising_twice_changes_nothing():
    weight = torch.randn(576, 700, generator=torch.Generator().manual_seed(0)) * 0.02
    for first, exact_scales in ((weight.bfloat16(), True), (weight, False)):
        codes, scales = quantize(first)
        for dtype in (torch.float32, torch.bfloat16):
            again, scales_again = quantize(dequantize(codes, scales, dtype))
            assert torch.equal(again.view(torch.uint8), codes.view(torch.uint8))
            assert torch.allclose(scales_again, scales, rtol=2**-8, atol=0)
            if exact_scales and dtype is torch.bfloat16:
                assert torch.equal(scales_again, scales)


def test_published_v3_has_its_tensors_and_elements():
    shapes = {tensor.name: tensor.shape for tensor in hf_tensors(hf_shapes(PRESETS["671b"]), torch.float8_e4m3fn)}
    elements = sum(torch.Size(shape).numel() for shape in shapes.values())
    assert (len(shapes), elements) == (91_991, 684_531_386_000)
    assert shapes["model.layers.61.self_attn.kv_a_proj_with_mqa.weight_scale_inv"] == (5, 56)
    for name in ("lm_head", "model.layers.61.eh_proj", "model.layers.3.mlp.gate", "model.layers.0.input_layernorm"):
        assert not is_fp8_weight(f"{name}.weight") and scale_name(f"{name}.weight") not in shapes
