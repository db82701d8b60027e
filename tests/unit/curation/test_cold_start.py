"""Cold-start and non-reasoning data against a real HTTP server that stands in for a served model."""

from __future__ import annotations

import json
import threading
from concurrent.futures import Future
from pathlib import Path

import pytest

from megatron_r1.config.curation import CurationConfig, WriterConfig
from megatron_r1.curation.accept_samples import done
from megatron_r1.curation.ask_model import ServedWriter, ask_all
from megatron_r1.curation.cold_start import write_cold_start
from megatron_r1.curation.cold_start_prompts import SUMMARY_PROMPT, built_in_examples, summary_messages, translation_messages
from megatron_r1.curation.filters import first_failure
from megatron_r1.curation.forms import Form
from megatron_r1.curation.non_reasoning import write_non_reasoning
from megatron_r1.curation.records import Conversation
from megatron_r1.data.problem_records import Problem
from megatron_r1.errors import ConfigError, DataError, RolloutError
from megatron_r1.rewards.protocol import Verdict
from megatron_r1.runtime.ledger import Ledger
from tests.chat_server import ChatServer, Reply, completion
from tests.paths import ROOT
from tests.patience import patient

FACTS = ROOT / "docs/paper_facts.md"
PROBLEMS = [Problem("p1", "What is three plus four?", "7", "en"), Problem("p2", "三加五等于几？", "8", "zh")]
THINKING = {
    "en": "Let me see what is asked: the sum of both numbers.\n\nThey make {n}. I check it once more, and it is right.",
    "zh": "我先看题目：要求两个数的和。\n\n结果是{n}，我再验证一遍，没有问题。",
}
SUMMARY = {"en": "The sum of the numbers is \\boxed{{{n}}}.", "zh": "两个数的和是 \\boxed{{{n}}}。"}


def writer(server: ChatServer, **settings) -> ServedWriter:
    defaults = {"url": server.url, "model": "v3", "timeout_seconds": patient(5.0), "retries": 1, "concurrency": 2}
    return ServedWriter(WriterConfig(**defaults | settings), pause=lambda _: None)


def check(asked: Problem, response: str) -> Future[Verdict]:
    right = f"\\boxed{{{asked.answer}}}" in response.partition("</think>")[2]
    return done(Verdict(1.0, "correct") if right else Verdict(0.0, "wrong"))


def asked_for(request: dict) -> tuple[str, Problem]:
    """Which step a request is, and of which problem."""
    text = request["messages"][-1]["content"]
    problem = next(problem for problem in PROBLEMS if problem.question in text)
    if len(request["messages"]) > 1:
        return "few_shot", problem
    steps = {"Translate the thinking": "translate", "Rewrite the": "rewrite", "Based on the above": "summarise"}
    return next((step for phrase, step in steps.items() if phrase in text), "direct"), problem


def respond(request: dict, _: int) -> str:
    step, problem = asked_for(request)
    thinking, summary = (texts[problem.language].format(n=problem.answer) for texts in (THINKING, SUMMARY))
    if step in ("few_shot", "direct"):
        return f"<think>\n{thinking}\n</think>\n\n{summary}"
    return summary if step == "summarise" else thinking


def trace(id: str, problem: Problem, reasoning: str, answer: str, outcome: str = "correct") -> Conversation:
    fields = {"outcome": outcome, "reference": problem.answer, "kind": "reasoning", "prompt_id": problem.id}
    content = f"<think>\n{reasoning}\n</think>\n\n{answer}"
    return Conversation.of_turn(id, problem.question, content, domain="math", language=problem.language, fields=fields)


TRACES = [
    trace("p1/0", PROBLEMS[0], "The numbers are three and four, that makes seven.", "7"),
    trace("p1/1", PROBLEMS[0], "三加四等于七，所以答案就是七。", "7"),
    trace("p2/0", PROBLEMS[1], "The numbers are three and five, that makes eight.", "8"),
    trace("p1/2", PROBLEMS[0], "It makes nine.", "9", "wrong"),
]


def write(folder: Path, model: ServedWriter | None, traces=TRACES, form: str = "think", **settings):
    config = CurationConfig(cold_start=settings, form=form, writer={"model": "v3"})
    return write_cold_start(PROBLEMS, traces, model, check, folder, config, seed=0)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_summary_prompt_is_listing_1_and_translation_the_recipe_s_sentence():
    facts = " ".join(FACTS.read_text(encoding="utf-8").split())
    listing = facts[facts.index("## Question {question} ## Thought process") :].partition(" - Code problems")[0]
    assert " ".join(SUMMARY_PROMPT.split()) == listing
    assert "Translate the thinking process to the same language as the question." in facts
    filled = summary_messages("{thought_process} \\1", "think")[0]["content"]
    assert filled.startswith("## Question\n{thought_process} \\1\n\n## Thought process\nthink\n") and "\\boxed{}" in filled
    assert translation_messages("q", "t")[0]["content"].endswith(
        "Translate the thinking process to the same language as the question."
    )


def test_the_built_in_examples_are_what_the_filters_want():
    filters = CurationConfig().cold_start.filters.model_copy(update={"verdict_domains": []})
    assert [first_failure(example, filters, Form()) for example in built_in_examples()] == [None, None]


def test_all_ways_give_reasoning_and_summary_checked_and_filtered(tmp_path):
    with ChatServer(respond) as server, writer(server) as model:
        counts = write(tmp_path, model, samples_per_problem=2)
        steps = [asked_for(request)[0] for request in server.requests]
        shown = [request["messages"][:-1] for request in server.requests if asked_for(request)[0] == "few_shot"]
    expected = {"few_shot": 4, "direct": 4, "translate": 2, "rewrite": 3, "summarise": 3}
    assert {step: steps.count(step) for step in expected} == expected, "only what is in another language is translated"
    assert all(len(messages) == 2 and "</think>\n\n**" in messages[1]["content"] for messages in shown)
    kept = {line["id"]: line for line in lines(tmp_path / "conversations.jsonl")}
    assert set(kept) == {f"{p}/{way}/{k}" for p in ("p1", "p2") for way in ("few_shot", "direct") for k in (0, 1)} | {
        "p1/0", "p1/1", "p2/0"}  # fmt: skip
    rewritten = kept["p2/0"]
    assert rewritten["messages"][1]["content"] == f"<think>\n{THINKING['zh'].format(n=8)}\n</think>\n\n{SUMMARY['zh'].format(n=8)}"
    assert (rewritten["source"], rewritten["outcome"], rewritten["language"]) == ("cold_start/zero", "correct", "zh")
    assert counts.filtered == {"correct": {"math": 1}}, "R1-Zero's wrong output"


def test_rules_alone_ask_no_model_and_the_special_token_is_put_on_at_the_end(tmp_path):
    say = "I see three and four, and they make seven."
    first = trace("p1/9", PROBLEMS[0], say, "It is \\boxed{7}.")
    second = first.renamed("p1/8").answered(f"|special_token|{say}|special_token|So \\boxed{{7}}.")
    counts = write(tmp_path, None, [first, second, *TRACES], form="special_token", ways=["zero"], refine="rules")
    assert [line["messages"][1]["content"] for line in lines(tmp_path / "conversations.jsonl")] == [
        f"|special_token|{say}|special_token|It is \\boxed{{7}}.",
        f"|special_token|{say}|special_token|So \\boxed{{7}}.",
    ]
    assert counts.left == {"math": 2} and sum(by_domain.total() for by_domain in counts.filtered.values()) == 4
    with pytest.raises(ConfigError, match=r"ways=\[zero\] with refine=rules"):
        write(tmp_path / "x", None, ways=["zero"])


def test_what_the_model_spoils_is_dropped_and_counted(tmp_path):
    def spoil(request: dict, _: int):
        step, problem = asked_for(request)
        if step == "few_shot":
            return "no tags at all" if problem.id == "p1" else completion("cut", "length")
        if step == "direct":
            return "<think>\nI think.\n</think>\n\nIt is \\boxed{0}." if problem.id == "p1" else respond(request, 0)
        if step == "translate":
            return completion("", "stop")
        return "# Plan\n\n" + respond(request, 0) if step == "rewrite" else respond(request, 0)

    with ChatServer(spoil) as server, writer(server) as model:
        counts = write(tmp_path, model)
    assert {name: by_domain.total() for name, by_domain in counts.filtered.items()} == {
        "no_answer": 3, "well_formed": 1, "correct": 2, "markdown": 1}  # fmt: skip
    assert [line["id"] for line in lines(tmp_path / "conversations.jsonl")] == ["p2/direct/0"]


def test_an_endpoint_that_dies_loses_nothing_and_no_request_is_made_twice(tmp_path):
    with ChatServer(respond) as server, writer(server) as model:
        write(tmp_path / "whole", model)
        all_requests = [request["messages"] for request in server.requests]
    alive = threading.Event()
    answered: list = []

    def die(request: dict, _: int):
        if not alive.is_set() and len(answered) >= 5:
            return Reply(503, b"")
        answered.append(request["messages"])
        return respond(request, 0)

    with ChatServer(die) as server:
        with (
            writer(server) as model,
            pytest.raises(RolloutError, match=r"HTTP 503.*; [56] answers are kept in .*answers.jsonl") as error,
        ):
            write(tmp_path / "died", model)
        assert "\n" not in str(error.value) and not (tmp_path / "died/manifest.json").exists()
        alive.set()
        with writer(server) as model:
            write(tmp_path / "died", model)
    assert sorted(map(str, answered)) == sorted(map(str, all_requests))
    for name in ("conversations.jsonl", "rejected.jsonl", "manifest.json"):
        assert (tmp_path / "died" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    with ChatServer(respond) as server, writer(server) as model:
        with pytest.raises(ConfigError, match="was begun with inputs="):
            write(tmp_path / "died", model, TRACES[:1])
        with pytest.raises(ConfigError, match="was begun with cold_start.samples_per_problem=1, now it is 3"):
            write(tmp_path / "died", model, samples_per_problem=3)


def test_reasoning_that_the_server_gives_apart_goes_into_its_tags(tmp_path):
    body = {
        "choices": [{"message": {"role": "assistant", "content": "Seven.", "reasoning_content": "I add."}, "finish_reason": "stop"}]
    }
    reply = Reply(200, json.dumps(body).encode())
    with ChatServer(lambda *_: reply) as server, writer(server) as model, Ledger(tmp_path / "answers.jsonl") as ledger:
        answers = ask_all(model, {"a": [{"role": "user", "content": "x"}]}, ledger, 0, "ask")
    assert answers == {"a": "<think>\nI add.\n</think>\n\nSeven."}


# Non-reasoning data


def chat(number: int, question: str, answer: str = "Here is what you asked me to write for you.") -> dict:
    return {"id": f"c{number}", "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def test_simple_queries_get_no_chain_of_thought_and_others_by_share(tmp_path):
    records = [chat(0, "Hello there!", "Hello, how are you?")]
    records += [chat(n, f"Write me a {{question}} number {n} about the sea and the ships") for n in range(1, 41)]
    source = tmp_path / "chat.jsonl"
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    thought = "I should write about the sea, since this is what they want from me."
    config = CurationConfig(non_reasoning={"cot_share": 0.5}, filters={"names": ["well_formed", "language"]})
    with ChatServer(lambda *_: thought) as server, writer(server) as model:
        counts = write_non_reasoning(source, model, tmp_path / "out", config, seed=0)
        asked = len(server.requests)
        assert all("Write me a {question} number" in request["messages"][0]["content"] for request in server.requests)
        write_non_reasoning(source, model, tmp_path / "out", config, seed=0)
        assert len(server.requests) == asked, "a second run asks nothing again"
    kept = lines(tmp_path / "out/conversations.jsonl")
    thinking = [line for line in kept if "<think>" in line["messages"][1]["content"]]
    assert counts.left == {"general": 41} and 12 <= len(thinking) == asked <= 28 and "c0" not in [line["id"] for line in thinking]
    assert thinking[0]["messages"][1]["content"] == f"<think>\n{thought}\n</think>\n\n{records[1]['messages'][1]['content']}"
    with pytest.raises(ConfigError, match="cot_share is above 0"):
        write_non_reasoning(source, None, tmp_path / "x", config, seed=0)
    plain = CurationConfig(non_reasoning={"cot_share": 0.0}, filters={"names": ["well_formed"]})
    assert write_non_reasoning(source, None, tmp_path / "plain", plain, seed=0).left == {"general": 41}
    for line, says in (
        ("{", "bad.jsonl:2: bad JSON"),
        (json.dumps(chat(1, "y")), "bad.jsonl:2: the id 'c1' stands already at .*:1"),
    ):
        (tmp_path / "bad.jsonl").write_text(json.dumps(chat(1, "x")) + f"\n{line}\n")
        with pytest.raises(DataError, match=says):
            write_non_reasoning(tmp_path / "bad.jsonl", None, tmp_path / f"bad-{len(line)}", plain, seed=0)
