"""The first hour on a GPU: ten parts that show what the CPU cannot, the most telling first. One command runs them all:

    python tests/gpu/first_hour.py --out DIR

Each part is a process of its own with a limit of its own. What it finds goes line by line into DIR/results.jsonl, so a part that
hangs or is killed loses nothing that it said before; DIR/summary.md is the table. It needs one GPU and none of Transformer Engine,
Apex and vLLM. Packages that are missing are named, and the parts that need them left out; `--wheels` installs them from files.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.gpu.hour.ground import Ground, call

#: modules that training needs, and the distributions that bring them
TRAINING = {
    "torch": "torch", "numpy": "numpy", "megatron.core": "megatron-core", "pydantic": "pydantic, pydantic-core, annotated-types, "
    "typing-inspection", "yaml": "PyYAML", "safetensors": "safetensors", "tokenizers": "tokenizers", "tqdm": "tqdm",
    "packaging": "packaging", "xxhash": "xxhash",
}  # fmt: skip
TORCH = {"torch": "torch", "numpy": "numpy"}
TRANSFORMERS = TRAINING | {"transformers": "transformers"}


@dataclass(frozen=True)
class Part:
    """One part: what it shows, its function, its limit in seconds on a GPU, and the modules it needs."""

    shows: str
    target: str
    limit: float
    needs: dict[str, str]


PARTS = {
    1: Part("the path starts: layers, collectives, generators", "tests.gpu.hour.start:run", 60, TRAINING),
    2: Part("a tiny V3 and a tiny Qwen2 learn and agree with transformers", "tests.gpu.hour.training:learn", 90, TRANSFORMERS),
    3: Part("the same training on CPU and CUDA, fp32 and bf16", "tests.gpu.hour.training:compare_devices", 100, TRAINING),
    4: Part("GRPO's update, asynchronous checkpoint, kill, resume", "tests.gpu.hour.resume:run", 90, TRAINING),
    5: Part("bandwidths of the weights' way to an engine; IPC; checksums", "tests.gpu.hour.transfer:run", 80, TRAINING),
    6: Part("one 671B-shaped layer with experts, balanced and twice the tokens", "tests.gpu.hour.layer:run", 110, TRAINING),
    7: Part("torch's attention kernels for heads of 192 and 128", "tests.gpu.hour.kernels:run", 50, TORCH),
    8: Part("cross entropy: peak memory", "tests.gpu.hour.cross_entropy:run", 40, TRAINING),
    9: Part("predicted against measured memory of training", "tests.gpu.hour.memory:run", 90, TRAINING),
    10: Part("tokens of a round as lists and as arrays: pickle", "tests.gpu.hour.objects:run", 40, TORCH),
}


def main(arguments: list[str] | None = None) -> int:
    """Run the chosen parts. Returns 0, 1 if a part failed or did not end, 2 if nothing could be run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of results.jsonl and summary.md; made if it is not there")
    parser.add_argument("--parts", default="", help="numbers with commas; all if left out")
    parser.add_argument("--cpu", action="store_true", help="everything small on the CPU: does the script itself work?")
    parser.add_argument("--limit", type=float, default=780.0, help="seconds for all parts together (780)")
    parser.add_argument("--stretch", type=float, default=1.0, help="multiply every limit, for a machine that is busy (1)")
    parser.add_argument("--wheels", type=Path, help="folder of wheels to install into a temporary folder first")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--ground", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.child:
        call(given.child, json.loads(given.ground), {})
        return 0
    if given.out is None:
        parser.error("--out DIR is missing")
    try:
        numbers = [int(number) for number in given.parts.split(",")] if given.parts else list(PARTS)
        chosen = {number: PARTS[number] for number in numbers}
    except (ValueError, KeyError):
        parser.error(f"--parts {given.parts}: the parts are {', '.join(map(str, PARTS))}")
    with tempfile.TemporaryDirectory(prefix="first-hour-") as folder:
        if given.wheels is not None:
            _install(given.wheels, Path(folder, "site"))
        return _run(chosen, "cpu" if given.cpu else "cuda", given.out, given.limit, Path(folder), given.stretch)


def missing_packages(needs: dict[str, str]) -> list[str]:
    """The distributions that bring the modules which are not there."""
    return [distribution for module, distribution in needs.items() if not _is_there(module)]


def _run(parts: dict[int, Part], kind: str, out: Path, limit: float, folder: Path, stretch: float = 1.0) -> int:
    lacking = {number: missing_packages(part.needs) for number, part in parts.items()}
    for name in dict.fromkeys(name for names in lacking.values() for name in names):
        print(f"missing: {name}", file=sys.stderr)
    if not _is_there("torch"):
        print("torch is needed for every part", file=sys.stderr)
        return 2
    import torch

    if kind == "cuda" and not torch.cuda.is_available():
        print("torch finds no CUDA device; --cpu runs everything small without one", file=sys.stderr)
        return 2
    out.mkdir(parents=True, exist_ok=True)
    results = out / "results.jsonl"
    results.write_text("")
    if kind == "cpu":
        torch.set_num_threads(1)
        _load_once()
    device = "the CPU, small" if kind == "cpu" else torch.cuda.get_device_name(0)
    _append(results, {"machine": device, "torch": torch.__version__, "cuda": torch.version.cuda, "python": sys.version.split()[0]})
    began = time.monotonic()
    for number, part in parts.items():
        left = limit * stretch - (time.monotonic() - began)
        if lacking[number]:
            ended, taken = f"left out: needs {', '.join(lacking[number])}", 0.0
        elif left < 5:
            ended, taken = "left out: no time left", 0.0
        else:
            own = folder / f"part_{number}"
            own.mkdir()
            started = time.monotonic()
            print(f"part {number}: {part.shows}", flush=True)
            code = Ground(number, kind, str(results), str(own)).start(part.target).wait(min(part.limit * stretch, left))
            taken = time.monotonic() - started
            ended = {0: "passed", None: "out of time"}.get(code, f"failed (exit code {code})")
        _append(results, {"part": number, "end": ended, "seconds": round(taken, 1)})
        print(f"part {number}: {ended}, {taken:.1f} s", flush=True)
        _summarize(results, out / "summary.md")
    print((out / "summary.md").read_text())
    ends = [line["end"] for line in read_lines(results) if "end" in line]
    return 0 if all(end == "passed" for end in ends) else 1


def read_lines(results: Path) -> list[dict]:
    """The lines of a file of results. One that a killed process began and did not end is left out."""
    lines = []
    for text in results.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


def _summarize(results: Path, path: Path) -> None:
    lines = read_lines(results)
    machine, rows, figures = lines[0], ["| part | shows | end | s |", "|---|---|---|---|"], []
    for number, part in PARTS.items():
        own = [line for line in lines if line.get("part") == number]
        for line in own:
            if "end" in line:
                rows.append(f"| {number} | {part.shows} | {line['end']} | {line['seconds']} |")
        said = [line for line in own if "name" in line]
        figures += ["", f"## Part {number}: {part.shows}", "", "| | |", "|---|---|"] if said else []
        figures += [f"| {line['name']} | {_shown(line)} |" for line in said]
    head = f"# First hour: {machine['machine']}\n\ntorch {machine['torch']}, CUDA {machine['cuda']}, Python {machine['python']}\n\n"
    path.write_text(head + "\n".join([*rows, *figures]) + "\n")


def _shown(line: dict) -> str:
    value = "not measured here" if line["value"] is None else f"{line['value']} {line['unit']}".strip()
    if "ok" in line:
        value = f"{'holds' if line['ok'] else '**does not hold**'} {value}".strip()
    return value.replace("|", "\\|")


def _append(results: Path, line: dict) -> None:
    with results.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def _load_once() -> None:
    """What forked parts would each import."""
    if missing_packages(TRAINING):
        return
    from megatron_r1.mcore import host

    host.activate("cpu")
    from megatron_r1.mcore import checkpoint, device_checks  # noqa: F401
    from megatron_r1.pipeline.builders import export, models  # noqa: F401
    from megatron_r1.training import grpo, pretrain  # noqa: F401


def _install(wheels: Path, site: Path) -> None:
    files = [str(path) for path in sorted(wheels.glob("*.whl"))]
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target", str(site), *files]
    subprocess.run(command, check=True)
    sys.path.insert(1, str(site))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent package is missing
        return False


if __name__ == "__main__":
    sys.exit(main())
