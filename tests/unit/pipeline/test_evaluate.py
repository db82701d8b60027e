"""`megatron-r1 evaluate` over benchmarks, end to end, with a served model that a test plays."""

from __future__ import annotations

import csv
import json
import re
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_r1 import cli
from megatron_r1.config.load import load_config
from megatron_r1.data.tally.tokenizer import train_tally_tokenizer
from megatron_r1.evaluation.benchmarks import BENCHMARKS
from megatron_r1.evaluation.sample_ledger import settings_path
from megatron_r1.model.presets import PRESETS
from megatron_r1.pipeline import evaluate as benchmarks
from megatron_r1.runtime import distributed
from megatron_r1.types import Rollout, RolloutGroup
from megatron_r1.weights.hf import HfFolder
from tests.chat_server import ChatServer, Reply, completion
from tests.paths import ROOT
from tests.random_weights import write_random_model

EXAMPLES = ROOT / "examples/evaluate"


@pytest.fixture(autouse=True)
def no_process_group(monkeypatch):
    """As in a fresh process, whatever ran before in this one."""
    monkeypatch.setattr(distributed, "_STORE", None)


@pytest.fixture
def files(tmp_path):
    """Small copies of three benchmarks in their published layouts."""
    gsm8k = [{"question": f"What is {n}+{n}?", "answer": f"Twice.\n#### {2 * n}"} for n in range(1, 5)]
    (tmp_path / "gsm8k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in gsm8k))
    with (tmp_path / "gpqa_diamond.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["Record ID", "Question", "Correct Answer", *(f"Incorrect Answer {n}" for n in (1, 2, 3))])
        table.writerows([f"rec{n}", f"Question {n}?", "right", "wrong", "worse", "worst"] for n in range(3))
    check = "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(-1) == 1\n"
    humaneval = {"task_id": "HumanEval/0", "prompt": "def square(x):\n", "test": check, "entry_point": "square"}
    (tmp_path / "humaneval.jsonl").write_text(json.dumps(humaneval) + "\n")
    return tmp_path


def answer(body: dict[str, Any], _: int) -> Any:
    """Right in mathematics but for 3+3 (a tie of 6 and 7 over two seeds), always right in choices, a program that works."""
    question = body["messages"][0]["content"]
    if "def square" in question:
        return "<think>x</think>\n```python\ndef square(x):\n    return x * x\n```"
    if "multiple choice" in question:
        return f"ANSWER: {re.search(r'([A-D])[)] right', question)[1]}"
    number = int(re.search(r"What is (\d+)", question)[1])
    if number == 4:
        return completion("8 8 8", finish_reason="length")
    return f"<think>\\boxed{{1}}</think>It is \\boxed{{{2 * number + (number == 3 and body['temperature'] > 0)}}}."


def run(folder: Path, server: ChatServer, *arguments: str) -> int:
    names = ("gsm8k", "gpqa_diamond", "humaneval")
    [gsm8k, gpqa, humaneval] = [f"evaluate.benchmarks.files.{name}={next(folder.glob(name + '.*'))}" for name in names]
    samples = [f"evaluate.benchmarks.samples.{name}=2" for name in names]
    endpoint = [f"evaluate.benchmarks.endpoint.url={server.url}", "evaluate.benchmarks.endpoint.model=stub"]
    endpoint += ["evaluate.benchmarks.endpoint.retries=0", "evaluate.benchmarks.endpoint.concurrency=2"]
    settings = [
        f"run_dir={folder / 'run'}",
        "reward.workers=1",
        "evaluate.benchmarks.resamples=100",
        "evaluate.benchmarks.name=R1-Zero",
    ]
    return cli.main(["evaluate", *settings, gsm8k, gpqa, humaneval, *samples, *endpoint, *arguments])


@pytest.mark.slow
def test_benchmarks_are_measured_resumed_and_judged_again(files, capsys):
    greedy = "evaluate.benchmarks.greedy=true"
    with ChatServer(lambda body, number: Reply(503, b"") if number >= 5 else answer(body, number)) as server:
        assert run(files, server, greedy) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert "HTTP 503 (1 attempts)); 5 of 8 responses are kept in" in error or "5 of 6 responses are kept in" in error
        assert not (files / "run/results.json").exists()
        assert run(files, server, "--rescore", greedy) == 2
        assert re.search(r"responses.jsonl lacks \d responses; run the same command without --rescore", capsys.readouterr().err)
    with ChatServer(answer) as server:
        assert run(files, server, greedy) == 0
        assert len(server.requests) == 3 * (4 + 3 + 1) - 5
        table = capsys.readouterr().out
        results = json.loads((files / "run/results.json").read_text())
        assert run(files, server, greedy) == 0
        assert len(server.requests) == 3 * (4 + 3 + 1) - 5 and json.loads((files / "run/results.json").read_text()) == results
        assert run(files, server, "evaluate.benchmarks.temperature=1.0") == 2
        assert "was begun with temperature=0.6, now it is 1.0" in capsys.readouterr().err
    measured = results["benchmarks"]
    assert list(measured) == ["gpqa_diamond", "gsm8k", "humaneval"] and results["name"] == "R1-Zero"
    assert measured["gsm8k"]["pass_at_1"]["value"] == 0.5 and measured["gsm8k"]["greedy"]["value"] == 0.75
    assert measured["gsm8k"]["cut"] == 0.25 and measured["gsm8k"]["notes"] == ["4 problems, published with 1319"]
    assert measured["gpqa_diamond"]["cons"]["value"] == 1.0 and measured["humaneval"]["pass_at_1"]["value"] == 1.0
    assert measured["humaneval"]["cons"] is None and "| HumanEval    | 1 " in table

    scores = files / "run/gsm8k/scores.jsonl"
    scores.write_text(scores.read_text().replace('"wrong"', '"correct"').replace('"score": 0.0', '"score": 1.0'))
    with ChatServer(answer) as server:
        assert run(files, server, greedy) == 0
        assert json.loads((files / "run/results.json").read_text())["benchmarks"]["gsm8k"]["pass_at_1"]["value"] == 1.0
        assert run(files, server, "--rescore", greedy) == 0
        assert json.loads((files / "run/results.json").read_text())["benchmarks"] == measured and not server.requests
    gsm8k = (files / "gsm8k.jsonl").read_text()
    (files / "gsm8k.jsonl").write_text(gsm8k.replace("#### 6", "#### 7"))  # the copy had a mistake
    with ChatServer(answer) as server:
        assert run(files, server, "--rescore", greedy) == 0 and not server.requests
    corrected = json.loads((files / "run/results.json").read_text())["benchmarks"]["gsm8k"]
    assert corrected["pass_at_1"]["value"] == 0.75 and corrected["greedy"]["value"] == 0.5
    capsys.readouterr()
    assert cli.main(["evaluate", "--table", str(files / "run"), f"mine={files / 'run'}"]) == 0
    tables = capsys.readouterr().out
    assert re.search(
        r"\| GPQA Diamond +\| published, R1 v2 Table 3 +\| 75.8 .*\n\| +\| \*\*measured\*\* +\| \*\*100.0\*\* \[100.0, 100.0\] +\|",
        tables,
    )
    assert re.search(r"\| mine +\| \*\*measured\*\*", tables)


class FakeEngine:
    """In place of vLLM: keeps what it is given and answers what the template of R1 makes of it."""

    def __init__(self) -> None:
        self.weights, self.prompts = {}, []

    def load_weights(self, weights, version):
        self.weights = list(weights.names())

    def generate(self, prompts, sampling, seed, on_group):
        self.prompts += prompts
        for prompt in prompts:
            right = 2 * int(re.search(r"is (\d+)", prompt.question)[1])
            texts = [f"Hm.\n</think>\n\n\\boxed{{{right + (sample == 1)}}}" for sample in range(sampling.n)]
            on_group(RolloutGroup(prompt, [Rollout([5, 6], [0.0, 0.0], text, True) for text in texts], 0))


def test_a_model_folder_is_loaded_and_asked_in_its_template(files, capsys, monkeypatch):
    arch, engine, asked = PRESETS["tiny"], FakeEngine(), []
    model = write_random_model(files / "model", arch)
    train_tally_tokenizer(arch.vocab_size, "r1_chat", 0.1).save(model)

    @contextmanager
    def open_engine(config, *_):
        asked.append((config.rollout.max_response_tokens, config.data.max_prompt_tokens))
        yield engine

    monkeypatch.setattr(benchmarks, "open_engine", open_engine)
    run_dir, tokens = f"run_dir={files / 'run'}", "evaluate.benchmarks.max_tokens"
    settings = [f"model.weights={model}", "runtime.device=cpu", "data.template=r1_chat_think", run_dir, "reward.workers=1"]
    settings += [f"evaluate.benchmarks.files.gsm8k={files / 'gsm8k.jsonl'}", "evaluate.benchmarks.samples.gsm8k=2"]
    assert cli.main(["evaluate", *settings]) == 2 and not asked
    assert "more than the model's 1024 positions; lower max_tokens" in capsys.readouterr().err
    distributed._STORE = None
    assert cli.main(["evaluate", *settings, f"{tokens}=64"]) == 0
    assert set(engine.weights) == set(HfFolder(model).files)
    assert asked == [(64, max(len(prompt.token_ids) for prompt in engine.prompts))]
    question = "What is 1+1?\nPlease reason step by step, and put your final answer within \\boxed{}."
    assert engine.prompts[0].text == f"<bos><｜User｜>{question}<｜Assistant｜><think>\n"
    first = json.loads((files / "run/gsm8k/responses.jsonl").read_text().splitlines()[0])
    assert first == {"problem": "1", "sample": 0, "response": "<think>\nHm.\n</think>\n\n\\boxed{2}", "finished": True, "tokens": 2}
    result = json.loads((files / "run/results.json").read_text())
    assert result["benchmarks"]["gsm8k"]["pass_at_1"]["value"] == 0.5 and result["name"] == "model"
    kept = json.loads(settings_path(files / "run/gsm8k/responses.jsonl").read_text())
    assert not {"system_prompt", "stop"} & kept.keys(), "what was sampled before these settings were there goes on"
    distributed._STORE = None
    assert cli.main(["evaluate", *settings, f"{tokens}=64", "data.system_prompt=Hm"]) == 2
    assert "was begun with system_prompt=None, now it is Hm" in capsys.readouterr().err
    other = load_config(None, ["data.question_suffix=' Go.'", 'rollout.stop=["x"]', "data.template_arguments.a=1"])
    asked_with = {"template_arguments": {"a": 1}, "question_suffix": " Go.", "stop": ["x"]}
    assert benchmarks._asked_with(other) == asked_with and benchmarks._asked_with(load_config(None)) == {}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--rescore"], "--rescore needs evaluate.benchmarks.files"),
        (["--table", "nowhere"], "nowhere/results.json: no such file"),
        (["evaluate.benchmarks.files.gsm8k=none.jsonl"], "none.jsonl: no such file"),
        (["evaluate.benchmarks.files.gsm=none.jsonl"], "'gsm' is no benchmark; choose of aime2024"),
        (["evaluate.benchmarks.files.gsm8k={gsm8k}", "run_dir={run}"],
         "set either model.weights or evaluate.benchmarks.endpoint.url"),
        (["evaluate.benchmarks.files.gsm8k={gsm8k}", "run_dir={run}", "model.weights=nowhere"],
         "model folder nowhere does not exist"),
    ],
)  # fmt: skip
def test_what_is_missing_is_one_line(files, capsys, arguments, says):
    filled = [text.format(gsm8k=files / "gsm8k.jsonl", run=files / "run") for text in arguments]
    assert cli.main(["evaluate", *filled]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.name)
def test_examples_load_and_are_the_recipe_s(path):
    settings = load_config(path).evaluate.benchmarks
    assert (settings.temperature, settings.top_p, settings.max_tokens, settings.problems) == (0.6, 0.95, 32768, None)
    assert settings.samples == {} and set(settings.files) <= set(BENCHMARKS)
    assert set(yaml.safe_load(path.read_text())["evaluate"]) == {"benchmarks"}
