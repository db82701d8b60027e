"""Evaluation results side by side."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from megatron_r1.errors import DataError
from megatron_r1.evaluation.heldout import EvaluationResult
from megatron_r1.runtime.markdown_table import align_table

EVALUATION = "evaluation.json"  #: what `evaluate` writes of held-out problems


def render_heldout(files: Mapping[str, Path]) -> str:
    """The table of `render_table`, from the files that `evaluate` wrote, by the names of their columns.

    Raises:
        DataError: a file is not the result of an evaluation, or the results cannot stand side by side.
    """
    results = {name: _read_heldout(path) for name, path in files.items()}
    try:
        return render_table(results)
    except ValueError as error:
        raise DataError(str(error)) from None


def _read_heldout(path: Path) -> EvaluationResult:
    try:
        return EvaluationResult(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; `megatron-r1 evaluate` on held-out problems writes it") from None
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path}: not the result of an evaluation on held-out problems ({error})") from error


def render_table(results: Mapping[str, EvaluationResult]) -> str:
    """A markdown table, aligned for a terminal: one column per named result, 95% intervals in brackets.

    Raises:
        ValueError: results over different numbers of problems or samples, which must not stand side by side.
    """
    settings = {(result.problems, result.k, result.temperature) for result in results.values()}
    if len(settings) != 1:
        raise ValueError(f"results with different (problems, samples, temperature) cannot be compared: {sorted(settings)}")
    problems, k, temperature = settings.pop()
    lines = [("pass@1", "pass_at_1"), (f"pass@{k}", "pass_at_k"), ("greedy accuracy", "greedy"), ("format", "format"),
             ("format, greedy", "format_greedy")]  # fmt: skip
    for name in dict.fromkeys(name for result in results.values() for name in result.custom):
        lines += [(f"{name}: {label}", f"{name}/{share}") for label, share in lines[:3]]
    rows = [[f"{problems} held-out problems", *results]]
    rows += [
        [label, *(_share_with_interval(result, name) for result in results.values())]
        for label, name in lines
        if any(_share(result, name) is not None for result in results.values())
    ]
    rows.append(["response length (tokens)", *(f"{result.response_length:.1f}" for result in results.values())])
    rows.append(["finished", *(f"{result.finished:.1%}" for result in results.values())])
    if any(result.unscored for result in results.values()):
        rows.append(["accuracy not scored", *(f"{result.unscored:.1%}" for result in results.values())])
    note = f"Sampled at temperature {temperature:g}, {k} samples per problem; in brackets 95% Wilson intervals over problems."
    return f"{align_table(rows)}\n\n{note}"


def _share(result: EvaluationResult, name: str) -> float | None:
    custom, slash, share = name.rpartition("/")
    return result.custom.get(custom, {}).get(share) if slash else getattr(result, name)


def _share_with_interval(result: EvaluationResult, name: str) -> str:
    share = _share(result, name)
    if share is None:
        return "-"
    low, high = result.intervals[name]
    return f"{share:.1%} [{low:.1%}, {high:.1%}]"
