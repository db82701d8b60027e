"""Megatron-Core's GPTModel with a logit temperature and an optional multi-token-prediction pass."""

from __future__ import annotations

from typing import Any

import torch

from megatron_r1.mcore.active import require_active

require_active()

from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.multi_token_prediction import MTPLossAutoScaler, roll_tensor

from megatron_r1.mcore.cross_entropy import vocab_parallel_cross_entropy

#: Logits from which on those of positions without loss are left out. With fewer, which a small vocabulary has, it would gain
#: nothing: matrix products of other shapes only round differently.
LEAST_SAVED = 2**22


class R1GPTModel(GPTModel):
    """`model(token_ids, position_ids, None, labels=labels)` is -log p of the labels [b, s] under softmax(logits / temperature).

    Given a `loss_mask` [b, s], labels outside it may get 0 instead. Without labels it is the logits [b, s, vocab / tp], at
    temperature 1.
    """

    logit_temperature: float = 1.0
    least_saved: int = LEAST_SAVED
    train_mtp: bool = False  #: False: the block keeps its weights but is not run
    vocabulary: int  #: tokens; the rows after them, which make the vocabulary divide over ranks, are never predicted
    mtp_trains_trunk: bool = False  #: False: nothing below the block and no shared weight learns from its loss
    mtp_token_weight: float = 1.0  #: by which gradients will be divided, over the trained tokens of the whole minibatch
    mtp_loss: torch.Tensor | None = None  #: this rank's sum over tokens, averaged over depths; None: nothing since it was cleared

    def compute_language_model_loss(self, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """-log p [b, s] of labels [b, s] under logits [s, b, vocab / tp]."""
        logits, targets = self._without_padding(logits), labels.t().contiguous()
        group, temperature = self.pg_collection.tp, self.logit_temperature
        if self.config.cross_entropy_loss_fusion:
            # In float32 before the kernel, which knows no temperature and would divide in the logits' own dtype.
            logits = logits if temperature == 1.0 else logits.float() / temperature
            loss = fused_vocab_parallel_cross_entropy(logits, targets, group)
        else:
            loss = vocab_parallel_cross_entropy(logits, targets, temperature=temperature, group=group)
        return loss.t().contiguous()

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
        *,
        labels: torch.Tensor | None = None,
        runtime_gather_output: bool | None = None,
        mtp_in_postprocess: bool | None = None,
        **inputs: Any,
    ) -> torch.Tensor:
        if not self.post_process:
            return hidden_states
        predicted = None
        if mtp_in_postprocess is False and self.mtp_process:
            # The schedule of `megatron.overlap_moe_expert_parallel_comm` has run the block, trunk and depths end to end.
            predicted, hidden_states = hidden_states, hidden_states.chunk(1 + self.config.mtp_num_layers, dim=0)[0]
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        # The stock method runs multi-token prediction whenever the block exists, even if its loss reaches nothing.
        if self.train_mtp and labels is not None and torch.is_grad_enabled():
            hidden_states = self._attach_mtp_loss(hidden_states, weight, labels, outputs=predicted, **inputs)
        if labels is not None:
            return self._label_loss(hidden_states, weight, labels, inputs.get("loss_mask"))
        logits, _ = self.output_layer(hidden_states, weight=weight, runtime_gather_output=runtime_gather_output)
        return self._without_padding(logits).transpose(0, 1).contiguous()

    def _label_loss(
        self, hidden_states: torch.Tensor, weight: torch.Tensor | None, labels: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """-log p [b, s] of labels [b, s] after hidden states [s, b, hidden]; 0 outside the mask if that saves `least_saved` logits.

        Prompts and padding have no loss, and a large vocabulary costs as much as several layers. Under sequence parallelism each
        rank has other positions, and all are computed.
        """
        positions = None if mask is None or self.config.sequence_parallel else mask.t().flatten().nonzero().flatten()
        width = self.vocabulary // self.pg_collection.tp.size()
        if positions is None or (labels.numel() - len(positions)) * width < self.least_saved:
            logits, _ = self.output_layer(hidden_states, weight=weight)
            return self.compute_language_model_loss(labels, logits)
        chosen = hidden_states.flatten(0, 1).index_select(0, positions)
        logits, _ = self.output_layer(chosen.unsqueeze(1), weight=weight)
        loss = self.compute_language_model_loss(labels.t().flatten()[positions][None], logits)
        everywhere = loss.new_zeros(labels.numel()).index_copy(0, positions, loss[0])
        return everywhere.view(labels.shape[1], -1).t().contiguous()

    def _attach_mtp_loss(
        self, hidden_states: torch.Tensor, weight: torch.Tensor | None, labels: torch.Tensor, *,
        input_ids: torch.Tensor, position_ids: torch.Tensor, attention_mask: None, loss_mask: torch.Tensor | None,
        packed_seq_params: Any, rotary_pos_emb: torch.Tensor | None, outputs: torch.Tensor | None = None, **_: Any,
    ) -> torch.Tensor:  # fmt: skip
        """`hidden_states` [s, b, hidden], with the gradient of the multi-token-prediction loss attached.

        `outputs` are those of the block, if it was run already.

        DeepSeek-V3 (arXiv 2412.19437) equations 24 and 25: lambda / D sum_k 1/T sum_i -log p_i^k. T are the trained tokens of the
        whole minibatch, so that neither packing nor padding changes the loss.
        """
        trunk, embedding = hidden_states, self.embedding
        if not self.mtp_trains_trunk:
            # It asks for a gradient, which stays here: otherwise a recomputed block would get none for its own weights.
            trunk = hidden_states.detach().requires_grad_()
            weight = (self.output_layer.weight if weight is None else weight).detach()

            def embedding(**ids: torch.Tensor) -> torch.Tensor:
                return self.embedding(**ids).detach()

        if outputs is None:
            outputs = self.mtp(
                input_ids=input_ids, position_ids=position_ids, hidden_states=trunk, attention_mask=attention_mask,
                rotary_pos_emb=rotary_pos_emb, packed_seq_params=packed_seq_params, embedding=embedding,
            )  # fmt: skip
        depths = self.config.mtp_num_layers
        trunk, *predicted = outputs.chunk(1 + depths, dim=0)
        if self.mtp_trains_trunk:
            hidden_states = trunk
        mask = torch.ones_like(labels, dtype=torch.float32) if loss_mask is None else loss_mask
        rolled = {"cp_group": self.cp_group, "packed_seq_params": packed_seq_params}
        for hidden in predicted:
            labels, _ = roll_tensor(labels, **rolled)
            mask, _ = roll_tensor(mask, **rolled)
            loss = mask * self._label_loss(hidden, weight, labels, mask)
            scale = self.config.mtp_loss_scaling_factor / depths
            hidden_states = MTPLossAutoScaler.apply(hidden_states, scale * self.mtp_token_weight * loss)
            total = loss.detach().sum() / depths
            self.mtp_loss = total if self.mtp_loss is None else self.mtp_loss + total
        return hidden_states
