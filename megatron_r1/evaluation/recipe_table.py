"""The recipe's result tables with published and measured numbers in rows of their own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from megatron_r1.errors import DataError
from megatron_r1.evaluation.published import (
    METRICS,
    NOTES,
    OTHER_STAGE_SOURCES,
    PUBLISHED,
    REASONING,
    STAGE_SOURCE,
    STAGES,
    TableMetric,
)
from megatron_r1.evaluation.result_files import ModelResults, show
from megatron_r1.runtime.markdown_table import align_table

_LEGEND = (
    "**Bold with an interval: measured** by this project (percent, pass@1 or as named, 95% bootstrap interval over problems). "
    "Plain: published by others, never measured here. Empty: neither."
)


def render_recipe_table(measured: Sequence[ModelResults]) -> str:
    """Two Markdown tables: the stages of the recipe (R1 v2 Table 3), and all models on reasoning (R1 v1 Tables 2, 5, 6).

    A measured model stands under the published one of the same name (case does not matter), else in a row of its own at the end.

    Raises:
        DataError: two results under one name.
    """
    names = {_spelling_key(name): name for name in PUBLISHED}
    by_name: dict[str, ModelResults] = {}
    for results in measured:
        name = names.get(_spelling_key(results.name), results.name)
        if name in by_name:
            raise DataError(f"two results are named {name!r} ({by_name[name].model}, {results.model}): give NAME=RUN")
        by_name[name] = results
    legend = [_LEGEND, *(f"{name}: {results.model}{_setting(results)}." for name, results in by_name.items()), *NOTES]
    return "\n\n".join(
        ["## Stages of the recipe", _stage_table(by_name), "## Reasoning benchmarks", _reasoning_table(by_name), "\n".join(legend)]
    )


def _stage_table(measured: dict[str, ModelResults]) -> str:
    """One row per benchmark and one column per stage, with a second row if a stage was measured."""
    rows = [["benchmark", "", *STAGES]]
    for name in _used_metrics(STAGES, measured):
        title, source = METRICS[name].title, OTHER_STAGE_SOURCES.get(name, STAGE_SOURCE)
        published = [_published_cell(stage, name) for stage in STAGES]
        cells = [_measured(measured.get(stage), METRICS[name]) for stage in STAGES]
        if any(published):
            rows.append([title, f"published, {source}", *published])
            title = ""
        if any(cells):
            rows.append([title, "**measured**", *cells])
    return align_table(rows)


def _reasoning_table(measured: dict[str, ModelResults]) -> str:
    """One row per model and one column per benchmark, with a second row if the model was measured."""
    extra = [name for name in _used_metrics((), measured) if name not in REASONING]
    columns = [*REASONING, *extra]
    rows = [["model", "", *(METRICS[name].title for name in columns)]]
    for model in [*PUBLISHED, *(name for name in measured if name not in PUBLISHED)]:
        title = model
        if model in PUBLISHED:
            rows.append([model, f"published, {PUBLISHED[model].source}", *(_published_cell(model, name) for name in columns)])
            title = ""
        if model in measured:
            rows.append([title, "**measured**", *(_measured(measured[model], METRICS[name]) for name in columns)])
    return align_table(rows)


def _used_metrics(models: Iterable[str], measured: dict[str, ModelResults]) -> list[str]:
    """Metrics with a number, published for these models or measured for any."""
    published = {name for model in models for name in PUBLISHED[model].numbers}
    return [
        name
        for name, metric in METRICS.items()
        if name in published or any(_measured(results, metric) for results in measured.values())
    ]


def _published_cell(model: str, metric: str) -> str:
    number = PUBLISHED[model].numbers.get(metric)
    return "" if number is None else f"{number:g}" if metric == "cf" else f"{number:.1f}"


def _measured(results: ModelResults | None, metric: TableMetric) -> str:
    result = results.benchmarks.get(metric.benchmark) if results and metric.benchmark else None
    if result is None or (metric.vote and result.cons is None):
        return ""
    votes = f" cons@{result.samples}" if metric.vote and result.samples != 64 else ""
    return show(result.cons if metric.vote else result.pass_at_1, bold=True) + votes


def _setting(results: ModelResults) -> str:
    counts = ", ".join(f"{name} {result.problems} problems, k={result.samples}" for name, result in results.benchmarks.items())
    return f" (temperature {results.sampling['temperature']:g}; {counts})"


def _spelling_key(name: str) -> str:
    """Spelling that does not matter: DeepSeek-R1-Distill-Qwen-7B is Distill-Qwen-7B."""
    key = name.casefold().replace("_", "-").removeprefix("deepseek-")
    return key.removeprefix("r1-") if key.startswith(("r1-distill-", "r1-zero-qwen")) else key
