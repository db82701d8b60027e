"""Compares the checksums of the weights that were sent with those of the weights that the engine holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from megatron_r1.errors import WeightSyncError
from megatron_r1.weights.checksum import MASK

_NAMED = 5  # tensors named in one message


@dataclass
class HeldReport:
    """What one worker of the engine found in its own memory after an update."""

    replicated: dict[str, int] = field(default_factory=dict)  #: Hugging Face name -> checksum of the whole tensor
    sharded: dict[str, int] = field(default_factory=dict)  #: Hugging Face name -> this worker's part of the checksum
    contradictions: list[str] = field(default_factory=list)  #: names of which two copies in this worker differ
    underived: list[str] = field(default_factory=list)  #: derived tensors that do not follow from the held weights
    uncovered: list[str] = field(default_factory=list)  #: parameters and buffers that no rule explains
    constants: dict[str, int] = field(default_factory=dict)  #: tensors no update may change -> checksum


def verify_held(sent: Mapping[str, int], workers: Sequence[HeldReport], constants: Mapping[str, int] | None) -> dict[str, int]:
    """Compare checksums of all tensors; return the workers' constants for the next comparison.

    Args:
        sent: Hugging Face name -> checksum, computed by the trainer.
        workers: a report of each worker of the engine.
        constants: what the first verification returned; None at the first.

    Raises:
        WeightSyncError: naming the first few tensors that differ, are missing, are not explained or changed unasked.
    """
    held: dict[str, int] = {}
    problems: dict[str, list[str]] = {}
    now = {f"worker {i} {name}": value for i, worker in enumerate(workers) for name, value in worker.constants.items()}
    for worker in workers:
        for kind in ("contradictions", "underived", "uncovered"):
            problems.setdefault(kind, []).extend(getattr(worker, kind))
        for name, value in worker.sharded.items():
            held[name] = (held.get(name, 0) + value) & MASK
    for worker in workers:
        for name, value in worker.replicated.items():
            if held.setdefault(name, value) != value:
                problems["contradictions"].append(name)
    problems["changed constants"] = sorted(n for n in {*now, *(constants or now)} if (constants or now).get(n) != now.get(n))
    problems["different"] = sorted(name for name in sent.keys() & held.keys() if sent[name] != held[name])
    problems["sent but not held"] = sorted(sent.keys() - held.keys())
    problems["held but not sent"] = sorted(held.keys() - sent.keys())
    found = [f"{kind}: {_some(names)}" for kind, names in problems.items() if names]
    if found:
        raise WeightSyncError(f"the rollout engine does not hold the trainer's weights: {'; '.join(found)}")
    return now


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
