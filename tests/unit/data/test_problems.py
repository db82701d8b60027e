from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_r1.config.data import DataConfig
from megatron_r1.data.general import Requests
from megatron_r1.data.problem_records import Problem
from megatron_r1.data.problems import FileProblems, load_problems, read_problem_file, read_problems
from megatron_r1.data.split import is_heldout
from megatron_r1.data.tally import arithmetic, requests
from megatron_r1.errors import ConfigError, DataError
from tests.public_data import math_file, math_records


def write(path: Path, text: str) -> DataConfig:
    path.write_text(text, encoding="utf-8")
    return DataConfig(source=str(path))


def numbered(count: int) -> list[Problem]:
    return [Problem(f"p-{n}", f"What is {n}+1?", str(n + 1)) for n in range(count)]


def test_jsonl_and_json_give_the_same_problems(tmp_path):
    records = [{"question": " What is\u20281+1? ", "answer": "2"}, {"question": "求2+2？", "answer": 4}]
    lines = write(tmp_path / "p.jsonl", "\n".join(json.dumps(r, ensure_ascii=False) for r in records) + "\n\n")
    listed = write(tmp_path / "p.json", json.dumps(records))
    expected = [Problem("p-1", "What is\u20281+1?", "2"), Problem("p-2", "求2+2？", "4")]
    assert read_problems(lines) == read_problems(listed) == expected


def test_gsm8k_answers_are_what_follows_the_marker_without_commas(tmp_path):
    config = write(tmp_path / "p.jsonl", json.dumps({"q": "How many?", "a": "2*617 = <<2*617=1234>>1234\n#### 1,234 "}))
    config = config.model_copy(update={"question_field": "q", "answer_field": "a", "answer_format": "gsm8k"})
    assert read_problems(config)[0].answer == "1234"


def test_kind_domain_language_and_tests_choose_the_rewards(tmp_path):
    tests = {"asserts": ["assert f(1) == 2"]}
    records = [
        {"question": "q1", "tests": tests, "language": "en"},
        {"question": "q2", "answer": "2", "domain": "math", "kind": "reasoning"},
        {"question": "q3", "kind": "general"},
        {"question": "q4", "kind": "general", "answer": "like this"},
    ]
    problems = read_problems(write(tmp_path / "p.json", json.dumps(records)))
    assert [(p.kind, p.domain, p.language, p.answer) for p in problems] == [
        ("reasoning", "code", "en", json.dumps(tests)), ("reasoning", "math", "", "2"),
        ("general", "math", "", ""), ("general", "math", "", "like this"),
    ]  # fmt: skip
    assert FileProblems(problems, 0.01, "p").domains() == {"code", "math"}
    assert FileProblems(problems[2:], 0.01, "p").domains() == set()
    mixed = FileProblems([replace(p, kind="general") if n % 2 else p for n, p in enumerate(numbered(200))], 0.5, "p")
    assert {p.kind for p in mixed.heldout(30, seed=0)} == {"reasoning"}, "a general problem has no accuracy to evaluate"


def test_a_domain_of_ones_own_may_have_any_json_as_its_answer(tmp_path):
    records = [
        {"question": "q1", "answer": {"target": 24}, "domain": "countdown"},
        {"question": "q2", "answer": "B", "domain": "stem"},
        {"question": "q3", "tests": ["assert f(1) == 2"], "domain": "contest"},
        {"question": "q4", "answer": "C", "domain": "choice"},
    ]
    config = write(tmp_path / "p.json", json.dumps(records))
    problems = read_problems(config, {"math", "code", "choice", "countdown", "stem", "contest"})
    assert [(p.domain, p.answer) for p in problems] == [
        ("countdown", '{"target": 24}'), ("stem", "B"), ("contest", '["assert f(1) == 2"]'), ("choice", "C"),
    ]  # fmt: skip
    with pytest.raises(DataError, match="p.json item 2: domain 'stem' is unknown; choose one of countdown, or name"):
        read_problems(config, ["countdown"])


GOOD = '{"question": "a", "answer": "1"}\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.jsonl", None, "p.jsonl: no such file"),
        ("p.jsonl", "", "p.jsonl: the file is empty"),
        ("p.jsonl", " \n\n", "p.jsonl: the file is empty"),
        ("p.jsonl", GOOD + '{"question": ', r"p.jsonl:2: bad JSON"),
        ("p.jsonl", GOOD + "\n[1]\n", r"p.jsonl:3: expected an object, found list"),
        ("p.jsonl", GOOD + '{"question": "b"}', r"p.jsonl:2: field 'answer' is missing; the record has 'question'"),
        ("p.jsonl", GOOD + '{"question": "b", "answer": " "}', r"p.jsonl:2: field 'answer' is blank"),
        ("p.jsonl", GOOD + '{"question": ["b"], "answer": "1"}', r"p.jsonl:2 message 1: expected an object, found str"),
        ("p.jsonl", GOOD + '{"question": "b", "answer": true}', r"p.jsonl:2: field 'answer' is bool, not text"),
        ("p.jsonl", GOOD + '{"question": "\\ud800", "answer": "1"}', r"p.jsonl:2: .*surrogate"),
        (
            "p.jsonl",
            '{"question": "b", "answer": "1", "kind": "odd"}',
            r"p.jsonl:1: kind 'odd' is unknown; choose one of reasoning, general",
        ),
        (
            "p.jsonl",
            '{"question": "b", "answer": "1", "domain": "law"}',
            (
                r"p.jsonl:1: domain 'law' is unknown; choose one of math, code, choice, "
                r"or name the scorer of this domain in reward.domains"
            ),
        ),
        ("p.jsonl", '{"question": "b", "domain": "code"}', r"p.jsonl:1: a problem of domain code needs the field 'tests'"),
        ("p.jsonl", "[" * 100_000, r"p.jsonl:1: bad JSON"),
        ("p.json", "{}", r"p.json:1: field 'question' is missing"),
        ("p.json", '{\n"question": "b"}', r"p.json: expected a list of objects, or one object a line"),
        ("p.json", "[]", r"p.json: the list is empty"),
        ("p.json", '[{"question": "b"}]', r"p.json item 1: field 'answer' is missing"),
        ("p.txt", GOOD, r"p.txt: expected .jsonl, "),
    ],
)
def test_a_bad_file_is_a_one_line_error_with_its_place(tmp_path, name, content, message):
    config = DataConfig(source=str(tmp_path / name))
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        read_problems(config)
    assert "\n" not in str(caught.value)


def test_a_folder_and_binary_data_are_errors(tmp_path):
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    for name, message in (("folder.jsonl", "the folder holds no table"), ("binary.jsonl", "not UTF-8")):
        with pytest.raises(DataError, match=message):
            read_problems(DataConfig(source=str(tmp_path / name)))


def test_gsm8k_format_without_the_marker_is_an_error(tmp_path):
    for answer in ("72", "72 ####", "####"):
        config = write(tmp_path / "p.jsonl", json.dumps({"question": "a", "answer": answer}))
        with pytest.raises(DataError, match=r"p.jsonl:1: .*####"):
            read_problems(config.model_copy(update={"answer_format": "gsm8k"}))


def test_train_and_held_out_are_disjoint_complete_and_stable():
    problems = numbered(2000)
    source = FileProblems(problems, 0.1, "numbers")
    train = {source.train(position, seed=0).question for position in range(1800)}
    heldout = {p.question for p in problems if is_heldout(p.question, 0.1)}
    assert len(heldout) == pytest.approx(200, abs=50)
    assert {p.question for p in source.heldout(len(heldout), seed=5)} == heldout
    assert not train & heldout
    grown = FileProblems(problems[::-1] + numbered(3000)[2000:], 0.1, "numbers")
    assert not {grown.train(position, seed=0).question for position in range(2700)} & heldout


def test_an_epoch_visits_every_training_problem_once_in_a_new_order():
    source = FileProblems(numbered(300), 0.2, "numbers")
    size = len(source.fixed_problems()) - sum(is_heldout(p.question, 0.2) for p in source.fixed_problems())
    epochs = [[source.train(epoch * size + i, seed=3).id for i in range(size)] for epoch in range(3)]
    assert len(set(epochs[0])) == size
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != [source.train(i, seed=4).id for i in range(size)]


def test_too_few_problems_are_refused():
    with pytest.raises(DataError, match="evaluate.problems=10000 but only"):
        FileProblems(numbered(50), 0.2, "numbers").heldout(10_000, seed=0)
    held = next(p for p in numbered(100) if is_heldout(p.question, 0.2))
    with pytest.raises(DataError, match="no training problem is left of 1"):
        FileProblems([held], 0.2, "numbers")


def test_tally_problems_are_disjoint_and_held_out_ones_differ_in_numbers():
    source = load_problems(DataConfig())
    train = [source.train(position, seed=0) for position in range(3000)]
    heldout = source.heldout(500, seed=99)

    def expression(problem: Problem) -> str:
        return problem.id.split("-", 2)[2]

    assert len({expression(p) for p in heldout}) == 500
    assert not {expression(p) for p in train} & {expression(p) for p in heldout}
    assert heldout == source.heldout(500, seed=99) and heldout != source.heldout(500, seed=98)
    assert {p.language for p in train} == {"en", "zh"}
    assert all(eval(expression(p)) == int(p.answer) for p in train + heldout)


@pytest.mark.parametrize(("kind", "count"), [("made", 2000), ("public", 7473)])
def test_gsm8k_loads_through_the_same_path(kind, count, tmp_path):
    source = load_problems(DataConfig(source=str(math_file(kind, tmp_path)), answer_format="gsm8k"))
    assert len(source.fixed_problems()) == count
    answers = {problem.question: problem.answer for problem in source.fixed_problems()}
    first = math_records(kind)[0]
    assert answers[first["question"].strip()] == first["answer"].rpartition("#### ")[2]
    assert all(p.answer.lstrip("-").replace(".", "", 1).isdigit() for p in source.fixed_problems())


def read(folder: Path, records: list[dict], **settings) -> tuple[list[Problem], list[str]]:
    path = folder / "p.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return read_problem_file(DataConfig(source=str(path), **settings))


def test_a_repeated_question_counts_once_and_not_at_all_if_its_answers_differ(tmp_path):
    one, two, other = ({"question": q, "answer": a} for q, a in (("a", "1"), ("b", "2"), ("b", "3")))
    problems, notes = read(tmp_path, [one, two, one, one])
    assert [(p.id, p.question) for p in problems] == [("p-1", "a"), ("p-2", "b")]
    assert len(notes) == 1 and "2 different problems of 4: 2 repeat a question" in notes[0]
    problems, notes = read(tmp_path, [one, two, one, other, two])
    assert [p.question for p in problems] == ["a"]
    assert "1 questions have answers that differ, and are left out, the first at" in notes[1] and "p.jsonl:2 and" in notes[1]
    assert read(tmp_path, [one, two]) == (problems + [replace(problems[0], id="p-2", question="b", answer="2")], [])
    with pytest.raises(DataError, match="answers that differ.*nothing is left"):
        read(tmp_path, [two, other])
    with pytest.raises(DataError, match=r"p.jsonl:3: the same question stands at .*p.jsonl:1"):
        read(tmp_path, [one, two, one], repeated="error")
    system = {**one, "system": "Be brief."}
    assert len(read(tmp_path, [one, system, system])[0]) == 2, "another system message is another question"


def test_memory_does_not_grow_with_repeats(tmp_path):
    """DAPO-Math-17k has every question a hundred times, 1.8 million rows."""
    import tracemalloc

    peaks = []
    for times in (10, 40):
        records = [{"question": f"{'Why? ' * 200}{n}", "answer": "1"} for n in range(50)] * times
        with (tmp_path / "p.jsonl").open("w") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)
        del records
        tracemalloc.start()
        assert len(read_problem_file(DataConfig(source=str(tmp_path / "p.jsonl")))[0]) == 50
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]


def test_another_file_to_evaluate_on(tmp_path):
    train, test = tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    train.write_text("".join(json.dumps({"question": f"q{n}", "answer": "1"}) + "\n" for n in range(5)))
    test.write_text("".join(json.dumps({"question": f"q{n}", "answer": "1"}) + "\n" for n in (3, 7)))
    source = load_problems(DataConfig(source=str(train), evaluation_source=str(test)))
    assert {source.train(position, 0).question for position in range(12)} == {"q0", "q1", "q2", "q4"}
    assert {problem.question for problem in source.heldout(2, 0)} == {"q3", "q7"}
    assert len(source.fixed_problems()) == 6 and "1 problems of data.evaluation_source are not trained on" in source.notes[0]
    with pytest.raises(DataError, match="evaluate.problems=3 but only 2"):
        source.heldout(3, 0)
    with pytest.raises(ConfigError, match="data.evaluation_source goes with a file"):
        load_problems(DataConfig(evaluation_source=str(test)))


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_few_problems_are_enough_without_a_held_out_part(tmp_path, count):
    problems = read(tmp_path, [{"question": f"q{n}", "answer": "1"} for n in range(count)])[0]
    source = FileProblems(problems, 0.0, "few")
    assert len({source.train(position, 0).id for position in range(count)}) == count and source.heldout(0, 0) == []
    with pytest.raises(DataError, match="only 0 problems are held out; ask for fewer .0: no evaluation., raise"):
        source.heldout(1, 0)


def test_nothing_is_held_out_of_a_generated_world_at_a_share_of_0():
    for source in (load_problems(DataConfig(heldout_fraction=0.0)), Requests(0.0)):
        assert source.train(0, 0).question and source.heldout(0, 0) == []
        with pytest.raises(DataError, match="data.heldout_fraction=0 holds out no problem"):
            source.heldout(1, 0)


@pytest.mark.parametrize("source", ["tally", "requests"])
@pytest.mark.parametrize(("fraction", "part"), [(0.00004, "to hold out"), (0.99996, "to train on")])
def test_a_part_of_a_generated_world_that_is_empty_does_not_wait_for_a_problem(monkeypatch, source, fraction, part):
    """Shares come in steps of 0.0001."""
    for module in (arithmetic, requests):
        monkeypatch.setattr(module, "MOST_DRAWS", 2000)
    problems = load_problems(DataConfig(heldout_fraction=fraction)) if source == "tally" else Requests(fraction)
    with pytest.raises(DataError, match=rf"data.heldout_fraction={fraction} leaves no generated problem {part}: choose"):
        problems.heldout(1, 0) if "hold" in part else problems.train(0, 0)
    assert problems.train(0, 0) if "hold" in part else problems.heldout(1, 0)


def test_more_generated_problems_than_are_held_out_are_refused():
    most = arithmetic.count_heldout(0.01)
    source = load_problems(DataConfig(heldout_fraction=0.01))
    with pytest.raises(DataError, match=f"evaluate.problems={most + 1} but .*=0.01 holds out only {most} generated problems: ask"):
        source.heldout(most + 1, 0)
    assert most > 100 and len({p.id for p in source.heldout(100, 0)}) == 100


@pytest.mark.parametrize("fraction", [0.0, 0.5, 0.9999])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_few_problems_and_a_held_out_share_train_or_say_why_not(count, fraction):
    problems = numbered(count)
    held = [problem for problem in problems if is_heldout(problem.question, fraction)]
    if len(held) == count:
        with pytest.raises(DataError, match=f"no training problem is left of {count} with data.heldout_fraction={fraction}"):
            FileProblems(problems, fraction, "few")
        return
    source = FileProblems(problems, fraction, "few")
    epoch = count - len(held)
    asked = [source.train(position, 0).id for position in range(3 * epoch)]
    assert all(asked.count(id) == 3 for id in asked)
    assert len(source.heldout(len(held), 0)) == len(held)
    with pytest.raises(DataError, match=f"but only {len(held)} problems are held out"):
        source.heldout(len(held) + 1, 0)


def test_what_is_selected_keeps_its_order_and_says_how_many_are_left_out():
    source = FileProblems(numbered(100), 0.2, "numbers")
    few = source.select(lambda problem: len(problem.answer) == 1, "long")
    assert source.select(lambda problem: True, "long") is source
    assert [p.id for p in few.fixed_problems()] == [p.id for p in source.fixed_problems() if len(p.answer) == 1]
    assert {p.id for p in few.heldout(len(few.fixed_problems()) - len({few.train(n, 0).id for n in range(50)}), 0)} <= {
        p.id for p in source.heldout(sum(is_heldout(p.question, 0.2) for p in numbered(100)), 0)
    }
    assert few.notes == ("numbers: 91 problems are long, and are left out",)
    with pytest.raises(DataError, match="no training problem is left: 100 are long"):
        source.select(lambda problem: False, "long")
