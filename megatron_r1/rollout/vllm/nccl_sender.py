"""Weight transfer over NCCL, with vLLM's own back end on both sides. For CUDA.

It follows the sources of vLLM 0.32.0. It has not been run: no GPU was at hand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo, NCCLTrainerWeightTransferEngine

from megatron_r1.model.hf_config import read_hf_config
from megatron_r1.rollout.options import EngineOptions
from megatron_r1.runtime.launch import free_port
from megatron_r1.weights.mapping import hf_shapes


class NcclSender:
    """The trainer's half: one NCCL group of this rank and the engine's workers.

    Args:
        call: calls a method of the engine by name and waits for it.
        options: the engine's.
        address: under which the workers reach this process.
    """

    def __init__(self, call: Callable[..., Any], options: EngineOptions, address: str) -> None:
        self._client = _Client(call)
        self._source = _Source(options)
        meeting = NCCLTrainerInitInfo(address, free_port(""), world_size=1 + options.tensor_parallel_size, rank=0)
        self._engine = NCCLTrainerWeightTransferEngine.trainer_init(meeting, client=self._client, source=self._source)

    def send(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """See `WeightSender.send`."""
        self._source.weights, self._client.version = weights, version
        self._engine.send_weights()

    def close(self) -> None:
        """See `WeightSender.close`."""
        self._engine.shutdown()


class _Source(WeightSource):
    """One pass over the weights of one update, announced from the architecture alone."""

    def __init__(self, options: EngineOptions) -> None:
        self.weights: Iterable[tuple[str, torch.Tensor]] = ()
        shapes = hf_shapes(read_hf_config(options.hf_config))
        dtype = getattr(torch, options.dtype)
        self._metadata = [
            ParamMeta(name, torch.float32 if name.endswith("e_score_correction_bias") else dtype, shape)
            for name, shape in shapes.items()
            if not options.is_draft_layer(name)
        ]

    def metadata(self) -> list[ParamMeta]:
        return self._metadata

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return iter(self.weights)


class _Client:
    """vLLM's `VLLMWeightSyncClient` protocol over calls to the engine process."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call
        self.version = 0

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._call("init_weight_transfer_engine", init_info)

    def start_weight_update(self) -> None:
        self._call("start_weight_update")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self._call("update_weights", update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._call("finish_weight_update", weight_version or str(self.version))
