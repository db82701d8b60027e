"""Human review of cold-start data: out as a page, back as decisions.

R1 v2 (arXiv) B.3.2: annotators convert traces, others verify them.

    review.html       all records, to accept, reject or edit; opens without a server and saves the decisions as a file
    review.jsonl      the same records, for other tools

A decision is one JSON object a line: {"id", "decision": "accept" | "reject" | "edit"}, for "edit" also "reasoning" and "summary".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from megatron_r1.curation.forms import Answer, Form
from megatron_r1.curation.outputs import make_folder, write_json_lines
from megatron_r1.curation.records import Conversation
from megatron_r1.curation.review_page import render_page
from megatron_r1.data.record_files import read_records, take_text
from megatron_r1.errors import DataError
from megatron_r1.runtime.files import write_atomically
from megatron_r1.tags import THINK_CLOSE, THINK_OPEN

PAGE, RECORDS = "review.html", "review.jsonl"
Choice = Literal["accept", "reject", "edit"]


@dataclass(frozen=True)
class Decision:
    """What a person decided about a record."""

    choice: Choice
    answer: Answer | None = None  #: for "edit"


def export_review(conversations: Sequence[Conversation], folder: Path, form: Form, title: str = "Cold-start review") -> Path:
    """Write both files; returns the page.

    Raises:
        DataError: an answer that is not in the form, a conversation of several turns, an id that comes twice, or nothing to review.
    """
    if not conversations:
        raise DataError(f"{folder}: there is nothing to review")
    repeated = [id for id, count in Counter(conversation.id for conversation in conversations).items() if count > 1]
    if repeated:
        raise DataError(f"{folder}: the id {repeated[0]!r} comes twice; a decision would not say which it means")
    answers = [_answer_of(conversation, form) for conversation in conversations]
    make_folder(folder)
    write_json_lines(folder / RECORDS, (_describe(c, answer) for c, answer in zip(conversations, answers)))
    write_atomically(folder / PAGE, render_page(conversations, answers, title))
    return folder / PAGE


def read_decisions(path: Path, ids: Sequence[str]) -> dict[str, Decision]:
    """The decisions of a file, by id.

    Args:
        ids: of the records that were exported.

    Raises:
        DataError: file and line of an unknown or repeated id, an unknown decision, or a missing field.
    """
    known, first_seen = set(ids), {}
    decisions: dict[str, Decision] = {}
    for where, record in read_records(path):
        id = take_text(record, "id", where)
        if id not in known:
            raise DataError(f"{where}: no record with the id {id!r} was exported for review")
        if id in first_seen:
            raise DataError(f"{where}: {id!r} is decided already at {first_seen[id]}; remove one of the two")
        first_seen[id] = where
        decisions[id] = _read_decision(record, where)
    return decisions


def apply_decisions(
    conversations: Sequence[Conversation], decisions: dict[str, Decision], form: Form
) -> tuple[list[Conversation], dict[str, int]]:
    """The conversations that are accepted or edited, in their order, and the number of each decision, "undecided" included.

    The field `review` of a kept conversation holds its decision.
    """
    kept: list[Conversation] = []
    counts = dict.fromkeys((*get_args(Choice), "undecided"), 0)
    for conversation in conversations:
        decision = decisions.get(conversation.id)
        counts[decision.choice if decision else "undecided"] += 1
        if decision is None or decision.choice == "reject":
            continue
        edited = conversation if decision.answer is None else conversation.answered(form.join(decision.answer))
        kept.append(edited.with_fields(review=decision.choice))
    return kept, counts


def _read_decision(record: dict[str, Any], where: str) -> Decision:
    choice = take_text(record, "decision", where)
    if choice not in get_args(Choice):
        raise DataError(f"{where}: the decision {choice!r:.40} is unknown; choose one of {', '.join(get_args(Choice))}")
    if choice != "edit":
        return Decision(choice)
    answer = Answer(take_text(record, "reasoning", where), take_text(record, "summary", where))
    if Form().split(Form().join(answer)) != answer:
        raise DataError(f"{where}: reasoning and summary must hold no {THINK_OPEN} or {THINK_CLOSE}")
    return Decision(choice, answer)


def _answer_of(conversation: Conversation, form: Form) -> Answer:
    answer = form.split(conversation.messages[-1].content) if len(conversation.turns) == 1 else None
    if answer is None:
        raise DataError(f"{conversation.id!r} is not one turn with reasoning and summary: filter it out before the review")
    return answer


def _describe(conversation: Conversation, answer: Answer) -> dict[str, Any]:
    return {
        "id": conversation.id,
        "question": conversation.prompt,
        "reasoning": answer.reasoning or "",
        "summary": answer.summary,
        "domain": conversation.domain,
        "language": conversation.language,
        "source": conversation.source,
    }
