"""`megatron-r1 score`: what it adds, what it refuses, and that its output is whole or not there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_r1 import cli
from megatron_r1.config.load import load_config
from megatron_r1.data.tokenizer import train_tokenizer
from megatron_r1.pipeline import score
from megatron_r1.pipeline.score import read_lines, score_file
from megatron_r1.rewards.scorers import ScorerSpec
from tests.odd_scorer import OddScorer
from tests.patience import patient

RIGHT, WRONG = "<think>a</think><answer>8</answer>", "<think>a</think><answer>7</answer>"


def write(folder: Path, *lines: str | dict) -> Path:
    path = folder / "in.jsonl"
    texts = (line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_bytes("\n".join(texts).encode("utf-8", "surrogateescape"))
    return path


def run(folder: Path, reward: str, *arguments: str) -> tuple[int, list[dict]]:
    out = folder / "out.jsonl"
    code = cli.main(["score", "--reward", reward, "--input", str(folder / "in.jsonl"), "--output", str(out), *arguments])
    return code, [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []


@pytest.fixture
def odd(monkeypatch):
    """The scorer that does what the response says, in place of the math scorer."""
    specs = {"math": ScorerSpec(f"{OddScorer.__module__}:{OddScorer.__name__}", patient(2.0))}
    monkeypatch.setattr(score, "scorer_specs", lambda *_: specs)


def test_scores_are_added_to_the_lines(tmp_path, capsys):
    write(
        tmp_path,
        {"id": "一", "response": RIGHT, "answer": "8.0"},
        "",
        {"response": WRONG, "answer": 8},
        {"response": "\ud800", "answer": "8"},
    )
    code, lines = run(tmp_path, "math", "--workers", "1")
    assert code == 0 and capsys.readouterr().out == f"{tmp_path / 'out.jsonl'}: 2 wrong, 1 correct\n"
    assert lines[0] == {"id": "一", "response": RIGHT, "answer": "8.0", "score": 1.0, "outcome": "correct", "detail": ""}
    assert [(line["score"], line["outcome"]) for line in lines[1:]] == [(0.0, "wrong")] * 2
    assert lines[2]["response"] == "\ud800" and lines[1]["detail"] == "an answer is not the reference"


def test_settings_of_the_reward_can_be_given(tmp_path):
    write(tmp_path, {"response": "\\boxed{50\\%}", "answer": "0.5"})
    assert (
        run(tmp_path, "math", "reward.answer_location=boxed", "--workers", "1", "reward.math.percent=hundredth")[1][0]["score"]
        == 1.0
    )
    assert run(tmp_path, "format", "--workers", "1")[1][0]["score"] == 0.0


def test_responses_to_a_tokenizers_own_template_have_the_reasoning_that_its_prompts_open(tmp_path):
    jinja = "{{ messages[0].content }}{% if thinking %}<think>{% endif %}"  # as DeepSeek-V3.1's
    train_tokenizer(["one and one"], 300).with_chat_template(jinja).save(tmp_path / "tokenizer")
    write(tmp_path, {"response": "\\boxed{2}", "answer": "2"}, {"response": "3?</think>\n\\boxed{2}", "answer": "2"})
    own = ["data.template=tokenizer", f"data.tokenizer={tmp_path / 'tokenizer'}", "--workers", "1", "reward.answer_location=boxed"]
    thinking = "data.template_arguments.thinking=true"
    assert [line["score"] for line in run(tmp_path, "math", *own, thinking)[1]] == [0.0, 1.0]
    form = ["reward.format=custom", "reward.format_pattern='<think>.*</think>.*'"]
    assert [line["score"] for line in run(tmp_path, "format", *own, thinking, *form)[1]] == [0.0, 1.0]


@pytest.mark.slow
def test_outcomes_are_told_apart_and_lines_keep_their_order(tmp_path, odd):
    commands = ["echo 1", "sleep 3600", "echo 0", "segfault", *(f"echo {n / 200}" for n in range(1, 200))]
    path = write(tmp_path, *({"response": text, "answer": "x"} for text in commands))
    outputs = []
    for workers in (1, 2):
        counts = score_file(load_config(None, [f"reward.workers={workers}"]), "math", path, tmp_path / "out.jsonl", False)
        assert counts == {"correct": 200, "wrong": 1, "timeout": 1, "error": 1}
        outputs.append((tmp_path / "out.jsonl").read_text())
    lines = [json.loads(line) for line in outputs[0].splitlines()]
    assert [line["response"] for line in lines] == commands
    assert [line["outcome"] for line in lines[:4]] == ["correct", "timeout", "wrong", "error"] and lines[1]["score"] is None
    assert outputs[0] == outputs[1]


MALFORMED = ["{", "[1]", {"answer": "8"}, {"response": 8, "answer": "8"}, {"response": "x"}, {"response": "x", "answer": " "},
             {"response": "x", "answer": True}, '{"response": "\udcff", "answer": "8"}', "[" * 100_000]  # fmt: skip


@pytest.mark.parametrize("line", MALFORMED, ids=lambda line: str(line)[:30].encode("ascii", "replace").decode())
def test_a_malformed_line_is_named_before_anything_is_written(tmp_path, capsys, line):
    write(tmp_path, {"response": RIGHT, "answer": "8"}, line, {"response": RIGHT, "answer": "8"})
    assert run(tmp_path, "math") == (2, [])
    error = capsys.readouterr().err
    assert error.startswith(f"megatron-r1: error: {tmp_path / 'in.jsonl'}:2: ") and error.count("\n") == 1
    assert "pass --mark-unscorable" in error
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_malformed_lines_can_be_marked_instead(tmp_path):
    write(tmp_path, *MALFORMED, {"response": RIGHT, "answer": "8"}, "nonsense")
    code, lines = run(tmp_path, "math", "--mark-unscorable", "--workers", "1")
    assert code == 0 and len(lines) == len(MALFORMED) + 2
    assert [line["outcome"] for line in lines] == ["unscorable"] * len(MALFORMED) + ["correct", "unscorable"]
    assert lines[0]["detail"].startswith(f"{tmp_path / 'in.jsonl'}:1: bad JSON") and lines[2]["answer"] == "8"


@pytest.mark.parametrize(
    ("reward", "line", "field"), [("code", {"response": "x", "tests": []}, "tests"), ("language", {"response": "x"}, "language")]
)
def test_each_reward_names_the_field_it_needs(tmp_path, reward, line, field):
    (read,) = read_lines(write(tmp_path, line), reward)
    assert f"field '{field}' is missing" in read.problem


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--input", "none.jsonl"], "none.jsonl: cannot be read (No such file or directory)"),
        (["--output", "/nowhere/out.jsonl"], "/nowhere/out.jsonl: cannot be written (No such file or directory)"),
        (["--workers", "0"], "'reward.workers' on the command line is 0, expected greater than 0"),
        (["--reward", "taste"], "argument --reward: invalid choice: 'taste'"),
        (["--output", "in.jsonl"], "--output is the input file"),
        (["data.template=tokenizer"], "data.template=tokenizer: name its folder in data.tokenizer"),
        (["--reward", "format", "reward.format=none"], "reward.format=none leaves no format to reward"),
        (["reward.format=custom"], "reward.format=custom and reward.format_pattern go together"),
        (["reward.format=custom", "reward.format_pattern='(a'"], "is no regular expression of RE2: missing ): (a"),
    ],
)
def test_what_cannot_work_is_one_line(tmp_path, monkeypatch, capsys, arguments, says):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, {"response": RIGHT, "answer": "8"})
    try:
        code = run(tmp_path, "math", *arguments)[0]
    except SystemExit as end:
        code = end.code
    assert code == 2
    assert says in capsys.readouterr().err


def test_an_interrupted_run_leaves_no_output(tmp_path, monkeypatch, odd):
    path = write(tmp_path, {"response": "echo 1", "answer": "x"})
    monkeypatch.setattr(score, "_as_fields", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        score_file(load_config(None, ["reward.workers=1"]), "math", path, tmp_path / "out.jsonl", False)
    assert [file.name for file in tmp_path.iterdir()] == ["in.jsonl"]
