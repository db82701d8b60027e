"""New weights straight into the live parameters of vLLM's model, as vLLM's own weight-transfer API.

vLLM's layerwise reload keeps a module's tensors, whole and not yet divided over the workers, until the last of them is there, and
then loads them into fresh parameters beside the live ones. All routed experts of a layer are one module: 22.5 GB of DeepSeek-V3 on
every worker. Here each tensor's slice is copied into its place as it comes: a worker needs no memory beside the bucket.

Where the places are, `held_weights.py` says, which also reads them back for the checksums. That it agrees with vLLM's own loader is
tested for every family: what an engine computes after an update is what it computes from a folder that vLLM loaded itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo

from megatron_r1.rollout.vllm.held_weights import Held, read_derived, read_held
from megatron_r1.rollout.vllm.packed_linear import find_packed


@dataclass
class WeightBucket(WeightTransferUpdateInfo):
    """The places of the tensors of one bucket."""

    num_bytes: int
    names: list[str]  #: Hugging Face names
    dtype_names: list[str]  #: as in `torch.float32`, without "torch."
    shapes: list[list[int]]
    offsets: list[int]  #: first byte of each tensor

    def tensors(self, buffer: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and tensor, a view of the bucket's bytes."""
        for name, dtype_name, shape, offset in zip(self.names, self.dtype_names, self.shapes, self.offsets, strict=True):
            dtype = getattr(torch, dtype_name)
            num_bytes = dtype.itemsize * torch.Size(shape).numel()
            yield name, buffer[offset : offset + num_bytes].view(dtype).view(shape)


class LiveWeights:
    """The places of all Hugging Face tensors in the memory of one worker's model.

    They are looked up once. A parameter that vLLM replaces later is no longer written, which the checksums find.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self._held: dict[str, list[Held]] = {}
        covered: dict[int, int] = {}
        sources: dict[int, torch.Tensor] = {}
        for held in read_held(model):
            self._held.setdefault(held.name, []).append(held)
            sources[id(held.source)] = held.source
            covered[id(held.source)] = covered.get(id(held.source), 0) + held.shape.numel()
        with torch.no_grad():
            for key, source in sources.items():
                if covered[key] < source.numel():  # padding: as the engine starts it holds random values
                    source.zero_()

    def write(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Overwrite tensors. Raises ValueError for one that the model does not have, or that has another shape there."""
        with torch.no_grad():
            for name, tensor in tensors:
                if name not in self._held:
                    raise ValueError(f"the engine's model has no {name}")
                for held in self._held[name]:
                    held.write(tensor)

    def derive(self) -> None:
        """Compute again what vLLM keeps beside the weights and computed from them."""
        with torch.no_grad():
            for _, held, expected in read_derived(self.model):
                held.copy_(expected)
            for _, linear in find_packed(self.model):
                linear.pack()


class InPlaceTransfer(WeightTransferEngine):
    """Worker half of a transfer: what all ways of the bytes share."""

    init_info_cls = WeightTransferInitInfo
    update_info_cls = WeightBucket
    _live: LiveWeights | None = None

    def start_weight_update(self) -> None:
        """Know the places."""
        if self._live is None or self._live.model is not self.model:
            self._live = LiveWeights(self.model)

    def write(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Overwrite tensors of the model."""
        assert self._live is not None, "vLLM calls start_weight_update first"
        self._live.write(tensors)

    def finish_weight_update(self) -> None:
        """Refresh MLA's absorbed weights and packed ones."""
        assert self._live is not None, "vLLM calls start_weight_update first"
        self._live.derive()
