"""Matrix products of vLLM's CPU engine with weights that oneDNN has rearranged for them, beside the plain ones.

The plain weight stays: updates are written into it, and checksums are read from it. The packed copy is made from it after every
update, and read back bit for bit where weights are verified. It costs the weight's bytes once more. For the few rows of a decoding
step torch's product on the plain weight, which arranges it anew at every call, takes up to twice as long.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

#: Entries of the smallest weight that is packed: below, the plain product is as fast.
SMALLEST_PACKED = 1 << 18

_ROWS = 32  #: of the input for which oneDNN chooses the arrangement; any number may come


class PackedLinear:
    """`x @ weight.T + bias`, in place of `torch.nn.functional.linear`. The first call packs: not every weight is multiplied."""

    def __init__(self) -> None:
        self._packed: torch.Tensor | None = None
        self._weight: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """The product; x is [..., in], the result [..., out]."""
        if self._packed is None or self._weight is not weight:
            self._weight = weight
            self.pack()
        return torch.ops.mkldnn._linear_pointwise(x, self._packed, bias, "none", [], "")

    def pack(self) -> None:
        """Pack the weight again if it ever was, since it has other values now."""
        if self._weight is not None:
            self._packed = torch.ops.mkldnn._reorder_linear_weight(self._weight.detach(), _ROWS)

    def is_current(self) -> bool:
        """Whether it computes with the weight's very bits."""
        return self._packed is None or self._weight is None or torch.equal(self._packed.to_dense(), self._weight)


def choose_linear(weight: torch.Tensor) -> PackedLinear | None:
    """The product for a weight that gains by packing; None: torch's own."""
    is_fit = weight.ndim == 2 and not weight.is_meta and weight.numel() >= SMALLEST_PACKED
    is_known = weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return PackedLinear() if is_fit and is_known and torch.backends.mkldnn.is_available() else None


def find_packed(model: torch.nn.Module) -> Iterator[tuple[str, PackedLinear]]:
    """The modules that compute with packed weights, by name."""
    for name, module in model.named_modules():
        if isinstance(linear := vars(module).get("cpu_linear"), PackedLinear):
            yield name, linear
