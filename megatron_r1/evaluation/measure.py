"""From scores to numbers: means over samples and problems, with intervals over problems."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from megatron_r1.evaluation.benchmark_problems import BenchmarkProblem
from megatron_r1.evaluation.passk import mean, pass_at_k
from megatron_r1.evaluation.vote import majority_score
from megatron_r1.runtime.ledger import Ledger

_AT_ONCE = 1 << 22  # draws held in memory


@dataclass(frozen=True)
class Estimate:
    """A mean over problems, and its 95% interval; in [0, 1]."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class BenchmarkResult:
    """What was measured on one benchmark."""

    problems: int
    samples: int  #: k
    pass_at_1: Estimate  #: the share of right samples
    cons: Estimate | None  #: majority vote of all k; None for programs
    pass_at: dict[int, Estimate]  #: k' -> at least one of k' samples is right, for powers of two up to k, and k
    greedy: Estimate | None  #: share of right responses at temperature 0; None: not asked for
    length: float | None  #: mean tokens of a sample; None: an endpoint that does not count tokens
    cut: float  #: share of samples cut at the limit, which count as wrong
    unscorable: float  #: share of samples that have no score, which count as wrong
    categories: dict[str, tuple[int, float]] = field(default_factory=dict)  #: category -> problems, pass@1
    notes: tuple[str, ...] = ()


def measure_benchmark(
    problems: Sequence[BenchmarkProblem],
    samples: int,
    responses: Ledger,
    scores: Ledger,
    *,
    classes: Mapping[str, Sequence[int | None]] | None,
    right_votes: Mapping[str, Sequence[bool]] | None = None,
    greedy_scores: Ledger | None,
    resamples: int,
    seed: int,
    notes: Sequence[str] = (),
) -> BenchmarkResult:
    """The numbers of one benchmark. Every problem has all its samples in both ledgers.

    Args:
        classes: see `score_responses.vote_classes`; None: no vote.
        right_votes: see `score_responses.judge_votes`; None: the scores of the responses stand for those of their answers.
        greedy_scores: of the responses at temperature 0.
        resamples, seed: of the bootstrap.
    """
    keys = [(problem.id, sample) for problem in problems for sample in range(samples)]
    right = {p.id: [scores.records[p.id, sample]["score"] == 1.0 for sample in range(samples)] for p in problems}

    def estimate(values: Sequence[float]) -> Estimate:
        return Estimate(mean(values), *bootstrap_interval(values, resamples, seed))

    shares = {id: mean(row) for id, row in right.items()}
    by_category: dict[str, list[float]] = defaultdict(list)
    for problem in problems:
        by_category[problem.category].append(shares[problem.id])
    tokens = [responses.records[key]["tokens"] for key in keys]
    sizes = sorted({samples, *(1 << power for power in range(samples.bit_length()))} - {1})
    return BenchmarkResult(
        problems=len(problems),
        samples=samples,
        pass_at_1=estimate(list(shares.values())),
        cons=estimate([majority_score(classes[p.id], (right_votes or right)[p.id]) for p in problems])
        if classes is not None
        else None,
        pass_at={k: estimate([pass_at_k(samples, sum(row), k) for row in right.values()]) for k in sizes},
        greedy=estimate([float(greedy_scores.records[p.id, 0]["score"] == 1.0) for p in problems])
        if greedy_scores is not None
        else None,
        length=mean(tokens) if None not in tokens else None,
        cut=mean([float(not responses.records[key]["finished"]) for key in keys]),
        unscorable=mean([float(scores.records[key]["score"] is None) for key in keys]),
        categories={name: (len(row), mean(row)) for name, row in sorted(by_category.items())} if set(by_category) != {""} else {},
        notes=tuple(notes),
    )


def bootstrap_interval(values: Sequence[float], resamples: int, seed: int) -> tuple[float, float]:
    """95% percentile interval of the mean of one value per problem, from `resamples` draws of as many problems with replacement.

    Problems are drawn, not samples: samples of one problem are not independent. If all values are the same, as 0 of 30, the
    interval is empty; `passk.wilson_interval` is not.
    """
    array, generator = np.asarray(values, dtype=np.float64), np.random.default_rng(seed % 2**64)
    rows = max(1, _AT_ONCE // len(array))
    means = [
        array[generator.integers(len(array), size=(min(rows, resamples - start), len(array)))].mean(axis=1)
        for start in range(0, resamples, rows)
    ]
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return float(low), float(high)
