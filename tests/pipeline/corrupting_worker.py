"""A worker that can damage what it holds. Test only; named to vLLM as the worker extension."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from megatron_r1.rollout.sync.verify_weights import HeldReport
from megatron_r1.rollout.vllm import cpu_latent, packed_linear
from megatron_r1.rollout.vllm.held_weights import read_held
from megatron_r1.rollout.vllm.worker import HeldWeights
from tests.pipeline.update_cases import measure, update_over_nccl

_SHARE = cpu_latent.share_prompts


class CorruptingWorker(HeldWeights):
    """Flips single bits of vLLM's memory."""

    def damage(self, name: str, row: int | None = None) -> None:
        """In the next update flip the lowest bit of one element of a parameter or buffer, in a row or the middle one.

        A weight is damaged after it was written and before it is compared, all else while the worker looks at it.
        """
        model, live = self.model_runner.model, self.weight_transfer_engine.live
        tensor = dict([*model.named_parameters(), *model.named_buffers()])[name]
        self._damaged = tensor.data if row is None else tensor.data[row : row + 1]
        weights = {_memory(parameter) for parameter in model.parameters() if id(parameter) in live.sources}
        if _memory(tensor) not in weights:  # what vLLM derives may be a view of a weight
            return
        damaged, self._damaged, own = self._damaged, None, live.read

        def read(*args: Any) -> list[torch.Tensor]:
            _flip(damaged)
            found = [values.clone() for values in own(*args)]
            _flip(damaged)
            return found

        live.read = read

    def held_weights(self, verifies: bool) -> HeldReport:
        """With the damage, which ends with it."""
        damaged, self._damaged = getattr(self, "_damaged", None), None
        vars(self.weight_transfer_engine.live).pop("read", None)
        if damaged is not None:
            _flip(damaged)
        report = super().held_weights(verifies)
        if damaged is not None:
            _flip(damaged)
        return report

    def forget_piece(self, name: str) -> None:
        """Take one piece of a tensor out of the plan of all further updates."""
        transfer = self.weight_transfer_engine
        found = [(pieces, piece) for pieces in transfer._plan for piece in pieces if transfer.live.boxes[piece.index][0] == name]
        found[0][0].remove(found[0][1])

    def replace_router_bias(self, layer: int) -> None:
        """Give a router a copy of its bias that later updates would not reach, with one bit changed."""
        for name, module in self.model_runner.model.named_modules():
            router = vars(module).get("router")
            if f"layers.{layer}." in name and router is not None:
                bias = router.e_score_correction_bias.data.clone()
                _flip(bias)
                router.e_score_correction_bias = bias

    def untie(self) -> None:
        """Give a tied output layer a copy of the embedding that later updates would not reach."""
        model = self.model_runner.model
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone(), requires_grad=False)

    def keep_packed(self) -> str:
        """Let a packed weight miss every further update; its module."""
        packed = packed_linear.find_packed(self.model_runner.model)
        name, linear = next((name, linear) for name, linear in packed if linear._packed is not None)
        linear.pack = lambda: None
        return name

    def add_parameter(self) -> None:
        """Register a parameter that no rule explains."""
        self.model_runner.model.register_parameter("surplus", torch.nn.Parameter(torch.zeros(2), requires_grad=False))

    def count_prompts(self, share: bool) -> None:
        """From now on count the rows of prompts, and share them or not."""
        own, self.prompt_rows = _SHARE, [0, 0]

        def counted(token_ids: torch.Tensor, metadata: Any) -> cpu_latent.SharedPrompts | None:
            shared = own(token_ids, metadata)
            computed = shared.metadata if share and shared is not None else metadata
            self.prompt_rows[0] += metadata.num_actual_tokens - metadata.num_decode_tokens
            self.prompt_rows[1] += computed.num_actual_tokens - computed.num_decode_tokens
            return shared if share else None

        cpu_latent.share_prompts = counted

    def counted_prompts(self) -> list[int]:
        """Rows of prompts since, and how many of them were computed."""
        return self.prompt_rows

    def measure_buckets(self) -> None:
        """From now on measure what memory the receipt of a bucket takes."""
        engine = self.weight_transfer_engine
        receive, self.most_bytes = engine.receive_weights, 0

        def measured(info: object) -> None:
            self.most_bytes = max(self.most_bytes, measure(lambda: receive(info)))

        engine.receive_weights = measured

    def measured_bytes(self) -> int:
        """The most that a bucket took since."""
        return self.most_bytes

    def update_over_nccl(self, *arguments: Any) -> list[str]:
        """See `update_cases`."""
        return update_over_nccl(self, *arguments)

    def held_tensors(self) -> dict[str, np.ndarray]:
        """Everything the model holds, in Hugging Face form. No place is found twice: tied weights are one."""
        found = list(read_held(self.model_runner.model))
        assert len({(held.name, held.memory.data_ptr(), id(held.source)) for held in found}) == len(found)
        return {held.name: held.read().detach().numpy().copy() for held in found}


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _flip(tensor: torch.Tensor) -> None:
    index = tuple(size // 2 for size in tensor.shape)
    element = tensor[index].clone().reshape(1).view(torch.int32)
    tensor[index] = (element ^ 1).view(torch.float32)[0]
