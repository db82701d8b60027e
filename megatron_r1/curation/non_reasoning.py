"""Non-reasoning data: answers are taken as they are; for some of them a model writes a chain of thought.

Sources: R1 v1 (arXiv) section 2.3.3, R1 v2 B.3.3.

A simple query such as "hello" gets no chain of thought; nor does a conversation of several turns, or an answer that has reasoning.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

from megatron_r1.config.curation import CurationConfig, NonReasoningConfig
from megatron_r1.curation.ask_model import Messages, Writer, ask_all
from megatron_r1.curation.filters import Rejection, first_failure
from megatron_r1.curation.forms import Answer, Form
from megatron_r1.curation.manifest import RecordCounts, fingerprint_file
from megatron_r1.curation.outputs import write_outputs
from megatron_r1.curation.records import Conversation, read_file
from megatron_r1.curation.words import words_of
from megatron_r1.errors import ConfigError
from megatron_r1.runtime.ledger import Ledger, settle
from megatron_r1.tags import without_reasoning

#: Ours: the recipe says only that the model is prompted for "a potential chain-of-thought before answering the question".
COT_PROMPT = """\
Below are a request and the answer that you are about to give to it. Write what you think before you give this answer: \
what the request asks for, what matters, how you come to the answer. Write in the first person, in short paragraphs of plain text, \
in the language of the request. Do not write the answer itself, and do not mention that it was given to you.

## Request
{question}

## Answer
{answer}"""


def write_non_reasoning(source: Path, writer: Writer | None, folder: Path, config: CurationConfig, seed: int) -> RecordCounts:
    """Make supervised data of a file of conversations; `outputs.py` describes the files. Started again after a kill, it continues.

    Args:
        source: .jsonl, in any form that `data.conversations` reads.
        writer: the served model; None if `config.non_reasoning.cot_share` is 0.

    Raises:
        ConfigError: a model is needed and there is none, or the folder was begun with other settings.
        DataError: file and line of a malformed record, or nothing is accepted.
        RolloutError: the model does not answer; what it has written is kept.
    """
    if writer is None and config.non_reasoning.cot_share > 0:
        raise ConfigError("curation.non_reasoning.cot_share is above 0: set curation.writer.url and model, or cot_share=0")
    settings = {
        "seed": seed,
        "inputs": fingerprint_file(source)["sha256"],
        "non_reasoning": config.non_reasoning.model_dump(),
        "writer": config.writer.model_dump(include={"model", "temperature", "max_tokens"}),
    }
    settle(folder, settings)
    form = Form.of(config)
    with Ledger(folder / "answers.jsonl") as ledger:
        requests = {c.id: _cot_messages(*c.turns[0]) for c in read_file(source) if _gets_cot(c, config.non_reasoning, form, seed)}
        thoughts = ask_all(writer, requests, ledger, seed, "chain of thought") if writer is not None else {}
        with write_outputs(folder, settings | {"filters": config.filters.model_dump()}) as results:
            for conversation in _answered(source, thoughts, form):
                if conversation.id in requests and conversation.id not in thoughts:
                    results.drop(
                        conversation, Rejection("no_answer", "the model's chain of thought was cut at the limit, or blank")
                    )
                    continue
                rejection = first_failure(conversation, config.filters, form)
                if rejection is None:
                    results.keep(conversation)
                else:
                    results.drop(conversation, rejection)
            results.numbers["with_chain_of_thought"] = len(thoughts)
    return results.counts


def is_simple(query: str, config: NonReasoningConfig) -> bool:
    """Whether a query needs no thinking: it has few words. A Chinese character counts as one."""
    return len(words_of(query)) <= config.simple_words


def _gets_cot(conversation: Conversation, config: NonReasoningConfig, form: Form, seed: int) -> bool:
    """Whether a model writes a chain of thought for this one: drawn from seed and id, whatever else the file holds."""
    turns = conversation.turns
    if len(turns) != 1 or is_simple(turns[0][0], config):
        return False
    answer = form.split(turns[0][1])
    if answer is None or answer.reasoning is not None:
        return False
    return random.Random(f"chain of thought {seed} {conversation.id}").random() < config.cot_share


def _answered(source: Path, thoughts: dict[str, str], form: Form) -> Iterator[Conversation]:
    """The conversations of the file, with the chains of thought that were written."""
    for conversation in read_file(source):
        thought = without_reasoning(thoughts[conversation.id]) if conversation.id in thoughts else None
        yield conversation if not thought else conversation.answered(form.join(Answer(thought, conversation.turns[-1][1])))


def _cot_messages(question: str, answer: str) -> Messages:
    # Not format(): question and answer may hold braces.
    before, _, after = COT_PROMPT.partition("{question}")
    return [{"role": "user", "content": before + question + after.replace("{answer}", answer)}]
