"""Ten thousand broken and hostile responses go through math, format, language and code: none raises, is slow or is accepted."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from megatron_r1.rewards.code.scorer import CodeScorer
from megatron_r1.rewards.judge.prompts import read_comparison, read_grade, render_payload
from megatron_r1.rewards.language.scorer import LanguageScorer
from megatron_r1.rewards.math.scorer import MathScorer
from megatron_r1.rewards.rules.choice import ChoiceScorer
from megatron_r1.rewards.rules.format import FormatScorer
from megatron_r1.rewards.sandbox.probe import probe_sandbox
from megatron_r1.rewards.sandbox.supervisor import SandboxSettings
from tests.patience import patient
from tests.timed import cpu_seconds

RESPONSES = 10_000
MEGABYTE_EVERY = 400
SLOWEST_SECONDS = 1.5  # CPU of one verdict on a megabyte; an ordinary response takes a millisecond
MEMORY_BYTES = 64 << 20
RUN_EVERY = 400  #: as a program; every response without a block of code ends before it would run
PROBE = probe_sandbox(SandboxSettings())

TAGS = [
    "<think>",
    "</think>",
    "<answer>",
    "</answer>",
    "\\boxed{",
    "}",
    "{",
    "\n",
    " ",
    "#### ",
    "$",
    "\\(",
    "```",
    "`",
    "\\begin{",
    "\\[",
    "$$",
]
PIECES = [
    "9**9**9**9", "9^{9^{9^9}}", "9!!!!", "((9!)!)!", "\\frac", "\\sqrt{", "\\sqrt[", "\\sum_{n=1}^\\infty", "\\int",
    "\\pm", "\\cup", "(",
    ")", "[", "]", "|", "1/0", "0^0", "1e99", "1e999999", "\\infty", "i", "e", "x", "=", "<", ">", "\\le", "\\in",
    ",", "and", "or", "...", "!", "^",
    "_", "%", "\\text{", "cm", "&", "\\\\", "\\begin{pmatrix}", "\\end{pmatrix}", "10^{10^{10}}", "\\exp(", "\\log_",
    "\\binom", "-", "+", "*",
    "/", ".",
]  # fmt: skip
REGEX_BOMBS = ["a" * 3000 + "!", "'" * 3000, "a'" * 1500, "1," * 1500, "\\" * 3000, "<" * 3000, "$" * 3001,
               "`" * 3001, "1" * 3000 + "x",
               "w." * 1500, " " * 3000, "\\overline{1" * 300, "{" * 3000, "http://" * 400, "x@" * 1500,
               "\u0301" * 3000, "\\,1" * 900, "0.1~" * 700]  # fmt: skip


def random_bytes(rng: random.Random) -> str:
    return rng.randbytes(rng.randrange(400)).decode(rng.choice(["latin-1", "utf-8"]), "surrogateescape")


def random_characters(rng: random.Random) -> str:
    return "".join(chr(rng.randrange(rng.choice([0x80, 0x250, 0x10000, 0x110000]))) for _ in range(rng.randrange(80)))


def tags_and_pieces(rng: random.Random) -> str:
    return "".join(rng.choices(TAGS + PIECES, k=rng.randrange(60)))


def unclosed(rng: random.Random) -> str:
    return rng.choice(TAGS) * rng.randrange(300) + rng.choice(PIECES)


def nested_boxes(rng: random.Random) -> str:
    depth = rng.randrange(300)
    return "\\boxed{" * depth + rng.choice(PIECES) + "}" * (depth - rng.randrange(3))


def regex_bomb(rng: random.Random) -> str:
    return rng.choice(REGEX_BOMBS)[rng.randrange(50) :] + rng.choice(PIECES)


MAKERS: list[Callable[[random.Random], str]] = [
    random_bytes,
    random_characters,
    tags_and_pieces,
    unclosed,
    nested_boxes,
    regex_bomb,
]
PLACES = ["{}", "<think>a</think>{}", "<think>a</think><answer>{}</answer>", "<think>a</think>\\boxed{{{}}}", "<think>{}</think>b",
          "<think>\n{}\n</think>\n\nb", "#### {}", "{}</think>\n\n{}"]  # fmt: skip


def make_response(index: int) -> str:
    rng = random.Random(index)
    text = rng.choice(MAKERS)(rng)
    if index % MEGABYTE_EVERY == 0:
        text = (text or " ") * (1_000_000 // max(1, len(text)))
    place = rng.choice(PLACES)
    return place.replace("{{", "{").replace("}}", "}").replace("{}", text) if "{{" in place else place.replace("{}", text)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def judge_and_choice(response: str) -> None:
    """What else reads a response, or a judge that quotes it."""
    assert ChoiceScorer().score(response, "Q").outcome == "wrong"
    assert render_payload(response, "n").count("\n") == 2
    for read in (read_grade, read_comparison):
        with suppress(ValueError):
            read(response)


def test_nothing_breaks_the_rewards():
    references = ["271828.5", "\\frac{\\pi}{7}", "x^2-3x+11", "(-2.5, 17]", "\\approx 8.24 \\text{ mph}"]
    maths = [MathScorer(place) for place in ("answer_tag", "boxed", "hash")]
    zero, chat, custom = FormatScorer("zero"), FormatScorer("chat"), FormatScorer("custom", "(.*<(think|answer)>)+.* ")
    language = LanguageScorer()
    slowest, slowest_index, before = 0.0, -1, 0
    for index in range(RESPONSES):
        response = make_response(index)
        verdicts = []
        for scorer, text, reference in (
            *((math, response, references[index % len(references)]) for math in maths),
            (zero, response + "<answer>", None),  # which no format allows, so nothing is right by chance
            (chat, response + "<think>", None),
            (custom, response + "<think>", None),
            (language, response, "fr"),
        ):
            seconds, verdict = cpu_seconds(scorer.score, text, reference)
            verdicts.append(verdict)
            if seconds > slowest and index > MEGABYTE_EVERY:  # the first ones load word lists
                slowest, slowest_index = seconds, index
        assert [verdict.outcome for verdict in verdicts] == ["wrong"] * 7, (index, verdicts)
        assert cpu_seconds(judge_and_choice, response)[0] < SLOWEST_SECONDS
        if index == RESPONSES // 4:
            before = resident_bytes()
    print(f"slowest {slowest:.3f} s (response {slowest_index}), memory {resident_bytes() - before:+,} bytes")
    assert slowest < SLOWEST_SECONDS
    assert resident_bytes() - before < MEMORY_BYTES


@pytest.mark.skipif(not PROBE.available, reason=PROBE.reason)
def test_nothing_breaks_the_code_reward():
    scorer = CodeScorer(cpu_seconds=1, wall_seconds=patient(60), stop_at_first_failure=True)
    tests = {"inputs": ["1 2\n"], "outputs": ["R1EXPECTED"]}
    outcomes, ran = set(), 0
    for index in range(RESPONSES):
        response = make_response(index)
        outcomes.add(scorer.score(response, tests).outcome)
        if index % RUN_EVERY == 1:
            language = "cpp" if index % (5 * RUN_EVERY) == 1 else "python"
            program = response.replace("think>", "")[:100_000]  # else most were reasoning, and none a program
            verdict = scorer.score(f"{response}</think>\n```{language}\n{program}\n```", tests)
            ran += verdict.parts is not None
            outcomes.add(verdict.outcome)
            assert verdict.detail.isprintable()
    assert outcomes == {"wrong"} and ran > 0.8 * RESPONSES / RUN_EVERY
