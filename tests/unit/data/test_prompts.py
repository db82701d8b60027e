from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from megatron_r1.config.data import DataConfig
from megatron_r1.data.chat.messages import Message
from megatron_r1.data.chat.prompt_templates import fixed_texts
from megatron_r1.data.problem_records import Problem
from megatron_r1.data.problems import FileProblems, ProblemSource, load_problems
from megatron_r1.data.prompts import PromptStream, PromptWriter, force_thinking, heldout_prompts
from megatron_r1.data.tally.tokenizer import train_tally_tokenizer
from megatron_r1.data.tokenizer import Tokenizer, train_tokenizer
from megatron_r1.errors import DataError
from tests.public_data import KINDS, math_file


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tally_tokenizer()


def sources() -> dict[str, ProblemSource]:
    problems = [Problem(f"p-{n}", f"What is {n}+1?", str(n + 1)) for n in range(200)]
    return {"tally": load_problems(DataConfig()), "file": FileProblems(problems, 0.1, "numbers")}


def writer_of(tokenizer: Tokenizer, max_prompt_tokens: int = 64, **settings: Any) -> PromptWriter:
    return PromptWriter(DataConfig(max_prompt_tokens=max_prompt_tokens, **settings), tokenizer)


def stream(source: ProblemSource, tokenizer: Tokenizer, seed: int = 0) -> PromptStream:
    return PromptStream(source, writer_of(tokenizer), seed)


@pytest.mark.parametrize("kind", ["tally", "file"])
def test_resume_skips_and_repeats_nothing(tokenizer, kind):
    whole = stream(sources()[kind], tokenizer)
    expected = [prompt for _ in range(40) for prompt in whole.next(7)]  # the file's epoch ends in the middle of a batch
    for stop in (1, 13, 27):
        first = stream(sources()[kind], tokenizer)
        seen = [prompt for _ in range(stop) for prompt in first.next(7)]
        state = json.loads(json.dumps(first.state_dict()))
        second = stream(sources()[kind], tokenizer)
        second.load_state_dict(state)
        assert seen + second.next(7 * (40 - stop)) == expected


@pytest.mark.parametrize("kind", ["tally", "file"])
def test_the_order_depends_on_the_seed(tokenizer, kind):
    def first(seed: int):
        return stream(sources()[kind], tokenizer, seed).next(20)

    assert first(0) == first(0) != first(1)


def test_batch_size_does_not_change_the_order(tokenizer):
    one, many = (stream(sources()["tally"], tokenizer) for _ in range(2))
    assert [one.next(1)[0] for _ in range(12)] == many.next(12)


def test_a_cursor_of_other_problems_or_another_seed_is_refused(tokenizer):
    state = stream(sources()["file"], tokenizer).state_dict()
    with pytest.raises(DataError, match="the problems are not those"):
        stream(sources()["tally"], tokenizer).load_state_dict(state)
    changed = FileProblems([Problem(f"p-{n}", f"What is {n}+1?", str(n + 2)) for n in range(200)], 0.1, "numbers")
    with pytest.raises(DataError, match="the problems are not those"):
        stream(changed, tokenizer).load_state_dict(state)
    with pytest.raises(DataError, match="seed=1 but this run began with 0"):
        stream(sources()["file"], tokenizer, seed=1).load_state_dict(state)


def test_a_prompt_that_is_too_long_is_named_before_the_run_starts(tokenizer):
    problems = [Problem(f"p-{n}", f"What is {n}+1?", "1") for n in range(20)] + [Problem("p-long", "blah " * 100, "1")]
    with pytest.raises(DataError, match=r"problem p-long has a prompt of \d\d\d tokens, data.max_prompt_tokens is 64"):
        stream(FileProblems(problems, 0.1, "numbers"), tokenizer)
    with pytest.raises(DataError, match="has a prompt of 10 tokens, data.max_prompt_tokens is 9"):
        heldout_prompts(sources()["tally"], writer_of(tokenizer, 9), 1, seed=0)


def test_held_out_prompts_are_fixed_distinct_and_never_trained_on(tokenizer):
    source = sources()["tally"]
    chosen = heldout_prompts(source, writer_of(tokenizer), 200, seed=99)
    assert chosen == heldout_prompts(sources()["tally"], writer_of(tokenizer), 200, seed=99)
    questions = {p.question for p in chosen}
    assert len(questions) == 200
    assert not questions & {p.question for p in stream(source, tokenizer).next(5000)}


@pytest.mark.parametrize("kind", ["tally", "file"])
def test_nothing_of_the_answer_is_in_the_prompt(tokenizer, kind):
    """The prompt is a function of the question alone, and the question is the same whatever the answer is."""
    source = sources()[kind]
    for problem in [source.train(position, 0) for position in range(100)] + source.heldout(10, 0):
        prompt = writer_of(tokenizer).write(problem)
        other = writer_of(tokenizer).write(replace(problem, answer="another answer"))
        assert (prompt.text, prompt.token_ids) == (other.text, other.token_ids)
        assert tokenizer.decode(prompt.token_ids) == prompt.text
        if kind == "tally":  # the question holds the start and the moves, and no partial sum follows from its form
            assert problem.question in (f"Total {problem.id.split('-', 2)[2]}?", f"求{problem.id.split('-', 2)[2]}？")


def test_a_forced_opening_is_the_tag_token(tokenizer):
    prompt = stream(sources()["tally"], tokenizer).next(1)[0]
    forced = force_thinking(prompt, tokenizer)
    assert forced.token_ids == (*prompt.token_ids, 3)
    assert forced.text == tokenizer.decode(forced.token_ids) == prompt.text + "<think>"


@pytest.mark.parametrize("kind", KINDS)
def test_gsm8k_prompts_hold_the_question_and_not_the_solution(tokenizer, kind, tmp_path):
    path = math_file(kind, tmp_path)
    solutions = {r["question"].strip(): r["answer"] for r in map(json.loads, path.read_text().splitlines())}
    source = load_problems(DataConfig(source=str(path), answer_format="gsm8k"))
    for prompt in PromptStream(source, writer_of(tokenizer, 1024), 0).next(200):
        assert prompt.question in prompt.text and prompt.text.endswith(". Assistant:")
        assert solutions[prompt.question] not in prompt.text and "####" not in prompt.text


def test_what_was_said_before_a_question_goes_into_the_prompt():
    tokenizer = train_tokenizer(["Be brief. How many? Few."] * 3, 320, single_tokens=fixed_texts("r1_chat"))
    context = (Message("system", "Be brief."), Message("user", "A?"), Message("assistant", "<think>x</think>B."))
    problem = Problem("p", "How many?", "1", context=context, where="x:1")
    prompt = writer_of(tokenizer, 200, template="r1_chat").write(problem)
    assert prompt.text == "<bos>Be brief.<｜User｜>A?<｜Assistant｜>B.<eos><｜User｜>How many?<｜Assistant｜>"
    assert prompt.context == (("system", "Be brief."), ("user", "A?"), ("assistant", "<think>x</think>B."))
    assert tokenizer.decode_everything(prompt.token_ids) == prompt.text
    with pytest.raises(DataError, match="x:1: data.template=r1_zero holds one question"):
        writer_of(tokenizer, 200).write(problem)
    own = tokenizer.with_chat_template("{% for m in messages %}{{ m.role + ':' + m.content + ';' }}{% endfor %}A:")
    assert (
        writer_of(own, 200, template="tokenizer").write(problem).text
        == "system:Be brief.;user:A?;assistant:<think>x</think>B.;user:How many?;A:"
    )


def test_too_long_prompts_are_left_out_where_that_is_asked_for(tokenizer):
    problems = [Problem(f"p-{n}", "What is 1+1? " * (1 + 30 * (n % 5 == 0)), "2") for n in range(50)]
    problems = [replace(problem, question=f"{problem.question}{n}") for n, problem in enumerate(problems)]
    source = FileProblems(problems, 0.2, "numbers")
    writer, dropping = writer_of(tokenizer, 60), writer_of(tokenizer, 60, overlong="drop")
    assert writer.without_overlong(source) is source
    with pytest.raises(DataError, match="raise it, remove the problem or leave all such out with data.overlong=drop"):
        PromptStream(source, writer, 0)
    fitting = dropping.without_overlong(source)
    PromptStream(fitting, writer, 0)
    assert len(fitting.fixed_problems()) == 40
    assert fitting.notes == ("numbers: 10 problems are longer than data.max_prompt_tokens=60, and are left out",)
    assert [prompt.id for prompt in dropping.write_fitting(problems[:7])] == ["p-1", "p-2", "p-3", "p-4", "p-6"]
