"""A look at every element, once."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_r1.weights.finite import first_nonfinite, is_finite


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, 500, -1])
def test_one_element_among_many_is_found(dtype, value, at):
    tensor = torch.linspace(-3, 3, 1001).to(dtype)
    assert is_finite(tensor) and is_finite(tensor[::3])
    tensor[at] = value
    assert not is_finite(tensor) and not is_finite(tensor.view(7, 143).T)
    names = [("a", torch.ones(2)), ("b", tensor), ("c", tensor)]
    assert first_nonfinite(names) == "b" and first_nonfinite(names[:1]) is None


def test_what_has_no_numbers_to_look_at_is_finite():
    assert is_finite(torch.zeros(0)) and is_finite(torch.tensor([1, 2])) and is_finite(torch.tensor(1.0))


def test_every_code_of_float8_is_told():
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    assert [not is_finite(codes[i : i + 1]) for i in range(256)] == codes.float().isnan().tolist()


class Reads(torch.utils._python_dispatch.TorchDispatchMode):
    """Adds up the bytes that operations read and make of the tensor's size."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self._size, self.read, self.made = size, 0, 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        if not function.is_view:
            self.read += sum(t.nbytes for t in arguments if isinstance(t, torch.Tensor) and t.numel() >= self._size)
            results = result if isinstance(result, tuple) else (result,)
            self.made += sum(t.nbytes for t in results if isinstance(t, torch.Tensor) and t.numel() >= self._size)
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_costs_one_pass_and_no_copy(dtype):
    tensor = torch.ones(1 << 16, dtype=dtype)
    with Reads(tensor.numel()) as reads:
        is_finite(tensor)
    assert (reads.read, reads.made) == (tensor.nbytes, 0)
