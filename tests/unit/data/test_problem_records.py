"""Problems from the records that TRL, verl and open-r1 publish, and from every kind of file."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path

import pytest

from megatron_r1.config.data import DataConfig
from megatron_r1.data.chat.messages import Message
from megatron_r1.data.problem_records import Problem, read_problem
from megatron_r1.data.problems import read_problem_file
from megatron_r1.errors import DataError

ASK = {"role": "user", "content": "How many?"}
ANSWER = {"role": "assistant", "content": "72"}
SYSTEM = Message("system", "Be brief.")
# As verl's preprocessing of GSM8K and BytedTsinghua-SIA's DAPO-Math-17k have them.
VERL = {
    "data_source": "openai/gsm8k", "prompt": [ASK], "ability": "math", "reward_model": {"style": "rule", "ground_truth": "72"},
    "extra_info": {"split": "train", "index": 0, "answer": "48 + 24\n#### 72", "question": "How many?"},
}  # fmt: skip
DAPO = {
    "data_source": "math_dapo", "prompt": [{"content": "Solve it. How many?", "role": "user"}], "ability": "MATH",
    "reward_model": {"ground_truth": "34", "style": "rule-lighteval/MATH_v2"}, "extra_info": {"index": "9a9b6eb4"},
}  # fmt: skip
TESTS = {"inputs": ["1\n"], "outputs": ["2\n"]}


def take(record: dict, **settings) -> Problem:
    return read_problem(record, DataConfig(**settings), ["math", "code", "choice", "stem"], "x:1", "x-1")


@pytest.mark.parametrize(
    ("record", "question", "answer", "context"),
    [
        (VERL, "How many?", "72", ()),
        (DAPO, "Solve it. How many?", "34", ()),
        ({**VERL, "prompt": [{"role": "system", "content": "Be brief."}, ASK]}, "How many?", "72", (SYSTEM,)),
        ({**VERL, "reward_model": {"ground_truth": ["72"], "style": None}}, "How many?", "72", ()),
        ({**VERL, "reward_model": {"ground_truth": 72}}, "How many?", "72", ()),
        ({"prompt": [ASK], "answer": "72"}, "How many?", "72", ()),
        ({"prompt": [ASK], "solution": "It is \\boxed{72}."}, "How many?", "It is \\boxed{72}.", ()),
        ({"prompt": [ASK], "ground_truth": "72", "solution": None}, "How many?", "72", ()),
        ({"prompt": "How many?", "answer": "72", "question": None}, "How many?", "72", ()),
        ({"prompt": [{"role": "user", "content": [{"type": "text", "text": "How many?"}]}], "answer": 72}, "How many?", "72", ()),
        ({"prompt": [{"role": "user", "content": "A?"}, {"role": "assistant", "content": "B."}, ASK], "answer": "72"},
         "How many?", "72", (Message("user", "A?"), Message("assistant", "B."))),
        ({"problem": "How many?", "solution": "\\boxed{72}", "answer": "72", "messages": [ASK, ANSWER]}, "How many?", "72", ()),
        ({"problem": "How many?", "solution": "\\boxed{72}", "messages": [ASK]}, "How many?", "\\boxed{72}", ()),
        ({"messages": [ASK], "answer": "72"}, "How many?", "72", ()),
        ({"question": "How many?", "expected_answer": "72", "problem_type": "x"}, "How many?", "72", ()),
        ({"question": "How many?", "answer": "72", "system": "Be brief."}, "How many?", "72", (SYSTEM,)),
        ({"question": "How many?", "answer": "72", "system": None, "tools": [], "images": None, "language": None, "kind": None,
          "domain": float("nan"), "preference": None, "tests": None}, "How many?", "72", ()),
        ({"question": "How many?", "answer": float("nan"), "solution": "72"}, "How many?", "72", ()),
        ({"question": [ASK], "answer": "72"}, "How many?", "72", ()),
    ],
)  # fmt: skip
def test_published_forms(record, question, answer, context):
    problem = take(record)
    assert (problem.question, problem.answer, problem.context, problem.domain) == (question, answer, context, "math")


def test_named_fields_may_stand_inside_of_others():
    settings = {"question_field": "extra_info.question", "answer_field": "extra_info.answer", "answer_format": "gsm8k"}
    assert take(VERL, **settings).answer == "72"
    assert take({"a.b": "How many?", "a": {"b": "no"}, "answer": "72"}, question_field="a.b").question == "How many?"
    with pytest.raises(DataError, match="x:1: field 'extra_info.text' is missing; the record has 'data_source'"):
        take(VERL, question_field="extra_info.text")
    with pytest.raises(DataError, match="field 'final' is missing"):
        take({"question": "How many?", "solution": "72"}, answer_field="final")


@pytest.mark.parametrize("ground_truth", [json.dumps(TESTS), TESTS])
def test_verl_s_code_problems_have_their_tests(ground_truth):
    record = {**VERL, "ability": "code", "data_source": "taco", "reward_model": {"style": "rule", "ground_truth": ground_truth}}
    problem = take(record)
    assert problem.domain == "code" and json.loads(problem.answer) == TESTS


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({**VERL, "ability": "fact-reasoning"}, "domain 'fact-reasoning' is unknown; choose one of math, code, choice"),
        ({**VERL, "reward_model": {"style": "model", "ground_truth": "72"}}, "reward_model.style is 'model'"),
        ({**VERL, "reward_model": {"style": "rule", "ground_truth": None}}, "field 'answer' is missing"),
        ({**VERL, "reward_model": {"style": "rule", "ground_truth": ["7", "2"]}}, "'reward_model.ground_truth' is list, not text"),
        ({**VERL, "images": [{"bytes": "x"}]}, "field 'images' holds what is no text"),
        ({**VERL, "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]}]}, "of type 'image'"),
        ({**VERL, "prompt": []}, "field 'question' is missing"),
        ({**VERL, "prompt": [ASK, {"role": "assistant", "content": "72"}]}, "does not end with a message of the user"),
        ({"messages": [ASK, {"role": "assistant", "content": "72"}], "answer": "72"}, "does not end with a message of the user"),
        ({**VERL, "prompt": [ASK, {"role": "tool", "content": "72"}, ASK]}, "has calls of tools"),
        ({"question": "a", "answer": "1", "tools": [{"name": "add"}]}, "the record has tools"),
        ({"question": float("nan"), "answer": "1"}, "field 'question' is nan, which is a missing value"),
        ({"question": "a", "answer": None}, "field 'answer' is NoneType, not text"),
        ({"question": "a", "answer": float("nan")}, "field 'answer' is nan, which is a missing value"),
        ({"question": "a", "answer": float("inf")}, "field 'answer' is inf, which is no number"),
        ({"question": "a", "domain": "code", "tests": None}, "a problem of domain code needs the field 'tests'"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_is_refused(record, says):
    with pytest.raises(DataError) as caught:
        take(record)
    assert says in str(caught.value) and str(caught.value).startswith("x:1") and "\n" not in str(caught.value)


def test_every_kind_of_file_gives_the_same_problems(tmp_path):
    """Among them a table that fills what a row does not have with null."""
    import datasets
    import pyarrow

    rows = [
        {**VERL, "language": "en"},
        {"prompt": [{**ASK, "content": "And?"}], "reward_model": {"ground_truth": "34"}, "tests": TESTS | {"x": 1}},
    ]
    rows[1]["domain"] = "math"
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    for name, content in (
        ("a.jsonl", lines), ("a.json", lines), ("a.jsonl.gz", gzip.compress(lines)), ("b.json", json.dumps(rows).encode()),
        ("a.jsonl.zst", pyarrow.compress(lines, codec="zstd", asbytes=True)),
    ):  # fmt: skip
        (tmp_path / name).write_bytes(content)
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [["problem", "solution", "language", "system"], ["How many?", "72", "en", ""], ["And?", "34", "", ""]]
        )
    for name in ("a.jsonl", "a.json", "b.json", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "saved", "a.csv"):
        problems, notes = read_problem_file(DataConfig(source=str(tmp_path / name)))
        assert [(p.question, p.answer, p.language, p.domain) for p in problems] == [
            ("How many?", "72", "en", "math"), ("And?", "34", "", "math"),
        ]  # fmt: skip
        assert notes == []


def test_a_digest_of_problems_is_as_it_was():
    """A cold start that was begun before has it in its folder."""
    assert str(Problem("a", "b", "c", where="x:1", context=(SYSTEM,))) == (
        "Problem(id='a', question='b', answer='c', language='', domain='math', kind='reasoning', preference='helpful')"
    )


def test_published_problems_of_the_tests_read_as_before(tmp_path: Path):
    records = [{"question": "q1", "tests": ["assert f(1) == 2"]}, {"question": "q2", "tests": TESTS, "answer": "x"}]
    assert [take(record).answer for record in records] == [json.dumps(record["tests"]) for record in records]
