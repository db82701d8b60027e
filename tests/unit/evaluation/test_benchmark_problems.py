"""From local copies of benchmarks, in the layouts in which they are published, to what a model is asked."""

from __future__ import annotations

import base64
import csv
import gzip
import json
import pickle
import zlib
from pathlib import Path
from typing import Any

import pytest

from megatron_r1.config.evaluation import BenchmarksConfig
from megatron_r1.errors import ConfigError, DataError
from megatron_r1.evaluation.benchmark_problems import BenchmarkProblem, read_benchmark
from megatron_r1.evaluation.benchmarks import BENCHMARKS, find_benchmarks
from megatron_r1.rewards.code.scorer import CodeScorer
from megatron_r1.rewards.rules.choice import ChoiceScorer
from tests.public_data import GSM8K, public_file

GPQA = {"Record ID": "rec1", "Question": "Which {gas}?", "Correct Answer": "neon", "Incorrect Answer 1": "argon\n",
        "Incorrect Answer 2": "oxygen", "Incorrect Answer 3": "none", "High-level domain": "Chemistry"}  # fmt: skip
STDIN = [{"input": "1 2\n", "output": "3\n", "testtype": "stdin"}]
CALLS = [{"input": "[1, 2]\n3", "output": "6", "testtype": "functional"}]
LCB = {"question_content": "Add.", "question_id": "a_1", "contest_date": "2024-08-01T00:00:00", "difficulty": "easy",
       "starter_code": "", "public_test_cases": json.dumps(STDIN), "private_test_cases": json.dumps(STDIN),
       "metadata": "{}"}  # fmt: skip


def write(path: Path, *rows: dict[str, Any]) -> Path:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def read(name: str, path: Path, **settings: Any) -> list[BenchmarkProblem]:
    return read_benchmark(BENCHMARKS[name], path, BenchmarksConfig(**settings))


def packed(content: object) -> str:
    return base64.b64encode(zlib.compress(pickle.dumps(content))).decode()


@pytest.mark.parametrize(
    ("name", "row", "question", "reference"),
    [
        ("aime2024", {"id": 60, "problem": "2+{2}?", "solution": "s", "answer": 4},
         "2+{2}?\nPlease reason step by step, and put your final answer within \\boxed{}.", "4"),
        ("aime2024", {"ID": "I-1", "Problem": "2+2?", "Answer": 4}, "2+2?\nPlease reason", "4"),
        ("aime2024", {"problem": "2+2?", "solution": "Adding, \\boxed{\\frac{8}{2}}."}, "2+2?\nPlease reason", "\\frac{8}{2}"),
        ("math500", {"problem": "p", "solution": "\\boxed{2}", "answer": "1", "level": 5, "unique_id": "test/1.json"}, "p\nPlease",
         "1"),
        ("gsm8k", {"question": "q", "answer": "1+1=<<1+1=2>>2\n#### 2"}, "q\nPlease", "1+1=<<1+1=2>>2\n#### 2"),
        ("cmath", {"question": "一加一？", "golden": "2"}, "一加一？\n请通过逐步推理来解答问题，并把最终答案放置于\\boxed{}中。",
         "2"),
        ("humaneval", {"task_id": "HumanEval/0", "prompt": "def f():\n", "test": "def check(c):\n    assert c() == 1",
         "entry_point": "f"},
         "```python\ndef f():\n```", {"check": "def check(c):\n    assert c() == 1", "entry_point": "f", "prelude": "def f():"}),
        ("mbpp", {"task_id": 11, "text": "Write f.", "test_list": ["assert f() == 1"], "test_setup_code": "x = 1"},
         "here is your task: Write f. Your code should pass these tests:\n\nassert f() == 1\n", {"asserts": ["assert f() == 1"],
         "setup": "x = 1"}),
        ("mbpp", {"task_id": 510, "prompt": "Write f.", "test_list": ["assert f()"], "test_imports": ["import math"]}, "Write f.",
         {"asserts": ["assert f()"], "setup": "import math"}),
        ("livecodebench", LCB, "### Question:\nAdd.\n\n### Format: Read the inputs from stdin", {"inputs": ["1 2\n"] * 2,
         "outputs": ["3\n"] * 2}),
        ("livecodebench", LCB | {"starter_code": "class Solution:", "public_test_cases": json.dumps(CALLS),
         "private_test_cases": packed(json.dumps(CALLS)), "metadata": '{"func_name": "add"}'},
         ("### Format: You will use the following starter code to write the solution to the problem and enclose your code "
          "within delimiters.\n```python\nclass Solution:\n```\n\n### Answer"),
         {"inputs": [[[1, 2], 3]] * 2, "outputs": [6, 6], "fn_name": "add", "exact": True}),
    ],
)  # fmt: skip
def test_published_fields_become_problems(tmp_path, name, row, question, reference):
    (problem,) = read(name, write(tmp_path / "b.jsonl", row))
    assert question in problem.question and problem.reference == reference
    assert problem.bare_question in problem.question and "Please" not in problem.bare_question
    id = next((row[field] for field in BENCHMARKS[name].id if field in row), 1)
    assert problem.id == str(id) and problem.category == str(row.get("level", row.get("difficulty", "")))


def test_choices_are_shuffled_by_seed_and_question(tmp_path):
    with (tmp_path / "gpqa_diamond.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, GPQA)
        table.writeheader()
        table.writerows(GPQA | {"Record ID": f"rec{n}"} for n in range(40))
    problems = read("gpqa_diamond", tmp_path / "gpqa_diamond.csv")
    first = problems[0].question
    assert first.startswith(
        "Answer the following multiple choice question. The last line of your response should be of the following format: "
        "'ANSWER: $LETTER' (without quotes) where LETTER is one of ABCD. Think step by step before answering.\n\n"
        "Which {gas}?\n\nA) "
    )
    for problem in problems:
        lines = dict(line.split(") ") for line in problem.question.splitlines()[-4:])
        assert list(lines) == list("ABCD") and set(lines.values()) == {"neon", "argon", "oxygen", "none"}
        assert lines[problem.reference] == "neon" and problem.category == "Chemistry"
    assert {problem.reference for problem in problems} == set("ABCD")
    assert problems == read("gpqa_diamond", tmp_path / "gpqa_diamond.csv")
    other = read("gpqa_diamond", tmp_path / "gpqa_diamond.csv", seed=1)
    assert [p.reference for p in problems] != [p.reference for p in other]


def test_every_kind_of_file_and_folder_gives_the_same_problems(tmp_path):
    import datasets
    import pyarrow
    import pyarrow.parquet

    rows = [{"question": f"{n}+1?", "answer": f"#### {n + 1}"} for n in range(5)]
    expected = read("gsm8k", write(tmp_path / "test.jsonl", *rows))
    (tmp_path / "list.json").write_text(json.dumps(rows))
    published, saved = tmp_path / "published", tmp_path / "saved"
    published.mkdir()
    for split, table in (("train", rows[:1]), ("test", rows)):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), published / f"{split}-00000-of-00001.parquet")
    datasets.DatasetDict(test=datasets.Dataset.from_list(rows), train=datasets.Dataset.from_list(rows[:1])).save_to_disk(saved)
    paths = [
        write(tmp_path / "t.jsonl.gz", *rows),
        tmp_path / "list.json",
        published / "test-00000-of-00001.parquet",
        published,
        saved,
    ]
    assert len(expected) == 5 and all(read("gsm8k", path) == expected for path in paths)


@pytest.mark.parametrize(
    ("name", "row", "says"),
    [
        ("aime2024", {"answer": "4", "x": 1},
         ":2: field 'problem' or 'Problem' or 'question' is missing; the record has 'answer', 'x'"),
        ("math500", {"problem": "p", "solution": "none"},
         ":2: field 'solution' has no \\boxed answer, and there is no field 'answer'"),
        ("gpqa_diamond", {k: v for k, v in GPQA.items() if k != "Incorrect Answer 2"}, ":2: field 'Incorrect Answer 2' is missing"),
        ("gpqa_diamond", GPQA | {"Incorrect Answer 3": "neon"}, ":2: the right choice is also among the wrong ones"),
        ("livecodebench", LCB | {"question_id": "b", "private_test_cases": "AAAA"},
         ":2: field 'private_test_cases' cannot be read"),
        ("livecodebench", LCB | {"question_id": "b", "private_test_cases": packed(print)},
         "asks for builtins.print, tests are text"),
        ("livecodebench", LCB | {"question_id": "b", "public_test_cases": "[]", "private_test_cases": "[]"}, "hold no test"),
        ("livecodebench", LCB | {"question_id": "b", "private_test_cases": None},
         ":2: field 'private_test_cases' is missing or not text"),
        ("livecodebench", LCB | {"question_id": "b", "private_test_cases": json.dumps(CALLS)},
         ":2: some tests call a function and some run a program ('testtype')"),
        ("livecodebench", LCB, ":2: the id 'a_1' is there twice"),
        ("mbpp", {"task_id": 12, "text": "t", "test_list": []}, ":2: field 'test_list' is missing, empty or no list"),
        ("humaneval", {"prompt": "p", "test": "t"}, ":2: field 'entry_point' is missing"),
    ],
)  # fmt: skip
def test_a_bad_row_is_named(tmp_path, name, row, says):
    good = {"gpqa_diamond": GPQA | {"Record ID": "rec0"}, "livecodebench": LCB, "mbpp": {"task_id": 11, "text": "t",
    "test_list": ["assert f()"]},
            "humaneval": {"prompt": "p", "test": "t", "entry_point": "f"}}.get(name, {"problem": "p", "answer": "1"})  # fmt: skip
    with pytest.raises(DataError) as caught:
        read(name, write(tmp_path / "b.jsonl", good, row))
    assert str(tmp_path / "b.jsonl") in str(caught.value) and says in str(caught.value) and "\n" not in str(caught.value)


def test_contest_days_and_the_test_split_are_chosen(tmp_path):
    days = ["2024-07-31T00:00:00", "2024-08-01", "2025-01-31T23:00:00", "2025-02-01"]
    contests = write(tmp_path / "lcb.jsonl", *(LCB | {"contest_date": day, "question_id": day} for day in days))
    assert [problem.id for problem in read("livecodebench", contests)] == days[1:3]
    with pytest.raises(DataError, match="no problem of LiveCodeBench from 2026-01-01 to 2025-01-31"):
        read("livecodebench", contests, contests_from="2026-01-01")
    tasks = write(tmp_path / "mbpp.jsonl", *({"task_id": n, "text": "t", "test_list": ["assert f()"]} for n in (10, 11, 510, 511)))
    assert [problem.id for problem in read("mbpp", tasks)] == ["11", "510"]


def test_a_part_of_a_benchmark_is_drawn_by_the_seed(tmp_path):
    path = write(tmp_path / "b.jsonl", *({"question": str(n), "answer": "1"} for n in range(50)))
    parts = [[problem.id for problem in read("gsm8k", path, problems=10, seed=seed)] for seed in (0, 0, 1)]
    assert parts[0] == parts[1] != parts[2] and parts[0] == sorted(parts[0], key=int) and len(set(parts[0])) == 10


def test_an_unknown_benchmark_is_named():
    with pytest.raises(ConfigError, match="'aime' is no benchmark; choose of aime2024, math500"):
        find_benchmarks(["aime"])


def test_the_recipe_s_settings_are_the_defaults():
    settings = BenchmarksConfig()
    assert (settings.temperature, settings.top_p, settings.max_tokens) == (0.6, 0.95, 32768)
    assert {name: b.samples for name, b in BENCHMARKS.items() if b.samples_source == "R1 v2 D.1"} == {
        "aime2024": 64, "gpqa_diamond": 64, "math500": 16, "livecodebench": 8,
    }  # fmt: skip
    assert all(4 <= benchmark.samples <= 64 for benchmark in BENCHMARKS.values())


@pytest.mark.parametrize(
    ("response", "outcome"),
    [
        ("<think>ANSWER: A</think>So it is neon.\nANSWER: B", "correct"),
        ("**Answer:** B", "correct"),
        ("ANSWER: **B**", "correct"),
        ("Answer: $B$", "correct"),
        ("ANSWER: \\boxed{B}", "correct"),
        ("answer: (B) neon", "correct"),
        ("ANSWER: A\nNo.\nANSWER: B.", "correct"),
        ("ANSWER: B\nNo.\nANSWER: A", "wrong"),
        ("ANSWER: Because", "wrong"),
        ("ANSWER: I'd say B", "wrong"),
        ("B", "wrong"),
        ("<think>ANSWER: B", "wrong"),
        ("<think>ANSWER: B</think>", "wrong"),
        ("", "wrong"),
    ],
)
def test_the_last_letter_after_the_reasoning_counts(response, outcome):
    assert ChoiceScorer().score(response, "B").outcome == outcome
    assert ChoiceScorer().score(response, "neon").outcome == "unscorable"


def test_real_files_are_read_and_their_own_solutions_pass(tmp_path):
    gsm8k = read("gsm8k", public_file(GSM8K))
    assert len(gsm8k) == 7473 and all("####" in problem.reference for problem in gsm8k)
    code = {"humaneval": public_file("code/humaneval.jsonl.gz"), "mbpp": public_file("code/mbpp.jsonl")}
    problems = {name: read(name, path) for name, path in code.items()}
    assert {name: len(found) for name, found in problems.items()} == {"humaneval": 164, "mbpp": 500}
    records = [json.loads(line) for line in gzip.decompress(code["humaneval"].read_bytes()).splitlines()]
    solutions = {record["task_id"]: record["prompt"] + record["canonical_solution"] for record in records}
    solutions |= {str(row["task_id"]): row["code"] for row in map(json.loads, code["mbpp"].read_text().splitlines())}
    scorer = CodeScorer()
    for problem in (problems["humaneval"][38], problems["mbpp"][0]):
        assert scorer.score(f"```python\n{solutions[problem.id]}\n```", problem.reference).outcome == "correct", problem.id
        assert scorer.score("```python\ndef nothing(): pass\n```", problem.reference).outcome == "wrong"
