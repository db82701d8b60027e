"""How many bytes of training state one rank holds, from the number of its parameters alone: for whoever plans memory.

Megatron-Core is not imported. Its gradient buffers are a little larger: parameters begin at multiples of 64 elements.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

_FLOAT32 = 4  # bytes
FLOAT32_MOMENTS = (4, 4)  #: bytes a parameter of Adam's moments


def optimizer_bytes(trained: int, *, data_parallel: int = 1, moments: tuple[int, int] = FLOAT32_MOMENTS) -> int:
    """What a rank stores of the optimizer in a checkpoint: master weights and both moments of its share of the parameters.

    A checkpoint copies at most so much to the host; it gathers nothing.

    Args:
        trained: parameters of this rank's model.
        data_parallel: ranks that share them.
        moments: as for `StateBytes.of`.
    """
    return (_FLOAT32 + sum(moments)) * -(-trained // data_parallel)


@dataclass(frozen=True)
class StateBytes:
    """Bytes of one rank, by what they are for; gradients, optimizer and reference can be on the host while an engine samples
    (`runtime.offload`).
    """

    weights: int  #: 2P in bf16, 4P in fp32
    gradients: int  #: 4P of what is trained: sums are float32
    #: on the device, of what is trained in bf16: 12P / dp, or 8P / dp with both moments in bf16; in fp32, where the weights are
    #: their own master weights, 8P / dp
    optimizer: int
    reference: int  #: as the weights, if there is a reference policy
    #: for the time of an update, when no activation is there: Transformer Engine makes bf16 moments fp32 for it, 4P / dp each
    update: int = 0
    #: on the host with `megatron.optimizer_cpu_offload`: master weights, moments and a copy of the gradient, 16P / dp
    host: int = 0

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
        moments: tuple[int, int] = FLOAT32_MOMENTS,
        on_host: float = 0.0,
    ) -> StateBytes:
        """For a rank's numbers of parameters.

        Args:
            dense: trained parameters outside experts.
            experts: trained parameters of experts.
            frozen: parameters that get no gradient.
            data_parallel: ranks that hold the same dense parameters.
            expert_data_parallel: ranks that hold the same experts.
            moments: bytes a parameter of either moment, see `switches.Switches.moments`.
            on_host: share of the parameters that the host updates, `megatron.optimizer_offload_fraction`.
        """
        weights = (2 if bf16 else 4) * (dense + experts + frozen)
        share = -(-dense // data_parallel) - (-experts // expert_data_parallel)
        away = round(on_host * share)
        return StateBytes(
            weights=weights,
            gradients=_FLOAT32 * (dense + experts),
            optimizer=((_FLOAT32 if bf16 else 0) + sum(moments)) * (share - away),
            reference=weights if has_reference else 0,
            update=sum(_FLOAT32 for width in moments if width < _FLOAT32) * share,
            host=(2 * _FLOAT32 + sum(moments)) * away,
        )

    def moved(self, offload: Iterable[str]) -> int:
        """Bytes that leave the device with this `runtime.offload`. Those of the gradients are needed nowhere meanwhile."""
        return sum(getattr(self, name) for name in offload)
