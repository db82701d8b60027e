"""`megatron-r1 check-problems`, and what grpo says of its references at its start."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest

from megatron_r1 import cli
from megatron_r1.config.load import load_config
from megatron_r1.data.problems import load_problems
from megatron_r1.data.tokenizer import train_tokenizer
from megatron_r1.errors import DataError
from megatron_r1.pipeline.check_problems import FINDINGS, REPORT_FILE, check_problems, check_references
from megatron_r1.rewards.scorers import accuracy_scorers

GOOD = [
    {"question": "What is 1+1?", "answer": "2", "language": "en"},
    {"question": "What is 1+11?", "answer": "12"},
    {"question": "What is 1.11?", "answer": "\\frac{111}{100}"},
    {"question": "What is 111?", "answer": "We add.\n#### 111"},
    {"question": "Which one?", "answer": "C", "domain": "choice"},
    {"question": "Print it.", "tests": {"inputs": ["1\n", "1\n", "2\n"], "outputs": ["1\n", "1", "2\n"]}},
    {"question": "Write f.", "tests": {"asserts": ["assert f(1) == 2", "assert f(2) == 3"]}, "domain": "code"},
    {"question": "Write g.", "tests": {"inputs": [[1], [2]], "outputs": [1, 2], "fn_name": "g"}},
    {"question": "Tell me about cats.", "kind": "general"},
]
BAD = [  # a record, what is found, and words of the detail
    ({"question": "a", "answer": ""}, "malformed", "field 'answer' is blank"),
    ({"answer": "5"}, "malformed", "field 'question' is missing"),
    ({"question": "b"}, "malformed", "field 'answer' is missing"),
    ({"question": "c", "answer": ["5"]}, "malformed", "is list, not text"),
    ({"question": "d", "answer": "5", "kind": "odd"}, "malformed", "kind 'odd' is unknown"),
    ({"question": "e", "domain": "code"}, "malformed", "needs the field 'tests'"),
    ({"question": "f", "answer": "5", "domain": "geography"}, "no_scorer", "set reward.domains.geography"),
    ({"question": "g", "answer": "\\frac{1}{"}, "unscorable", "cannot be read"),
    ({"question": "h", "answer": "$$"}, "unscorable", "reference"),
    ({"question": "i", "answer": "AB", "domain": "choice"}, "unscorable", "no letter"),
    ({"question": "j", "tests": {"inputs": ["1"], "outputs": []}}, "unusable_tests", "same length"),
    ({"question": "k", "tests": {"inputs": [], "outputs": []}}, "unusable_tests", "0 usable tests"),
    ({"question": "l", "tests": ["f(1) == 2"]}, "unusable_tests", ""),
    ({"question": "m", "tests": {"functional": "def check(candidate): pass"}}, "unusable_tests", ""),
    ({"question": "n", "tests": {"inputs": ["1", "1"], "outputs": ["1", "2"]}}, "contradicting", "tests 1 and 2"),
    (
        {"question": "o", "tests": {"inputs": [[1], [2], [1]], "outputs": [1, 2, 3], "fn_name": "o"}},
        "contradicting",
        "tests 1 and 3",
    ),
    ({"question": "p", "tests": ["assert p(1) == 2", "assert p(1) == 3"]}, "contradicting", "tests 1 and 2"),
    ({"question": "What is 1+1?", "answer": "2"}, "duplicate", "problems.jsonl:1"),
    ({"question": "what is  1 + 1 ?", "answer": "2"}, "near_duplicate", "problems.jsonl:1"),
    ({"question": "WHAT IS $1+1$?", "answer": "2"}, "near_duplicate", "problems.jsonl:1"),
    (
        {"question": "Wir addieren die beiden Zahlen und teilen dann die Summe durch drei.", "answer": "4", "language": "en"},
        "language",
        "most words are de",
    ),
]


def write(folder: Path, records: list[dict]) -> Path:
    path = folder / "problems.jsonl"
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return path


def config(path: Path, *overrides: str):
    return load_config(None, [f"data.source={path}", "reward.workers=1", *overrides])


def test_good_problems_are_found_good(tmp_path, capsys):
    assert cli.main(["check-problems", str(write(tmp_path, GOOD)), "--workers", "1"]) == 0
    text = capsys.readouterr().out
    assert f"{len(GOOD)} problems" in text and "Nothing was found." in text and "math 4, code 3, choice 1, general 1" in text


def test_every_kind_is_found_and_nothing_else(tmp_path):
    report = check_problems(config(write(tmp_path, GOOD + [record for record, _, _ in BAD])))
    places = {where: (kind, detail) for kind, kept in report.examples.items() for where, detail in kept}
    expected = {f"{tmp_path}/problems.jsonl:{number}": found for number, (_, *found) in enumerate(BAD, start=len(GOOD) + 1)}
    assert {where: kind for where, (kind, _) in places.items()} == {where: kind for where, (kind, _) in expected.items()}
    for where, (_, words) in expected.items():
        assert words in places[where][1], where
    assert report.counts.total() == len(BAD) and report.problems == len(GOOD) + len(BAD)


def test_the_report_is_a_table_and_a_file(tmp_path, capsys):
    path = write(tmp_path, GOOD + [record for record, _, _ in BAD])
    assert cli.main(["check-problems", str(path), "--json", str(tmp_path / "out/report.json"), "reward.workers=1"]) == 1
    text = capsys.readouterr().out
    assert f"{path}:{len(GOOD) + 1}: {FINDINGS['malformed']}: field 'answer' is blank" in text
    assert text.count(FINDINGS["malformed"]) == 4, "one line of the table and three examples"
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["findings"]["malformed"]["count"] == 6 and len(report["findings"]["malformed"]["examples"]) == 6
    assert report["problems"] == len(GOOD) + len(BAD) and report["lengths"]["question, characters"]["longest"] == 68


def test_lengths_in_tokens_come_with_a_tokenizer(tmp_path):
    train_tokenizer(["What is one and one?", "word word word"] * 3, 300).save(tmp_path / "tokenizer")
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How many?"}]
    path = write(tmp_path, [GOOD[0], {"question": "word " * 500, "answer": "5"}, {"prompt": turns, "answer": "5"}])
    report = check_problems(config(path, f"data.tokenizer={tmp_path}/tokenizer", "data.max_prompt_tokens=400"))
    (place, detail), *others = report.examples["long_prompt"]
    assert place == f"{path}:2" and not others and dict(report.counts) == {"long_prompt": 1, "malformed": 1}
    assert report.examples["malformed"] == [
        (f"{path}:3", "data.template=r1_zero holds one question and its response; take r1_chat for conversations")
    ]
    first, second = report.lengths["prompt, tokens"]
    assert first < 400 < second and detail == f"{second} tokens" and list(report.lengths["answer, tokens"]) == [1, 1]
    assert "prompt, tokens" not in check_problems(config(path)).lengths


def test_the_same_question_with_another_answer_is_said_apart(tmp_path):
    report = check_problems(config(write(tmp_path, [GOOD[0], {"question": "What is 1+1?", "answer": "3"}])))
    assert dict(report.counts) == {"duplicate": 1, "other_answer": 1}


def test_reference_solutions_are_run(tmp_path):
    tests = {"inputs": ["1\n"], "outputs": ["2\n"]}
    solutions = [
        {"question": "a", "tests": tests, "solution": "print(int(input()) + 1)"},
        {"question": "b", "tests": tests, "solutions": ["```python\nprint(2)\n```"]},
        {"question": "c", "tests": tests, "code": "print(3)"},
        {"question": "d", "tests": tests, "solution": "def"},
    ]
    path = write(tmp_path, solutions)
    settings = ["reward.code.isolation=none_i_accept_untrusted_code_on_this_machine"]
    report = check_problems(config(path, *settings))
    assert dict(report.counts) == {"solution": 2}
    assert [where.rpartition(":")[2] for where, _ in report.examples["solution"]] == ["3", "4"]
    assert not check_problems(config(path), runs_solutions=False).counts


@pytest.mark.parametrize(
    ("content", "says"),
    [(None, "no such file"), ("", "the file is empty"), ("{]\n", "problems.jsonl:1: bad JSON"), ("[1]\n", "expected an object")],
)
def test_a_file_that_cannot_be_read_is_bad_input(content, says, tmp_path, capsys):
    path = tmp_path / "problems.jsonl"
    if content is not None:
        path.write_text(content)
    assert cli.main(["check-problems", str(path)]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def test_the_report_does_not_replace_the_problems(tmp_path, capsys):
    path = write(tmp_path, GOOD)
    assert cli.main(["check-problems", str(path), "--json", str(path)]) == 2
    assert "name another one" in capsys.readouterr().err and len(path.read_text().splitlines()) == len(GOOD)


def test_memory_does_not_grow_with_the_texts(tmp_path):
    path = write(tmp_path, [{"question": f"What is {n}+1? {'word ' * 4000}", "answer": str(n + 1)} for n in range(300)])
    tracemalloc.start()
    report = check_problems(config(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert report.problems == 300 and not report.counts
    assert peak < path.stat().st_size


# At the start of grpo


def start(path: Path, folder: Path, *overrides: str) -> None:
    settings = config(path, *overrides)
    check_references(settings, load_problems(settings.data, accuracy_scorers(settings.reward)), folder)


def test_a_run_says_which_references_it_cannot_use(tmp_path, capsys):
    bad = [record for record, kind, _ in BAD if kind in ("unscorable", "unusable_tests", "contradicting")]
    path = write(tmp_path, GOOD + bad)
    start(path, tmp_path)
    said = capsys.readouterr().out
    assert said.startswith(f"{len(bad)} of {len(GOOD) + len(bad) - 1} problems have a reference that no scorer can use, first ")
    assert f"{path}:{len(GOOD) + 1} (" in said and said.count("\n") == 1
    report = json.loads((tmp_path / REPORT_FILE).read_text())
    assert report["unusable"] == len(bad) and len(report["examples"]) == len(bad)


def test_good_references_are_not_worth_a_line(tmp_path, capsys):
    start(write(tmp_path, GOOD), tmp_path, "reward.max_unscorable_share=0")
    assert capsys.readouterr().out == "" and json.loads((tmp_path / REPORT_FILE).read_text())["unusable"] == 0


def test_too_many_of_them_end_the_run(tmp_path, capsys):
    records = [{"question": f"q{n}", "answer": "5" if n else "\\frac{1}{"} for n in range(20)]
    path = write(tmp_path, records)
    start(path, tmp_path, "reward.max_unscorable_share=0.05")
    assert capsys.readouterr().out.startswith("1 of 20")
    with pytest.raises(DataError, match=r"1 of 20 .*problems.jsonl:1 .*raise reward.max_unscorable_share=0.04"):
        start(path, tmp_path, "reward.max_unscorable_share=0.04")


def test_a_resumed_run_does_not_check_again(tmp_path, monkeypatch, capsys):
    path = write(tmp_path, [*GOOD, BAD[7][0]])
    start(path, tmp_path)
    monkeypatch.setattr("megatron_r1.pipeline.check_problems.open_scoring", None)
    start(path, tmp_path)
    assert len(set(capsys.readouterr().out.splitlines())) == 1
    write(tmp_path, [*GOOD, BAD[7][0], BAD[8][0]])
    with pytest.raises(TypeError):
        start(path, tmp_path)


def test_generated_problems_are_not_checked(tmp_path):
    start("tally", tmp_path)
    assert not (tmp_path / REPORT_FILE).exists()
