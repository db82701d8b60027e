"""Latent attention of vLLM's CPU engine with less work.

vLLM 0.32 has no prefix cache for it on a CPU, so the prompt of a group is computed once for each of its responses, and queries and
keys are rotated with two copies more than they need.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention.mla_attention import MLACommonMetadata


@dataclass
class SharedPrompts:
    """A step in which each prompt is computed once, though several requests have it.

    Attributes:
        rows: [rows computed], which of the step's rows they are.
        row_of: [rows of the step], at which of the computed ones each is found.
        metadata: vLLM's of the step with the computed rows alone.
    """

    rows: torch.Tensor
    row_of: torch.Tensor
    metadata: MLACommonMetadata

    def fill_cache(self, cache: torch.Tensor, slots: torch.Tensor) -> None:
        """Give each request what was written into the cache for another one with its prompt.

        Args:
            cache: [blocks, tokens of a block, width].
            slots: [rows of the step], their places in the cache.
        """
        flat = cache.view(-1, cache.shape[-1])
        written = slots[self.rows][self.row_of]
        missing = written != slots
        flat[slots[missing]] = flat[written[missing]]


def share_prompts(token_ids: torch.Tensor, metadata: MLACommonMetadata) -> SharedPrompts | None:
    """The step with one of each prompt; None if no two are alike.

    Args:
        token_ids: [rows of the step]: one row of each request that has its prompt behind it, then whole prompts.
    """
    prefill = metadata.prefill
    if prefill is None or prefill.chunked_context is not None:
        return None
    first, limits = metadata.num_decode_tokens, prefill.query_start_loc.tolist()
    ids = token_ids[first:].tolist()
    rows, row_of = list(range(first)), list(range(first))
    begins: dict[tuple[int, ...], int] = {}  #: a prompt: the first of its rows among those computed
    kept: list[int] = []  #: numbers of the requests whose prompts are computed
    for number, (start, end) in enumerate(pairwise(limits)):
        prompt = tuple(ids[start:end])
        if prompt not in begins:
            begins[prompt] = len(rows)
            kept.append(number)
            rows += range(first + start, first + end)
        row_of += range(begins[prompt], begins[prompt] + end - start)
    if len(kept) == len(limits) - 1:
        return None
    starts = torch.tensor([*begins.values(), len(rows)], dtype=prefill.query_start_loc.dtype)
    computed = replace(
        metadata,
        num_reqs=metadata.num_decodes + len(kept),
        num_actual_tokens=len(rows),
        num_prefills=len(kept),
        query_start_loc=torch.cat([metadata.query_start_loc[: metadata.num_decodes], starts]),
        slot_mapping=metadata.slot_mapping[rows],
        prefill=replace(
            prefill,
            block_table=prefill.block_table[kept],
            query_start_loc=starts - first,
            query_lens_cpu=None if prefill.query_lens_cpu is None else prefill.query_lens_cpu[kept],
        ),
    )
    return SharedPrompts(torch.tensor(rows), torch.tensor(row_of), computed)


def run_model(own: Callable[..., torch.Tensor], token_ids: torch.Tensor, positions: torch.Tensor, **rest: Any) -> torch.Tensor:
    """In place of the runner's forward pass, which is `own`: [rows of the step, hidden]."""
    context = get_forward_context()
    layers, slots = context.attn_metadata, context.slot_mapping
    if not isinstance(layers, dict) or not isinstance(slots, dict):
        return own(token_ids, positions, **rest)  # a trial step of vLLM's start
    kinds = {id(metadata): metadata for metadata in layers.values()}
    metadata = next(iter(kinds.values())) if len(kinds) == 1 else None
    shared = share_prompts(token_ids, metadata) if isinstance(metadata, MLACommonMetadata) else None
    if shared is None:
        return own(token_ids, positions, **rest)
    prefill = shared.metadata.prefill
    assert prefill is not None and prefill.prefill_backend is not None, "`share_prompts` looks at it, and vLLM sets it"
    prefill.prefill_backend.prepare_metadata(prefill)
    context.attn_metadata = dict.fromkeys(layers, shared.metadata)
    context.slot_mapping = {name: of_rows[shared.rows] for name, of_rows in slots.items()}
    hidden = own(token_ids[shared.rows], positions[shared.rows], **rest)
    for name in layers:
        shared.fill_cache(context.no_compile_layers[name].kv_cache, slots[name])
    return hidden[shared.row_of]


def rotate(
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor | None,
    head_size: int,
    rotary_dim: int,
    cos_sin_cache: torch.Tensor,
    is_neox_style: bool,
) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """In place of the `forward_static` of vLLM's rotary embedding, where the whole head is rotated and neighbours make pairs.

    Returns:
        Rotated query and key in their shapes; None for another kind.
    """
    if is_neox_style or rotary_dim != head_size or key is None:
        return None
    cos, sin = cos_sin_cache.index_select(0, positions.flatten()).unsqueeze(1).chunk(2, dim=-1)
    return _turn_pairs(query, cos, sin, head_size), _turn_pairs(key, cos, sin, head_size)


def _turn_pairs(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, head_size: int) -> torch.Tensor:
    heads = x.view(len(cos), -1, head_size)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    even, odd = heads[..., ::2], heads[..., 1::2]
    out = torch.empty(heads.shape, dtype=x.dtype)
    torch.sub(even * cos, odd * sin, out=out[..., ::2])
    torch.add(odd * cos, even * sin, out=out[..., 1::2])
    return out.view(x.shape)
