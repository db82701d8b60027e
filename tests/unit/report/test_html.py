"""The report stands alone, shows what was recorded, and escapes what a model wrote."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_r1.config.load import load_config
from megatron_r1.errors import DataError
from megatron_r1.report.html import write_report
from megatron_r1.report.plots import seconds_by_part, write_curves_png
from megatron_r1.runtime.run import Run
from megatron_r1.types import Prompt, Rollout, RolloutGroup

HOSTILE = "</pre><script>alert(1)</script> & <think>\u4e09</think>"


def record_grpo(folder: Path, steps: int = 12) -> None:
    with Run.open(folder, load_config(None, ["run_dir=<b>x</b>"]), "grpo") as run:
        run.record(0, {"eval/pass@1": 0.2, "eval/format": 0.4})
        for step in run.steps(steps, "grpo"):
            with run.timer("rollout"):
                prompt = Prompt(id="p", question="1 < 2?", answer="yes", text="", token_ids=(1,))
                text = HOSTILE if step == steps else f"response {step}"
                rollouts = [Rollout([1, 2], [0.0, 0.0], text, index % 2 == 0) for index in range(4)]
                rewards = torch.ones(4, dtype=torch.float64)
                run.save_rollouts(step, [RolloutGroup(prompt, rollouts, step - 1, rewards, {"accuracy": [1.0] * 4}, rewards)])
            metrics = {"reward/accuracy": step / steps, "reward/format": 0.5, "reward/mean": 1.0, "response_length/mean": 9.0}
            metrics |= {"kl/reference": 0.01, "logprob_diff/mean": 1e-6, "logprob_diff/max": 1e-5, "grad_norm": 0.3}
            run.record(step, metrics | ({"eval/pass@1": 0.8, "eval/format": 0.9} if step == steps else {}))


class Tags(HTMLParser):
    """Which elements a browser would make, and with which attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.attributes += attrs


def read(path: Path) -> tuple[str, Tags]:
    text, tags = path.read_text(), Tags()
    tags.feed(text)
    return text, tags


def data_of(text: str) -> dict[str, Any]:
    """What the page's script reads."""
    return json.loads(re.findall(r'<script type="application/json" id="rollouts">(.*?)</script>', text, re.DOTALL)[0])


MARKUP = "</title><script>alert(1)</script><img src=x onerror='alert(1)'>\"&"


def test_no_field_becomes_markup(tmp_path):
    """Whoever wrote the files of a run writes no element of the page."""
    folder = tmp_path / MARKUP.replace("/", "_")
    record_grpo(folder, steps=2)
    for path in (folder / "rollouts").glob("step_*.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        hostile = {name: MARKUP for name in ("step", "question", "answer", "response", "length", "finished", "prompt_id")}
        path.write_text("".join(json.dumps(line | hostile | {"reward_parts": {MARKUP: 1.0}}) + "\n" for line in lines))
    made = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(made | {"command": MARKUP}))
    (folder / "config.yaml").write_text(MARKUP)
    metrics = [
        json.loads(line) | {f"seconds/{MARKUP} $\\frac{{": 1.0} for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    rows = [{"name": MARKUP, MARKUP: MARKUP, "list": [MARKUP, [MARKUP]], "object": {MARKUP: MARKUP}}]
    (folder / "summary.json").write_text(json.dumps({"rows": rows, "claims": [MARKUP, {MARKUP: 1}, None]}))
    text, tags = read(write_report(folder))
    assert text.count("<script") == tags.seen.count("script") == 2, "the page's data and its own script"
    assert "<img" not in text and "onerror" not in dict(tags.attributes)
    assert not {"img", "iframe", "a"} & set(tags.seen) and text.count("<title>") == 1


@pytest.mark.parametrize(
    "name, content",
    [
        ("run.json", "{"), ("run.json", "[]"), ("run.json", '{"command": 1, "started": "2026-01-01"}'), ("run.json", "[" * 99999),
        ("run.json", '{"command": "grpo", "started": "<b>"}'), ("run.json", '{"command": "grpo", "started": 5}'),
        ("metrics.jsonl", '{"step": 1, "loss": "x"}\n'), ("metrics.jsonl", '{"step": 1, "loss": [1]}\n'),
        ("metrics.jsonl", '{"step": 1, "loss": 1' + "0" * 400 + "}\n"), ("metrics.jsonl", "[" * 99999 + "\n"),
        ("config.yaml", None), ("summary.json", "[" * 99999), ("summary.json", '{"rows": [1]}'),
        ("summary.json", '{"rows": ["a"]}'), ("summary.json", '{"rows": [{}], "claims": 5}'), ("rollouts/step_000001.jsonl", "x\n"),
        ("rollouts/step_000001.jsonl", "{}\n"), ("rollouts/step_000001.jsonl", "[1]\n"),
        ("rollouts/step_000001.jsonl", '{"prompt_id": 1, "step": 1}\n'),
    ],
)  # fmt: skip
def test_a_broken_file_of_a_run_is_one_line(tmp_path, name, content):
    record_grpo(tmp_path / "run", steps=2)
    path = tmp_path / "run" / name
    if content is None:
        path.unlink()
    else:
        path.write_text(content)
    with pytest.raises(DataError) as caught:
        write_report(tmp_path / "run")
    assert "\n" not in str(caught.value) and name in str(caught.value)


def test_a_grpo_report_has_curves_table_and_samples(tmp_path):
    folder = tmp_path / "run"
    record_grpo(folder)
    rows = [{"name": "base", "pass_at_1": 0.234, "pass_at_8": None}, {"name": "R1-Zero <1>", "pass_at_1": 1.0, "ci": [0.5, 0.75]}]
    (folder / "summary.json").write_text(json.dumps({"rows": rows}))
    text, tags = read(write_report(folder))
    for title in ("Accuracy", "Format", "Reward", "Response length", "KL to the reference", "Log-prob difference", "Gradient norm"):
        assert title in text
    assert "Where the time goes" in text
    assert "Gate" not in text, "no panel without numbers"
    assert re.search(">1e.05<", text) and "mathdefault" not in text, "ticks of a logarithmic axis are numbers"
    assert "<td>base</td><td>23.4%</td><td>&ndash;</td><td>&ndash;</td>" in text
    assert "<td>R1-Zero &lt;1&gt;</td><td>100.0%</td><td>&ndash;</td><td>[50.0%, 75.0%]</td>" in text
    (shown,) = data_of(text)["runs"]
    assert [response["step"] for response in shown["responses"][::4]] == list(range(1, 13))
    assert shown["responses"][0]["question"] == "1 < 2?" and shown["responses"][0]["answer"] == "yes"
    assert shown["responses"][-1]["response"] == HOSTILE, "the response is shown as it was written"
    assert shown["note"].startswith("48 of 48 responses of 12 of 12 steps are in this page.")
    assert tags.seen.count("script") == 2


def test_a_report_stands_alone(tmp_path):
    record_grpo(tmp_path / "run", steps=2)
    text, tags = read(write_report(tmp_path / "run"))
    assert "svg" in tags.seen
    assert not {"link", "iframe", "img"} & set(tags.seen)
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    allowed = {name: value for tag in tags.attributes if (name := tag[0]) == "content" and "script-src" in (value := str(tag[1]))}
    assert "default-src 'none'" in allowed["content"] and f"script-src 'sha256-{digest}';" in allowed["content"]
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval|https?:", script)
    links = [value for name, value in tags.attributes if name in ("src", "href", "xlink:href")]
    assert all(link.startswith("#") for link in links), links


def test_a_pretrain_run_has_its_loss_and_no_samples(tmp_path):
    with Run.open(tmp_path / "base", load_config(None, []), "pretrain") as run:
        for step in run.steps(3, "pretraining"):
            run.record(step, {"loss": 6.0 / step, "grad_norm": 1.0})
    text, _ = read(write_report(tmp_path / "base"))
    assert ">Loss<" in text
    assert "<script" not in text and "script-src 'none'" in text
    assert "Accuracy" not in text


def test_a_pipeline_report_has_its_runs_in_the_order_in_which_they_started(tmp_path):
    with Run.open(tmp_path / "z_first", load_config(None, []), "pretrain") as run:
        run.record(1, {"loss": 1.0})
    record_grpo(tmp_path / "a_second", steps=2)
    with Run.open(tmp_path / "z_first", load_config(None, []), "pretrain"):
        pass  # a resumed run keeps its place
    text, _ = read(write_report(tmp_path))
    assert re.findall(r"<h2>(\w+): (\w+)", text) == [("z_first", "pretrain"), ("a_second", "grpo")]
    write_curves_png(tmp_path, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_what_no_timer_covered_is_shown_as_other():
    records = [
        {"step": 1, "seconds/rollout": 2.0, "seconds/train": 1.0, "seconds/step": 4.0},
        {"step": 2, "seconds/rollout": 2.0, "seconds/step": 1.5},
    ]
    assert seconds_by_part(records) == {"rollout": [2.0, 2.0], "train": [1.0, 0.0], "other": [1.0, 0.0]}
    assert seconds_by_part([{"step": 1, "seconds/step": 3.0}]) == {"other": [3.0]}


def test_folders_without_a_run_are_named(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(DataError, match=f"{folder} holds no run"):
            write_report(folder)
    Run.open(tmp_path / "new", load_config(None, []), "grpo").close()
    assert "Nothing is recorded yet" in write_report(tmp_path / "new").read_text()
    with pytest.raises(DataError, match="has no line yet"):
        write_curves_png(tmp_path / "new", tmp_path / "curves.png")
    (tmp_path / "new" / "summary.json").write_text("[]")
    with pytest.raises(DataError, match="summary.json does not hold"):
        write_report(tmp_path / "new")
