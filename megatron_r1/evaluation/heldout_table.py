"""Evaluation results side by side."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_r1.evaluation.heldout import EvaluationResult
from megatron_r1.runtime.markdown_table import align_table


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
    rows = [[f"{problems} held-out problems", *results]]
    rows += [
        [label, *(_share_with_interval(result, name) for result in results.values())]
        for label, name in lines
        if any(getattr(result, name) is not None for result in results.values())
    ]
    rows.append(["response length (tokens)", *(f"{result.response_length:.1f}" for result in results.values())])
    rows.append(["finished", *(f"{result.finished:.1%}" for result in results.values())])
    if any(result.unscored for result in results.values()):
        rows.append(["accuracy not scored", *(f"{result.unscored:.1%}" for result in results.values())])
    note = f"Sampled at temperature {temperature:g}, {k} samples per problem; in brackets 95% Wilson intervals over problems."
    return f"{align_table(rows)}\n\n{note}"


def _share_with_interval(result: EvaluationResult, name: str) -> str:
    if getattr(result, name) is None:
        return "-"
    low, high = result.intervals[name]
    return f"{getattr(result, name):.1%} [{low:.1%}, {high:.1%}]"
