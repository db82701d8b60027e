"""Samples of a policy with their verdicts, kept so that a kill at any moment loses none and counts none twice.

folder/
    settings.json              what the samples depend on
    samples/
        000000.jsonl           a finished batch: its samples with their verdicts, in the order of the prompts
        000001.responses.jsonl the batch under way: appended and on the disk as soon as a prompt's samples are there
        000001.verdicts.jsonl  the same for verdicts
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path
from typing import Any

from megatron_r1.config.curation import RejectionConfig
from megatron_r1.curation.accept_samples import Check, done
from megatron_r1.curation.outputs import make_folder, write_json_lines
from megatron_r1.data.record_files import read_records
from megatron_r1.errors import DataError
from megatron_r1.rewards.protocol import Verdict
from megatron_r1.runtime.ledger import Ledger, settle, sync_folder
from megatron_r1.runtime.progress import Progress
from megatron_r1.types import Prompt, RolloutGroup, Sampling, SamplingEngine

OnSamples = Callable[[int], None]  #: is called with the number of samples that came


def sample(
    engine: SamplingEngine, check: Check, prompts: Sequence[Prompt], folder: Path, config: RejectionConfig, seed: int, policy: str
) -> None:
    """Sample `config.samples_per_prompt` responses to every prompt that `folder` does not hold yet, and check them.

    Args:
        policy: a name for the weights that the engine holds, e.g. their hash.

    Raises:
        ConfigError: the folder holds samples of another policy, of other prompts or with other settings.
        DataError: no prompts, two with one id, a file that cannot be written or is damaged.
    """
    _settle(prompts, folder, config, seed, policy)
    make_folder(folder / "samples")
    batches = list(_batches(prompts, config))
    finished = [number for number, _ in batches if batch_path(folder, number).exists()]
    per_prompt = config.samples_per_prompt
    done_already = sum(len(batch) for number, batch in batches if number in set(finished)) * per_prompt
    with Progress(len(prompts) * per_prompt, "sample", initial=done_already) as progress:
        for number, batch in batches:
            if not batch_path(folder, number).exists():
                _fill_batch(engine, check, batch, folder, number, config, seed, progress.advance)
            for path in _open_paths(folder, number):  # there if a kill came after the batch was finished
                path.unlink(missing_ok=True)


def read_samples(prompts: Sequence[Prompt], folder: Path, config: RejectionConfig) -> Iterator[tuple[Prompt, list[dict[str, Any]]]]:
    """Every prompt with its samples, one batch in memory at a time.

    A sample: id, prompt_id, response, finished, tokens, score, outcome, detail.

    Raises:
        DataError: a batch is missing or damaged.
    """
    for number, batch in _batches(prompts, config):
        by_prompt: dict[str, list[dict[str, Any]]] = {prompt.id: [] for prompt in batch}
        for where, record in read_records(batch_path(folder, number)):
            if record.get("prompt_id") not in by_prompt:
                raise DataError(f"{where}: no sample of this batch; remove the file, its samples are made again")
            by_prompt[record["prompt_id"]].append(record)
        yield from ((prompt, by_prompt[prompt.id]) for prompt in batch)


def batch_path(folder: Path, number: int) -> Path:
    """The file of a finished batch."""
    return folder / "samples" / f"{number:06d}.jsonl"


def _fill_batch(
    engine: SamplingEngine,
    check: Check,
    prompts: Sequence[Prompt],
    folder: Path,
    number: int,
    config: RejectionConfig,
    seed: int,
    on_samples: OnSamples,
) -> None:
    """Make the file of one batch."""
    responses_path, verdicts_path = _open_paths(folder, number)
    with Ledger(responses_path) as responses, Ledger(verdicts_path) as verdicts:
        batch = _Batch(prompts, check, responses, verdicts, config.samples_per_prompt, on_samples)
        missing = batch.unsampled_prompts()
        if missing:
            sampling = Sampling(config.samples_per_prompt, config.temperature, config.top_p, config.max_tokens)
            engine.generate(
                prompts if config.resample_batch else missing,
                sampling,
                random.Random(f"sample {seed} {number}").getrandbits(62),
                batch.keep,
            )
        write_json_lines(batch_path(folder, number), batch.finish())
        sync_folder(responses_path.parent)


class _Batch:
    """A batch under way. It takes over what its ledgers hold from before a kill."""

    def __init__(
        self, prompts: Sequence[Prompt], check: Check, responses: Ledger, verdicts: Ledger, per_prompt: int, on_samples: OnSamples
    ) -> None:
        self._by_id = {sample_id(prompt, index): prompt for prompt in prompts for index in range(per_prompt)}
        self._check, self._responses, self._verdicts, self._on_samples = check, responses, verdicts, on_samples
        self._waiting: dict[str, Future[Verdict]] = {}
        for record in responses.records.values():
            if record["id"] not in self._by_id:
                raise DataError(f"{responses.path}: {record['id']!r} is no sample of this batch; remove the file")
            if record["id"] not in verdicts.records:
                self._start(record)
        on_samples(len(responses.records))

    def unsampled_prompts(self) -> list[Prompt]:
        """The prompts that lack a sample."""
        return list({prompt.id: prompt for id, prompt in self._by_id.items() if id not in self._responses.records}.values())

    def keep(self, group: RolloutGroup) -> None:
        """Take the new samples of a prompt and start checking them."""
        records = [record for record in _sample_records(group) if record["id"] not in self._responses.records]
        self._responses.append(records)
        for record in records:
            self._start(record)
        self._keep_verdicts()
        self._on_samples(len(records))

    def finish(self) -> list[dict[str, Any]]:
        """Wait for every verdict: all samples with their verdicts, in the order of the prompts."""
        while self._waiting:
            wait(self._waiting.values(), return_when=FIRST_COMPLETED)
            self._keep_verdicts()
        return [self._responses.records[id] | self._verdicts.records[id] for id in self._by_id]

    def _start(self, record: dict[str, Any]) -> None:
        cut = Verdict(0.0, "wrong", "cut at the length limit")
        self._waiting[record["id"]] = (
            self._check(self._by_id[record["id"]], record["response"]) if record["finished"] else done(cut)
        )

    def _keep_verdicts(self) -> None:
        """Put the verdicts that are known by now on the disk."""
        ready = [id for id, verdict in self._waiting.items() if verdict.done()]
        verdicts = {id: self._waiting.pop(id).result() for id in ready}
        self._verdicts.append(
            [{"id": id, "score": v.score, "outcome": v.outcome, "detail": v.detail} for id, v in verdicts.items()]
        )


def _sample_records(group: RolloutGroup) -> Iterator[dict[str, Any]]:
    for index, rollout in enumerate(group.rollouts):
        yield {
            "id": sample_id(group.prompt, index),
            "prompt_id": group.prompt.id,
            "response": rollout.text,
            "finished": rollout.finished,
            "tokens": len(rollout.token_ids),
        }


def sample_id(prompt: Prompt, index: int) -> str:
    """The name of a sample."""
    return f"{prompt.id}/{index}"


def _settle(prompts: Sequence[Prompt], folder: Path, config: RejectionConfig, seed: int, policy: str) -> None:
    if not prompts:
        raise DataError(f"{folder}: there are no prompts to sample for")
    seen: set[str] = set()
    digest = hashlib.sha256()
    for prompt in prompts:
        if prompt.id in seen:
            raise DataError(f"{folder}: two prompts have the id {prompt.id!r}; sample each once")
        seen.add(prompt.id)
        digest.update(f"{prompt.id}\0{prompt.text}\0{prompt.answer}\0{prompt.domain}\0{prompt.kind}\n".encode())
    settings = config.model_dump(exclude={"keep_per_prompt", "choose", "resample_batch", "answer_summary"})
    settle(folder, {"policy": policy, "prompts": digest.hexdigest(), "seed": seed, **settings})


def _batches(prompts: Sequence[Prompt], config: RejectionConfig) -> Iterator[tuple[int, Sequence[Prompt]]]:
    for number, start in enumerate(range(0, len(prompts), config.batch_prompts)):
        yield number, prompts[start : start + config.batch_prompts]


def _open_paths(folder: Path, number: int) -> tuple[Path, Path]:
    """Responses and verdicts of a batch under way."""
    path = batch_path(folder, number)
    return path.with_suffix(".responses.jsonl"), path.with_suffix(".verdicts.jsonl")
