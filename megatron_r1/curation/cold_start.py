"""Cold-start data: long chains of thought with a summary, made in the ways that the recipe names.

Sources: R1 v1 (arXiv) section 2.3.1, R1 v2 B.3.2.

    few_shot   a model is shown worked examples and answers the problem
    direct     a model is asked to reflect and verify
    zero       correct outputs of R1-Zero are translated if they left the question's language, rewritten, and summarised
               by a model (`refine: served`), or only get other tags (`refine: rules`)

Every answer of a model is kept as soon as it arrives. The results are checked again and filtered, and are then ready for review.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from megatron_r1.config.curation import CurationConfig
from megatron_r1.curation.accept_samples import Check
from megatron_r1.curation.ask_model import Messages, Writer, ask_all
from megatron_r1.curation.cold_start_prompts import (
    built_in_examples,
    direct_messages,
    few_shot_messages,
    rewrite_messages,
    summary_messages,
    translation_messages,
)
from megatron_r1.curation.filters import Rejection, first_failure
from megatron_r1.curation.forms import Answer, Form, read_sample
from megatron_r1.curation.manifest import RecordCounts
from megatron_r1.curation.outputs import StepOutputs, write_outputs
from megatron_r1.curation.records import Conversation, read_file
from megatron_r1.data.problem_records import Problem
from megatron_r1.errors import ConfigError, DataError
from megatron_r1.runtime.ledger import Ledger, settle
from megatron_r1.tags import without_reasoning

_THINK = Form()  # of all intermediate answers; `config.form` is applied at the end
_NO_ANSWER = "no_answer"


def write_cold_start(
    problems: Sequence[Problem],
    traces: Sequence[Conversation],
    writer: Writer | None,
    check: Check,
    folder: Path,
    config: CurationConfig,
    seed: int,
) -> RecordCounts:
    """Make cold-start data in `folder`, whose files `outputs.py` describes. Started again after a kill, it continues.

    Args:
        problems: for few_shot and direct.
        traces: for zero: what `sample_and_keep` kept of R1-Zero's samples, with think tags or in the config's form.
        writer: the served model; None if no way needs it.
        check: checks what is written against the reference again, because a rewrite may have changed the answer.

    Raises:
        ConfigError: a model is needed and there is none, or the folder was begun with other settings.
        DataError: nothing is accepted, or a trace has no reference.
        RolloutError: the model does not answer; what it has written is kept.
    """
    cold = config.cold_start
    new_ways = [way for way in ("few_shot", "direct") if way in cold.ways]
    if writer is None and (new_ways or cold.refine == "served"):
        raise ConfigError(
            "curation.cold_start needs a model that writes: set curation.writer.url and model, or ways=[zero] with refine=rules"
        )
    settings = {
        "seed": seed,
        "inputs": _digest(problems, traces),
        "cold_start": cold.model_dump(exclude={"filters"}),
        "writer": config.writer.model_dump(include={"model", "temperature", "max_tokens"}),
    }
    settle(folder, settings)
    made_from = settings | {"filters": cold.filters.model_dump()}
    with Ledger(folder / "answers.jsonl") as ledger, write_outputs(folder, made_from) as results:

        def ask(requests: Mapping[str, Messages], description: str) -> dict[str, str]:
            return ask_all(writer, requests, ledger, seed, description)

        written = [conversation for way in new_ways for conversation in _write_anew(way, problems, ask, config, results)]
        if "zero" in cold.ways:
            readable = _readable([_in_think_form(trace, Form.of(config)) for trace in traces], config, results)
            written += readable if cold.refine == "rules" else _refine(readable, ask, config, results)
        _keep_good(written, check, config, results)
    return results.counts


Ask = Callable[[Mapping[str, Messages], str], dict[str, str]]  #: (id -> what is asked, description) -> id -> answer


def _write_anew(
    way: str, problems: Sequence[Problem], ask: Ask, config: CurationConfig, results: StepOutputs
) -> list[Conversation]:
    """Answers to the problems by few_shot or direct."""
    asked = {
        f"{problem.id}/{way}/{number}": _question_of(problem, f"{problem.id}/{way}/{number}", way)
        for problem in problems
        for number in range(config.cold_start.samples_per_problem)
    }
    if way == "few_shot":
        examples = _load_examples(config)
        answers = ask({id: few_shot_messages(question.prompt, question.language, examples) for id, question in asked.items()}, way)
    else:
        answers = ask({id: direct_messages(question.prompt) for id, question in asked.items()}, way)
    written = []
    for id, question in asked.items():
        if id not in answers:
            results.drop(question, Rejection(_NO_ANSWER, "the model's answer was cut at the limit, or blank"))
            continue
        answer = read_sample(answers[id])
        written.append(question.answered(answers[id].strip() if answer is None else _THINK.join(answer)))
    return written


def _readable(traces: Sequence[Conversation], config: CurationConfig, results: StepOutputs) -> list[Conversation]:
    """The outputs of R1-Zero that are worth refining; the others are dropped."""
    filters = config.cold_start.filters.model_copy(update={"names": config.cold_start.zero_filters})
    kept = []
    for trace in (replace(trace, source="cold_start/zero") for trace in traces):
        rejection = first_failure(trace, filters, _THINK)
        if rejection is None and _answer_parts(trace).reasoning is None:
            rejection = Rejection("well_formed", "no reasoning to refine")
        if rejection is None:
            kept.append(trace)
        else:
            results.drop(trace, rejection)
    return kept


def _refine(traces: Sequence[Conversation], ask: Ask, config: CurationConfig, results: StepOutputs) -> list[Conversation]:
    """Translate what is not in the question's language, rewrite, summarise."""
    by_id = {trace.id: trace for trace in traces}

    def rework(step: str, thinking: Mapping[str, str], make: Callable[[str, str], Messages]) -> dict[str, str]:
        answers = ask({f"{id}/{step}": make(by_id[id].prompt, text) for id, text in thinking.items()}, step)
        reworked = {id: without_reasoning(answers.get(f"{id}/{step}", "")) for id in thinking}
        for id in [id for id, text in reworked.items() if not text]:
            results.drop(by_id[id], Rejection(_NO_ANSWER, f"{step}: the model's answer was cut at the limit, or blank"))
            del reworked[id]
        return reworked

    thinking = {trace.id: _answer_parts(trace).reasoning for trace in traces}
    one_language = config.cold_start.filters.model_copy(update={"names": ["language"]})
    mixed = {trace.id: thinking[trace.id] for trace in traces if first_failure(trace, one_language, _THINK) is not None}
    translated = rework("translate", mixed, translation_messages)
    thinking = {id: translated.get(id, text) for id, text in thinking.items() if id in translated or id not in mixed}
    if config.cold_start.rewrite:
        thinking = rework("rewrite", thinking, rewrite_messages)
    summaries = rework("summarise", thinking, summary_messages)
    return [by_id[id].answered(_THINK.join(Answer(thinking[id], summary))) for id, summary in summaries.items()]


def _keep_good(written: Sequence[Conversation], check: Check, config: CurationConfig, results: StepOutputs) -> None:
    """Check every conversation, filter it, and write it in the form of the config."""
    form = Form.of(config)
    verdicts = [check(_problem_of(conversation), conversation.turns[-1][1]) for conversation in written]
    for conversation, future in zip(written, verdicts, strict=True):
        verdict = future.result()
        checked = conversation.with_fields(outcome=verdict.outcome, score=verdict.score, detail=verdict.detail)
        rejection = first_failure(checked, config.cold_start.filters, _THINK)
        if rejection is None:
            results.keep(checked.answered(form.join(_answer_parts(checked))))
        else:
            results.drop(checked, rejection)


def _in_think_form(conversation: Conversation, form: Form) -> Conversation:
    answer = form.split(conversation.turns[-1][1])
    return conversation if answer is None else conversation.answered(_THINK.join(answer))


def _answer_parts(conversation: Conversation) -> Answer:
    """The parts of the last answer; a malformed one, if no filter drops it, counts as a summary alone."""
    content = conversation.turns[-1][1]
    return _THINK.split(content) or Answer(None, content)


def _question_of(problem: Problem, id: str, way: str) -> Conversation:
    """A problem as a conversation without an answer."""
    if problem.context:
        raise DataError(f"{problem.where}: a cold start is written for questions alone, and something is said before this one")
    fields = {"prompt_id": problem.id, "kind": problem.kind, "reference": problem.answer}
    domain = problem.domain if problem.kind == "reasoning" else "general"
    named = {"domain": domain, "language": problem.language, "source": f"cold_start/{way}", "fields": fields}
    return Conversation.of_turn(id, problem.question, "", **named)


def _problem_of(conversation: Conversation) -> Problem:
    """What an answer is checked against."""
    reference, kind = conversation.fields.get("reference"), conversation.fields.get("kind", "reasoning")
    if not isinstance(reference, str):
        raise DataError(f"cold start: {conversation.id!r} has no field 'reference', so that its answer cannot be checked")
    return Problem(conversation.id, conversation.prompt, reference, conversation.language, conversation.domain, kind)


def _load_examples(config: CurationConfig) -> list[Conversation]:
    path = config.cold_start.examples
    return built_in_examples() if path is None else list(read_file(Path(path)))


def _digest(problems: Sequence[Problem], traces: Sequence[Conversation]) -> str:
    digest = hashlib.sha256()
    for problem in problems:
        digest.update(f"{problem}\n".encode("utf-8", "backslashreplace"))
    for trace in traces:
        digest.update(json.dumps(trace.to_json(), sort_keys=True).encode() + b"\n")
    return digest.hexdigest()
