"""Megatron-Core's GPTModel with one number per token in place of the vocabulary: a reward model."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from megatron_r1.mcore.active import require_active
from megatron_r1.mcore.layers import ReplicatedLinear

require_active()

from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig

_FIRST_SCORES = 0.1  # standard deviation of the scores of a fresh head: the first gradients must not be those of its noise


class RewardHead(ReplicatedLinear):
    """Scores [s, b, 1] in float32 of hidden states [s, b, hidden]: bfloat16 would give similar responses the same score."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config.hidden_size, 1, config=config, init_method=config.init_method)
        # The final norm leaves elements of mean square 1.
        self.weight.init_std = _FIRST_SCORES / config.hidden_size**0.5

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """One number per token."""
        return F.linear(hidden_states.float(), self.weight.float())


class RewardGPTModel(GPTModel):
    """`model(token_ids, position_ids, None)` is a score [b, s] for every token; that of the last one is the response's."""

    def __init__(self, config: TransformerConfig, *args: Any, **settings: Any) -> None:
        super().__init__(config, *args, **settings)
        if self.post_process:
            self.output_layer = RewardHead(config)

    def _postprocess(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not self.post_process:
            return hidden_states
        scores = self.output_layer(hidden_states)
        if self.config.sequence_parallel:
            # Every rank computes the same loss from all scores, so the gradient of a score goes back to its owner once; the
            # head's own is summed over the ranks, as a norm's is.
            scores = gather_from_sequence_parallel_region(scores, tensor_parallel_output_grad=False, group=self.pg_collection.tp)
        return scores.squeeze(-1).transpose(0, 1).contiguous()
