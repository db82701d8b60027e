"""What the workers of an engine found in their own memory after an update, and what is wrong with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from megatron_r1.errors import WeightSyncError
from megatron_r1.weights.shard_plan import list_some


@dataclass
class HeldReport:
    """What one worker of the engine found in its own memory after an update."""

    received_bytes: int = 0  #: of all buckets, what this worker read or was sent
    held_bytes: int = 0  #: of the boxes of Hugging Face tensors that it holds
    unsent: list[str] = field(default_factory=list)  #: tensors of which not every piece came
    different: list[str] = field(default_factory=list)  #: tensors whose bits here are not those whose checksum came
    unreached: list[str] = field(default_factory=list)  #: tensors of which there is a copy that updates do not reach
    underived: list[str] = field(default_factory=list)  #: derived tensors that do not follow from the held weights
    uncovered: list[str] = field(default_factory=list)  #: parameters and buffers that no rule explains
    constants: dict[str, int] = field(default_factory=dict)  #: tensors no update may change -> checksum


_KINDS = {
    "unsent": "held but never sent", "different": "different", "unreached": "with a copy that is not updated",
    "underived": "underived", "uncovered": "uncovered",
}  # fmt: skip


def verify_held(workers: Sequence[HeldReport], constants: Mapping[str, int] | None) -> dict[str, int]:
    """Look at what all workers found; return their constants for the next comparison.

    Args:
        workers: a report of each worker of the engine.
        constants: what the first verification returned; None at the first.

    Raises:
        WeightSyncError: naming the first few tensors that differ, are missing, are not explained or changed unasked.
    """
    now = {f"worker {i} {name}": value for i, worker in enumerate(workers) for name, value in worker.constants.items()}
    problems = {says: sorted({name for worker in workers for name in getattr(worker, kind)}) for kind, says in _KINDS.items()}
    problems["changed constants"] = sorted(n for n in {*now, *(constants or now)} if (constants or now).get(n) != now.get(n))
    found = [f"{kind}: {list_some(names)}" for kind, names in problems.items() if names]
    if found:
        raise WeightSyncError(f"the rollout engine does not hold the trainer's weights: {'; '.join(found)}")
    return now
