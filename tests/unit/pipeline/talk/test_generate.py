"""Prompts of files in any form, and responses that a kill does not change."""

from __future__ import annotations

import io
import json
from contextlib import contextmanager
from dataclasses import replace

import pytest

from megatron_r1.data.tokenizer import train_tokenizer
from megatron_r1.errors import ConfigError, DataError
from megatron_r1.model.presets import PRESETS
from megatron_r1.pipeline.talk import generate as module
from megatron_r1.pipeline.talk.generate import WantedResponses, generate
from megatron_r1.pipeline.talk.model import find_model
from megatron_r1.types import Rollout, RolloutGroup, Sampling
from tests.random_weights import write_random_model


class Engine:
    """Answers with the seed and the place in the call; `dies_at`: the call that fails."""

    def __init__(self, dies_at=None):
        self.calls, self.dies_at = [], dies_at

    def generate(self, prompts, sampling, seed, on_group=None):
        if len(self.calls) == self.dies_at:
            raise KeyboardInterrupt
        self.calls.append([prompt.question for prompt in prompts])
        groups = []
        for number, prompt in enumerate(prompts):
            texts = [f"{seed % 1000} {number} {g}\u202e" for g in range(sampling.n)]
            groups.append(RolloutGroup(prompt, [Rollout([7, 8], [-0.1, -0.25], text, number % 2 == 0) for text in texts], 0))
            on_group(groups[-1])
        return groups


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = write_random_model(tmp_path_factory.mktemp("generate") / "model", PRESETS["tiny"])
    train_tokenizer(["a few words"], 300).save(folder)
    return find_model(folder, None, ["runtime.device=cpu", "data.template=r1_chat"])


@pytest.fixture
def engine(monkeypatch):
    def use(engine):
        monkeypatch.setattr(module, "open_talk_engine", contextmanager(lambda model: (yield engine)))
        return engine

    return use


def wanted(source, target, samples=2, **changes):
    return replace(WantedResponses(str(source), str(target), Sampling(samples, 1.0, 1.0, 8), 3, 4, False), **changes)


PROMPTS = [{"question": f"q{number}", "answer": number, "id": f"r{number}"} for number in range(5)]


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_record_gets_its_samples_in_order(tmp_path, model, engine):
    used = engine(Engine())
    generate(model, wanted(write(tmp_path / "in.jsonl", PROMPTS), tmp_path / "out.jsonl", logprobs=True))
    lines = read(tmp_path / "out.jsonl")
    assert [(line["id"], line["sample"]) for line in lines] == [(f"r{number}", g) for number in range(5) for g in range(2)]
    assert used.calls == [["q0", "q1"], ["q2", "q3"], ["q4"]]
    assert lines[2] | {"response": ""} == {
        "prompt": "q1", "question": "q1", "answer": 1, "id": "r1", "response": "", "finish": "length", "tokens": 2, "sample": 0,
        "seed": 3, "token_ids": [7, 8], "logprobs": [-0.1, -0.25],
    }  # fmt: skip
    assert len({line["response"] for line in lines}) == 10 and lines[0]["finish"] == "stop"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl", "out.jsonl.made"]


def test_asked_again_a_finished_file_stays_as_it_is_and_another_one_is_refused(tmp_path, model, engine, capsys):
    used = engine(Engine())
    source, target = write(tmp_path / "in.jsonl", PROMPTS), tmp_path / "out.jsonl"
    generate(model, wanted(source, target))
    whole, calls = target.read_bytes(), len(used.calls)
    generate(model, wanted(source, target))
    assert f"{target} is finished" in capsys.readouterr().err
    (tmp_path / "out.jsonl.part").mkdir()  # as a kill between the last file and the end leaves it
    generate(model, wanted(source, target))
    assert not (tmp_path / "out.jsonl.part").exists()
    stopping = replace(model, config=model.config.model_copy(deep=True))
    stopping.config.rollout.stop.append("END")
    for asking, changes, named in ((model, {"seed": 4}, "seed=3 and not 4"), (stopping, {}, "stop=")):
        with pytest.raises(ConfigError, match=f"is there already, made with {named}"):
            generate(asking, wanted(source, target, **changes))
    with pytest.raises(ConfigError, match="is there already, made with input="):
        generate(model, wanted(write(tmp_path / "other.jsonl", PROMPTS[::-1]), target))
    assert target.read_bytes() == whole and len(used.calls) == calls
    made = (tmp_path / "out.jsonl.made").read_text()
    for text in ("", "[]", "{}", made):
        (tmp_path / "out.jsonl.made").write_text(text)
        target.write_text("somebody's own\n")
        with pytest.raises(ConfigError, match="is there already: remove it"):
            generate(model, wanted(source, target))
    (tmp_path / "out.jsonl.made").unlink()
    with pytest.raises(ConfigError, match="is there already: remove it"):
        generate(model, wanted(source, target))
    assert target.read_text() == "somebody's own\n" and len(used.calls) == calls


def test_a_killed_command_goes_on_to_the_same_file(tmp_path, model, engine):
    source = write(tmp_path / "in.jsonl", PROMPTS)
    engine(Engine())
    generate(model, wanted(source, tmp_path / "whole.jsonl"))
    engine(Engine(dies_at=1))
    with pytest.raises(KeyboardInterrupt):
        generate(model, wanted(source, tmp_path / "out.jsonl"))
    assert not (tmp_path / "out.jsonl").exists()
    for changed in ({"seed": 4}, {"batch": 6}, {"sampling": Sampling(2, 0.5, 1.0, 8)}, {"logprobs": True}):
        with pytest.raises(ConfigError, match="was begun with"):
            generate(model, wanted(source, tmp_path / "out.jsonl", **changed))
    with pytest.raises(ConfigError, match="was begun with input"):
        generate(model, wanted(write(tmp_path / "other.jsonl", PROMPTS[::-1]), tmp_path / "out.jsonl"))
    used = engine(Engine())
    generate(model, wanted(source, tmp_path / "out.jsonl"))
    assert used.calls == [["q2", "q3"], ["q4"]]
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_text_pipes_and_messages(tmp_path, model, engine, monkeypatch, capsys):
    used = engine(Engine())
    (tmp_path / "in.txt").write_text("one\n\n{two}\r\n")
    generate(model, wanted(tmp_path / "in.txt", "-", samples=1))
    assert [json.loads(line)["prompt"] for line in capsys.readouterr().out.splitlines()] == ["one", "{two}"]
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    generate(model, wanted(write(tmp_path / "in.jsonl", [{"messages": messages}, {"prompt": "d"}]), tmp_path / "out.jsonl"))
    assert used.calls[-1] == ["c", "d"] and read(tmp_path / "out.jsonl")[0]["messages"] == messages
    for text, asked in (("x\ny\n", ["x", "y"]), ('{"prompt": "z"}\n', ["z"])):
        monkeypatch.setattr(module, "open_unpacked", lambda path, text=text: io.BytesIO(text.encode()))
        monkeypatch.setattr(module, "read_once", lambda path: path)
        generate(model, wanted("-", "-", samples=1))
        assert used.calls[-1] == asked


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"question": "a"}\n{"question": }\n', ":2: "), ('{"question": "a"}\n{"other": "b"}\n', ":2: field 'question' is missing"),
        ('{"question": "a"}\n\n[1]\n', ":3: "), ('{"question": " "}\n', ":1: "), ("", "empty"),
        ('{"question": "a", "response": "b"}\n', ":1: the record has a field 'response'"),
        ('{"messages": [{"role": "assistant", "content": "b"}]}\n', ":1: .*does not end with a message of the user"),
        ('{"question": "' + "word " * 400 + '"}\n', ":1: the prompt has .* tokens"),
    ],
)  # fmt: skip
def test_a_bad_record_is_told_before_anything_is_sampled(tmp_path, model, engine, text, said):
    used = engine(Engine())
    (tmp_path / "in.jsonl").write_text(text)
    short = replace(model, context=300)
    with pytest.raises(DataError, match=said) as raised:
        generate(short, wanted(tmp_path / "in.jsonl", tmp_path / "out.jsonl"))
    assert str(tmp_path / "in.jsonl") in str(raised.value) and "\n" not in str(raised.value)
    assert not used.calls and sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl"]


@pytest.mark.parametrize("name", ["none.txt", "none.jsonl", "folder.txt"])
def test_a_file_that_cannot_be_read_is_named(tmp_path, model, engine, name):
    engine(Engine())
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(DataError, match=name):
        generate(model, wanted(tmp_path / name, tmp_path / "out.jsonl"))
