"""What torch keeps of a forward pass on a CPU, where layers are the project's own (`mcore.layers`, `mcore.elementwise`).

Other than `mcore.activation_bytes` counts, all layers share sines and cosines, a dense SwiGLU keeps one number less, attention of
latent vectors keeps its probabilities, packed sequences a copy in rows, and the router numbers of experts. A mixture of experts
that tensor-parallel ranks share keeps more than is counted here.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from megatron_r1.mcore.activation_bytes import WIDE_LOGITS_ON_CPU, layer_numbers, logits_bytes, passes_in_flight
from megatron_r1.mcore.head_bytes import keeps_whole
from megatron_r1.mcore.layout import Layout
from megatron_r1.model.architecture import Architecture

_WIDTH = 4  # bytes of a number
_PARTS = {"mlp", "moe", "shared_experts"}  # of a layer, which `layer_numbers` leaves out if they are recomputed


@dataclass(frozen=True)
class Rows:
    """How the sequences of a micro-batch lie: attention computes rows of one width."""

    positions: int  #: of the micro-batch
    width: int  #: of a row
    cells: int  #: of all rows, padding included
    is_packed: bool  #: whether positions are put into rows and back


def cpu_activation_bytes(
    arch: Architecture, layout: Layout, rows: Rows, stage: int, *, recompute: str, modules: Collection[str] = (),
    mtp_trained: bool = False, micro_batches: int | None = None, whole_logits_mb: int | None = None,
) -> int:  # fmt: skip
    """Bytes that a rank's passes keep at the fullest moment, in float32; see `activation_bytes` for the arguments."""
    counts = layout.decoder_layers(arch.num_hidden_layers)
    is_last = stage == layout.pp - 1
    full = recompute == "full"
    parts = frozenset(modules) if recompute == "selective" else frozenset()
    kept, passes = 0.0, []  # of a layer's one pass in the order of the forward pass: what is kept, and computed again
    for turn, times in enumerate(passes_in_flight(layout, stage, micro_batches)):
        chunk = stage + turn * layout.pp
        layers = list(range(sum(counts[:chunk]), sum(counts[: chunk + 1])))
        if is_last and mtp_trained and turn == layout.vpp - 1:
            layers += [arch.num_hidden_layers - 1] * arch.mtp_depth
        for layer in layers:
            whole, held = (_numbers_of_rank(arch, layer, layout, rows, left_out) for left_out in (frozenset[str](), parts))
            if full:
                held = arch.hidden_size * rows.positions / layout.tp
            kept += times * held
            passes.append((held, whole - held))
    turned = _turned(arch)
    kept += 2 * turned * rows.positions  # cosines and sines of all layers
    if is_last and mtp_trained:
        kept += 3 * arch.mtp_depth * arch.hidden_size * rows.positions / layout.tp  # both norms and what is projected of them
    most = kept + (_around(arch, layout, rows, mtp_trained, whole_logits_mb) if is_last else 0.0)
    for held, again in reversed(passes) if full or parts else ():  # what is around the layers is gone by then
        most = max(most, kept + again)
        kept -= held
    return round(most * _WIDTH)


def _numbers_of_rank(arch: Architecture, layer: int, layout: Layout, rows: Rows, recomputed: Collection[str]) -> float:
    """Tensor-parallel ranks share a layer, but for sine and cosine of the positions of packed sequences."""
    turning = 4 * _turned(arch) * rows.positions if rows.is_packed else 0
    return (cpu_layer_numbers(arch, layer, rows, recomputed) - turning) / layout.tp + turning


def _turned(arch: Architecture) -> int:
    """Numbers of a head that RoPE turns."""
    return arch.megatron_settings()["qk_pos_emb_head_dim" if arch.ATTENTION == "latent" else "kv_channels"]


def cpu_layer_numbers(arch: Architecture, layer: int, rows: Rows, recomputed: Collection[str] = ()) -> float:
    """Numbers that one layer keeps of a micro-batch."""
    hidden, heads = arch.hidden_size, arch.num_attention_heads
    settings = arch.megatron_settings()
    experts = arch.experts if arch.is_moe_layer(layer) else None
    each = layer_numbers(arch, layer, _PARTS & set(recomputed)) - (0 if rows.is_packed else 4 * _turned(arch))
    if "layernorm" in recomputed:
        each -= 2 * hidden
    if experts is None and "mlp" not in recomputed:
        each -= arch.intermediate_size
    if experts is not None and "moe" not in recomputed:
        each += 4 * experts.count + 8 * experts.per_token
        each -= 0 if "shared_experts" in recomputed else experts.shared_width
    cells = 0.0
    if arch.ATTENTION == "latent":
        plain, turned, value = settings["qk_head_dim"], settings["qk_pos_emb_head_dim"], settings["v_head_dim"]
        each -= heads * plain
        if "mla_up_proj" in recomputed:
            each -= heads * value + turned
        if "core_attn" not in recomputed:
            cells += heads * rows.width
        if rows.is_packed:
            cells += heads * (2 * (plain + turned) + value)
    else:
        if "core_attn" not in recomputed:
            each += heads
        if rows.is_packed:  # queries, keys, values and results in rows, and their places
            cells += 2 * settings["kv_channels"] * (heads + arch.query_groups) + 6
    return each * rows.positions + cells * rows.cells


def _around(arch: Architecture, layout: Layout, rows: Rows, mtp_trained: bool, whole_logits_mb: int | None) -> float:
    """Of the last norm and the output layer, and the logits, unless they are computed by tiles."""
    heads = 1 + (arch.mtp_depth if mtp_trained else 0)
    logits = 0 if arch.is_reward_model else logits_bytes(arch, layout, rows.positions, 1)
    if whole_logits_mb is not None and not keeps_whole(logits * _WIDTH, whole_logits_mb):
        logits = 0
    return heads * (2 * arch.hidden_size * rows.positions / layout.tp + logits)


def wide_logits(arch: Architecture, layout: Layout, positions: int) -> int:
    """Bytes of the part of the logits that the cross entropy has in float32, and in copies of it, at a time."""
    whole = logits_bytes(arch, layout, positions, _WIDTH)
    return 0 if arch.is_reward_model else 3 * min(whole, WIDE_LOGITS_ON_CPU * _WIDTH)
