"""The comparison of the R1 pipeline's models: one table, and what the paper claims beside what was measured.

"R1 v1" and "R1 v2" are the versions of DeepSeek-R1 (arXiv 2501.12948).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from megatron_r1.pipeline.recipe.measure import Measured, read_measured
from megatron_r1.report.html import write_report
from megatron_r1.runtime.files import write_atomically
from megatron_r1.runtime.markdown_table import align_table

_SHARES = ("pass_at_1", "format", "language", "readable", "helpful", "safe")

#: (the paper's claim, the measure, the model that should be higher in it, the model that should be lower)
CLAIMS = (
    ("the cold start makes the model more readable than R1-Zero (R1 v1 section 2.3.1)", "readable", "stage1", "zero"),
    ("the language reward stops language mixing (R1 v2 section 3.2.1)", "language", "stage2", "zero"),
    ("RL over all scenarios makes answers more helpful (R1 v2 section 3.2.2, table 3)", "helpful", "stage4", "stage3"),
    ("a small model gains more from distillation than from RL (R1 v1 section 4.1)", "pass_at_1", "distill", "student_rl"),
)


def write_comparison(root: Path, titles: Mapping[str, str]) -> str:
    """Print the table, and keep it as summary.json, summary.md and in report.html.

    Args:
        titles: stage -> title of every language model, in the order of the table.
    """
    measured = {stage: found for stage in titles if (found := read_measured(root, stage)) is not None}
    rows = [{"name": f"{stage}: {titles[stage]}", **_row(found)} for stage, found in measured.items()]
    claims = [line for claim in CLAIMS if (line := _hold(claim, measured))]
    text = "\n".join([_table(rows), "", *(f"- {claim}" for claim in claims)])
    write_atomically(root / "summary.json", json.dumps({"rows": rows, "claims": claims}, indent=1, ensure_ascii=False) + "\n")
    write_atomically(root / "summary.md", text + "\n")
    print(f"\n{text}\n\nreport: {write_report(root)}", flush=True)
    return text


def _row(found: Measured) -> dict[str, float | None]:
    return {name: getattr(found, name) for name in (*_SHARES, "length")}


def _table(rows: list[dict]) -> str:
    names = ["name", *_SHARES, "length"]

    def show(name: str, value: float | None) -> str:
        return "-" if value is None else f"{value:.1%}" if name in _SHARES else f"{value:.1f}"

    head = [name.replace("_at_", "@") for name in names]
    return align_table([head, *([row["name"], *(show(name, row[name]) for name in names[1:])] for row in rows)], numbers=True)


def _hold(claim: tuple[str, str, str, str], measured: Mapping[str, Measured]) -> str | None:
    """Whether a claim holds for the models measured here; None if a model or a measure is missing."""
    text, measure, better, worse = claim
    values = [getattr(measured[stage], measure) for stage in (better, worse) if stage in measured]
    found: list[float] = [value for value in values if value is not None]
    if len(found) < 2:
        return None
    verdict = "holds here" if found[0] > found[1] else "does NOT hold here"
    return f"{text}: {verdict}: {measure} {found[0]:.1%} ({better}) against {found[1]:.1%} ({worse})"
