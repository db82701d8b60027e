"""The results of one evaluation: a file to read by program, and a table to read by eye."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megatron_r1.errors import DataError
from megatron_r1.evaluation.benchmarks import BENCHMARKS
from megatron_r1.evaluation.measure import BenchmarkResult, Estimate
from megatron_r1.runtime.files import write_atomically
from megatron_r1.runtime.markdown_table import align_table

RESULTS, TABLE = "results.json", "results.md"


@dataclass(frozen=True)
class ModelResults:
    """One model on some benchmarks."""

    name: str  #: how tables call it
    model: str  #: folder, or model and url of an endpoint
    sampling: dict[str, Any]  #: temperature, top_p, max_tokens, template and what else the responses depend on
    benchmarks: dict[str, BenchmarkResult]  #: by the names of `BENCHMARKS`


def write_results(folder: Path, results: ModelResults) -> str:
    """Write results.json and results.md; each is whole or not there. Returns the table."""
    table = render_results(results)
    write_atomically(folder / RESULTS, json.dumps(asdict(results), indent=1, ensure_ascii=False) + "\n")
    write_atomically(folder / TABLE, f"# {results.name}\n\n{table}\n")
    return table


def read_results(folder: Path) -> ModelResults:
    """What `write_results` wrote.

    Raises:
        DataError: the folder holds no finished evaluation.
    """
    path = folder / RESULTS
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        benchmarks = {name: _read_result(fields) for name, fields in content.pop("benchmarks").items()}
        return ModelResults(**content, benchmarks=benchmarks)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; `megatron-r1 evaluate` with evaluate.benchmarks.files writes it") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: not the results of an evaluation ({error})") from error


def _read_result(fields: dict[str, Any]) -> BenchmarkResult:
    estimates = {name: Estimate(**fields[name]) if fields[name] else None for name in ("pass_at_1", "cons", "greedy")}
    pass_at = {int(k): Estimate(**value) for k, value in fields["pass_at"].items()}
    categories = {name: tuple(value) for name, value in fields["categories"].items()}
    return BenchmarkResult(**fields | estimates | {"pass_at": pass_at, "categories": categories, "notes": tuple(fields["notes"])})


def render_results(results: ModelResults) -> str:
    """A Markdown table, aligned for a terminal: one row a benchmark, shares in percent, 95% intervals in brackets."""
    with_greedy = any(result.greedy is not None for result in results.benchmarks.values())
    rows = [
        [
            "benchmark",
            "problems",
            "k",
            "pass@1",
            "cons@k",
            "pass@k",
            *(["greedy"] if with_greedy else []),
            "tokens",
            "cut",
            "unscorable",
        ]
    ]
    for name, result in results.benchmarks.items():
        cells = [show(result.pass_at_1), show(result.cons), show(result.pass_at.get(result.samples, result.pass_at_1))]
        cells += [show(result.greedy)] if with_greedy else []
        length = "-" if result.length is None else f"{result.length:.0f}"
        shares = [length, f"{result.cut:.1%}", f"{result.unscorable:.1%}"]
        rows.append([BENCHMARKS[name].title, str(result.problems), str(result.samples), *cells, *shares])
    sampling = results.sampling
    legend = (
        f"{results.model}, sampled at temperature {sampling['temperature']:g}, top-p {sampling['top_p']:g}, at most "
        f"{sampling['max_tokens']} tokens. Percent; in brackets 95% bootstrap intervals over problems. pass@1 is the mean over k "
        "samples, cons@k the majority vote (ties count as their share of right answers). Cut and unscorable responses count as "
        "wrong."
    )
    text = [align_table(rows), "", legend]
    for name, result in results.benchmarks.items():
        text += [f"{BENCHMARKS[name].title}: {note}." for note in result.notes]
        if result.categories:
            shares = ", ".join(f"{category} {share:.1%} of {count}" for category, (count, share) in result.categories.items())
            text.append(f"{BENCHMARKS[name].title}, pass@1 by category: {shares}.")
    return "\n".join(text)


def show(estimate: Estimate | None, bold: bool = False) -> str:
    """An estimate in percent with its interval."""
    if estimate is None:
        return "-"
    value, low, high = (f"{100 * number:.1f}" for number in (estimate.value, estimate.low, estimate.high))
    return f"{'**' if bold else ''}{value}{'**' if bold else ''} [{low}, {high}]"


def named_results(folders: Sequence[tuple[str | None, Path]]) -> list[ModelResults]:
    """The results of several folders, each under another name if one is given. Raises DataError as `read_results` does."""
    return [replace(found, name=name or found.name) for name, found in ((name, read_results(folder)) for name, folder in folders)]
