"""A worker that writes updates of experts as if the CPU kernel kept them in checkpoint order. Test only."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from megatron_r1.rollout.vllm import held_weights, in_place
from megatron_r1.rollout.vllm.held_weights import Held
from megatron_r1.rollout.vllm.worker import HeldWeights

__all__ = ["HeldWeights"]


def read_plain(model: torch.nn.Module) -> Iterator[Held]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(held_weights, "_packed_places", lambda rows, columns, *_: torch.arange(rows * columns))
        yield from list(held_weights.read_held(model))


in_place.read_held = read_plain
