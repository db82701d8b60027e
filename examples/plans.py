"""Writes the planner's figures into the presets for GPUs, and one_node's table of models: `make plans`.

    python examples/plans.py            # writes what has changed, and names it
    python examples/plans.py --check    # names what would change; exit code 1 if anything would

A preset has them in its comments, in lines that begin with "# plan:". Exit code 2, with one line for each, if a preset does not
fit: then the preset is changed, not the figure.
"""

from __future__ import annotations

import argparse
import re
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

from megatron_r1.config.load import load_config
from megatron_r1.pipeline.dry_run.room import node_peak, phase_peaks
from megatron_r1.plan.job import Stage, read_job
from megatron_r1.plan.memory import MemoryPlan, plan_memory
from megatron_r1.runtime.files import write_atomically

FOLDER = Path(__file__).parent
MARK = "# plan: "
_WIDTH = 132
ENGINES = "rollout.engines_per_node=8"  # one a GPU
_TWO = (ENGINES, "parallel.tp=2")


@dataclass(frozen=True)
class Preset:
    """A file, and the job that its figures are of."""

    stage: Stage
    nodes: int
    devices_per_node: int = 8
    gpu: str = "H800"


#: file, without .yaml -> its job
PRESETS = {
    "v3_671b/pretrain": Preset("pretrain", 256),
    "v3_671b/r1_zero": Preset("grpo", 64),
    "v3_671b/stage1": Preset("sft", 64),
    "v3_671b/stage2": Preset("grpo", 64),
    "v3_671b/reward_helpful": Preset("reward-model", 64),
    "v3_671b/reward_safety": Preset("reward-model", 64),
    "v3_671b/r1": Preset("rejection", 64),
    "v3_671b/stage3": Preset("sft", 64),
    "v3_671b/stage4": Preset("grpo", 64),
    "v2_lite_16b/r1_zero": Preset("grpo", 1),
    "distill_qwen/qwen_1_5b": Preset("sft", 1),
    "distill_qwen/qwen_7b": Preset("sft", 1),
    "distill_qwen/qwen_14b": Preset("sft", 1),
    "distill_qwen/qwen_32b": Preset("sft", 2),
    "distill_qwen/llama_8b": Preset("sft", 1),
    "distill_qwen/llama_70b": Preset("sft", 4),
    "distill_qwen/zero_qwen_32b": Preset("grpo", 8),
    "one_node/gsm8k": Preset("grpo", 1, 1),
    "one_node/math": Preset("grpo", 1, 1),
}


@dataclass(frozen=True)
class OneNode:
    """A model of one_node's table, on so many GPUs of a node."""

    model: str  #: as published; gsm8k.yaml takes its chat model, math.yaml its base model
    preset: str
    gpus: int
    overrides: tuple[str, ...] = ()

    def settings(self) -> list[str]:
        """Everything behind `--config FILE` but the folder of the weights."""
        return [f"model.preset={self.preset}", *self.overrides]

    def plan(self, name: str) -> MemoryPlan:
        """With `name`.yaml."""
        config = load_config(FOLDER / "one_node" / f"{name}.yaml", self.settings())
        return plan_memory(read_job(config, "grpo", "H800", 1, devices_per_node=self.gpus))


ONE_NODE = [
    OneNode("Qwen2.5-0.5B", "qwen2.5_0.5b", 1),
    OneNode("Qwen2.5-0.5B", "qwen2.5_0.5b", 8, (ENGINES,)),
    OneNode("Qwen2.5-1.5B", "qwen2.5_1.5b", 1),
    OneNode("Qwen2.5-1.5B", "qwen2.5_1.5b", 8, (ENGINES,)),
    OneNode("Qwen2.5-7B", "qwen2.5_7b", 1),
    OneNode("Qwen2.5-7B", "qwen2.5_7b", 8, _TWO),
    OneNode("Qwen3-0.6B", "qwen3_0.6b", 1),
    OneNode("Qwen3-0.6B", "qwen3_0.6b", 8, (ENGINES,)),
    OneNode("Qwen3-1.7B", "qwen3_1.7b", 1),
    OneNode("Qwen3-1.7B", "qwen3_1.7b", 8, (ENGINES,)),
    OneNode("Qwen3-4B", "qwen3_4b", 1),
    OneNode("Qwen3-4B", "qwen3_4b", 8, (ENGINES,)),
    OneNode("Qwen3-8B", "qwen3_8b", 1),
    OneNode("Qwen3-8B", "qwen3_8b", 8, _TWO),
]


def plan_of(name: str) -> MemoryPlan:
    """The plan of a preset."""
    preset = PRESETS[name]
    job = read_job(
        load_config(FOLDER / f"{name}.yaml"), preset.stage, preset.gpu, preset.nodes, devices_per_node=preset.devices_per_node
    )
    return plan_memory(job)


def figures(name: str, plan: MemoryPlan) -> str:
    """The comment of a preset, line by line."""
    preset = PRESETS[name]
    where = f"{preset.nodes} node(s) of {preset.devices_per_node} {preset.gpu}"
    told = (
        f"{preset.stage} on {where}, GB. Device of {plan.device_bytes / 1e9:,.1f}: {phase_peaks(plan)}; {node_peak(plan)}. "
        "Written by `make plans`."
    )
    lines = textwrap.wrap(told, _WIDTH - len(MARK), break_long_words=False, break_on_hyphens=False)
    return "".join(f"{MARK}{line}\n" for line in lines)


def with_figures(text: str, comment: str) -> str:
    """A preset with its comment in place of the one before, behind its head."""
    bare = "".join(line for line in text.splitlines(keepends=True) if not line.startswith(MARK))
    head = re.match(r"(?:#.*\n)*", bare)
    assert head is not None
    return bare[: head.end()] + comment + bare[head.end() :]


def one_node_table() -> str:
    """README's table: of both files the one that takes more."""
    rows = [
        "| model | GPUs | overrides | updates, GB a GPU | sampling, GB a GPU | node, GB | fits 80 GB |",
        "|---|---|---|---|---|---|---|",
    ]
    for job in ONE_NODE:
        plans = [job.plan(name) for name in ("gsm8k", "math")]
        peaks = [{phase.name: phase.device_bytes for phase in plan.phases} for plan in plans]
        numbers = [max(peak[phase] for peak in peaks) for phase in ("update", "sampling")]
        numbers.append(max(plan.host_peak.host_bytes for plan in plans))
        fits = not any(plan.shortfalls() for plan in plans)
        overrides = " ".join(f"`{setting}`" for setting in job.settings())
        cells = " | ".join(f"{number / 1e9:.0f}" for number in numbers)
        rows.append(f"| {job.model} | {job.gpus} | {overrides} | {cells} | {'yes' if fits else 'no'} |")
    return "\n".join(rows)


def new_texts() -> dict[Path, str]:
    """Every file with its figures."""
    found = {}
    for name in PRESETS:
        path = FOLDER / f"{name}.yaml"
        found[path] = with_figures(path.read_text(encoding="utf-8"), figures(name, plan_of(name)))
    readme = FOLDER / "one_node/README.md"
    before, _, rest = readme.read_text(encoding="utf-8").partition("<!-- plans.py -->\n\n")
    _, _, after = rest.partition("\n\n<!-- end -->")
    assert after, f"{readme} has no place for the table"
    found[readme] = f"{before}<!-- plans.py -->\n\n{one_node_table()}\n\n<!-- end -->{after}"
    return found


def main(arguments: list[str] | None = None) -> int:
    """Write the files, or say which differ."""
    parser = argparse.ArgumentParser(description="Writes the planner's figures into the presets.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if a file would change")
    check = parser.parse_args(arguments).check
    problems = [f"{name} does not fit: {problem}" for name in PRESETS for problem in plan_of(name).shortfalls()]
    if problems:
        print("\n".join(problems), file=sys.stderr)
        return 2
    changed = {path: text for path, text in new_texts().items() if text != path.read_text(encoding="utf-8")}
    for path, text in changed.items():
        if not check:
            write_atomically(path, text)
        print(f"{'differs' if check else 'written'}: {path}")
    return int(check and bool(changed))


if __name__ == "__main__":
    sys.exit(main())
