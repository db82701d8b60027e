"""Coding problems as MBPP, HumanEval and APPS publish them, read as records of this project: with a question and tests.

    MBPP         {"text" or "prompt", "test_list", "test_setup_code" or "test_imports", "challenge_test_list", "code"}
    HumanEval    {"prompt", "test", "entry_point", "canonical_solution": the body of the prompt's function}
    APPS         {"question", "input_output": JSON, "starter_code", "solutions": JSON}

The tests stay in their own fields, which `rewards.code.forms` reads.
"""

from __future__ import annotations

import json
from typing import Any

from megatron_r1.data.record_files import is_missing

COMPLETION_PROMPT = (
    "Complete the following Python function. Give the whole program, with its imports, in one block of code.\n\n"
    "```python\n{question}\n```"
)
#: the sentence of Austin et al. 2021 (arXiv 2108.07732), without its few-shot markers
ASSERTS_PROMPT = (
    "You are an expert Python programmer, and here is your task: {question} Your code should pass these tests:\n\n{tests}\n\n"
    "Give the program in one block of Python code."
)
_STARTER = "{question}\n\nThe program begins with this code:\n\n```python\n{starter}\n```"
_MBPP = ("test_list", "test_setup_code", "test_imports", "challenge_test_list")
_HUMANEVAL = ("prompt", "test", "entry_point")
_APPS = ("input_output",)
_SOLUTIONS = ("solution", "solutions", "reference_solution", "code")


def with_tests(record: dict[str, Any]) -> dict[str, Any]:
    """The record with `question` and `tests`, if it is one of the forms above and has no `tests`; else as it is.

    MBPP's challenge tests are tests like the others, but the question does not show them.
    """
    if not is_missing(record.get("tests")):
        return record
    text = record["text"] if isinstance(record.get("text"), str) else record.get("prompt")
    if _are_texts(record.get("test_list")) and isinstance(text, str):
        question = ASSERTS_PROMPT.replace("{tests}", "\n".join(record["test_list"])).replace("{question}", text.strip())
        return {**record, "question": question, "tests": _kept_fields(record, _MBPP)}
    if all(isinstance(record.get(name), str) for name in _HUMANEVAL):
        question = COMPLETION_PROMPT.replace("{question}", record["prompt"].strip("\n"))
        return {**record, "question": question, "tests": _kept_fields(record, _HUMANEVAL)}
    if isinstance(record.get("input_output"), (str, dict)) and isinstance(record.get("question"), str):
        starter = record.get("starter_code")
        question = record["question"]
        if isinstance(starter, str) and starter.strip():
            question = _STARTER.replace("{starter}", starter.strip("\n")).replace("{question}", question)
        return {**record, "question": question, "tests": _kept_fields(record, _APPS)}
    return record


def reference_solution(record: dict[str, Any]) -> str:
    """The program that a record gives as its solution; "" if it gives none, or has no tests for it."""
    if is_missing(with_tests(record).get("tests")):
        return ""
    body, prompt = record.get("canonical_solution"), record.get("prompt")
    if isinstance(body, str) and isinstance(prompt, str) and body.strip():
        return f"{prompt}{body}"
    for name in _SOLUTIONS:
        value = record.get(name)
        if name == "solutions" and isinstance(value, str) and value.startswith("["):  # APPS: a list as JSON
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                continue
        solution = value[0] if isinstance(value, list) and value else value
        if isinstance(solution, str) and solution.strip():
            return solution
    return ""


def _kept_fields(record: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: record[name] for name in names if not is_missing(record.get(name)) and record[name] not in ("", [])}


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) for text in value)
