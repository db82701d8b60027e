"""How many bytes of training state one rank holds, from the number of its parameters alone: for whoever plans memory.

Megatron-Core is not imported. Its gradient buffers are a little larger: parameters begin at multiples of 64 elements.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

_MASTER, _MOMENTS = 4, 8  # bytes a parameter, float32


def optimizer_bytes(trained: int, *, data_parallel: int = 1) -> int:
    """What a rank stores of the optimizer in a checkpoint: master weights and both moments of its share of the parameters.

    A checkpoint copies at most so much to the host; it gathers nothing.

    Args:
        trained: parameters of this rank's model.
        data_parallel: ranks that share them.
    """
    return (_MASTER + _MOMENTS) * -(-trained // data_parallel)


@dataclass(frozen=True)
class StateBytes:
    """Bytes of one rank, by what they are for; the last three can be on the host while an engine samples (`runtime.offload`)."""

    weights: int  #: 2P in bf16, 4P in fp32
    gradients: int  #: 4P of what is trained: sums are float32
    optimizer: int  #: 12P / dp of what is trained in bf16; in fp32, where the weights are their own master weights, 8P / dp
    reference: int  #: as the weights, if there is a reference policy

    @staticmethod
    def of(
        dense: int,
        experts: int = 0,
        *,
        frozen: int = 0,
        data_parallel: int = 1,
        expert_data_parallel: int = 1,
        bf16: bool,
        has_reference: bool = False,
    ) -> StateBytes:
        """For a rank's numbers of parameters.

        Args:
            dense: trained parameters outside experts.
            experts: trained parameters of experts.
            frozen: parameters that get no gradient.
            data_parallel: ranks that hold the same dense parameters.
            expert_data_parallel: ranks that hold the same experts.
        """
        weights = (2 if bf16 else 4) * (dense + experts + frozen)
        share = -(-dense // data_parallel) - (-experts // expert_data_parallel)
        return StateBytes(
            weights=weights,
            gradients=4 * (dense + experts),
            optimizer=((_MASTER if bf16 else 0) + _MOMENTS) * share,
            reference=weights if has_reference else 0,
        )

    def moved(self, offload: Iterable[str]) -> int:
        """Bytes that leave the device with this `runtime.offload`. Those of the gradients are needed nowhere meanwhile."""
        return sum(getattr(self, name) for name in offload)
