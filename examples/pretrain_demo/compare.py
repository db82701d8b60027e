"""Held-out losses of both models against each other: tables, curves, the report page, and whether V3's are lower."""

from __future__ import annotations

import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib as mpl
import mpmath
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from examples.pretrain_demo.plan import MODELS, flops_per_token, run_folder, search_folder, token_file
from megatron_r1.config.schema import Config
from megatron_r1.errors import DataError
from megatron_r1.model.architecture import Architecture
from megatron_r1.model.size import count_parameters
from megatron_r1.report.html import fill_page
from megatron_r1.report.plots import COLOURS, STYLE
from megatron_r1.runtime.metrics import read_metrics
from megatron_r1.training.pretrain_plan import PretrainPlan

Table = list[list[str]]  #: rows of cells, the first one is the head
CONFIDENCE = 0.95


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Student's interval of the mean of a few runs; of one run alone, from minus to plus infinity."""
    if len(values) < 2:
        return -float("inf"), float("inf")
    half = t_quantile(len(values) - 1) * stdev(values) / sqrt(len(values))
    return mean(values) - half, mean(values) + half


def t_quantile(freedom: int) -> float:
    """What the size of Student's t exceeds in one of twenty cases."""

    def excess(t: Any) -> Any:
        return mpmath.betainc(freedom / 2, 0.5, 0, freedom / (freedom + t * t), regularized=True) - (1 - CONFIDENCE)

    return float(mpmath.findroot(excess, (1, 20), solver="anderson"))


@dataclass(frozen=True)
class Losses:
    """Held-out losses of one source, in nats a token."""

    source: str
    curves: dict[str, list[dict[int, float]]]  #: model -> for each seed: update -> loss

    def at(self, model: str, update: int) -> list[float]:
        """Of every seed after an update. Raises DataError if a run has no such measurement."""
        if any(update not in curve for curve in self.curves[model]):
            raise DataError(f"a run of {model} has no validation/{self.source}/loss at step {update}: remove its folder")
        return [curve[update] for curve in self.curves[model]]

    def differences(self, update: int) -> list[float]:
        """V3's loss less the dense model's, seed by seed."""
        return [ours - theirs for ours, theirs in zip(self.at("v3", update), self.at("dense", update), strict=True)]


def read_losses(out: Path, sources: Sequence[str], seeds: Sequence[int]) -> list[Losses]:
    """What the runs measured."""
    folders = {model: [run_folder(out, model, seed) for seed in seeds] for model in MODELS}
    return [Losses(name, {model: [read_curve(run, name) for run in runs] for model, runs in folders.items()}) for name in sources]


def read_curve(run: Path, source: str) -> dict[int, float]:
    """Held-out loss of a source after the updates where it was measured."""
    name = f"validation/{token_file(run, source).name}/loss"
    return {record["step"]: record[name] for record in read_metrics(run / "metrics.jsonl") if record.get(name) is not None}


@dataclass(frozen=True)
class Search:
    """Held-out losses at the ends of short runs with several learning rates.

    Raises:
        DataError: a run has measured nothing.
    """

    sources: Sequence[str]
    ends: dict[str, dict[float, list[float]]]  #: model -> rate, from the lowest -> loss of each source

    @classmethod
    def read(cls, out: Path, sources: Sequence[str], rates: Sequence[float]) -> Search:
        ends = {model: {rate: _ends(search_folder(out, model, rate), sources) for rate in sorted(rates)} for model in MODELS}
        return cls(sources, ends)

    def best(self) -> dict[str, float]:
        """Model -> the rate whose loss is the lowest, as the mean over the sources."""
        return {model: min(losses, key=lambda rate, losses=losses: mean(losses[rate])) for model, losses in self.ends.items()}

    def beyond(self) -> float | None:
        """A rate to try next: twice the highest or half the lowest, if one of these is the best of a model."""
        rates = list(self.ends["v3"])
        if len(rates) > 1 and rates[-1] in self.best().values():
            return rates[-1] * 2
        return rates[0] / 2 if len(rates) > 1 and rates[0] in self.best().values() else None

    def table(self) -> Table:
        """Losses of every rate; the best rate of a model has a star."""
        rows = [["search: model", "learning rate", *self.sources, "mean"]]
        for model, losses in self.ends.items():
            best = self.best()[model]
            for rate, found in losses.items():
                shown = f"{rate:g}{' *' if rate == best else '  '}"
                rows.append([MODELS[model], shown, *(f"{loss:.3f}" for loss in found), f"{mean(found):.3f}"])
        return rows


def _ends(run: Path, sources: Sequence[str]) -> list[float]:
    curves = [read_curve(run, source) for source in sources]
    if not all(curves):
        raise DataError(f"{run} has no held-out loss of {', '.join(sources)}: remove it")
    return [curve[max(curve)] for curve in curves]


def verdict(losses: Sequence[Losses], last: int) -> tuple[bool, str]:
    """Whether V3's loss after the last update is lower for every source: in every seed, and with the whole interval; and a line."""
    differences = [source.differences(last) for source in losses]
    pairs = [difference for of_source in differences for difference in of_source]
    clear = sum(interval(of_source)[1] < 0 for of_source in differences)
    alone = len(differences[0]) < 2
    holds = max(pairs) < 0 and (alone or clear == len(losses))
    claim = "lower for V3" if holds else "NOT lower for V3 throughout"
    of_all = f"the 95% interval of the difference is below 0 for {clear} of {len(losses)} sources"
    sure = "one seed gives no interval" if alone else of_all
    counted = f"in {sum(pair < 0 for pair in pairs)} of {len(pairs)} pairs of source and seed; {sure}"
    return holds, f"Held-out loss at the end is {claim}: {counted}."


def loss_table(losses: Sequence[Losses], plan: PretrainPlan) -> Table:
    """Loss at the end of every phase: mean over the seeds, and the lowest and highest; the difference and its interval."""
    rows = [["held-out loss (nats a token)", *MODELS.values(), "V3 - dense, mean", "95% interval", "seeds where V3 is lower"]]
    for source in losses:
        for phase in plan.phases:
            found = [source.at(model, phase.last_update) for model in MODELS]
            shown = [f"{mean(values):.3f} [{min(values):.3f}, {max(values):.3f}]" for values in found]
            differences = source.differences(phase.last_update)
            low, high = interval(differences)
            lower = f"{sum(difference < 0 for difference in differences)} of {len(differences)}"
            name = f"{source.source}, rows of {phase.sequence_length:,}"
            rows.append([name, *shown, f"{mean(differences):+.3f}", f"[{low:+.3f}, {high:+.3f}]", lower])
    return rows


def shape_table(found: Mapping[str, tuple[Config, Architecture]]) -> Table:
    """Parameters, FLOPs and learning rate of both models."""
    plan = PretrainPlan(found["v3"][0].pretrain)
    rows = [["", *(MODELS[model] for model in found)]]
    rows.append(["parameters (millions)", *(f"{count_parameters(arch) / 1e6:.2f}" for _, arch in found.values())])
    for length in dict.fromkeys(phase.sequence_length for phase in plan.phases):
        counts = [flops_per_token(arch, length) for _, arch in found.values()]
        rows.append([f"MFLOPs a token to train, rows of {length:,}", *(f"{trained / 1e6:.3f}" for _, trained in counts)])
        rows.append(["... of a forward pass without MTP", *(f"{forward / 1e6:.3f}" for forward, _ in counts)])
    rows.append(["highest learning rate", *(f"{config.pretrain.optimizer.lr:g}" for config, _ in found.values())])
    rows.append(["updates", *(f"{PretrainPlan(config.pretrain).total_updates:,}" for config, _ in found.values())])
    rows.append(["tokens", *(f"{PretrainPlan(config.pretrain).total_tokens:,}" for config, _ in found.values())])
    return rows


def text_table(tokens: Mapping[str, int], config: Config) -> Table:
    """Tokens of the text, and how often each phase reads those that are trained on."""
    kept = config.data.split[0] / sum(config.data.split)
    rows = [["text", "tokens", "trained on, without those held out"]]
    rows += [[name, f"{count:,}", f"{count * kept:,.0f}"] for name, count in tokens.items()]
    rows.append(["all", f"{sum(tokens.values()):,}", f"{sum(tokens.values()) * kept:,.0f}"])
    for phase in PretrainPlan(config.pretrain).phases:
        times = phase.tokens / (sum(tokens.values()) * kept)
        rows.append([f"read with rows of {phase.sequence_length:,}", f"{phase.tokens:,}", f"{times:.2f} times"])
    return rows


def draw_curves(losses: Sequence[Losses], plan: PretrainPlan) -> Figure:
    """A panel for each source: mean over the seeds with its interval, each seed faintly, and where a phase ends."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.2 * len(losses), 3.6), layout="constrained")
        axes = figure.subplots(1, len(losses), squeeze=False)[0]
        for ax, source in zip(axes, losses, strict=True):
            _draw(ax, source, plan)
    return figure


def _draw(ax: Axes, source: Losses, plan: PretrainPlan) -> None:
    for colour, (model, label) in zip(COLOURS, MODELS.items(), strict=False):
        curves = source.curves[model]
        steps = sorted(set.intersection(*(set(curve) for curve in curves)))
        tokens = [(plan.update(step).first_token + plan.update(step).tokens) / 1e3 for step in steps]
        for curve in curves:
            ax.plot(tokens, [curve[step] for step in steps], color=colour, alpha=0.3, linewidth=0.8)
        ax.plot(tokens, [mean(curve[step] for curve in curves) for step in steps], color=colour, label=label)
        if len(curves) > 1:
            bounds = [interval([curve[step] for curve in curves]) for step in steps]
            ax.fill_between(tokens, *zip(*bounds, strict=True), color=colour, alpha=0.15, linewidth=0)
    for phase in plan.phases[1:]:
        ax.axvline(phase.first_token / 1e3, color="#999999", linestyle="--", linewidth=0.8)
        ax.annotate(
            f" {phase.sequence_length:,}", (phase.first_token / 1e3, 1), xycoords=("data", "axes fraction"), va="top", fontsize=7
        )
    ax.set_title(f"Held-out loss, {source.source} (nats a token)", loc="left", fontweight="bold")
    ax.set_xlabel("thousand tokens")
    ax.legend()


def report_page(said: str, figure: Figure, tables: Sequence[Table]) -> str:
    """The report of both models: the verdict, the curves, and all tables, in one file."""
    buffer = io.StringIO()
    with mpl.rc_context(STYLE):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    note = (
        "Thick lines are means over the seeds with their 95% intervals (Student's), thin ones the seeds. A dashed line begins a "
        "phase of longer rows, with which the loss is then measured."
    )
    body = [f"<p><strong>{html.escape(said)}</strong></p>", svg[svg.index("<svg") :], f'<p class="note">{note}</p>']
    return fill_page("A tiny V3 and a dense model of equal FLOPs a token", "\n".join([*body, *map(_table_html, tables)]))


def _table_html(table: Table) -> str:
    head, *body = (
        "".join(f"<{kind}>{html.escape(cell)}</{kind}>" for cell in row)
        for kind, row in zip(["th", *["td"] * (len(table) - 1)], table, strict=True)
    )
    return f"<table><tr>{head}</tr>" + "".join(f"<tr>{row}</tr>" for row in body) + "</table>"
