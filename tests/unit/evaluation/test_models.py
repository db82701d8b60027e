"""Responses to benchmarks: kept as they come, whole, once, whatever kills the process; from an engine or an endpoint."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_r1.config.endpoint import EndpointConfig
from megatron_r1.data.chat.wording import Wording
from megatron_r1.errors import ConfigError, RolloutError
from megatron_r1.evaluation.benchmark_problems import BenchmarkProblem
from megatron_r1.evaluation.models import EndpointModel, EngineModel, Pass
from megatron_r1.evaluation.sample_ledger import open_samples
from megatron_r1.types import Prompt, Rollout, RolloutGroup, Sampling
from tests.chat_server import ChatServer, Reply, completion
from tests.patience import patient

PROBLEMS = [BenchmarkProblem(f"p{n}", f"question {n}", "1") for n in range(10)]
SAMPLING = Sampling(3, 0.6, 0.95, 100)


class SeededEngine:
    """Answers depend on the seed and on everything that is asked together, as an engine's do; groups come in any order."""

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, seed: int, on_group: Callable[[RolloutGroup], None]
    ) -> list[RolloutGroup]:
        """See `Engine`."""
        for index in reversed(range(len(prompts))):
            texts = [f"{prompts[index].question} {seed} {len(prompts)} {index} {g}" for g in range(sampling.responses)]
            on_group(RolloutGroup(prompts[index], [Rollout([1, 2], [0.0, 0.0], text, True) for text in texts], 0))
        return []


def make_prompt(problem: BenchmarkProblem) -> Prompt:
    return Prompt(problem.id, problem.question, "", f"{problem.question}<think>", (1,))


def sample(path: Path, tell: Callable[[int], object] = lambda count: None) -> list[str]:
    with open_samples(path, {"k": 3}) as kept:
        EngineModel(SeededEngine(), make_prompt, 9).sample(PROBLEMS, Pass(SAMPLING, "seed", kept, tell))
    return path.read_text().splitlines()


def test_an_engine_is_asked_for_every_response_once(tmp_path):
    told: list[int] = []
    lines = [json.loads(line) for line in sample(tmp_path / "a.jsonl", told.append)]
    assert sum(told) == len(lines) == 30 == len({(line["problem"], line["sample"]) for line in lines})
    assert lines[0]["response"].startswith("<think>\nquestion 2 ") and lines[0]["tokens"] == 2 and lines[0]["finished"]
    assert len({line["response"].split()[3] for line in lines}) == 4, "a seed for each call"
    told.clear()
    assert len(sample(tmp_path / "a.jsonl", told.append)) == 30 and not told


def test_an_engine_that_dies_says_what_is_kept(tmp_path):
    class Dying(SeededEngine):
        def generate(self, prompts: Sequence[Prompt], *rest: Any) -> list[RolloutGroup]:
            if prompts[0].id == "p3":
                raise RolloutError("the rollout engine died in generate")
            return super().generate(prompts, *rest)

    with (
        open_samples(tmp_path / "a.jsonl", {}) as kept,
        pytest.raises(RolloutError, match="died in generate; 9 of 30 responses are kept"),
    ):
        EngineModel(Dying(), make_prompt, 9).sample(PROBLEMS, Pass(SAMPLING, "seed", kept, lambda count: None))


@pytest.mark.parametrize("stop", [1, 4, 8])
def test_a_killed_evaluation_ends_as_one_that_was_not_killed(tmp_path, stop):
    """SIGKILL as soon as so many groups are kept, three times; each time half a line is left, too."""
    path = tmp_path / "killed.jsonl"

    def run_and_die() -> None:
        calls = iter(range(stop))

        def die(_: int) -> None:
            if next(calls, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)

        sample(path, die)

    for attempt in range(3):
        child = multiprocessing.get_context("fork").Process(target=run_and_die)
        child.start()
        child.join()
        assert attempt or child.exitcode == -signal.SIGKILL
        with path.open("ab") as file:
            file.write(b'{"problem": "p9", "sample": 0, "resp')
    assert sorted(sample(path)) == sorted(sample(tmp_path / "whole.jsonl"))


GREEDY = Sampling(1, 0.0, 1.0, 100)


class NotedEngine(SeededEngine):
    """Notes what is asked in one call, and may end in the middle of one."""

    def __init__(self, groups: int = 1000) -> None:
        self.calls: list[tuple[list[str], int, int]] = []
        self._left = groups

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, seed: int, on_group: Callable[[RolloutGroup], None]
    ) -> list[RolloutGroup]:
        """See `Engine`."""
        self.calls.append(([prompt.id for prompt in prompts], sampling.n, sampling.greedy))

        def pass_on(group: RolloutGroup) -> None:
            self._left -= 1
            if self._left < 0:
                raise RolloutError("the rollout engine died in generate")
            on_group(group)

        return super().generate(prompts, sampling, seed, pass_on)


def sample_both(
    folder: Path, engine: NotedEngine, told: dict[str, int] | None = None, *, greedy: bool = True
) -> dict[str, list[str]]:
    told = {} if told is None else told

    def tell(name: str) -> Callable[[int], object]:
        return lambda count: told.update({name: told.get(name, 0) + count})

    with open_samples(folder / "a.jsonl", {}) as kept, open_samples(folder / "g.jsonl", {}) as kept_greedy:
        asked = Pass(SAMPLING, "seed", kept, tell("sampled")), Pass(GREEDY, "seed greedy_", kept_greedy, tell("greedy"))
        EngineModel(engine, make_prompt, 9).sample(PROBLEMS, *asked[: 1 + greedy])
    return {name: sorted((folder / f"{name}.jsonl").read_text().splitlines()) for name in ("a", "g")}


def test_greedy_responses_share_the_calls_of_the_samples(tmp_path):
    engine, told = NotedEngine(), {}
    lines = sample_both(tmp_path, engine, told)
    assert [(len(ids), n, greedy) for ids, n, greedy in engine.calls] == [(3, 3, 1)] * 3 + [(1, 3, 1)]
    assert told == {"sampled": 30, "greedy": 10} and (len(lines["a"]), len(lines["g"])) == (30, 10)
    texts = {json.loads(line)["problem"]: json.loads(line) for line in lines["g"]}
    assert all(line["sample"] == 0 and line["response"].endswith(" 3") for line in texts.values()), "the one behind the samples"
    assert not any(json.loads(line)["response"].endswith(" 3") for line in lines["a"])
    assert sample_both(tmp_path, engine) == lines and len(engine.calls) == 4, "nothing is asked again"


@pytest.mark.parametrize("groups", [0, 1, 3, 7, 9])
def test_shared_calls_that_end_early_are_made_again_with_the_same_responses(tmp_path, groups):
    with pytest.raises(RolloutError, match=f"{3 * groups} of 30 responses are kept"):
        sample_both(tmp_path / "ended", NotedEngine(groups))
    path = tmp_path / "ended" / "a.jsonl"
    if groups == 1:  # killed between the two files: the greedy response is there, the samples are not
        path.write_text("")
    assert sample_both(tmp_path / "ended", NotedEngine()) == sample_both(tmp_path / "whole", NotedEngine())


def test_greedy_responses_asked_for_later_leave_the_samples_alone(tmp_path):
    """As a run folder of before, or `greedy` set after a first evaluation."""
    engine = NotedEngine()
    before = sample_both(tmp_path, engine, greedy=False)
    assert [greedy for _, _, greedy in engine.calls] == [0] * 4 and not before["g"]
    engine.calls.clear()
    after = sample_both(tmp_path, engine)
    assert after["a"] == before["a"] and len(after["g"]) == 10
    assert [(len(ids), n, greedy) for ids, n, greedy in engine.calls] == [(9, 1, 0), (1, 1, 0)]


def endpoint(server: ChatServer, **settings: Any) -> EndpointModel:
    config = EndpointConfig(url=server.url, model="m", retries=1, **{"timeout_seconds": patient(5.0), "concurrency": 4} | settings)
    return EndpointModel(config, pause=lambda seconds: None)


def ask(server: ChatServer, path: Path, **settings: Any) -> list[dict[str, Any]]:
    with endpoint(server, **settings) as model, open_samples(path, {}) as kept:
        model.sample(PROBLEMS, Pass(SAMPLING, "seed", kept, lambda count: None))
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_an_endpoint_gets_one_request_a_response(tmp_path):
    gate = threading.Barrier(4)

    def respond(body: dict[str, Any], number: int) -> Any:
        if number < 4:
            gate.wait(patient(5))  # four at a time
        if body["messages"][0]["content"] == "question 9":
            return completion("half", finish_reason="length")
        return f"{body['messages'][0]['content']} {body['seed']}"

    with ChatServer(respond) as server:
        lines = ask(server, tmp_path / "a.jsonl")
        assert server.most_at_once == 4 and len(server.requests) == 30 == len({request["seed"] for request in server.requests})
        request = {name: server.requests[0][name] for name in ("model", "temperature", "top_p", "max_tokens", "path")}
        assert request == {"model": "m", "temperature": 0.6, "top_p": 0.95, "max_tokens": 100, "path": "/v1/chat/completions"}
        assert len(ask(server, tmp_path / "a.jsonl")) == 30 == len(server.requests), "nothing is asked again"
    cut = [line for line in lines if not line["finished"]]
    assert [line["response"] for line in cut] == ["half"] * 3 and {line["tokens"] for line in lines} == {10}


def test_an_endpoint_gets_greedy_requests_with_the_others(tmp_path):
    with (
        ChatServer(lambda body, number: "x") as server,
        open_samples(tmp_path / "a.jsonl", {}) as kept,
        open_samples(tmp_path / "g.jsonl", {}) as kept_greedy,
        endpoint(server) as model,
    ):
        passes = [Pass(SAMPLING, "seed", kept, lambda _: None), Pass(GREEDY, "seed greedy_", kept_greedy, lambda _: None)]
        for _ in range(2):
            model.sample(PROBLEMS, *passes)
    temperatures = [request["temperature"] for request in server.requests]
    assert (temperatures.count(0.6), temperatures.count(0.0)) == (30, 10) == (len(kept.records), len(kept_greedy.records))


def test_an_endpoint_is_asked_in_the_words_of_the_settings(tmp_path):
    more = {"stop": ["END"], "chat_template_kwargs": {"enable_thinking": False}}
    config = EndpointConfig(url="", model="m", retries=0, timeout_seconds=patient(5.0), concurrency=1)
    with ChatServer(lambda body, number: "x") as server, open_samples(tmp_path / "a.jsonl", {}) as kept:
        served = config.model_copy(update={"url": server.url})
        with EndpointModel(served, Wording("Be brief.", "Now: ", " Go."), more) as model:
            model.sample(PROBLEMS[:1], Pass(replace(SAMPLING, n=1), "seed", kept, lambda count: None))
    (request,) = server.requests
    assert request["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Now: question 0 Go."},
    ]
    assert {name: request[name] for name in more} == more


def test_reasoning_given_apart_goes_back_into_its_tags(tmp_path):
    def respond(body: dict[str, Any], number: int) -> Reply:
        cut = number == 0
        message = {"role": "assistant", "content": None if cut else "A.", "reasoning_content": "Hm."}
        choice = {"index": 0, "message": message, "finish_reason": "length" if cut else "stop"}
        return Reply(200, json.dumps({"choices": [choice]}).encode())

    with ChatServer(respond) as server:
        lines = ask(server, tmp_path / "a.jsonl", concurrency=1)
    assert (lines[0]["response"], lines[0]["finished"], lines[0]["tokens"]) == ("<think>\nHm.", False, None)
    assert lines[1]["response"] == "<think>\nHm.\n</think>\n\nA." and lines[1]["finished"]


@pytest.mark.parametrize(
    ("dies", "says"),
    [
        (Reply(500, b""), "HTTP 500 \\(2 attempts\\)"),
        (Reply(400, b"too long"), "HTTP 400: b'too long'"),
        (Reply(401, b""), "refuses \\(HTTP 401\\): check evaluate.benchmarks.endpoint.url, model and api_key_file"),
        (Reply(200, b"<html>"), "no chat completion"),
    ],
)
def test_an_endpoint_that_dies_loses_nothing(tmp_path, dies, says):
    path = tmp_path / "a.jsonl"
    with ChatServer(lambda body, number: dies if number >= 13 else "fine") as server:
        with pytest.raises(
            RolloutError, match=rf"{says}.*13 of 30 responses are kept in .*a.jsonl, and the same command goes on"
        ) as caught:
            ask(server, path)
        assert "\n" not in str(caught.value) and len(path.read_text().splitlines()) == 13
        assert len(server.requests) <= 13 + 2 * 4, "no new request after the first that failed"
    with ChatServer(lambda body, number: "back") as server:
        assert len(ask(server, path)) == 30 and len(server.requests) == 17


def test_an_endpoint_that_is_gone_is_named(tmp_path):
    with ChatServer(lambda *_: "fine") as server:
        pass
    with pytest.raises(RolloutError, match="cannot be reached: ConnectError .2 attempts.*0 of 30"):
        ask(server, tmp_path / "a.jsonl")


@pytest.mark.parametrize("settings", [{"url": "localhost:8000", "model": "m"}, {"url": "http://localhost:1", "model": None}])
def test_an_endpoint_needs_url_and_model(settings):
    with pytest.raises(ConfigError, match="url begins with http:// or https://, and model names"):
        EndpointModel(EndpointConfig(**settings))
