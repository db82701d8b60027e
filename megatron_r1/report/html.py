"""`report.html`: one file, without links to anything, with table, curves and a browser of rollouts of a run or a pipeline."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_r1.errors import DataError
from megatron_r1.report.plots import curves_svg
from megatron_r1.report.rollouts import Choice, choose_shown, to_script
from megatron_r1.report.runs import RunRecord, find_runs
from megatron_r1.runtime.files import write_atomically

REPORT = "report.html"  #: in a run folder
_FOLDER = Path(__file__).parent
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""


def write_report(folder: Path, choice: Choice | None = None) -> Path:
    """Write `report.html` into a run folder, or into the folder above a pipeline's runs, and return its path.

    If the folder has a `summary.json`, it becomes the table: `{"rows": [{"name": ..., "pass_at_1": ...}]}`, with numbers from 0 to
    1 as percentages; its `claims`, if there are any, become a list below the table.

    Args:
        choice: which responses the page holds.

    Raises DataError if the folder holds no run or a file cannot be read.
    """
    runs = find_runs(folder)
    parts = [_summary_table(folder / "summary.json")] if (folder / "summary.json").exists() else []
    browser, script = _browser(runs, choice or Choice())  # before what takes a second: a file may be broken
    parts += [_run_section(run) for run in runs]
    path = folder / REPORT
    page = fill_page(f"megatron_r1: {folder.name}", "\n".join([*parts, browser]), script)
    write_atomically(path, page)
    return path


def fill_page(title: str, body: str, script: str = "") -> str:
    """A whole page in the report's style.

    Args:
        title: text.
        body: HTML.
        script: the one script in the body that may run.
    """
    allowed = f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" if script else "'none'"
    return _PAGE.format(
        # The curves have styles of their own; nothing that a model wrote becomes an element or an attribute.
        policy=f"default-src 'none'; style-src 'unsafe-inline'; script-src {allowed}; base-uri 'none'; form-action 'none'",
        title=html.escape(title),
        style=(_FOLDER / "report.css").read_text(encoding="utf-8"),
        body=body,
    )


def _browser(runs: Sequence[RunRecord], choice: Choice) -> tuple[str, str]:
    """The browser of rollouts and its script; nothing for runs without any."""
    runs = [run for run in runs if run.rollout_files]
    if not runs:
        return "", ""
    shown = [(run.name, choose_shown(run, choice, choice.most_bytes / len(runs))) for run in runs]
    content = {"runs": [{"name": name} | vars(of_run) for name, of_run in shown]}
    script = (_FOLDER / "report.js").read_text(encoding="utf-8")
    data = f'<script type="application/json" id="rollouts">{to_script(content).decode()}</script>'
    return f"{(_FOLDER / 'browser.html').read_text(encoding='utf-8')}{data}\n<script>{script}</script>", script


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
    return "\n".join([title, steps, curves_svg(run.metrics), config])
