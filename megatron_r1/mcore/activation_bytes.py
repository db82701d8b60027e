"""How many bytes one rank keeps of a forward pass until the backward pass, from shapes alone: for whoever plans memory.

Megatron-Core is not imported. Counted is what its layers, without fused kernels, keep for each position; tensors with one number a
head or an expert, copies that a kernel makes while it runs, and CUDA graphs are not. Of what is recomputed in parts, counted is at
least what is kept: norms that Transformer Engine fuses with the next product, `mla_up_proj`, whose results attention may copy, and
`core_attn` count as kept.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from megatron_r1.mcore.head_bytes import keeps_whole, tiles_bytes
from megatron_r1.mcore.layout import Layout, padded_vocabulary
from megatron_r1.model.architecture import Architecture

#: Logits that are float32 at the same time in the cross entropy, of one rank: 256 MiB. It bounds memory and changes no number.
WIDE_LOGITS = 2**26
#: The same on a CPU, where many small steps cost nothing: 4 MiB, which the heap keeps from one step to the next (`runtime.heap`).
WIDE_LOGITS_ON_CPU = 2**20


@dataclass(frozen=True)
class ActivationBytes:
    """Bytes of one rank of a pipeline stage at its fullest moment."""

    kept: int  #: of the layers, for all micro-batches that are between forward and backward pass
    recomputed: int  #: of the one layer, or of its parts, that are computed again in the backward pass
    logits: int  #: on the last stage: of the output layer and of every depth of multi-token prediction that is trained

    @property
    def all(self) -> int:
        """At the fullest moment: the logits are gone when the first layer is computed again."""
        return self.kept + max(self.recomputed, self.logits)


def activation_bytes(
    arch: Architecture, layout: Layout, *, recompute: str, tokens: int, stage: int, width: int = 2, mtp_trained: bool = False,
    modules: Collection[str] = (), micro_batches: int | None = None, imbalance: float = 1.0,
    whole_logits_mb: int | None = None,
) -> ActivationBytes:  # fmt: skip
    """What a rank of this stage keeps.

    Args:
        recompute: as `runtime.recompute`.
        modules: as `runtime.recompute_modules`; of "selective".
        tokens: of a micro-batch.
        stage: of the pipeline, from 0; of virtual stages the ones of a rank are counted together.
        width: bytes of a number.
        mtp_trained: whether multi-token prediction is trained.
        micro_batches: of an update; fewer than the pipeline has stages keep less. None: enough.
        imbalance: as for `layer_numbers`.
        whole_logits_mb: as `runtime.whole_logits_mb`; None: logits are whole, however many.
    """
    count = layout.decoder_layers(arch.num_hidden_layers)
    positions = tokens // layout.cp
    parts = frozenset(modules) if recompute == "selective" else frozenset()
    inputs = arch.hidden_size * positions * width // layout.tp
    is_last = stage == layout.pp - 1
    heads = (1 + (arch.mtp_depth if mtp_trained else 0)) if is_last else 0
    full, kept, again = recompute == "full", 0, 0
    for turn, times in enumerate(passes_in_flight(layout, stage, micro_batches)):
        chunk = stage + turn * layout.pp
        layers = list(range(sum(count[:chunk]), sum(count[: chunk + 1])))
        if is_last and mtp_trained and turn == layout.vpp - 1:
            layers += [arch.num_hidden_layers - 1] * arch.mtp_depth
        whole, of_layers = (
            [layer_numbers(arch, layer, left_out, imbalance) * positions * width // layout.tp for layer in layers]
            for left_out in ((), parts)
        )
        kept += times * (inputs * len(layers) if full else sum(of_layers))
        again = max([again, *(all_ - (inputs if full else kept_) for all_, kept_ in zip(whole, of_layers, strict=True))])
    return ActivationBytes(
        kept=kept,
        recomputed=again if full or parts else 0,
        logits=_of_heads(arch, layout, positions, width, heads, whole_logits_mb) if heads else 0,
    )


def passes_in_flight(layout: Layout, stage: int, micro_batches: int | None = None) -> list[int]:
    """Of each virtual stage of a rank, the micro-batches that are between forward and backward pass at the fullest moment.

    Megatron-Core's schedules: one forward, one backward after a warm-up of one pass for every stage that follows; interleaved, of
    two for every stage that follows and of all virtual stages but one, which take `pp` micro-batches in turn.
    """
    pp, vpp = layout.pp, layout.vpp
    passes = pp - stage if vpp == 1 else 2 * (pp - stage - 1) + (vpp - 1) * pp + 1
    if micro_batches is not None:
        passes = min(passes, micro_batches * vpp)
    counts = [0] * vpp
    for number in range(passes):
        counts[number // pp % vpp] += 1
    return counts


def _of_heads(arch: Architecture, layout: Layout, positions: int, width: int, heads: int, whole_logits_mb: int | None) -> int:
    whole = logits_bytes(arch, layout, positions, width)
    if whole_logits_mb is None or keeps_whole(whole, whole_logits_mb):
        return heads * whole + 4 * WIDE_LOGITS
    # Tiles keep the hidden states of all positions, of which each rank else has a part.
    gathered = arch.hidden_size * positions * width if layout.tp > 1 else 0
    return heads * gathered + tiles_bytes(arch.hidden_size, width)


def logits_bytes(arch: Architecture, layout: Layout, positions: int, width: int = 2) -> int:
    """Of one output layer's whole logits: `cross_entropy` keeps them, and writes their gradient over them."""
    return positions * padded_vocabulary(arch.vocab_size, layout.tp) // layout.tp * width


def layer_numbers(arch: Architecture, layer: int, recomputed: Collection[str] = (), imbalance: float = 1.0) -> int:
    """Numbers a position that one layer keeps on all tensor-parallel ranks together, but for modules that are recomputed.

    Norms keep what they take and what the next product takes. A SwiGLU keeps both halves of the first product, the first one after
    SiLU, a copy of the second, and their product. Of a mixture of experts, the copies of a position are counted as if all experts
    were used alike, times `imbalance`: the tokens of the rank whose experts are used most, over the mean.
    """
    settings = arch.megatron_settings()
    experts = arch.experts if arch.is_moe_layer(layer) else None
    if experts is None:
        feed_forward = 0 if "mlp" in recomputed else 5 * arch.intermediate_size
    elif "moe" in recomputed:
        feed_forward = 0
    else:
        of_expert = (2 if "moe_act" in recomputed else 5) * experts.width + arch.hidden_size
        shared = 0 if "shared_experts" in recomputed else 5 * experts.shared_width
        feed_forward = round(imbalance * settings["moe_router_topk"] * of_expert) + shared
    fused = (arch.ATTENTION == "grouped_query") + (experts is None)  # norms that are a part of the next layer
    norms = 4 - (2 - fused if "layernorm" in recomputed else 0)
    return norms * arch.hidden_size + _attention_numbers(arch, settings) + feed_forward


def _attention_numbers(arch: Architecture, settings: dict[str, Any]) -> int:
    """Query and key after RoPE with its four sines and cosines, the product that values are a part of, and what comes out."""
    heads = arch.num_attention_heads
    if arch.ATTENTION == "grouped_query":
        groups, width = arch.query_groups, settings["kv_channels"]
        return width * (heads + groups + 4 + (heads + 2 * groups) + heads)
    plain, turned, value = settings["qk_head_dim"], settings["qk_pos_emb_head_dim"], settings["v_head_dim"]
    compressed = 2 * (settings["q_lora_rank"] or 0) + 2 * settings["kv_lora_rank"] + turned
    return compressed + 2 * heads * (plain + turned) + 4 * turned + heads * (plain + value) + heads * value
