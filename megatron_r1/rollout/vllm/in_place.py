"""New weights straight into the live parameters of vLLM's model, as vLLM's own weight-transfer API.

vLLM's layerwise reload keeps a module's tensors, whole and not yet divided over the workers, until the last of them is there, and
then loads them into fresh parameters beside the live ones. All routed experts of a layer are one module: 22.5 GB of DeepSeek-V3 on
every worker. Here each tensor's slice is copied into its place as it comes: a worker needs no memory beside the bucket.

Where the places are, `held_weights.py` says, which also reads them back for the checksums. That it agrees with vLLM's own loader is
tested for every family: what an engine computes after an update is what it computes from a folder that vLLM loaded itself.

The checksum of every piece is compared as soon as it is written, of what then is in the live parameter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo

from megatron_r1.rollout.sync.verify_weights import HeldReport
from megatron_r1.rollout.vllm.held_weights import Held, read_derived, read_held
from megatron_r1.rollout.vllm.packed_linear import find_packed
from megatron_r1.weights.boxes import Box, box_shape, volume
from megatron_r1.weights.checksum import MASK, shard_checksum
from megatron_r1.weights.shard_plan import CHECKSUM_BYTES, Named, TakenPiece


@dataclass
class NumberedBucket(WeightTransferUpdateInfo):
    """Which bucket of the plan comes."""

    number: int


class LiveWeights:
    """The places of all Hugging Face tensors in the memory of one worker's model.

    They are looked up once. A parameter that vLLM replaces later is no longer written, which the worker finds as it verifies.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        found: dict[Named, list[Held]] = {}
        covered: dict[int, int] = {}
        sources: dict[int, torch.Tensor] = {}
        for held in read_held(model):
            sources[id(held.source)] = held.source
            size = volume(held.box)
            covered[id(held.source)] = covered.get(id(held.source), 0) + size
            if size:
                found.setdefault((held.name, held.box), []).append(held)
        self.boxes = list(found)  #: what this worker holds
        self._held = list(found.values())  # of each box all copies
        with torch.no_grad():
            for key, source in sources.items():
                if covered[key] < source.numel():  # padding: as the engine starts it holds random values
                    source.zero_()

    @property
    def sources(self) -> set[int]:
        """Ids of the parameters that are written."""
        return {id(held.source) for copies in self._held for held in copies}

    @property
    def nbytes(self) -> int:
        """Of all boxes, each once."""
        return sum(volume(copies[0].box) * copies[0].memory.element_size() for copies in self._held)

    def write(self, index: int, box: Box, values: torch.Tensor) -> None:
        """Overwrite a box within the worker's box of this number. Raises ValueError for one that is not part of it."""
        for held in self._held[index]:
            held.write(values, box)

    def read(self, index: int, box: Box) -> Iterator[torch.Tensor]:
        """What each copy of it holds now."""
        for held in self._held[index]:
            yield held.read(box)

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
    update_info_cls = NumberedBucket
    _live: LiveWeights | None = None
    _plan: Sequence[list[TakenPiece]] = ()  # bucket -> pieces of this worker
    _verifies = False

    @property
    def live(self) -> LiveWeights:
        """The places in the model as it is now."""
        if self._live is None or self._live.model is not self.model:
            self._live = LiveWeights(self.model)
        return self._live

    def init_transfer_engine(self, init_info: WeightTransferInitInfo) -> None:
        """Nothing to open."""

    def shutdown(self) -> None:
        """Nothing to close."""

    def take_plan(self, plan: list[list[TakenPiece]], verifies: bool) -> None:
        """Know what buckets hold for this worker.

        Args:
            verifies: whether checksums come with them.
        """
        self._plan, self._verifies = plan, verifies

    def start_weight_update(self) -> None:
        """Know the places; nothing has come yet."""
        assert self.live is not None
        self._came: set[int] = set()
        self._received, self._different = 0, set[str]()

    def take_bucket(self, number: int, region: torch.Tensor) -> None:
        """Write this worker's pieces of a bucket, and compare the checksum of each with that of what is then held.

        Args:
            region: the bytes of the bucket that are for this worker, and perhaps for others.
        """
        live = self.live
        with torch.no_grad():
            for piece in self._plan[number]:
                size = volume(piece.box) * piece.dtype.itemsize
                values = region[piece.offset : piece.offset + size].view(piece.dtype).view(box_shape(piece.box))
                live.write(piece.index, piece.box, values)
                self._received += size + CHECKSUM_BYTES
                if self._verifies:
                    told = int(region[piece.checksum_at : piece.checksum_at + CHECKSUM_BYTES].view(torch.int64)) & MASK
                    if any(_checksum_as_sent(held, piece.dtype) != told for held in live.read(piece.index, piece.box)):
                        self._different.add(live.boxes[piece.index][0])
        self._came.add(number)

    def report(self) -> HeldReport:
        """What came since the update began, and what did not."""
        live = self.live
        came = dict.fromkeys(range(len(live.boxes)), 0)
        for number in self._came:
            for piece in self._plan[number]:
                came[piece.index] += volume(piece.box)
        unsent = [name for index, (name, box) in enumerate(live.boxes) if came[index] != volume(box)]
        return HeldReport(self._received, live.nbytes, unsent, sorted(self._different))

    def finish_weight_update(self) -> None:
        """Refresh MLA's absorbed weights and packed ones."""
        self.live.derive()


def _checksum_as_sent(held: torch.Tensor, sent: torch.dtype) -> int | None:
    """Of what is held, in the dtype in which it was sent; None if it is no value of that dtype: vLLM may keep it in a wider one."""
    if held.dtype != sent and held.dtype == torch.float32:
        narrowed = held.to(sent)
        return shard_checksum(narrowed) if torch.equal(narrowed.to(held.dtype), held) else None
    return shard_checksum(held)
