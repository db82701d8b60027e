"""The KV cache of an engine on a CPU where the user gives no size: room for all that is computed at a time, if memory has it.

vLLM by itself takes half of the machine for each engine, and fills it with zeros as it starts. On a GPU that is right, the engine
measures what is left beside the weights; on a CPU the trainer and other engines live in the same memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_r1.model.architecture import Architecture

_SHORT = 512  #: tokens of a sequence up to which small blocks of grouped queries save more than they cost


@dataclass(frozen=True)
class CacheSize:
    """A chosen size."""

    bytes: int  #: of one worker of the engine
    sequences: int  #: of the longest kind that have room
    reason: str

    def describe(self) -> str:
        """The line for the user."""
        size = f"{self.bytes / 1e9:,.3f} GB, room for {self.sequences:,} sequences"
        return f"KV cache of each engine: {size}, as {self.reason}; rollout.kv_cache_bytes=N takes another size"


def choose_cache(
    arch: Architecture,
    dtype: Literal["float32", "bfloat16"],
    *,
    max_model_len: int,
    max_num_seqs: int,
    workers: int,
    free_bytes: int,
    share: float,
    most_bytes: int | None = None,
) -> CacheSize:
    """The KV cache of one worker of an engine on a CPU.

    Args:
        max_model_len: tokens of the longest sequence, prompt and response.
        max_num_seqs: sequences computed at a time.
        workers: of this engine, which share heads.
        free_bytes: of memory, for this worker.
        share: of `free_bytes` that may be taken.
        most_bytes: beside the room for one sequence, however much memory there is.
    """
    each, spare = (sequence_bytes(arch, dtype, max_model_len, workers, blocks) for blocks in (None, 1))  # vLLM keeps one block
    needed, limit = max_num_seqs * each + spare, int(free_bytes * share)
    bound = f"{share:g} (rollout.gpu_memory_utilization) of the free memory"
    if most_bytes is not None and most_bytes < limit:
        limit, bound = most_bytes, f"{most_bytes / 1e9:,.3f} GB"
    if needed <= limit:
        return CacheSize(needed, max_num_seqs, f"rollout.max_num_seqs={max_num_seqs:,} of up to {max_model_len:,} tokens need it")
    fitting = max(1, (limit - spare) // each)  # with less than one sequence vLLM would not start
    of_all = f"{needed / 1e9:,.3f} GB for rollout.max_num_seqs={max_num_seqs:,} of up to {max_model_len:,} tokens"
    return CacheSize(fitting * each + spare, fitting, f"{of_all} are more than {bound}")


def sequence_bytes(
    arch: Architecture, dtype: Literal["float32", "bfloat16"], tokens: int, workers: int = 1, blocks: int | None = None
) -> int:
    """Bytes that the longest sequence, of so many tokens, takes of one worker's cache: whole blocks, or so many `blocks`."""
    block = block_tokens(arch, tokens)
    kept = block * (-(-tokens // block) if blocks is None else blocks)
    sharers = 1 if arch.ATTENTION == "latent" else workers  # of the heads; the latent is whole on each
    return kept * arch.num_hidden_layers * (arch.cached_width // sharers) * (4 if dtype == "float32" else 2)


def block_tokens(arch: Architecture, max_model_len: int) -> int:
    """Tokens of a block on a CPU; only whole blocks are kept, and shared by the responses to a prompt.

    vLLM's kernel for latent attention takes 16 alone. The one for grouped queries takes multiples of 32, of which vLLM's own choice
    is 128: nothing of a shorter prompt is shared, and a sequence of 80 tokens takes as much as one of 128. With 32 the kernel takes
    1.05 times as long at 80 tokens, where it is a small part of a step, but 1.17 times at 512 and 2,048 (SmolLM2's heads, float32).
    """
    if arch.ATTENTION == "latent":
        return 16
    return 32 if max_model_len <= _SHORT else 128
