"""`report.html`: one file, without links to anything, with the table, the curves and sample rollouts of a run or a pipeline."""

from __future__ import annotations

import html
import json
from itertools import takewhile
from pathlib import Path
from typing import Any

from megatron_r1.data.unpacked import open_unpacked
from megatron_r1.errors import DataError, one_line
from megatron_r1.report.plots import curves_svg
from megatron_r1.report.runs import RunRecord, find_runs
from megatron_r1.runtime.files import write_atomically

SAMPLED_STEPS = 5
SAMPLED_RESPONSES = 3
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222; background: #fff; }}
h1 {{ font-size: 1.5em; }} h2 {{ font-size: 1.2em; margin-top: 2em; border-top: 1px solid #ddd; padding-top: 1em; }}
table {{ border-collapse: collapse; margin: 1em 0; }}
th, td {{ padding: .3em .8em; text-align: right; border-bottom: 1px solid #ddd; }}
th:first-child, td:first-child {{ text-align: left; }}
svg {{ max-width: 100%; height: auto; }}
pre {{ background: #f6f6f4; padding: .6em .8em; white-space: pre-wrap; overflow-wrap: anywhere; margin: .3em 0 1em; }}
.note {{ color: #666; font-size: .9em; }}
</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""


def write_report(folder: Path) -> Path:
    """Write `report.html` into a run folder, or into the folder above a pipeline's runs, and return its path.

    If the folder has a `summary.json`, it becomes the table: `{"rows": [{"name": ..., "pass_at_1": ...}]}`, with numbers from 0 to
    1 as percentages; its `claims`, if there are any, become a list below the table.

    Raises DataError if the folder holds no run or a file cannot be read.
    """
    parts = [_summary_table(folder / "summary.json")] if (folder / "summary.json").exists() else []
    parts += [_run_section(run) for run in find_runs(folder)]
    path = folder / "report.html"
    write_atomically(path, PAGE.format(title=html.escape(f"megatron_r1: {folder.name}"), body="\n".join(parts)))
    return path


def _summary_table(path: Path) -> str:
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        rows, claims = summary["rows"], summary.get("claims", [])
        columns = list(dict.fromkeys(name for row in rows for name in row))
        if not all(isinstance(row, dict) for row in rows) or not isinstance(claims, list):
            raise TypeError
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise DataError(f"{path} does not hold a list of objects under 'rows': run the pipeline again to write it") from None
    head = "".join(f"<th>{html.escape(name.replace('_', ' '))}</th>" for name in columns)
    body = "".join("<tr>" + "".join(f"<td>{_cell(row.get(name))}</td>" for name in columns) + "</tr>" for row in rows)
    said = "".join(f"<li>{html.escape(str(claim))}</li>" for claim in claims)
    return f"<h2>Comparison</h2>\n<table><tr>{head}</tr>{body}</table>" + (f"\n<ul>{said}</ul>" if said else "")


def _cell(value: Any) -> str:
    if value is None:
        return "&ndash;"
    if isinstance(value, float):
        return f"{value:.1%}" if 0 <= value <= 1 else f"{value:.4g}"
    if isinstance(value, list) and not any(isinstance(item, list) for item in value):
        return "[" + ", ".join(_cell(item) for item in value) + "]"
    return html.escape(str(value))


def _run_section(run: RunRecord) -> str:
    title = f"<h2>{html.escape(run.name)}: {html.escape(run.command)}</h2>"
    config = f"<details><summary>Resolved config</summary><pre>{html.escape(run.config)}</pre></details>"
    if not run.metrics:
        return f"{title}\n<p>Nothing is recorded yet.</p>\n{config}"
    steps = f'<p class="note">Started {html.escape(run.started)}, {run.metrics[-1]["step"]:d} steps recorded.</p>'
    samples = _samples(run.rollout_files)  # before what takes a second: a file may be broken
    return "\n".join([title, steps, curves_svg(run.metrics), samples, config])


def _samples(files: list[Path]) -> str:
    """A few responses to the first prompt of the first, the last and some steps between."""
    if not files:
        return ""
    count = min(SAMPLED_STEPS, len(files))
    chosen = [files[round(index * (len(files) - 1) / max(count - 1, 1))] for index in range(count)]
    return "\n".join(["<h3>Sample rollouts, first to last</h3>", *(_sampled_group(path) for path in chosen)])


def _sampled_group(path: Path) -> str:
    try:
        with open_unpacked(path) as file:
            lines = (json.loads(line) for line in file)
            first = next(lines, None)
            if first is None:
                return ""
            # The lines of a group stand together; what follows may be a gigabyte.
            return _sampled_lines([first, *takewhile(lambda line: line["prompt_id"] == first["prompt_id"], lines)])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path} is no file of a run's responses ({one_line(error)}): remove it") from None


def _sampled_lines(group: list[dict[str, Any]]) -> str:
    shown = group[:: max(len(group) // SAMPLED_RESPONSES, 1)][:SAMPLED_RESPONSES]
    title = f"Step {group[0]['step']}: {group[0]['question']}  (answer: {group[0]['answer']})"
    parts = [f"<h4>{html.escape(title)}</h4>"]
    for line in shown:
        rewards = ", ".join(
            f"{name} {'not scored' if value is None else f'{value:g}'}" for name, value in line["reward_parts"].items()
        )
        note = f"{rewards}, {line['length']} tokens{'' if line['finished'] else ', cut at the limit'}"
        parts.append(f'<p class="note">{html.escape(note)}</p><pre>{html.escape(line["response"])}</pre>')
    return "\n".join(parts)
