"""Coding problems as MBPP, HumanEval and APPS publish them: question, tests and solution, through to the verdict."""

from __future__ import annotations

import json

import pytest

from megatron_r1.config.data import DataConfig
from megatron_r1.data.coding_records import reference_solution, with_tests
from megatron_r1.data.problem_records import read_problem
from megatron_r1.data.record_files import read_records
from megatron_r1.errors import DataError
from megatron_r1.rewards.code.forms import read_tests
from tests.code_answers import judged, needs_sandbox
from tests.public_data import public_file

MBPP = {
    "task_id": 2, "text": "Write a function that doubles.", "code": "def twice(x):\r\n  return 2 * x",
    "test_setup_code": "BASE = 1",
    "test_list": ["assert twice(2) == 4", "assert twice(BASE) == 2"], "challenge_test_list": ["assert twice(-3) == -6"],
}  # fmt: skip
SANITIZED = {"task_id": 3, "prompt": "Write a root.", "code": "def root(x): return math.sqrt(x)", "test_imports": ["import math"],
             "test_list": ["assert root(4) == math.sqrt(4)"]}  # fmt: skip
HUMANEVAL = {
    "task_id": "HumanEval/7", "entry_point": "up",
    "prompt": "import math\n\ndef up(x: float) -> int:\n    \"\"\" {Round} up.\n    \"\"\"\n",
    "canonical_solution": "    return math.ceil(x)\n",
    "test": "METADATA = {}\n\ndef check(candidate):\n    assert candidate(1.5) == 2\n    assert candidate(2.0) == 2\n",
}  # fmt: skip
APPS = {
    "problem_id": 1, "question": "Print twice the number.", "starter_code": "", "difficulty": "introductory",
    "input_output": json.dumps({"inputs": ["2\n", "4\n"], "outputs": ["4\n", "8\n"]}),
    "solutions": json.dumps(["print(2 * int(input()))", "print(0)"]),
}  # fmt: skip
APPS_FUNCTION = {
    **APPS, "starter_code": "def f(x):\n\t", "solutions": json.dumps(["def f(x):\n\treturn 2 * x"]),
    "input_output": json.dumps({"fn_name": "f", "inputs": [[2]], "outputs": [4]}),
}  # fmt: skip


def take(record):
    return read_problem(record, DataConfig(), ["math", "code"], "x:1", "x-1")


@pytest.mark.parametrize(
    ("record", "asks", "hides", "tests"),
    [
        (MBPP, ["doubles. Your code should pass these tests:\n\nassert twice(2) == 4\nassert twice(BASE) == 2"], "-6", 3),
        (SANITIZED, ["Write a root.", "assert root(4)"], "import math", 1),
        (HUMANEVAL, ["```python\nimport math\n\ndef up(x: float)", "{Round} up"], "check", 2),
        (APPS, ["Print twice the number."], "input", 2),
        (APPS_FUNCTION, ["Print twice the number.", "```python\ndef f(x):"], "input", 1),
    ],
)
def test_a_published_record_is_a_problem(record, asks, hides, tests):
    problem = take(record)
    assert problem.domain == "code" and all(text in problem.question for text in asks) and hides not in problem.question
    assert len(read_tests(problem.answer).tests) == tests
    assert all(field in json.loads(problem.answer) or field in ("prompt",) for field in json.loads(problem.answer))


@needs_sandbox
@pytest.mark.parametrize("record", [SANITIZED, HUMANEVAL, APPS, APPS_FUNCTION])
def test_its_solution_passes_and_a_wrong_one_does_not(record):
    solution = reference_solution(record).replace("root(x):", "root(x):\n  import math;")
    assert judged(solution, take(record).answer).score == 1
    assert (
        judged(solution.replace("2 *", "3 *").replace("ceil", "floor").replace("sqrt(x)", "exp(x)"), take(record).answer).score == 0
    )


@needs_sandbox
def test_challenge_tests_and_set_up_count():
    program = "def twice(x): return 2 * x"
    assert judged(program, take(MBPP).answer).parts["tests"] == ["accepted"] * 3
    assert judged("def twice(x): return 2 * abs(x)", take(MBPP).answer).parts["tests"] == ["accepted", "accepted", "wrong"]


@needs_sandbox
@pytest.mark.parametrize(
    ("code", "score"),
    [
        ("    return math.ceil(x)", 1), ("\n    y = x\n    return math.ceil(y)\n", 1), ("    return math.floor(x)", 0),
        ("return math.ceil(x)", 0), ("import math\ndef up(x): return math.ceil(x)", 1), ("    pass\ndef down(x): return 2", 0),
    ],
)  # fmt: skip
def test_a_body_stands_after_its_prompt(code, score):
    assert judged(code, take(HUMANEVAL).answer).score == score


def test_records_of_other_forms_stay_as_they_are():
    for record in (
        {"question": "q", "answer": "1"}, {"question": "q", "tests": ["assert f(1) == 1"]}, {"prompt": "p", "solution": "s"},
        {"text": "t"}, {"text": "t", "test_list": []}, {"prompt": "p", "test": "t"}, {**MBPP, "tests": ["assert twice(1) == 2"]},
    ):  # fmt: skip
        assert with_tests(record) is record
    assert reference_solution({"question": "q", "answer": "1", "solution": "2"}) == ""
    with pytest.raises(DataError, match="x:1"):
        take({"text": "t", "test_list": "assert f(1)"})


@pytest.mark.parametrize("tests", [{"test_list": "x"}, {"test_list": []}, {"test": "x = 1", "entry_point": "f"},
                                   {"input_output": "{"},
                                   {"input_output": "[]"}, {"input_output": {"inputs": []}}])  # fmt: skip
def test_fields_that_hold_no_tests_are_unscorable(tests):
    with pytest.raises(ValueError, match="tests|asserts"):
        read_tests(tests)


@needs_sandbox
@pytest.mark.parametrize("name", ["code/mbpp.jsonl", "code/humaneval.jsonl.gz"])
def test_the_published_files_are_read(name):
    records = [record for _, record in read_records(public_file(name))]
    answers = [take(record).answer for record in records]
    assert len(answers) == {"code/mbpp.jsonl": 974, "code/humaneval.jsonl.gz": 164}[name]
    assert all(read_tests(answer).tests for answer in answers) and all(map(reference_solution, records))
    for index in range(0, len(records), 97):
        assert judged(reference_solution(records[index]), answers[index]).score == 1
