"""Conversations of several sources, tokenised once into a folder of the run, as batches for supervised fine-tuning."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_r1.config.data import DataConfig
from megatron_r1.config.sft import SftConfig, SftSource
from megatron_r1.data.chat.template import describe_sample
from megatron_r1.data.mixture import Mixture
from megatron_r1.data.record_files import read_records
from megatron_r1.data.sample_store import SampleStore, read_description, write_store
from megatron_r1.data.sft_encoding import Encoder, encode_records
from megatron_r1.data.split import is_heldout
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.errors import ConfigError, DataError
from megatron_r1.types import TrainingSample

VALIDATION = -1  #: group of the samples that are not trained on
PREVIEW = "preview.txt"  #: the first samples as text, the trained parts in brackets, to look at before a long run
_SHOWN = 5


@dataclass
class SourceCounts:
    """What happened to the records of one source."""

    path: str
    samples: int = 0
    tokens: int = 0  #: targets of the samples
    trained_tokens: int = 0  #: of these, with loss
    dropped: int = 0  #: samples beyond `sft.max_tokens`, or cut to it with nothing left to train on
    truncated: int = 0
    skipped: int = 0  #: malformed conversations, with `sft.invalid` = skip
    untrained: int = 0  #: conversations whose own fields leave nothing to train on


def prepare_sft(
    config: SftConfig, data: DataConfig, tokenizer: Tokenizer, folder: Path, on_progress: Callable[[int], None] = lambda _: None
) -> None:
    """Tokenise every conversation into `folder`, unless that was done from the same files and settings. On one rank only.

    Args:
        config: its `sources`, or `data.source` if there are none.
        data: names the template, and what stands around every question.
        folder: see `sample_store`.
        on_progress: called now and then with the number of conversations so far.

    Raises:
        ConfigError: settings that contradict each other.
        DataError: one line with file and line of what is missing, malformed or too long.
    """
    sources, limit = _sft_sources(config, data), token_limit(config)
    every = [*sources, *([config.validation] if config.validation else [])]
    made_from: dict[str, Any] = {
        "template": data.template,
        **({"asked_with": asked_with} if (asked_with := data.asked_with()) else {}),
        "tokenizer": tokenizer.fingerprint,
        "sources": [source.model_dump() for source in every],
        "files": [_file_state(Path(source.path)) for source in every],
        "settings": config.model_dump(
            include={"prompt_field", "response_field", "overlong", "invalid", "validation_fraction", "trained_turns"}
        ) | {"max_tokens": limit},
    }  # fmt: skip
    found = read_description(folder)
    if found is None or _without_folders(found["made_from"]) != _without_folders(made_from):
        counts: list[dict[str, Any]] = []
        fields = (config.prompt_field, config.response_field)
        last_only = config.trained_turns == "last"
        encoders = [Encoder(tokenizer, data, source.format, *fields, last_only) for source in every]
        samples = _encode_sources(config, list(zip(every, encoders)), len(sources), limit, counts, on_progress)
        write_store(folder, samples, {"made_from": made_from, "sources": counts})
    store = SampleStore(folder)
    shown = [f"--- sample {i + 1}\n{describe_sample(store[i], tokenizer)}\n" for i in range(min(len(store), _SHOWN))]
    (folder / PREVIEW).write_text("\n".join(shown), encoding="utf-8")


class SftData:
    """The samples that `prepare_sft` made: the order of those that train, and those that validate."""

    def __init__(self, folder: Path, config: SftConfig, seed: int):
        """
        Raises:
            DataError: a damaged folder, or a source that has nothing to train on.
        """
        self._store = SampleStore(folder)
        self.counts = [SourceCounts(**counts) for counts in self._store.description["sources"]]
        groups = np.asarray(self._store.groups)
        num_sources = len(self.counts) - (config.validation is not None)
        self._of_source = [np.flatnonzero(groups == source) for source in range(num_sources)]
        for counts, members in zip(self.counts, self._of_source):
            if not len(members):
                untrained = f", {counts.untrained} not to be trained on" if counts.untrained else ""
                raise DataError(
                    f"{counts.path}: nothing to train on: {counts.dropped} dropped, {counts.skipped} skipped{untrained}"
                )
        weights = [source.weight for source in config.sources if source.weight is not None]
        self._mixture = Mixture([len(members) for members in self._of_source], weights or None, seed)
        validation = np.flatnonzero(groups == VALIDATION).tolist()
        if len(validation) > config.validation_samples:
            validation = sorted(random.Random(f"validation {seed}").sample(validation, config.validation_samples))
        elif not validation and (config.validation or config.validation_fraction):
            raise DataError(f"{self.counts[-1].path}: nothing is left to validate with; raise sft.validation_fraction")
        self._validation = validation

    @property
    def fingerprint(self) -> str:
        """Changes with any token of any sample."""
        return self._store.fingerprint

    @property
    def epoch_size(self) -> int:
        """Samples of one epoch."""
        return self._mixture.epoch_size

    def epoch(self, number: int) -> list[int]:
        """The samples of this epoch in order, as numbers for `take`; the same for the same seed."""
        return [int(self._of_source[source][index]) for source, index in self._mixture.epoch(number)]

    def take(self, numbers: Sequence[int]) -> list[TrainingSample]:
        """These samples."""
        return [replace(self._store[number], name=self._name(number)) for number in numbers]

    def _name(self, number: int) -> str:
        for counts in self.counts:
            if number < counts.samples:
                return f"sample {number + 1} of {counts.path}"
            number -= counts.samples
        return f"sample {number + 1}"

    def validation(self) -> list[TrainingSample]:
        """The samples to validate with, at most `sft.validation_samples`."""
        return self.take(self._validation)

    @property
    def dropped(self) -> int:
        """Samples that were left out because they are too long."""
        return sum(counts.dropped for counts in self.counts)

    def describe(self) -> str:
        """One line on what there is and what was left out."""
        total = {name: sum(getattr(c, name) for c in self.counts) for name in asdict(self.counts[0]) if name != "path"}
        return (
            f"{total['samples']:,} samples of {len(self.counts)} sources, {total['tokens']:,} tokens, "
            f"{total['trained_tokens']:,} of them trained; {total['dropped']:,} dropped and {total['truncated']:,} truncated "
            f"as too long, {total['skipped']:,} malformed "
            f"skipped{f', {untrained:,} not to be trained on' if (untrained := total['untrained']) else ''}; "
            f"{len(self._validation):,} for validation"
        )

    def state_dict(self) -> dict[str, Any]:
        """What `check_same` compares, fit for JSON: the samples that are trained on, and all, as older versions kept it."""
        return {"samples": self.fingerprint, "trained": self._store.of_trained}

    def check_same(self, state: dict[str, Any] | None) -> None:
        """
        Raises:
            DataError: the samples are not those that a resumed run began with, so its position means nothing.
        """
        if state is None or state["samples"] == self.fingerprint or state.get("trained") == self._store.of_trained:
            return
        paths = ", ".join(counts.path for counts in self.counts)
        raise DataError(
            f"sft: the conversations are not those this run began with ({paths}), or a smaller sft.micro_batch_tokens drops or "
            "cuts others, since sft.max_tokens is not set; restore them or start a new run_dir"
        )


def token_limit(config: SftConfig) -> int:
    """The most targets of a sample.

    Raises:
        ConfigError: more than a forward pass takes.
    """
    limit = config.max_tokens or config.micro_batch_tokens
    if limit > config.micro_batch_tokens:
        raise ConfigError(f"sft.max_tokens={limit} is more than sft.micro_batch_tokens={config.micro_batch_tokens}: raise that one")
    return limit


def _sft_sources(config: SftConfig, data: DataConfig) -> list[SftSource]:
    weighted = [source for source in config.sources if source.weight is not None]
    if weighted and len(weighted) < len(config.sources):
        raise ConfigError("sft.sources: give every source a weight, or none, which takes each sample once an epoch")
    if config.validation and config.validation_fraction:
        raise ConfigError("sft.validation and sft.validation_fraction are both set: drop one of the two")
    if not config.sources and data.source == "tally":
        raise ConfigError("there are no conversations: set sft.sources=[FILE, ...] or data.source=FILE")
    return list(config.sources) or [SftSource(path=data.source)]


def _file_state(path: Path) -> list[list[Any]]:
    """Name, size and time of a file or of a folder's files: shows that nothing changed without reading everything."""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    return [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.exists()]


def _without_folders(made_from: dict[str, Any]) -> dict[str, Any]:
    """What samples were made from, wherever the files stood: a folder that moved with its times is not tokenised again."""
    sources = [source | {"path": ""} for source in made_from["sources"]]
    files = [sorted([Path(name).name, *look] for name, *look in of_source) for of_source in made_from["files"]]
    return json.loads(json.dumps(made_from | {"sources": sources, "files": files}))


def _encode_sources(
    config: SftConfig,
    every: list[tuple[SftSource, Encoder]],
    num_training: int,
    limit: int,
    results: list[dict[str, Any]],
    on_progress: Callable[[int], None],
) -> Iterator[tuple[int, TrainingSample]]:
    """(group, sample) of every conversation; the counts of a source go into `results` when it is done."""
    number = 0
    for group, (source, encoder) in enumerate(every):
        counts = SourceCounts(source.path)
        for encoded in encode_records(read_records(Path(source.path), source.split), encoder, config.workers):
            number += 1
            if number % 1000 == 0:
                on_progress(number)
            if isinstance(encoded, DataError):
                if config.invalid == "error":
                    raise encoded
                counts.skipped += 1
                continue
            counts.untrained += not encoded.samples
            is_validation = group >= num_training or is_heldout(encoded.question, config.validation_fraction)
            for sample in _limit(encoded.samples, limit, config.overlong, counts, encoded.where):
                counts.samples += 1
                counts.tokens += sample.num_targets
                counts.trained_tokens += sample.num_trained
                yield VALIDATION if is_validation else group, sample
        results.append(asdict(counts))


def _limit(samples: list[TrainingSample], limit: int, overlong: str, counts: SourceCounts, where: str) -> Iterator[TrainingSample]:
    """The samples of at most `limit` targets, and longer ones as `overlong` says."""
    for sample in samples:
        if sample.num_targets <= limit:
            yield sample
            continue
        if overlong == "error":
            raise DataError(
                f"{where}: {sample.num_targets} tokens are more than sft.max_tokens={limit}; raise it and sft.micro_batch_tokens, "
                "remove the example, or say with sft.overlong what to do"
            )
        if overlong == "truncate" and sample.loss_mask[:limit].any():
            counts.truncated += 1
            yield TrainingSample(sample.token_ids[: limit + 1], sample.loss_mask[:limit])
        else:
            counts.dropped += 1
