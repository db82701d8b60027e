"""Megatron-Core's GPTModel with a logit temperature and an optional multi-token-prediction pass."""

from __future__ import annotations

from typing import Any

import torch

from megatron_r1.mcore.active import require_active

require_active()

from megatron.core.models.gpt.gpt_model import GPTModel


class R1GPTModel(GPTModel):
    """`model(token_ids, position_ids, None, labels=labels)` is -log p of the labels [b, s] under softmax(logits / temperature).

    Without labels it is the logits [b, s, vocab / tp], at temperature 1.
    """

    logit_temperature: float = 1.0
    train_mtp: bool = False  #: False: the block keeps its weights but is not run
    vocabulary: int  #: tokens; the rows after them, which make the vocabulary divide over ranks, are never predicted

    def compute_language_model_loss(self, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """-log p [b, s] of labels [b, s] under logits [s, b, vocab / tp]."""
        if self.logit_temperature != 1.0:
            logits = logits / self.logit_temperature
        return super().compute_language_model_loss(labels, self._without_padding(logits))

    def _without_padding(self, logits: torch.Tensor) -> torch.Tensor:
        """The logits, in place, with those of padding at minus infinity: they have no part of any probability."""
        width = logits.shape[-1]
        first = self.pg_collection.tp.rank() * width
        if first + width > self.vocabulary:
            logits[..., max(self.vocabulary - first, 0) :] = -torch.inf
        return logits

    def _postprocess(
        self,
        hidden_states: torch.Tensor,
        *args: Any,
        labels: torch.Tensor | None = None,
        runtime_gather_output: bool | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        # The stock method runs multi-token prediction whenever the block exists, even if its loss reaches nothing.
        if self.train_mtp and labels is not None and torch.is_grad_enabled():
            return super()._postprocess(hidden_states, *args, labels=labels, runtime_gather_output=runtime_gather_output, **kwargs)
        if not self.post_process:
            return hidden_states
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        logits, _ = self.output_layer(hidden_states, weight=weight, runtime_gather_output=runtime_gather_output)
        if labels is None:
            return self._without_padding(logits).transpose(0, 1).contiguous()
        return self.compute_language_model_loss(labels, logits)
