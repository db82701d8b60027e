"""Files of conversations in, one file of supervised data out: filters, near-duplicates, decontamination, mix, manifest.

The inputs are read twice and never held in memory: first every record is inspected, then the chosen ones are written.

    folder/
        curated.jsonl    the data, in a random order
        rejected.jsonl   what was dropped, and why
        summary.md       the counts as a table
        manifest.json    written last: counts, hashes, seed and settings
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from megatron_r1.config.curation import CurationConfig
from megatron_r1.curation.decontaminate import EvaluationSets, load_evaluation_sets
from megatron_r1.curation.dedup import NearDuplicates
from megatron_r1.curation.inspect_records import Inspected, inspect_all
from megatron_r1.curation.manifest import (
    RecordCounts,
    count_fields,
    fingerprint_file,
    read_manifest,
    remove_manifest,
    render_counts,
    write_manifest,
)
from megatron_r1.curation.outputs import REJECTED, describe_losses, make_folder
from megatron_r1.curation.proportions import draw, plan_mix
from megatron_r1.curation.records import check_id, parse_line
from megatron_r1.data.record_files import RawLine, stream_lines
from megatron_r1.data.unpacked import read_once
from megatron_r1.errors import ConfigError, DataError
from megatron_r1.runtime.files import write_atomically, written_atomically
from megatron_r1.runtime.progress import Progress

CURATED, SUMMARY = "curated.jsonl", "summary.md"
_SETTINGS = ("inputs", "form", "special_token", "filters", "dedup", "decontamination", "mix")  #: those that the result depends on
_EXAMPLES = 5  # n-grams named per evaluation set: a phrase that every question has shows itself there


def curate_files(config: CurationConfig, seed: int, folder: Path) -> str:
    """Make `folder` from `config.inputs`; a finished folder of the same inputs and settings stays as it is.

    Returns:
        The summary table.

    Raises:
        ConfigError: no inputs.
        DataError: file and line of a malformed record, an id that comes twice, no record left, or proportions that cannot be met.
    """
    if not config.inputs:
        raise ConfigError("curation.inputs is empty: name the files, e.g. curation.inputs=[a.jsonl,b.jsonl]")
    paths = [Path(path) for path in config.inputs]
    for path in paths:
        if path.suffix != ".jsonl":  # lines are read again by their offsets
            raise DataError(f"{path}: expected a .jsonl file, one object a line")
    made_from = {
        "seed": seed,
        "settings": config.model_dump(include=set(_SETTINGS)),
        "inputs": [fingerprint_file(path) for path in paths],
        "evaluation_sets": {name: fingerprint_file(Path(path)) for name, path in config.decontamination.evaluation_sets.items()},
    }
    if _is_finished(folder, made_from):
        return (folder / SUMMARY).read_text(encoding="utf-8")
    make_folder(folder)
    remove_manifest(folder)
    counts, matches = RecordCounts(), {}
    with written_atomically(folder / REJECTED) as rejected:
        left = _choose_records(config, paths, load_evaluation_sets(config.decontamination), seed, counts, matches, rejected)
        if not left:
            raise DataError(f"no record is left of {counts.read.total()}: {describe_losses(counts)}; see curation.filters")
        domains = [record.domain for _, record in left]
        counts.left = Counter(domains)
        drawn = draw(domains, plan_mix(counts.left, config.mix), seed)
        counts.mixed = Counter(domains[index] for index, _ in drawn)
    _write_mix(paths, [(*left[index], copy) for index, copy in drawn], folder / CURATED)
    summary = render_counts(counts) + "\n"
    write_atomically(folder / SUMMARY, summary)
    outputs = {name: fingerprint_file(folder / name) | {"path": name} for name in (CURATED, REJECTED, SUMMARY)}
    write_manifest(folder, {**made_from, "counts": count_fields(counts), "matches": matches, "outputs": outputs})
    return summary


def _choose_records(
    config: CurationConfig,
    paths: Sequence[Path],
    sets: EvaluationSets,
    seed: int,
    counts: RecordCounts,
    matches: dict[str, list[dict[str, Any]]],
    rejected: TextIO,
) -> list[tuple[int, Inspected]]:
    """The records that are left, each with the number of its file. Inspects all; fills `counts`, `matches` and `rejected`."""
    kept: list[tuple[int, Inspected]] = []
    seen: dict[str, str] = {}
    names: dict[int, str] = {}  # what the index of a kept text is called
    duplicates = NearDuplicates(config.dedup)
    phrases: dict[str, Counter[str]] = {}

    def drop(record: Inspected, step: str, name: str, detail: str) -> None:
        counts.drop(step, name, record.domain)
        line = {"id": record.id, "domain": record.domain, "where": record.where, "step": step, "name": name, "detail": detail}
        rejected.write(json.dumps(line, ensure_ascii=False) + "\n")

    for number, record in _inspect_files(config, paths, sets, seed):
        check_id(record.id, record.where, seen)
        counts.read[record.domain] += 1
        if record.rejection is not None:
            drop(record, "filter", record.rejection.name, record.rejection.detail)
            continue
        if record.signature is not None:
            repeated = duplicates.find(len(seen), record.signature)
            if repeated is not None:
                drop(record, "duplicate", "near_duplicate", f"repeats {names[repeated[0]]!r}, similarity {repeated[1]:.2f}")
                continue
            names[len(seen)] = record.id
        if record.match is not None:
            phrases.setdefault(record.match.name, Counter())[record.match.words] += 1
            drop(record, "contamination", record.match.name, f"has the words {record.match.words!r}")
            continue
        kept.append((number, record))
    for name, words in phrases.items():
        matches[name] = [{"words": text, "records": count} for text, count in words.most_common(_EXAMPLES)]
    return kept


def _inspect_files(
    config: CurationConfig, paths: Sequence[Path], sets: EvaluationSets, seed: int
) -> Iterator[tuple[int, Inspected]]:
    with Progress(sum(read_once(path).stat().st_size for path in paths), "inspect", unit="B") as progress:
        for number, path in enumerate(paths):
            done = 0
            for record in inspect_all(stream_lines(path), path.stem, config, sets, seed):
                progress.advance(record.offset - done)
                done = record.offset
                yield number, record
            progress.advance(read_once(path).stat().st_size - done)


def _write_mix(paths: Sequence[Path], chosen: Sequence[tuple[int, Inspected, int]], target: Path) -> None:
    """Write the chosen records, a second copy under an id of its own."""
    with ExitStack() as stack, Progress(len(chosen), "write") as progress:
        files: list[BinaryIO] = [stack.enter_context(read_once(path).open("rb")) for path in paths]
        output = stack.enter_context(written_atomically(target))
        for number, record, copy in chosen:
            files[number].seek(record.offset)
            conversation = parse_line(RawLine(record.where, record.offset, files[number].readline()), paths[number].stem)
            if conversation.id != record.id:
                raise DataError(f"{record.where}: the file was changed while it was read; start again")
            named = conversation if copy == 1 else conversation.renamed(f"{conversation.id}#{copy}")
            output.write(json.dumps(named.to_json(), ensure_ascii=False) + "\n")
            progress.advance()


def _is_finished(folder: Path, made_from: dict[str, Any]) -> bool:
    manifest = read_manifest(folder)
    if manifest is None or any(manifest.get(key) != value for key, value in made_from.items()):
        return False
    outputs = manifest["outputs"].items()
    return all(
        (folder / name).is_file() and fingerprint_file(folder / name)["sha256"] == known["sha256"] for name, known in outputs
    )
