"""The code reward on real problems: every reference solution must be accepted and a spoilt one rejected; programs per second.

    python -m benchmarks.rewards_code --data FOLDER [--workers 1 2] [--limit N] [--sample N] [--cpp N] [--out FILE.json]

FOLDER holds mbpp.jsonl, humaneval.jsonl.gz and leetcode.json as their authors publish them. Three programs for each problem: the
reference; the same with the result changed on its way out ("result"); and with one operator or constant changed in its body
("operator"), of which some compute the same all the same: those are counted, not required. Programs that are not judged as
required are listed by name, and then the benchmark fails. All are judged once; the rate is measured on a sample. Then programs in
C++ are judged: without a cache, with compiled headers, and once more, when the programs are kept as well.
"""

from __future__ import annotations

import argparse
import ast
import gzip
import importlib.util
import json
import os
import re
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.measure import Disagreement, describe_machine, positive, print_table, run, write_results
from megatron_r1.errors import ConfigError
from megatron_r1.rewards.protocol import OUTCOMES, Verdict
from megatron_r1.rewards.scorers import SCORERS, ScorerSpec
from megatron_r1.rewards.workers.pool import ScoringPool
from megatron_r1.rewards.workers.process import WorkerLimits
from megatron_r1.runtime.progress import Progress

PACKAGES = ("numpy",)  #: LeetCode has it; shown to the programs, which cannot import it unless their Python is this one
REQUIRED = {"reference": "correct", "result": "wrong"}
_OPERATORS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Lt: ast.GtE, ast.Gt: ast.LtE, ast.LtE: ast.Gt, 
              ast.GtE: ast.Lt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq}  # fmt: skip
_CPP_PROGRAM = """#include <bits/stdc++.h>
using namespace std;
int main() {
    int n;
    cin >> n;
    vector<long long> values(n);
    for (auto& value : values) cin >> value;
    sort(values.begin(), values.end());
    map<long long, int> counts;
    long long sum = NUMBER - NUMBER;
    for (auto value : values) counts[value]++, sum += value;
    cout << sum << " " << counts.begin()->first << endl;
}
"""
_SPOIL = """
def _spoil(function):
    depth = 0

    def spoilt(*positional, **named):
        nonlocal depth
        depth += 1
        try:
            value = function(*positional, **named)
        finally:
            depth -= 1
        if depth:
            return value
        if value is None:
            return 0
        if isinstance(value, bool):
            return not value
        if isinstance(value, (int, float, complex)):
            return value + 1
        return value + "!" if isinstance(value, str) else [value]

    return spoilt

"""


@dataclass(frozen=True)
class Task:
    """One program to judge."""

    source: str  #: "mbpp", "humaneval", "leetcode"
    number: str
    variant: str  #: "reference", "result", "operator"
    program: str
    tests: Any


def read_problems(folder: Path) -> Iterator[tuple[str, str, str, str, Any]]:
    """(source, number, program, name of the function that is tested, tests)"""
    for number, line in enumerate((folder / "mbpp.jsonl").read_text(encoding="utf-8").splitlines()):
        row = json.loads(line)
        name = next(name for name in re.findall(r"(\w+) ?\(", row["test_list"][0]) if f"def {name}" in row["code"])
        yield "mbpp", str(row["task_id"]), row["code"], name, {"asserts": row["test_list"], "setup": row["test_setup_code"]}
    with gzip.open(folder / "humaneval.jsonl.gz", "rt", encoding="utf-8") as file:
        for row in map(json.loads, file):
            tests = {"check": row["test"], "entry_point": row["entry_point"], "prelude": row["prompt"]}
            yield "humaneval", row["task_id"], row["prompt"] + row["canonical_solution"], row["entry_point"], tests
    for number, row in enumerate(json.loads((folder / "leetcode.json").read_text(encoding="utf-8"))):
        name = row["tests"]["functional"].rsplit("check(Solution().", 1)[1].split(")", 1)[0]
        yield "leetcode", str(number), row["solutions"], name, row["tests"]


def tasks_of(folder: Path, limit: int | None) -> list[Task]:
    """All programs; with a limit, of the first problems of each source."""
    tasks, taken = [], Counter()
    for source, number, program, name, tests in read_problems(folder):
        taken[source] += 1
        if limit is None or taken[source] <= limit:
            variants = {"reference": program, "result": change_result(program, name), "operator": change_operator(program, name)}
            tasks += [Task(source, number, variant, text, tests) for variant, text in variants.items() if text is not None]
    return tasks


def change_result(program: str, name: str) -> str:
    """The program with another value returned by its function `name`, or its method of class Solution, to callers from outside."""
    inner = f"Solution.{name}" if "class Solution" in program else name
    return f"{program}\n{_SPOIL}{inner} = _spoil({inner})\n"


def change_operator(program: str, name: str) -> str | None:
    """The program with the first operator or number of the function changed; None where it has neither."""
    tree = ast.parse(program)
    for function in _functions(tree, name):
        for statement in function.body:
            for node in ast.walk(statement):
                if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
                    node.op = _OPERATORS[type(node.op)]()
                elif isinstance(node, ast.Compare) and type(node.ops[0]) in _OPERATORS:
                    node.ops[0] = _OPERATORS[type(node.ops[0])]()
                elif isinstance(node, ast.Constant) and type(node.value) is int:
                    node.value += 1
                else:
                    continue
                return ast.unparse(tree)
    return None


def _functions(tree: ast.Module, name: str) -> list[ast.FunctionDef]:
    """The last definition, which is the one that counts."""
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == name][-1:]


def scorer_specs() -> dict[str, ScorerSpec]:
    """The code scorer with numpy; and one with less time, for programs that may never end and need not be judged right."""
    settings = {"packages": package_folders(), "stop_at_first_failure": True}
    limits = {"code": {}, "impatient": {"cpu_seconds": 1.0, "wall_seconds": 5.0}}
    return {
        name: ScorerSpec(SCORERS["code"], time_limit_seconds=120.0, settings=settings | limit) for name, limit in limits.items()
    }


def package_folders() -> list[str]:
    """Of `PACKAGES` and the libraries beside them, as far as they are installed here."""
    found = [importlib.util.find_spec(name) for name in PACKAGES]
    packages = [folder for spec in found if spec for folder in spec.submodule_search_locations]
    return [*packages, *(f"{folder}.libs" for folder in packages if Path(f"{folder}.libs").is_dir())]


def judge(tasks: list[Task], workers: int, description: str) -> tuple[list[Verdict], float]:
    """The verdicts, in order, and programs per second once the workers have started."""
    items = [
        ("impatient" if task.variant == "operator" else "code", f"```python\n{task.program}\n```", task.tests) for task in tasks
    ]
    verdicts = []
    with (
        ScoringPool(scorer_specs(), workers=workers, limits=WorkerLimits(4 << 30, 1 << 30)) as pool,
        Progress(len(tasks), description) as progress,
    ):
        list(pool.stream(items[:workers]))
        start = time.perf_counter()
        for verdict in pool.stream(items):
            verdicts.append(verdict)
            progress.advance()
        seconds = time.perf_counter() - start
    return verdicts, len(tasks) / seconds


def measure_rates(tasks: list[Task], outcomes: list[str], arguments: argparse.Namespace) -> dict[int, float]:
    """Programs per second with each number of workers, on programs of the whole data that end by themselves.

    Raises:
        Disagreement: an outcome is another than in the whole run.
    """
    ending = [(task, outcome) for task, outcome in zip(tasks, outcomes, strict=True) if task.variant != "operator"]
    sample = ending[:: max(1, len(ending) // arguments.sample) | 1]  # odd: the variants take turns
    rates = {}
    for workers in arguments.workers:
        verdicts, rates[workers] = judge([task for task, _ in sample], workers, f"{workers} worker(s)")
        print(f"{workers} worker(s): {len(sample)} programs, {rates[workers]:.1f} programs/s", flush=True)
        for (task, outcome), verdict in zip(sample, verdicts, strict=True):
            if verdict.outcome != outcome:
                raise Disagreement(
                    f"{task.source} {task.number}, {task.variant}: {outcome}, but {verdict.outcome} with {workers} worker(s): "
                    f"{verdict.detail}"
                )
    return rates


def measure_cpp(programs: int) -> dict[str, float]:
    """Programs in C++ per second on one worker, each with one test: "no cache", "headers", "programs" (judged a second time).

    Raises:
        Disagreement: a program is not accepted, or a spoilt one is.
    """
    right = [_CPP_PROGRAM.replace("NUMBER", str(number)) for number in range(programs)]
    tests = {"inputs": ["3\n3 1 2\n", "2\n5 5\n"], "outputs": ["6 1\n", "10 5\n"]}
    spec = ScorerSpec(SCORERS["code"], time_limit_seconds=600.0)
    specs = {"headers": spec, "no cache": replace(spec, settings={"cpp_cache_mb": 0})}
    rates = {}
    with TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)  # the compiler may run as another user
        environment = {**os.environ, "TMPDIR": folder}
        with ScoringPool(specs, workers=1, limits=WorkerLimits(4 << 30, 1 << 30), environment=environment) as pool:

            def judge_all(scorer: str, texts: list[str], wanted: str) -> float:
                start = time.perf_counter()
                for verdict in pool.stream((scorer, f"```cpp\n{text}\n```", tests) for text in texts):
                    if verdict.outcome != wanted:
                        raise Disagreement(f"a program in C++: {verdict.outcome}, expected {wanted}: {verdict.detail}")
                return len(texts) / (time.perf_counter() - start)

            for scorer in ("no cache", "headers"):
                judge_all(scorer, [text.replace("sum +=", "sum -=") for text in right[:1]], "wrong")  # builds the headers
            rates["no cache"] = judge_all("no cache", right, "correct")
            rates["headers"] = judge_all("headers", right, "correct")
            rates["programs"] = judge_all("headers", right, "correct")
    return rates


def benchmark(arguments: argparse.Namespace) -> None:
    """Judge every program once with the most workers, then measure their rate on some with each number of workers.

    Raises:
        Disagreement: a reference is not accepted, a spoilt one is not rejected, or an outcome depends on the number of workers.
    """
    if not (arguments.data / "mbpp.jsonl").is_file():
        raise ConfigError(f"--data {arguments.data}: there is no mbpp.jsonl in it")
    tasks = tasks_of(arguments.data, arguments.limit)
    machine = describe_machine("cpu")
    verdicts, rate = judge(tasks, max(arguments.workers), "programs")
    counts: dict[tuple[str, str], Counter[str]] = {}
    unexpected = []
    for task, verdict in zip(tasks, verdicts, strict=True):
        counts.setdefault((task.source, task.variant), Counter())[verdict.outcome] += 1
        if verdict.outcome != REQUIRED.get(task.variant, verdict.outcome):
            unexpected.append(f"{task.source} {task.number}, {task.variant}: {verdict.outcome}: {verdict.detail}")
    for line in unexpected:
        print(line)
    header = ("data", "program", *OUTCOMES)
    print_table(header, [(*key, *(str(count[outcome]) for outcome in OUTCOMES)) for key, count in counts.items()])
    print(f"all: {len(tasks)} programs, {rate:.1f} programs/s")
    rates = measure_rates(tasks, [verdict.outcome for verdict in verdicts], arguments)
    cpp_rates = measure_cpp(arguments.cpp) if arguments.cpp else {}
    for name, cpp_rate in cpp_rates.items():
        print(f"C++, {name}: {cpp_rate:.1f} programs/s")
    if arguments.out is not None:
        table = [{"data": key[0], "program": key[1], **count} for key, count in counts.items()]
        results = {"counts": table, "unexpected": unexpected, "programs_per_second": rates, "programs_per_second_of_all": rate}
        results["cpp_programs_per_second"] = cpp_rates
        write_results(arguments.out, argparse.Namespace(**vars(arguments) | {"data": arguments.data.name}), results, machine)
    if unexpected:
        raise Disagreement(f"{len(unexpected)} programs are not judged as they must be")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the published data files")
    parser.add_argument("--workers", type=positive, nargs="+", default=[1, 2], help="numbers of processes to try in turn")
    parser.add_argument("--limit", type=positive, help="problems of each source; default: all")
    parser.add_argument("--sample", type=positive, default=400, help="programs on which the rate is measured, about")
    parser.add_argument("--cpp", type=int, default=12, help="programs in C++ whose rate is measured; 0: none; default: 12")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="also write the figures, with machine and versions")
    return run(benchmark, parser.parse_args())


if __name__ == "__main__":
    raise SystemExit(main())
