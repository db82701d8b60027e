"""Domains in given proportions, by leaving records out or by repeating them."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from fractions import Fraction

from megatron_r1.config.curation import MixConfig
from megatron_r1.errors import DataError


def plan_mix(available: Mapping[str, int], config: MixConfig) -> dict[str, int]:
    """How many records of each domain the mix has.

    Without proportions it has all of them. Otherwise the counts follow the proportions exactly but for rounding (largest
    remainders). They sum to `config.total`; if that is not set, to the most that needs no record twice ("down"), or to the fewest
    that leave none out ("up").

    Raises:
        DataError: a domain is missing on one of the sides, or has too few records.
    """
    if not config.proportions:
        return dict(available)
    weights = {domain: Fraction(weight) for domain, weight in config.proportions.items()}
    _check_proportions(available, config)
    wanted = {domain: weight for domain, weight in weights.items() if weight}
    whole = sum(wanted.values())
    totals = {domain: available[domain] * whole / weight for domain, weight in wanted.items()}  # that use a domain up exactly
    if config.total is not None:
        total = config.total
    elif config.sampling == "down":
        total = math.floor(min(totals.values()))
    else:
        total = math.ceil(max(totals.values()))
    counts = _apportion(total, {domain: weight / whole for domain, weight in wanted.items()})
    copies = 1 if config.sampling == "down" else config.max_copies
    for domain, count in counts.items():
        if count > copies * available[domain]:
            raise DataError(
                f"the mix needs {count} records of domain {domain!r} and there are {available[domain]}: "
                "lower curation.mix.total, or "
                + ("set curation.mix.sampling=up" if config.sampling == "down" else f"raise curation.mix.max_copies={copies}")
            )
    return counts


def draw(domains: Sequence[str], counts: Mapping[str, int], seed: int) -> list[tuple[int, int]]:
    """Which records make the mix, in a random order: (index into `domains`, number of the copy from 1).

    Every record of a domain comes as often as every other, or once more.

    Args:
        domains: of each record that there is.
        counts: from `plan_mix`.
    """
    chosen: list[tuple[int, int]] = []
    for domain in sorted(counts):
        indices = [index for index, other in enumerate(domains) if other == domain]
        rounds, rest = divmod(counts[domain], len(indices)) if indices else (0, 0)
        chosen += [(index, copy + 1) for copy in range(rounds) for index in indices]
        chosen += [(index, rounds + 1) for index in random.Random(f"mix {seed} {domain}").sample(indices, rest)]
    random.Random(f"mix {seed}").shuffle(chosen)
    return chosen


def _check_proportions(available: Mapping[str, int], config: MixConfig) -> None:
    for domain, weight in config.proportions.items():
        if weight < 0:
            raise DataError(f"curation.mix.proportions.{domain} is {weight:g}, expected 0 or more")
        if weight > 0 and not available.get(domain):
            raise DataError(f"no record of domain {domain!r} is left to mix: set curation.mix.proportions.{domain}=0, or add data")
    unnamed = sorted(set(available) - set(config.proportions))
    if unnamed:
        raise DataError(
            f"there are records of domain {unnamed[0]!r}: give it a weight in curation.mix.proportions, or 0 to drop it"
        )
    if not any(config.proportions.values()):
        raise DataError("all of curation.mix.proportions are 0: nothing is left")


def _apportion(total: int, shares: Mapping[str, Fraction]) -> dict[str, int]:
    """Whole numbers with sum `total`, each less than 1 from its share: the largest remainders are rounded up."""
    exact = {domain: total * share for domain, share in shares.items()}
    counts = {domain: math.floor(value) for domain, value in exact.items()}
    by_remainder = sorted(exact, key=lambda domain: (counts[domain] - exact[domain], domain))
    for domain in by_remainder[: total - sum(counts.values())]:
        counts[domain] += 1
    return counts
