"""Routers that know which sequence a token belongs to, so that balance loss and expert counts are the same for every packing.

DeepSeek-V3 (arXiv 2412.19437) equations 17 to 20: the balance loss is one of a sequence. Megatron-Core takes a packed row for one
sequence, and its padding for tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_r1.mcore.active import on_transformer_engine, require_active
from megatron_r1.mcore.layout import Layout
from megatron_r1.mcore.packing import MaskedRows, RowGroup, cut_rows, decode_sequences, encode_sequences, group_rows, share_rows
from megatron_r1.mcore.parallel import Groups
from megatron_r1.types import MicroBatch

require_active()

from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer


@dataclass
class PackedSequences(PackedSeqParams):
    """Megatron-Core's description of a packed micro-batch, and which sequence each token of this rank's hidden states is of."""

    sequence_bits: torch.Tensor | None = None  #: [1, tokens, bits] bool, see `packing.encode_sequences`
    #: how own attention takes sequences that share prompts, or of which this rank has a part; None: there are none
    rows: Sequence[RowGroup | MaskedRows] | None = None


def packed_sequences(whole: MicroBatch, layout: Layout, groups: Groups) -> PackedSequences | None:
    """What Megatron-Core's layers are told of a packed micro-batch, given whole; None for rows."""
    bounds = whole.cu_seqlens
    if bounds is None:
        return None
    before = whole.prompt_tokens()
    longest = int((bounds.diff() + before).max())
    lengths = whole.sequence_tokens() if whole.lengths else None
    bits = encode_sequences(bounds, whole.is_real, whole.num_tokens // layout.cp, layout.cp, groups.cp.rank(), lengths)
    if layout.sequence_parallel:
        bits = bits.chunk(layout.tp)[groups.tp.rank()]
    rows: Sequence[RowGroup | MaskedRows] | None = share_rows(bounds, whole.prompts, lengths) if whole.prompts else None
    if layout.cp > 1 and not on_transformer_engine():
        rows = cut_rows(rows or group_rows(bounds), bounds, layout.cp, groups.cp.rank())
    if whole.prompts:
        bounds = torch.stack([bounds.long(), torch.nn.functional.pad(before, (0, 1))])
    return PackedSequences(
        qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=longest, max_seqlen_kv=longest,
        sequence_bits=bits[None], rows=rows,
    )  # fmt: skip


class Layer(TransformerLayer):
    """A transformer layer that tells its router the sequences of a packed micro-batch.

    They go where Megatron-Core passes its padding mask: that is the one tensor which every way of recomputation hands on to the
    router of the same micro-batch, also when another one is under way in a pipeline.
    """

    def forward(self, *args: Any, packed_seq_params: PackedSeqParams | None = None, **kwargs: Any) -> Any:
        """As the stock layer."""
        if self.is_moe_layer and packed_seq_params is not None:
            known = isinstance(packed_seq_params, PackedSequences)
            assert known or not torch.is_grad_enabled(), "training needs PackedSequences: the router counts by sequence"
            kwargs["padding_mask"] = packed_seq_params.sequence_bits if known else None
        return super().forward(*args, packed_seq_params=packed_seq_params, **kwargs)


class GroupSelection:
    """Selection of experts over groups that are scored by another number of their experts than Megatron-Core counts.

    It takes the place of Megatron-Core's replay of recorded selections, the one part of the router that may select.
    """

    def __init__(self, best_of_group: int) -> None:
        self._best = best_of_group

    def get_replay_topk(
        self, scores: torch.Tensor, topk: int, num_groups: int, group_topk: int, stock: Callable[..., Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores [tokens, experts] -> scores and numbers [tokens, topk] of the best experts of the best groups."""
        grouped = scores.unflatten(1, (num_groups, -1))
        groups = grouped.topk(self._best, dim=-1).values.sum(-1).topk(group_topk, dim=-1).indices
        usable = torch.zeros(grouped.shape[:2], dtype=torch.bool, device=scores.device).scatter_(1, groups, True)
        return grouped.masked_fill(~usable.unsqueeze(-1), -torch.inf).flatten(1).topk(topk, dim=-1)


class Router(TopKRouter):
    """Megatron-Core's router with its family's rule, V3's balance loss at its full weight in every layout, and own statistics.

    Under `calculate_per_token_loss` gradients are divided by the tokens of the whole minibatch, so the balance loss is multiplied
    by them first: a packed sequence by `sequence_weight`, a row by its tokens. The stock router takes one sequence's share on one
    rank: the loss is too small by tp * cp and by the number of rows.
    """

    def __init__(self, config: TransformerConfig, pg_collection: ProcessGroupCollection | None = None) -> None:
        super().__init__(config, pg_collection)
        rule = config.router_rule
        self._normalize_one = rule.normalize_one
        if rule.best_of_group is not None:
            self.router_replay = GroupSelection(rule.best_of_group)
        self.sequence_weight = 1.0  #: tokens of the whole minibatch per sequence
        self.clear()
        self._sequences: torch.Tensor | None = None  # [tokens] of the forward pass in progress; None: rows

    def clear(self) -> None:
        """Forget what earlier forward passes counted."""
        #: [experts] int64, how often each was chosen for this rank's tokens; float32 counts exactly up to 16.8M only
        self.choices: torch.Tensor | None = None
        #: this rank's part of sum over sequences of sum_i f_i P_i
        self.balance_loss: torch.Tensor | None = None

    def routing(self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights [tokens, experts], zero where not selected, and what is selected, of logits [s, b, experts].

        Args:
            padding_mask: see `Layer`.
        """
        self._sequences = None if padding_mask is None else decode_sequences(padding_mask).flatten()
        self._num_sequences = logits.shape[1] if padding_mask is None else 2 ** padding_mask.shape[-1]
        weights, selected = super().routing(logits)
        if self._normalize_one:  # Megatron-Core normalises from two experts on
            scale = self.config.moe_router_topk_scaling_factor or 1.0
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) * scale
        return weights, selected

    def _apply_seq_aux_loss(
        self, probs: torch.Tensor, scores_for_aux_loss: torch.Tensor, routing_map: torch.Tensor, seq_length: int, bsz: int,
        with_padding_mask: bool = False,
    ) -> torch.Tensor:  # fmt: skip
        coefficient = self.get_aux_loss_coeff("seq_aux_loss")
        if self._sequences is None or not coefficient:
            return super()._apply_seq_aux_loss(probs, scores_for_aux_loss, routing_map, seq_length, bsz)
        # Sequence 0 is the padding. f_i needs the tokens of every rank that holds a part of the sequence, P_i is summed up by
        # its gradient.
        choices_SE = probs.new_zeros(self._num_sequences, probs.shape[1], dtype=torch.float32)
        scores_SE = torch.zeros_like(choices_SE).index_add(0, self._sequences, scores_for_aux_loss.float())
        choices_SE.index_add_(0, self._sequences, routing_map.float())
        if self.tp_cp_group.size() > 1:
            dist.all_reduce(choices_SE, group=self.tp_cp_group)
        lengths_S = (choices_SE.sum(1) / self.topk).clamp(min=1)
        scale_S = self.num_experts / (self.topk * lengths_S**2)
        loss = ((choices_SE * scores_SE).sum(1) * scale_S)[1:].sum()
        self._add_balance_loss(loss)
        return MoEAuxLossAutoScaler.apply(probs, coefficient * self.sequence_weight * loss)

    def attach_and_log_load_balancing_loss(
        self, activation: torch.Tensor, aux_loss_coeff: float, aux_loss: torch.Tensor, aux_loss_name: str,
        reduce_group: dist.ProcessGroup, reduce_group_has_dp: bool = False, valid_token_count: int | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """`activation` [local tokens, experts], with the gradient of `aux_loss`, the mean over rows, attached."""
        self._add_balance_loss(aux_loss / aux_loss_coeff * self._num_sequences)
        return MoEAuxLossAutoScaler.apply(activation, aux_loss * (activation.shape[0] * reduce_group.size()))

    def _add_balance_loss(self, loss: torch.Tensor) -> None:
        self.balance_loss = loss.detach() if self.balance_loss is None else self.balance_loss + loss.detach()

    def _apply_expert_bias(self, routing_map: torch.Tensor, padding_mask: torch.Tensor | None = None) -> None:
        """Count the choices. The stock method's counts stay zero: `balance.Balance` moves the biases, after the update."""
        # A recomputed layer runs twice, once of it without gradient.
        if not (self.training and torch.is_grad_enabled()):
            return
        with torch.no_grad():
            counted = routing_map if self._sequences is None else routing_map & (self._sequences > 0)[:, None]
            choices = counted.sum(0)
            self.choices = choices if self.choices is None else self.choices + choices
