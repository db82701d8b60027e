"""A tiny DeepSeek-V3 against a dense model of equal FLOPs a token, pretrained on real text: what `make pretrain-demo` runs.

python examples/pretrain_demo/pretrain_demo.py [--out FOLDER] [--text FOLDER] [--seeds N] [key.sub=value ...]

Stopped and started again, it goes on: a step that is done is not done again, one that was under way goes on from its last
checkpoint. `steps.json` in the folder has what each attempt at a step took; one that was killed with its parent is not in it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(ROOT))

from examples.pretrain_demo.prepare_text import PACKAGES, find_sources
from examples.step_runner import cost_table, run_example, run_steps
from megatron_r1.config.load import load_config
from megatron_r1.config.schema import Config
from megatron_r1.errors import DataError
from megatron_r1.model.architecture import Architecture
from megatron_r1.model.flops import forward_flops, rows_of, update_flops
from megatron_r1.model.presets import resolve_architecture
from megatron_r1.model.size import count_parameters
from megatron_r1.report.plots import COLOURS, STYLE
from megatron_r1.runtime.files import write_atomically
from megatron_r1.runtime.markdown_table import align_table
from megatron_r1.runtime.metrics import read_metrics
from megatron_r1.training.pretrain_plan import PretrainPlan

RESULT, CURVES = "result.md", "curves.png"
MODELS = {"v3": "V3", "dense": "dense"}  #: name of the YAML -> in tables and curves
SEEDS = 3
TOKENS_OF = "tokens of "


def plan_data(out: Path, text: Path | None) -> dict[str, list[str]]:
    """Name of each step that makes token files -> its command. Raises DataError if there are no texts in the folder."""
    data = out / "data"
    prepare = [sys.executable, str(HERE / "prepare_text.py"), "--out", str(data)]
    steps = {"text": [*prepare, *(["--text", str(text)] if text else [])]}
    for name in find_sources(text) if text else PACKAGES:
        steps[TOKENS_OF + name] = [
            sys.executable, "-m", "megatron_r1.cli", "preprocess", "--input", str(data / f"documents/{name}.jsonl"),
            "--output-prefix", str(data / name), "--tokenizer", str(data / "tokenizer"), "--append-eod", "--workers", "2",
        ]  # fmt: skip
    return steps


def tokens_of(data: Path, sources: Sequence[str]) -> dict[str, int]:
    """Tokens of each source, of which its weight in the blend is made: all of them are used up together."""
    notes = {name: json.loads(token_file(data, name).with_suffix(".json").read_text(encoding="utf-8")) for name in sources}
    return {name: note["tokens"] for name, note in notes.items()}


def token_file(data: Path, source: str) -> Path:
    """What `megatron-r1 preprocess` names a source's files, without their endings."""
    return data / f"{source}_text_document"


def plan_runs(out: Path, tokens: Mapping[str, int], seeds: Sequence[int], overrides: Sequence[str]) -> dict[str, list[str]]:
    """Name of each run -> its command; V3's first, which take longest, since two run side by side.

    Args:
        tokens: see `tokens_of`.
        overrides: settings of all runs, as `key.sub=value`.
    """
    data = out / "data"
    blend = ",".join(f"{{path: {json.dumps(str(token_file(data, name)))}, weight: {count}}}" for name, count in tokens.items())
    return {
        f"{model} {seed}": [
            sys.executable, "-m", "megatron_r1.cli", "pretrain", "--config", str(HERE / f"{model}.yaml"), f"seed={seed}",
            f"run_dir={run_folder(out, model, seed)}", f"data.tokenizer={data / 'tokenizer'}", f"data.blend=[{blend}]",
            f"data.index_cache={run_folder(out, model, seed) / 'index'}", *overrides,
        ]
        for model in MODELS
        for seed in seeds
    }  # fmt: skip


def run_folder(out: Path, model: str, seed: int) -> Path:
    """Of one run."""
    return out / f"{model}_{seed}"


def shapes(overrides: Sequence[str] = ()) -> dict[str, tuple[Config, Architecture]]:
    """Settings and shape of each model, by the name of its YAML. Raises ConfigError."""
    configs = {model: load_config(HERE / f"{model}.yaml", overrides) for model in MODELS}
    return {model: (config, resolve_architecture(config.model.preset, config.model.overrides)) for model, config in configs.items()}


def flops_per_token(arch: Architecture, length: int) -> tuple[float, float]:
    """FLOPs of a token in a sequence of so many: of a forward pass, and of training, multi-token prediction included."""
    work = rows_of(1, length)
    return forward_flops(arch, work) / length, update_flops(arch, work, mtp=arch.mtp_depth > 0) / length


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


def read_losses(out: Path, sources: Sequence[str], seeds: Sequence[int]) -> list[Losses]:
    """What the runs measured."""
    metrics = {model: [read_metrics(run_folder(out, model, seed) / "metrics.jsonl") for seed in seeds] for model in MODELS}
    found = []
    for source in sources:
        name = f"validation/{token_file(out, source).name}/loss"
        found.append(Losses(source, {model: [_curve(records, name) for records in runs] for model, runs in metrics.items()}))
    return found


def _curve(records: list[dict[str, Any]], name: str) -> dict[int, float]:
    return {record["step"]: record[name] for record in records if record.get(name) is not None}


def loss_table(losses: Sequence[Losses], plan: PretrainPlan) -> str:
    """Loss at the end of every phase: mean over the seeds, and the lowest and highest."""
    rows = [["held-out loss (nats a token)", *MODELS.values(), "V3 - dense, mean", "seeds where V3 is lower"]]
    for source in losses:
        for phase in plan.phases:
            found = {model: source.at(model, phase.last_update) for model in MODELS}
            shown = [f"{mean(values):.3f} [{min(values):.3f}, {max(values):.3f}]" for values in found.values()]
            differences = [ours - theirs for ours, theirs in zip(found["v3"], found["dense"], strict=True)]
            lower = f"{sum(difference < 0 for difference in differences)} of {len(differences)}"
            rows.append([f"{source.source}, rows of {phase.sequence_length:,}", *shown, f"{mean(differences):+.3f}", lower])
    return align_table(rows, numbers=True)


def shape_table(found: Mapping[str, tuple[Config, Architecture]]) -> str:
    """Parameters and FLOPs of both models."""
    plan = PretrainPlan(found["v3"][0].pretrain)
    rows = [["", *(MODELS[model] for model in found)]]
    rows.append(["parameters (millions)", *(f"{count_parameters(arch) / 1e6:.2f}" for _, arch in found.values())])
    for length in dict.fromkeys(phase.sequence_length for phase in plan.phases):
        counts = [flops_per_token(arch, length) for _, arch in found.values()]
        rows.append([f"MFLOPs a token to train, rows of {length:,}", *(f"{trained / 1e6:.2f}" for _, trained in counts)])
        rows.append(["... of a forward pass without MTP", *(f"{forward / 1e6:.2f}" for forward, _ in counts)])
    rows.append(["tokens", *(f"{PretrainPlan(config.pretrain).total_tokens:,}" for config, _ in found.values())])
    return align_table(rows, numbers=True)


def verdict(losses: Sequence[Losses], last: int) -> str:
    """What the last measurement says of both models."""
    lower = [
        ours < theirs
        for source in losses
        for ours, theirs in zip(source.at("v3", last), source.at("dense", last), strict=True)
    ]  # fmt: skip
    claim = "lower for V3" if all(lower) else "NOT lower for V3 throughout"
    return f"Held-out loss at the end is {claim}: in {sum(lower)} of {len(lower)} pairs of source and seed."


def write_curves(losses: Sequence[Losses], plan: PretrainPlan, path: Path) -> None:
    """A panel for each source: mean over the seeds, each seed faintly, and where a phase ends."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.2 * len(losses), 3.6), layout="constrained")
        axes = figure.subplots(1, len(losses), squeeze=False)[0]
        for ax, source in zip(axes, losses, strict=True):
            _draw(ax, source, plan)
        figure.savefig(path, format="png", dpi=120)


def _draw(ax: Axes, source: Losses, plan: PretrainPlan) -> None:
    for colour, (model, label) in zip(COLOURS, MODELS.items(), strict=False):
        curves = source.curves[model]
        steps = sorted(set.intersection(*(set(curve) for curve in curves)))
        tokens = [(plan.update(step).first_token + plan.update(step).tokens) / 1e3 for step in steps]
        for curve in curves:
            ax.plot(tokens, [curve[step] for step in steps], color=colour, alpha=0.3, linewidth=0.8)
        ax.plot(tokens, [mean(curve[step] for curve in curves) for step in steps], color=colour, label=label)
    for phase in plan.phases[1:]:
        ax.axvline(phase.first_token / 1e3, color="#999999", linestyle="--", linewidth=0.8)
        ax.annotate(
            f" {phase.sequence_length:,}", (phase.first_token / 1e3, 1), xycoords=("data", "axes fraction"), va="top", fontsize=7
        )
    ax.set_title(f"Held-out loss, {source.source} (nats a token)", loc="left", fontweight="bold")
    ax.set_xlabel("thousand tokens")
    ax.legend()


def write_result(out: Path, sources: Sequence[str], seeds: Sequence[int], overrides: Sequence[str], steps: Sequence[str]) -> str:
    """Write result.md and curves.png; returns what to print."""
    found = shapes(overrides)
    plan = PretrainPlan(found["v3"][0].pretrain)
    losses = read_losses(out, sources, seeds)
    last = plan.phases[-1].last_update
    parts = [verdict(losses, last), loss_table(losses, plan), shape_table(found), cost_table(steps, out)]
    write_curves(losses, plan, out / CURVES)
    text = "\n\n".join(parts) + "\n"
    write_atomically(out / RESULT, f"{text}\n![Held-out loss]({CURVES})\n")
    return f"{text}\nresult: {out / RESULT}\ncurves: {out / CURVES}"


def main(argv: list[str] | None = None) -> int:
    """Run all steps and print the result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/pretrain_demo"), help="folder of everything that is made")
    parser.add_argument("--text", type=Path, help="folder of .txt and .md files; default: the Debian Reference, from its packages")
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"runs of either model, with the seeds from 0 ({SEEDS})")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings of all runs")
    arguments = parser.parse_args(argv)
    if arguments.seeds < 1:
        parser.error(f"--seeds {arguments.seeds}: give at least 1")
    seeds = range(arguments.seeds)
    out, text = arguments.out.resolve(), arguments.text and arguments.text.resolve()
    out.mkdir(parents=True, exist_ok=True)
    planned: dict[str, list[str]] = {}
    sources: list[str] = []

    def run() -> int:
        made = plan_data(out, text)
        planned.update(made)
        sources.extend(name.removeprefix(TOKENS_OF) for name in made if name.startswith(TOKENS_OF))
        whole = {TOKENS_OF + name for name in sources if token_file(out / "data", name).with_suffix(".idx").exists()}
        if code := run_steps({name: command for name, command in made.items() if name not in whole}, out):
            return code
        runs = plan_runs(out, tokens_of(out / "data", sources), seeds, arguments.overrides)
        planned.update(runs)
        return run_steps(runs, out, side_by_side=runs)

    return run_example(run, lambda: write_result(out, sources, seeds, arguments.overrides, list(planned)))


if __name__ == "__main__":
    sys.exit(main())
