"""Rejection sampling (R1 v1 (arXiv) section 2.3.3): samples each prompt several times and keeps correct, readable samples."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from megatron_r1.config.curation import CurationConfig, FilterConfig
from megatron_r1.curation.accept_samples import Check
from megatron_r1.curation.filters import Rejection, first_failure
from megatron_r1.curation.forms import Form, read_sample
from megatron_r1.curation.outputs import StepOutputs, write_outputs
from megatron_r1.curation.records import Conversation
from megatron_r1.curation.sampling import read_samples, sample
from megatron_r1.data.chat.messages import Message, Role
from megatron_r1.types import Prompt, SamplingEngine


@dataclass(frozen=True)
class Selection:
    """Numbers of a finished rejection sampling."""

    prompts: int
    samples: int
    correct: int  #: samples
    accepted: int  #: samples that pass every filter, the same text of one prompt counted once
    kept: int  #: at most `keep_per_prompt` of each prompt
    empty_prompts: int  #: without an accepted sample
    unscored: int  #: samples to which neither rule nor judge gave a score (error, timeout, unscorable)


def sample_and_keep(
    engine: SamplingEngine,
    check: Check,
    prompts: Sequence[Prompt],
    folder: Path,
    config: CurationConfig,
    seed: int,
    policy: str,
    filters: FilterConfig | None = None,
) -> Selection:
    """Sample, check, filter and choose; `outputs.py` describes the files in `folder`. Started again, it continues.

    Called in one process. The engine holds the policy's weights already.

    Args:
        check: from `answer_check`.
        policy: a name for the weights that the engine holds, e.g. their hash.
        filters: those that a sample must pass; None: `config.filters`.

    Raises:
        ConfigError: the folder holds samples of another policy, of other prompts or with other settings.
        DataError: no sample is accepted, no prompts, or a file that cannot be written or is damaged.
    """
    sample(engine, check, prompts, folder, config.rejection, seed, policy)
    return select(prompts, folder, config, seed, policy, filters)


def select(
    prompts: Sequence[Prompt], folder: Path, config: CurationConfig, seed: int, policy: str, filters: FilterConfig | None = None
) -> Selection:
    """Filter and choose from existing samples: other filters need no new samples.

    Raises:
        DataError: samples are missing, or none is accepted.
    """
    filters = filters or config.filters
    made_from = {"seed": seed, "policy": policy, "rejection": config.rejection.model_dump(), "filters": filters.model_dump()}
    numbers = dict.fromkeys(("samples", "correct", "accepted", "kept", "empty_prompts", "unscored"), 0)
    with write_outputs(folder, made_from) as results:
        for prompt, samples in read_samples(prompts, folder, config.rejection):
            accepted = _accept(prompt, samples, config, filters, results)
            kept = _pick_kept(prompt, accepted, config, seed)
            for conversation in accepted:
                if conversation.id in kept:
                    results.keep(conversation)
                else:
                    results.drop(
                        conversation, Rejection("surplus", f"{config.rejection.keep_per_prompt} others of its prompt are kept")
                    )
            numbers["samples"] += len(samples)
            numbers["correct"] += sum(record["outcome"] == "correct" for record in samples)
            numbers["accepted"] += len(accepted)
            numbers["kept"] += len(kept)
            numbers["empty_prompts"] += not accepted
            numbers["unscored"] += sum(record["score"] is None for record in samples)
        results.numbers.update({"prompts": len(prompts), **numbers})
    return Selection(prompts=len(prompts), **numbers)


def _accept(
    prompt: Prompt, samples: Sequence[dict[str, Any]], config: CurationConfig, filters: FilterConfig, results: StepOutputs
) -> list[Conversation]:
    """The samples of a prompt that pass every filter; the others are dropped."""
    form = Form.of(config)
    accepted: list[Conversation] = []
    texts: set[str] = set()
    for record in samples:
        conversation = to_conversation(prompt, record, form, config.rejection.answer_summary)
        rejection = first_failure(conversation, filters, form)
        if rejection is None and conversation.text in texts:
            rejection = Rejection("same_text", "another sample of its prompt is the same")
        if rejection is not None:
            results.drop(conversation, rejection)
            continue
        texts.add(conversation.text)
        accepted.append(conversation)
    return accepted


def _pick_kept(prompt: Prompt, accepted: Sequence[Conversation], config: CurationConfig, seed: int) -> set[str]:
    """The ids of those that are kept."""
    count = min(config.rejection.keep_per_prompt, len(accepted))
    if config.rejection.choose == "shortest":
        chosen = sorted(accepted, key=lambda conversation: (conversation.fields["tokens"], conversation.id))[:count]
    else:
        chosen = random.Random(f"rejection {seed} {prompt.id}").sample(accepted, count)
    return {conversation.id for conversation in chosen}


def to_conversation(prompt: Prompt, record: dict[str, Any], form: Form, answer_summary: str) -> Conversation:
    """A sample as supervised data; a sample in no known form stays as it is, so that a filter drops it."""
    answer = read_sample(record["response"], answer_summary)
    fields = {name: record[name] for name in ("prompt_id", "outcome", "score", "detail", "tokens")}
    conversation = Conversation.of_turn(
        record["id"],
        prompt.question,
        record["response"] if answer is None else form.join(answer),
        domain=prompt.domain if prompt.kind == "reasoning" else "general",
        language=prompt.language,
        source="rejection_sampling",
        fields=fields | {"kind": prompt.kind, "reference": prompt.answer},
    )
    said_before = (Message(cast(Role, role), text) for role, text in prompt.context)
    return replace(conversation, messages=(*said_before, *conversation.messages)) if prompt.context else conversation
