"""Layers for machines without Transformer Engine (norm, replicated linear, attention, experts), and a multi-token-prediction layer
for all."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from megatron_r1.mcore.active import require_active
from megatron_r1.mcore.elementwise import rms_norm, swiglu
from megatron_r1.mcore.packing import MaskedRows, RowGroup, group_rows, local_token_indices
from megatron_r1.mcore.shift import shift_left
from megatron_r1.types import filled

require_active()

from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayer
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from megatron.core.utils import make_viewless_tensor


class RMSNorm(torch.nn.RMSNorm):
    """RMSNorm whose weight gradient is summed over tensor-parallel ranks when each sees a part of the sequence."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x of any shape whose last dimension is `hidden_size`."""
        return rms_norm(x, self.weight, self.eps) if x.is_cpu else super().forward(x)


class ReplicatedLinear(torch.nn.Linear):
    """A linear layer with the whole weight on every tensor-parallel rank: MLA's down-projections."""

    def __init__(
        self, input_size: int, output_size: int, *, config: TransformerConfig, init_method: Callable[[torch.Tensor], Any], **_: Any
    ) -> None:
        super().__init__(input_size, output_size, bias=False, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel
        init_method(self.weight)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        """(y, no bias), as Megatron's linear layers return."""
        return super().forward(x), None

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict[str, Any]:
        """One full tensor, replicated over tensor-parallel ranks."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            sharded_offsets=sharded_offsets,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
            dp_cp_group=metadata["dp_cp_group"],
        )


class CoreAttention(MegatronModule):
    """Causal attention by torch's scaled_dot_product_attention: rows [s, b], packed sequences (thd), context parallel.

    Keys and values may have fewer heads than queries: neighbouring query heads share one. No scale means 1 / sqrt(head width).
    Under context parallelism keys and values are gathered over the group and put into sequence order; queries stay local, and each
    sees the keys of its own sequence up to its own position. Ranks hold the parts of sequences that Transformer Engine's do.
    """

    def __init__(self, config: TransformerConfig, *, softmax_scale: float | None, pg_collection: Any, **_: Any) -> None:
        super().__init__(config)
        self.scale, self.cp_group = softmax_scale, pg_collection.cp

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: None = None,
        attn_mask_type: Any = None, attention_bias: None = None, packed_seq_params: Any = None,
    ) -> torch.Tensor:  # fmt: skip
        """Attention output [s, b, heads * v_dim] from [s, b, heads, dim], or [t, heads, v_dim] from packed [t, heads, dim]."""
        size = self.cp_group.size()
        if packed_seq_params is None:
            mask = None
            if size > 1:
                bounds = torch.tensor([0, query.shape[0] * size], device=query.device)
                key, value = self._gather(key, value, bounds)
                mask = torch.arange(len(key), device=key.device) <= local_token_indices(bounds, size, self.cp_group.rank())[:, None]
            return self._attend(query, key, value, mask).flatten(2)
        query, key, value = (x.unsqueeze(1) for x in (query, key, value))
        bounds = packed_seq_params.cu_seqlens_q
        rows = getattr(packed_seq_params, "rows", None)
        if size > 1:
            assert rows is not None, "`packed_sequences` cuts the rows of a context-parallel rank"
            key, value = self._gather(key, value, bounds if bounds.dim() == 1 else bounds[0])
        return self._packed(query, key, value, rows or group_rows(bounds)).squeeze(1)

    def _gather(self, key: torch.Tensor, value: torch.Tensor, bounds: torch.Tensor) -> list[torch.Tensor]:
        """Those of all context-parallel ranks, in the order of the micro-batch."""
        size = self.cp_group.size()
        order = torch.cat([local_token_indices(bounds, size, rank) for rank in range(size)]).argsort()
        return [gather_from_sequence_parallel_region(x.contiguous(), group=self.cp_group)[order] for x in (key, value)]

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[s, b, heads, v_dim]; causal when no mask [b or 1, 1, s, t] is given."""
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        grouped = key.shape[1] < query.shape[1]
        output_width, scale = value.shape[-1], self.scale
        if query.is_cpu and query.dtype in (torch.float32, torch.bfloat16) and output_width != query.shape[-1]:
            if key.shape[2] > _LONGEST_UNFUSED:
                scale = query.shape[-1] ** -0.5 if scale is None else scale
                query, key, value = _pad_to_one_width(query, key, value)
            elif mask is None and not grouped:
                return _attend_unfused(query, key, value, scale).permute(2, 0, 1, 3)
        output = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
        )
        return output[..., :output_width].permute(2, 0, 1, 3)

    def _packed(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, groups: Sequence[RowGroup | MaskedRows]
    ) -> torch.Tensor:
        """Rows of right-padded sequences: a causal row never looks at the padding behind it."""
        if any(isinstance(group, MaskedRows) for group in groups):
            return self._attend_masked(query, key, value, groups)
        if groups[0].tokens is None and groups[0].cells.shape[0] == query.shape[0]:
            return self._attend_rows(query, key, value, groups[0])
        output = value.new_zeros(*query.shape[:-1], value.shape[-1])  # tokens after the last sequence attend to nothing
        for group in groups:
            tokens = torch.arange(len(group.cells), device=value.device) if group.tokens is None else group.tokens
            output = output.index_copy(0, tokens, self._attend_rows(query[tokens], key[tokens], value[tokens], group))
        return output

    def _attend_rows(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, group: RowGroup) -> torch.Tensor:
        """[n, 1, heads, v_dim] for the n tokens of a group."""
        rows = (_to_rows(x, group) for x in (query, key, value))
        return self._attend(*rows).transpose(0, 1).flatten(0, 1)[group.cells].unsqueeze(1)

    def _attend_masked(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, groups: Sequence[RowGroup | MaskedRows]
    ) -> torch.Tensor:
        """As `_packed`, where keys are not those of the queries alone. Every query is in one group."""
        outputs, places = [], []
        for group in groups:
            own, keys = (group.queries, group.keys) if isinstance(group, MaskedRows) else (group, group)
            tokens = filled(own.tokens)
            inputs = [query.index_select(0, tokens)]
            inputs += [x if keys.tokens is None else x.index_select(0, keys.tokens) for x in (key, value)]
            if isinstance(group, RowGroup):
                outputs.append(self._attend_rows(*inputs, group))
            else:
                rows = [_to_rows(x, of) for x, of in zip(inputs, (own, keys, keys), strict=True)]
                outputs.append(self._attend(*rows, group.mask).transpose(0, 1).flatten(0, 1)[own.cells].unsqueeze(1))
            places.append(tokens)
        return torch.cat(outputs).index_select(0, torch.cat(places).argsort())


#: Where no fused kernel takes the widths, rows of at most so many tokens are attended to with all their scores in memory. They are
#: in the cache then, and padded rows take up to a third longer; with 1,024 tokens padding is 1.4 to 3.7 times as fast (fp32).
_LONGEST_UNFUSED = 512


def _pad_to_one_width(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """With zeros, which change neither scores nor outputs. Torch's fused kernel on a CPU takes one width alone; without it every
    score of a row is kept for the backward pass, heads x tokens^2 numbers a few times over."""
    width = max(x.shape[-1] for x in tensors)
    return [F.pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x for x in tensors]


def _attend_unfused(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None) -> torch.Tensor:
    """Causal attention [b, heads, s, v_dim] as torch computes it where no fused kernel fits, to the bit: in float32.

    On CPU none takes values of another width than keys. Torch then also looks at every score for rows that see nothing, which a
    causal mask never has.
    """
    dtype = query.dtype
    query, key, value = query.float(), key.float(), value.float()
    factor = math.sqrt(query.shape[-1] ** -0.5 if scale is None else scale)
    width = query.shape[-2]
    hidden = torch.full((width, width), -torch.inf, dtype=query.dtype, device=query.device).triu_(1)
    scores = torch.matmul(query * factor, key.transpose(-2, -1) * factor).add_(hidden)
    return torch.matmul(scores.softmax(-1), value).to(dtype)


def _to_rows(x: torch.Tensor, group: RowGroup) -> torch.Tensor:
    """[n, 1, heads, dim] -> zero-padded [width, rows, heads, dim]."""
    rows = x.new_zeros(group.num_rows * group.width, *x.shape[2:]).index_copy(0, group.cells, x.squeeze(1))
    return rows.view(group.num_rows, group.width, *x.shape[2:]).transpose(0, 1)


#: The rows of an expert's products in bf16 on a CPU are a multiple of this. oneDNN generates code for every shape that it has not
#: seen, 0.6 ms each, and experts have other numbers of tokens in every step.
_ROWS_OF_EXPERT = 32


class LeanExperts(SequentialMLP):
    """SequentialMLP's parameters and checkpoint layout, with a forward of bare matrix products.

    Only for whole experts (expert-tensor-parallel 1) with SwiGLU and no bias; otherwise the stock forward runs.
    """

    def forward(
        self, permuted_local_hidden_states: torch.Tensor, tokens_per_expert: torch.Tensor, permuted_probs: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        """Expert outputs weighted by their routing probabilities, [tokens, hidden]."""
        if self.tp_group.size() > 1:
            return super().forward(permuted_local_hidden_states, tokens_per_expert, permuted_probs)
        counts = tokens_per_expert.tolist()
        inputs, probs = permuted_local_hidden_states.split(counts), permuted_probs.unsqueeze(-1).split(counts)
        outputs = []
        for expert, tokens, x, p in zip(self.local_experts, counts, inputs, probs, strict=True):
            padding = -tokens % _ROWS_OF_EXPERT if x.is_cpu and x.dtype == torch.bfloat16 else 0
            if padding:
                x, p = (F.pad(rows, (0, 0, 0, padding)) for rows in (x, p))
            hidden = swiglu(F.linear(x, _gathered_weight(expert.linear_fc1)))
            outputs.append(F.linear((hidden * p).to(x.dtype), _gathered_weight(expert.linear_fc2))[:tokens])
        return torch.cat(outputs), None


def _gathered_weight(linear: torch.nn.Module) -> torch.Tensor:
    """The weight of a module that is not called. `megatron.overlap_param_gather` waits for new weights in hooks of the call."""
    for hook in linear._forward_pre_hooks.values():
        hook(linear, ())
    return linear.weight


class MtpLayer(MultiTokenPredictionLayer):
    """Megatron-Core's multi-token-prediction layer that can also recompute packed sequences, and shifts all of them at once."""

    def _get_embeddings(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, embedding: Callable, hidden_states: torch.Tensor,
        packed_seq_params: Any = None,
    ) -> tuple[torch.Tensor, ...]:  # fmt: skip
        bounds = None if packed_seq_params is None else packed_seq_params.cu_seqlens_q
        input_ids, position_ids = (shift_left(ids, bounds, self.cp_group) for ids in (input_ids, position_ids))
        embedded = embedding(input_ids=input_ids, position_ids=position_ids)
        return input_ids, position_ids, embedded, make_viewless_tensor(hidden_states, requires_grad=True, keep_graph=True)

    def _checkpointed_forward(
        self, forward_func: Callable, *args: Any, packed_seq_params: Any = None, sequence_len_offset: Any = None, **kwargs: Any
    ) -> torch.Tensor:
        # The stock method hands every argument to a checkpoint function that can save tensors only.
        bound = partial(forward_func, packed_seq_params=packed_seq_params, sequence_len_offset=sequence_len_offset)
        return super()._checkpointed_forward(bound, *args, **kwargs)
