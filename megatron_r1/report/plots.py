"""Curves of a run, drawn from its metrics: as SVG for the report, as PNG for a README."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from megatron_r1.errors import DataError
from megatron_r1.report.runs import find_runs

COLOURS = ["#3b6ea5", "#d1803b", "#4f9a5b", "#a8497a", "#7a6bb0", "#8c8c3c", "#5aa7b0", "#999999"]
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "megatron_r1",
    "text.parse_math": False,  # names of metrics are text
}
MARKED = 30  # a curve with fewer points than this, such as an evaluation, shows each of them


@dataclass(frozen=True)
class Panel:
    """One set of axes: metric name -> legend label."""

    title: str
    series: dict[str, str]
    scale: Literal["linear", "log"] = "linear"
    fraction: bool = False  #: values lie in 0 to 1


GRADIENT_KINDS = ("embedding", "attention", "norms", "mlp", "router", "experts", "shared_experts", "mtp", "head")

PANELS = [
    Panel("Accuracy", {"reward/accuracy": "training rollouts", "eval/pass@1": "held-out pass@1"}, fraction=True),
    Panel("Format", {"reward/format": "training rollouts", "eval/format": "held-out"}, fraction=True),
    Panel("Reward", {"reward/mean": "mean"}),
    Panel("Response length (tokens)", {"response_length/mean": "mean"}),
    Panel("KL to the reference (nats a token)", {"kl/reference": "k3 estimate"}),
    Panel(
        "Log-prob difference, trainer and engine",
        {"logprob_diff/mean": "mean", "logprob_diff/quantile": "quantile", "logprob_diff/max": "max"},
        scale="log",
    ),
    Panel("Preference accuracy", {"accuracy": "training batches", "validation/accuracy": "held-out"}, fraction=True),
    Panel("Loss", {"loss": "training", "validation/loss": "held-out"}),
    Panel("Gradient norm", {"grad_norm": "before clipping"}),
    Panel("Gradient norm by kind", {f"grad_norm/{kind}": kind.replace("_", " ") for kind in GRADIENT_KINDS}, scale="log"),
    Panel("Experts", {"moe/max_load": "largest load of all layers, 1: balanced", "moe/bias_spread": "spread of router biases"}),
    Panel("Tokens a second and device", {"tokens_per_second/device": "trained tokens, over the whole step"}),
    Panel("Share of the device's peak (MFU)", {"mfu/train": "while it trains", "mfu/step": "over the whole step"}, fraction=True),
    Panel("Gate", {"gate/accuracy": "greedy accuracy, forced to think"}, fraction=True),
]
PICTURE = (
    "Accuracy",
    "Format",
    "Response length (tokens)",
    "KL to the reference (nats a token)",
    "Log-prob difference, trainer and engine",
)


def curves_svg(records: list[dict[str, Any]]) -> str:
    """All panels for which the metrics have numbers, and the seconds of each part of a step."""
    panels = [panel for panel in PANELS if _has_numbers(panel, records)]
    with mpl.rc_context(STYLE):
        figure = _draw(panels, records)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :]


def write_curves_png(folder: Path, path: Path) -> None:
    """The main curves as one picture: of the run itself, or of the reinforcement learning among a pipeline's runs.

    Raises DataError if the folder holds no run, or if its runs have recorded nothing yet.
    """
    runs = [run for run in find_runs(folder) if run.metrics]
    if not runs:
        raise DataError(f"{folder}/metrics.jsonl has no line yet: let the run make a step")
    run = next((run for run in runs if any("reward/mean" in record for record in run.metrics)), runs[-1])
    panels = [panel for panel in PANELS if panel.title in PICTURE and _has_numbers(panel, run.metrics)]
    with mpl.rc_context(STYLE):
        figure = _draw(panels or [panel for panel in PANELS if _has_numbers(panel, run.metrics)], run.metrics)
        figure.savefig(path, format="png", dpi=120)


def seconds_by_part(records: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Part -> seconds of each step; time that no timer covered is `other`."""
    names = sorted({name for record in records for name in record if name.startswith("seconds/")} - {"seconds/step"})
    parts = {name.removeprefix("seconds/"): [record.get(name) or 0.0 for record in records] for name in names}
    timed = [sum(seconds) for seconds in zip(*parts.values(), strict=True)] or [0.0] * len(records)
    whole = [record.get("seconds/step") or 0.0 for record in records]
    return parts | {"other": [max(all_of_it - known, 0.0) for all_of_it, known in zip(whole, timed, strict=True)]}


def _has_numbers(panel: Panel, records: list[dict[str, Any]]) -> bool:
    return any(record.get(name) is not None for record in records for name in panel.series)


def _draw(panels: list[Panel], records: list[dict[str, Any]]) -> Figure:
    columns = min(3, len(panels) + 1)
    rows = math.ceil((len(panels) + 1) / columns)
    figure = Figure(figsize=(4.2 * columns, 2.8 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel, ax in zip(panels, axes, strict=False):
        _draw_panel(ax, panel, records)
    _draw_time(axes[len(panels)], records)
    for ax in axes[len(panels) + 1 :]:
        ax.set_visible(False)
    return figure


def _draw_panel(ax: Axes, panel: Panel, records: list[dict[str, Any]]) -> None:
    ax.set_title(panel.title, loc="left", fontweight="bold")
    for colour, (name, label) in zip(COLOURS, panel.series.items(), strict=False):
        points = [(record["step"], record[name]) for record in records if record.get(name) is not None]
        if points:
            ax.plot(
                *zip(*points, strict=True), color=colour, label=label, marker="o" if len(points) < MARKED else None, markersize=3
            )
    if panel.fraction:
        ax.set_ylim(-0.02, 1.02)
    if panel.scale == "log" and any((record.get(name) or 0) > 0 for record in records for name in panel.series):
        ax.set_yscale("log")
        for set_formatter in (ax.yaxis.set_major_formatter, ax.yaxis.set_minor_formatter):
            set_formatter(LogFormatter())  # the usual one writes formulas, which are not read here
    ax.set_xlabel("step")
    ax.legend()


def _draw_time(ax: Axes, records: list[dict[str, Any]]) -> None:
    ax.set_title("Where the time goes (seconds a step)", loc="left", fontweight="bold")
    timed = [record for record in records if record["step"] > 0 and "seconds/step" in record]
    if timed:
        parts = seconds_by_part(timed)
        ax.stackplot([record["step"] for record in timed], *parts.values(), labels=list(parts), colors=COLOURS)
        ax.legend(ncols=2, fontsize=7, frameon=True)  # it stands on the areas, whose colours its patches have
    ax.set_xlabel("step")
