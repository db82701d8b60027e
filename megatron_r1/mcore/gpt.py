"""Megatron-Core's GPTModel with a logit temperature and an optional multi-token-prediction pass."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from megatron_r1.mcore.active import require_active

require_active()

from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.multi_token_prediction import MTPLossAutoScaler

from megatron_r1.mcore.cross_entropy import vocab_parallel_cross_entropy
from megatron_r1.mcore.fused_head import Head, Slope, token_losses
from megatron_r1.mcore.loss_slope import LossSlope
from megatron_r1.mcore.shift import shift_left

#: Logits from which on those of positions without loss are left out. With fewer, which a small vocabulary has, it would gain
#: nothing: matrix products of other shapes only round differently.
LEAST_SAVED = 2**22


class OutputLayer(ColumnParallelLinear):
    """Megatron-Core's, which also gives losses without logits. Whoever waits for its weights hooks into its call."""

    def forward(
        self, input_: torch.Tensor, weight: torch.Tensor | None = None, runtime_gather_output: bool | None = None,
        losses: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    ) -> Any:  # fmt: skip
        """As the method it replaces; or what `losses` makes of all hidden states [s, b, hidden] and the weight.

        The gradients of hidden states that the ranks' parts of the weight bring are added up.
        """
        if losses is None:
            return super().forward(input_, weight, runtime_gather_output)
        if self.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(input_, tensor_parallel_output_grad=True, group=self.tp_group)
        else:
            hidden = copy_to_tensor_model_parallel_region(input_, group=self.tp_group)
        return losses(hidden, self.weight if weight is None else weight)


class R1GPTModel(GPTModel):
    """`model(token_ids, position_ids, None, labels=labels)` is -log p of the labels [b, s] under softmax(logits / temperature).

    Given a `loss_mask` [b, s], labels outside it may get 0 instead. Without labels it is the logits [b, s, vocab / tp], at
    temperature 1.
    """

    logit_temperature: float = 1.0
    least_saved: int = LEAST_SAVED
    whole_logits: int  #: bytes of logits up to which they are kept whole, on this rank
    loss_slope: LossSlope | None = None  #: of the micro-batch that comes; None: not known, or not asked for
    measures_entropy: bool = False  #: in training, whatever `whole_logits` says
    entropy: torch.Tensor | None = None  #: this rank's sum over trained tokens; None: nothing since it was cleared
    train_mtp: bool = False  #: False: the block keeps its weights but is not run
    vocabulary: int  #: tokens; the rows after them, which make the vocabulary divide over ranks, are never predicted
    mtp_trains_trunk: bool = False  #: False: nothing below the block and no shared weight learns from its loss
    mtp_token_weight: float = 1.0  #: by which gradients will be divided, over the trained tokens of the whole minibatch
    mtp_loss: torch.Tensor | None = None  #: this rank's sum over tokens, averaged over depths; None: nothing since it was cleared

    def __init__(self, *settings: Any, **more_settings: Any) -> None:
        super().__init__(*settings, **more_settings)
        self._asked: list[Head] = []  # those with a slope whose backward pass is still to come
        self._is_sum = True  # whether no slope was wrong so far
        if self.post_process:
            self.output_layer.__class__ = OutputLayer  # it has no attribute of its own

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
            training = torch.is_grad_enabled()
            slope = self.loss_slope if training else None
            mask = inputs.get("loss_mask")
            return self._label_loss(hidden_states, weight, labels, mask, slope, entropy=training and self.measures_entropy)
        logits, _ = self.output_layer(hidden_states, weight=weight, runtime_gather_output=runtime_gather_output)
        return self._without_padding(logits).transpose(0, 1).contiguous()

    def _label_loss(
        self, hidden_states: torch.Tensor, weight: torch.Tensor | None, labels: torch.Tensor, mask: torch.Tensor | None,
        slope: LossSlope | None, entropy: bool = False,
    ) -> torch.Tensor:  # fmt: skip
        """-log p [b, s] of labels [b, s] after hidden states [s, b, hidden]; 0 outside the mask if that saves `least_saved` logits.

        Prompts and padding have no loss, and a large vocabulary costs as much as several layers. Under sequence parallelism each
        rank has other positions, and all are computed.
        """
        positions = None if mask is None or self.config.sequence_parallel else mask.t().flatten().nonzero().flatten()
        width = self.vocabulary // self.pg_collection.tp.size()
        if positions is None or (labels.numel() - len(positions)) * width < self.least_saved:
            return self._losses(hidden_states, weight, labels, mask if entropy else None, slope and slope.at(None))
        chosen, targets = hidden_states.flatten(0, 1).index_select(0, positions), labels.t().flatten()[positions]
        weights = mask.t().flatten()[positions][None] if entropy else None
        loss = self._losses(chosen.unsqueeze(1), weight, targets[None], weights, slope and slope.at(positions))
        everywhere = loss.new_zeros(labels.numel()).index_copy(0, positions, loss[0])
        return everywhere.view(labels.shape[1], -1).t().contiguous()

    def _losses(
        self, hidden_states: torch.Tensor, weight: torch.Tensor | None, labels: torch.Tensor, entropy_of: torch.Tensor | None,
        slope: Slope | None,
    ) -> torch.Tensor:  # fmt: skip
        """-log p [b, s] of labels [b, s], by whole logits where they are small; `entropy_of` [b, s] weighs what is measured."""
        width = self.output_layer.output_size_per_partition * hidden_states.element_size()
        if entropy_of is None and (self.config.cross_entropy_loss_fusion or labels.numel() * width <= self.whole_logits):
            logits, _ = self.output_layer(hidden_states, weight=weight)
            return self.compute_language_model_loss(labels, logits)
        return self.output_layer(
            hidden_states, weight=weight, losses=partial(self._tile_losses, labels=labels, entropy_of=entropy_of, slope=slope)
        )

    def _tile_losses(
        self, hidden: torch.Tensor, weight: torch.Tensor, *, labels: torch.Tensor, entropy_of: torch.Tensor | None,
        slope: Slope | None,
    ) -> torch.Tensor:  # fmt: skip
        """The same without whole logits."""
        # A loss that is no sum over tokens is asked once: to guess would cost what a right guess saves.
        self._is_sum = self._is_sum and all(head.guessed is not False for head in self._asked)
        slope = slope if self._is_sum else None
        sums = getattr(weight, "main_grad", None) if weight.is_cuda and weight.requires_grad else None
        head = Head(
            self.logit_temperature, self.pg_collection.tp, self.vocabulary, slope=slope, entropy=entropy_of is not None,
            sums=sums if sums is not None and sums.dtype == torch.float32 else None,
        )  # fmt: skip
        self._asked = [*(one for one in self._asked if one.guessed is None), *([] if slope is None else [head])]
        targets = labels.t().flatten()
        losses, entropies = token_losses(hidden.flatten(0, 1), weight, targets, head)
        if entropies is not None:
            total = (entropies * entropy_of.t().flatten()).sum()
            self.entropy = total if self.entropy is None else self.entropy + total
        return losses.view(labels.shape[1], -1).t().contiguous()

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
        bounds = None if packed_seq_params is None else packed_seq_params.cu_seqlens_q
        for hidden in predicted:
            labels, mask = (shift_left(values, bounds, self.cp_group) for values in (labels, mask))
            scale = self.config.mtp_loss_scaling_factor / depths * self.mtp_token_weight
            slope = None if self.loss_slope is None else LossSlope(partial(_weighed, mask, scale), labels.shape)
            loss = mask * self._label_loss(hidden, weight, labels, mask, slope)
            hidden_states = MTPLossAutoScaler.apply(hidden_states, scale * loss)
            total = loss.detach().sum() / depths
            self.mtp_loss = total if self.mtp_loss is None else self.mtp_loss + total
        return hidden_states


def _weighed(mask: torch.Tensor, scale: float, losses: torch.Tensor) -> torch.Tensor:
    return (scale * (mask * losses)).sum()
