"""From the records of a benchmark to problems: the question for the model, and the reference for its responses."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_r1.config.evaluation import BenchmarksConfig
from megatron_r1.data.record_files import Record, read_records, take_text
from megatron_r1.errors import DataError
from megatron_r1.evaluation.benchmarks import Benchmark
from megatron_r1.evaluation.contest_tests import contest_day, contest_tests
from megatron_r1.tags import find_boxed_answers

LETTERS = "ABCD"
_MBPP_TEST = range(11, 511)  # task ids of the test split (google-research, mbpp/README)
_WITH_STARTER = (
    "You will use the following starter code to write the solution to the problem and enclose your code within delimiters."
)
_WITHOUT_STARTER = (
    "Read the inputs from stdin solve the problem and write the answer to stdout (do not directly test on the sample inputs). "
    "Enclose your code within delimiters as follows."
)


@dataclass(frozen=True)
class BenchmarkProblem:
    """One problem."""

    id: str  #: stable: responses are kept under it
    question: str  #: what the model is asked, word for word
    reference: Any  #: in the form that the scorer takes; fits JSON
    category: str = ""  #: level, difficulty or subject, where the benchmark has one
    bare_question: str = ""  #: without the benchmark's prompt around it: what training data must not contain


def read_benchmark(benchmark: Benchmark, path: Path, config: BenchmarksConfig) -> list[BenchmarkProblem]:
    """The problems of a local copy, in its order; with `config.problems` that many of them, drawn by `config.seed`.

    Raises:
        DataError: file and line of a missing or malformed field, an id that is there twice; no problem at all.
    """
    problems: dict[str, BenchmarkProblem] = {}
    for number, row in enumerate(read_records(path, benchmark.split), start=1):
        if not _is_asked(benchmark, row, config):
            continue
        problem = _read_problem(benchmark, row, str(number), config.seed)
        if problem.id in problems:
            raise DataError(f"{row[0]}: the id {problem.id!r} is there twice; {benchmark.title} has every problem once")
        problems[problem.id] = problem
    if not problems:
        raise DataError(f"{path}: no problem of {benchmark.title}{_window(benchmark, config)}")
    chosen = list(problems.values())
    if config.problems is not None and config.problems < len(chosen):
        picked = random.Random(f"problems {config.seed}").sample(range(len(chosen)), config.problems)
        chosen = [chosen[index] for index in sorted(picked)]
    return chosen


def _is_asked(benchmark: Benchmark, row: Record, config: BenchmarksConfig) -> bool:
    where, record = row
    if benchmark.form == "contest":
        return config.contests_from <= contest_day(record, where) <= config.contests_to
    if benchmark.form == "asserts":
        task = take_text(record, "task_id", where)
        if not task.isascii() or not task.isdigit():
            raise DataError(f"{where}: field 'task_id' is {task!r}, not a number")
        return int(task) in _MBPP_TEST
    return True


def _window(benchmark: Benchmark, config: BenchmarksConfig) -> str:
    if benchmark.form == "contest":
        return f" from {config.contests_from} to {config.contests_to} (evaluate.benchmarks.contests_from, contests_to)"
    return " with a task_id from 11 to 510, the test split" if benchmark.form == "asserts" else ""


def _read_problem(benchmark: Benchmark, row: Record, number: str, seed: int) -> BenchmarkProblem:
    where, record = row
    ids = [name for name in benchmark.id if record.get(name) not in (None, "")]
    id = take_text(record, ids[0], where) if ids else number
    category = next((take_text(record, name, where) for name in benchmark.category if record.get(name) not in (None, "")), "")
    parts, reference = _FORMS[benchmark.form](benchmark, row, f"{seed} {id}")
    return BenchmarkProblem(id, _fill_prompt(benchmark.prompt, parts), reference, category, parts["question"])


def _fill_prompt(prompt: str, parts: Mapping[str, str]) -> str:
    """The prompt with its parts, in one pass: a question may hold braces."""
    return re.sub(r"\{(question|format|tests)\}", lambda found: parts[found[1]], prompt)


def _take_question(benchmark: Benchmark, row: Record) -> str:
    """The question as the record has it: the leading space of a program matters."""
    where, record = row
    name = _first_name(benchmark.question, row)
    take_text(record, name, where)
    return str(record[name]).strip("\n")


def _first_name(names: Sequence[str], row: Record) -> str:
    """The first field of `names` that the record has."""
    where, record = row
    for name in names:
        if record.get(name) not in (None, ""):
            return name
    has = ", ".join(map(repr, record)) or "no fields"
    raise DataError(f"{where}: field {' or '.join(map(repr, names))} is missing; the record has {has}")


Parts = tuple[dict[str, str], Any]


def _answer(benchmark: Benchmark, row: Record, _: str) -> Parts:
    where, record = row
    name = _first_name(benchmark.answer, row)
    answer = take_text(record, name, where)
    if name == "solution":
        boxes = find_boxed_answers(answer)
        if not boxes:
            raise DataError(f"{where}: field 'solution' has no \\boxed answer, and there is no field {benchmark.answer[0]!r}")
        answer = boxes[-1]
    return {"question": _take_question(benchmark, row)}, answer


def _choices(benchmark: Benchmark, row: Record, key: str) -> Parts:
    """Choices in an order that depends only on seed, problem and choices; the reference is the letter of the right choice."""
    where, record = row
    right = take_text(record, benchmark.answer[0], where)
    choices = [right, *(take_text(record, f"Incorrect Answer {number}", where) for number in range(1, len(LETTERS)))]
    if right in choices[1:]:
        raise DataError(f"{where}: the right choice is also among the wrong ones")
    choices.sort(key=lambda choice: hashlib.sha256(f"{key} {choice}".encode()).digest())
    listed = "\n".join(f"{letter}) {choice}" for letter, choice in zip(LETTERS, choices, strict=True))
    return {"question": f"{_take_question(benchmark, row).strip()}\n\n{listed}"}, LETTERS[choices.index(right)]


def _contest(benchmark: Benchmark, row: Record, _: str) -> Parts:
    where, record = row
    starter = record.get("starter_code") or ""
    code = f"{_WITH_STARTER}\n```python\n{starter}\n```" if starter else f"{_WITHOUT_STARTER}\n```python\n# YOUR CODE HERE\n```"
    return {"question": _take_question(benchmark, row), "format": code}, contest_tests(record, where)


def _completion(benchmark: Benchmark, row: Record, _: str) -> Parts:
    where, record = row
    tests = {name: take_text(record, name, where) for name in ("test", "entry_point")}
    prompt = _take_question(benchmark, row)
    return {"question": prompt}, {"check": tests["test"], "entry_point": tests["entry_point"], "prelude": prompt}


def _asserts(benchmark: Benchmark, row: Record, _: str) -> Parts:
    where, record = row
    asserts = record.get("test_list")
    if not isinstance(asserts, list) or not asserts or not all(isinstance(text, str) for text in asserts):
        raise DataError(f"{where}: field 'test_list' is missing, empty or no list of asserts")
    setup = record.get("test_setup_code") or "\n".join(record.get("test_imports") or [])  # the sanitized copy has imports
    return {"question": _take_question(benchmark, row), "tests": "\n".join(asserts)}, {"asserts": asserts, "setup": setup}


_FORMS: dict[str, Callable[[Benchmark, Record, str], Parts]] = {
    "answer": _answer, "choices": _choices, "contest": _contest, "completion": _completion, "asserts": _asserts,
}  # fmt: skip


def digest(values: Iterable[Any]) -> str:
    """A short name for a sequence of values; other values have another name."""
    total = hashlib.sha256()
    for value in values:
        total.update(f"{value!r}\n".encode(errors="replace"))
    return total.hexdigest()[:16]
