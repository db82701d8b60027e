"""Trainer against engine: do both give the sampled tokens the same log-probability?

Each rank counts the differences of its own samples into a table whose size does not depend on their number; tables add up, so no
rank sees another's tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from megatron_r1.config.rollout import RolloutConfig
from megatron_r1.errors import WeightSyncError
from megatron_r1.runtime.distributed import gather_objects, world_size
from megatron_r1.training.metrics import pooled_mean
from megatron_r1.types import TrainingSample

# A bucket is what float32 numbers share in sign, exponent and the first 7 bits of the mantissa: 1/128 of its lower end wide. The
# first one also takes all that is smaller, the last one all that is larger.
_LOWEST, _HIGHEST = (int(torch.tensor(end).view(torch.int32)) >> 16 for end in (2.0**-24, 2.0**10))
BUCKETS = _HIGHEST - _LOWEST + 1


@dataclass(frozen=True)
class Worst:
    """The token that trainer and engine disagree on most."""

    difference: float  #: in nats
    sample: str  #: its name
    place: int  #: in the response, from 1
    token_id: int
    trainer: float  #: its log-prob
    engine: float

    def __str__(self) -> str:
        place = f"token {self.place} (id {self.token_id}) of {self.sample or 'a sample'}"
        return f"{place}, trainer {self.trainer:.4g}, engine {self.engine:.4g}"


@dataclass(frozen=True)
class LogprobDifferences:
    """|trainer - engine| over sampled tokens, in nats. Those of several parts of a batch can be put together."""

    count: int  #: tokens with two finite log-probs
    mean: float  #: NaN of none
    beyond: int  #: tokens that differ by more than `rollout.max_logprob_diff_max`
    buckets: torch.Tensor  #: [BUCKETS] int64, tokens by the size of their difference
    worst: Worst | None  #: None of none

    def quantile(self, share: float) -> float:
        """A number that at least this share of the tokens do not exceed, at most 1/128 above the smallest one; NaN of none."""
        if self.worst is None:
            return math.nan
        rank = max(1, math.ceil(share * self.count))
        bucket = int(torch.searchsorted(self.buckets.cumsum(0), rank))
        end = torch.tensor((_LOWEST + bucket + 1) << 16, dtype=torch.int32).view(torch.float32).item()
        return min(end, self.worst.difference) if bucket < BUCKETS - 1 else self.worst.difference

    def metrics(self, settings: RolloutConfig) -> dict[str, float]:
        """What goes into metrics.jsonl."""
        return {
            "logprob_diff/mean": self.mean,
            "logprob_diff/max": self.worst.difference if self.worst else math.nan,
            "logprob_diff/quantile": self.quantile(settings.logprob_diff_quantile),
            "logprob_diff/beyond": self.beyond / self.count if self.count else math.nan,
        }


def compare_logprobs(samples: Sequence[TrainingSample], settings: RolloutConfig) -> LogprobDifferences:
    """The differences over the response tokens of these samples, before any update on them.

    Tokens without a finite number are left out, as they are of training (`samples.find_nonfinite`).
    """
    differences = np.empty(sum(sample.num_trained for sample in samples), np.float32)  # the only array beside the samples' own
    buckets, end = torch.zeros(BUCKETS, dtype=torch.int64), 0
    worst: Worst | None = None
    for sample in samples:
        assert sample.old_logprobs is not None and sample.rollout_logprobs is not None, "read before the step that fills them"
        trainer, engine = sample.old_logprobs[sample.trained], sample.rollout_logprobs[sample.trained]
        found = np.abs(trainer - engine)
        finite = np.flatnonzero(np.isfinite(found))
        if not len(finite):
            continue
        start, end = end, end + len(finite)
        differences[start:end] = found[finite]
        numbers = (torch.from_numpy(found[finite].view(np.int32)) >> 16).clamp(_LOWEST, _HIGHEST) - _LOWEST
        buckets += torch.bincount(numbers, minlength=BUCKETS)
        at = int(finite[found[finite].argmax()])
        token = int(sample.token_ids[1:][sample.trained][at])
        here = Worst(float(found[at]), sample.name, at + 1, token, float(trainer[at]), float(engine[at]))
        worst = _worse(worst, here)
    counted = torch.from_numpy(differences[:end])
    beyond = int((counted > settings.max_logprob_diff_max).sum())
    return LogprobDifferences(end, counted.mean().item(), beyond, buckets, worst)


def over_ranks(own: LogprobDifferences) -> LogprobDifferences:
    """The differences of all ranks' samples. Collective: it adds up a table, and gathers a few numbers of each rank."""
    if world_size() == 1:
        return own
    buckets = own.buckets.clone()
    dist.all_reduce(buckets)
    parts = gather_objects((own.count, own.mean, own.beyond, own.worst))
    worst: Worst | None = None
    for part in parts:
        worst = _worse(worst, part[3])
    counts, means = np.array([part[0] for part in parts]), np.array([part[1] for part in parts])
    return LogprobDifferences(int(counts.sum()), pooled_mean(counts, means), sum(part[2] for part in parts), buckets, worst)


class ParityGate:
    """Lets a round go on if its engine samples from the policy that is trained.

    Attributes:
        found: the differences of all ranks' samples, once `check` has seen them.

    Args:
        sampled_by: the number of updates of the weights that the engine sampled with.
        trainer: the policy's.
    """

    found: LogprobDifferences

    def __init__(self, settings: RolloutConfig, *, sampled_by: int, trainer: int) -> None:
        self._settings, self._sampled_by, self._trainer = settings, sampled_by, trainer

    def check(self, samples: Sequence[TrainingSample], reports: bool) -> None:
        """Compare the samples' log-probs. Collective; raises WeightSyncError as `check_parity` does.

        Args:
            reports: whether this rank speaks for the samples that are `here`.
        """
        own = [sample for sample in samples if sample.here and reports]
        self.found = over_ranks(compare_logprobs(own, self._settings))
        check_parity(self.found, self._settings, sampled_by=self._sampled_by, trainer=self._trainer)


def check_parity(differences: LogprobDifferences, settings: RolloutConfig, *, sampled_by: int, trainer: int) -> None:
    """Stop if the engine samples from another policy than the one that is trained. The largest difference of all stops nothing.

    Args:
        sampled_by: the number of updates of the weights that the engine sampled with.
        trainer: the policy's.

    Raises:
        WeightSyncError: mean or quantile is above its bound, or not a number; one line that says where to look.
    """
    quantile_bound = quantile_bound_key(settings)
    for name, value, key in (
        ("logprob_diff/mean", differences.mean, "max_logprob_diff_mean"),
        ("logprob_diff/quantile", differences.quantile(settings.logprob_diff_quantile), quantile_bound),
    ):
        bound = getattr(settings, key)
        if not value <= bound:
            of = f" at {_percent(settings)}" if name.endswith("quantile") else ""
            raise WeightSyncError(
                f"{name}{of} is {value:.3g}, above rollout.{key}={bound:g}: over {differences.count} sampled tokens, trainer and "
                f"engine disagree, most on {differences.worst or 'nothing: no token has two finite log-probabilities'}; "
                f"{differences.beyond} differ by more than {settings.max_logprob_diff_max:g}; look at the weights (update "
                f"{sampled_by} sampled, the trainer is at {trainer}), at rollout.temperature={settings.temperature:g} and at "
                "runtime.dtype if the mean is large, and at experts that a router chooses nearly alike if only some tokens differ "
                f"much; with a larger rollout.{key} the same command goes on (bf16 needs about 0.05 for the mean, and 2 for the "
                "quantile)"
            )


def quantile_bound_key(settings: RolloutConfig) -> str:
    """The setting that bounds the quantile."""
    return "max_logprob_diff_max" if settings.max_logprob_diff_quantile is None else "max_logprob_diff_quantile"


def describe_older_bound(settings: RolloutConfig) -> str | None:
    """One line on what `rollout.max_logprob_diff_max` means now, for settings that were written when it stopped a run."""
    default = type(settings).model_fields["max_logprob_diff_max"].default
    if (
        settings.max_logprob_diff_max == default
        or settings.max_logprob_diff_quantile is not None
        or settings.logprob_diff_quantile == 1
    ):
        return None
    return (
        f"rollout.max_logprob_diff_max={settings.max_logprob_diff_max:g} stops no run at one token any more: it bounds the "
        f"difference that {_percent(settings)} of the tokens do not exceed; rollout.max_logprob_diff_quantile sets that bound, "
        "and rollout.logprob_diff_quantile=1.0 bounds the largest difference as before"
    )


def _percent(settings: RolloutConfig) -> str:
    return f"{100 * settings.logprob_diff_quantile:.8g}%"


def _worse(one: Worst | None, other: Worst | None) -> Worst | None:
    """The larger difference; of equal ones, the same whichever comes first."""
    if one is None or other is None:
        return one or other
    return min(one, other, key=lambda worst: (-worst.difference, worst.sample, worst.place))
