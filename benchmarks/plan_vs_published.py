"""The planner beside published runs: `python -m benchmarks.plan_vs_published`.

Prints every row of `benchmarks/published`, predicted or not, and ends with 0 only if the median errors are within the bars.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from statistics import median

from benchmarks.published.explained import EXPLAINED
from benchmarks.published.predict import NOT_PREDICTED, Compared, compare_memory, compare_times

TIME_BARS = {"fitted": 0.15, "held out": 0.25}  #: most that the median error of times may be
MEMORY_BAR = 0.05  #: the same of memory
LARGE = 0.3  #: an error beyond it has an explanation


def median_error(found: Iterable[Compared]) -> float:
    """Of the errors' absolute values."""
    return median(abs(one.error) for one in found)


def describe(found: list[Compared], peaks: list[Compared]) -> str:
    """All rows as a table, those without prediction, and the medians."""
    lines = [f"{'set':8} {'what':10} {'published':>10} {'predicted':>10} {'error':>7}  row"]
    lines += [
        f"{one.set:8} {one.what:10} {one.measured:10,.2f} {one.predicted:10,.2f} {one.error:+7.1%}  {one.row} ({one.source})"
        for one in found + peaks
    ]
    lines.append("\nnot predicted")
    lines += [f"  {row.name}: {row.measured} ({row.source}): {row.why}" for row in NOT_PREDICTED]
    lines.append(f"\nerrors beyond {LARGE:.0%}")
    large = sorted((one for one in found if abs(one.error) > LARGE), key=lambda one: -abs(one.error))
    lines += [f"  {one.error:+.0%} {one.what} of {one.row}: {EXPLAINED[one.row, one.what]}" for one in large]
    lines.append("\nmedian error")
    for name, bar in TIME_BARS.items():
        of_set = [one for one in found if one.set == name]
        kinds = {what: [one for one in of_set if one.what == what] for what in dict.fromkeys(one.what for one in of_set)}
        each = ", ".join(f"{what} {median_error(ones):.1%} of {len(ones)}" for what, ones in kinds.items())
        lines.append(f"  time, {name}: {median_error(of_set):.1%} of {len(of_set)} rows, bar {bar:.0%} ({each})")
    lines.append(f"  memory: {median_error(peaks):.1%} of {len(peaks)} rows, bar {MEMORY_BAR:.0%}")
    return "\n".join(lines)


def beyond_bars(found: list[Compared], peaks: list[Compared]) -> list[str]:
    """Sets whose median error is beyond their bar."""
    beyond = [f"time, {name}" for name, bar in TIME_BARS.items() if median_error(one for one in found if one.set == name) > bar]
    return beyond + (["memory"] if median_error(peaks) > MEMORY_BAR else [])


def main() -> int:
    """Print the comparison; 1: a bar does not hold."""
    argparse.ArgumentParser(prog="python -m benchmarks.plan_vs_published", description=__doc__).parse_args()
    found, peaks = compare_times(), compare_memory()
    print(describe(found, peaks))
    beyond = beyond_bars(found, peaks)
    if beyond:
        print(f"beyond the bar: {', '.join(beyond)}", file=sys.stderr)
    return 1 if beyond else 0


if __name__ == "__main__":
    sys.exit(main())
