"""The responses that the report's browser shows: a bounded, seeded choice from a run's files, as JSON for the page."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.data.tokenizer_folder import holds_tokenizer
from megatron_r1.data.unpacked import open_unpacked
from megatron_r1.errors import ConfigError, DataError, R1Error, one_line
from megatron_r1.report.runs import RunRecord
from megatron_r1.runtime.choose_responses import Candidate, choose_responses
from megatron_r1.runtime.kept_tokens import BYTES_PER_TOKEN, KEY, TokenColumns
from megatron_r1.runtime.rollout_files import step_of_file

STEPS = 24  #: of a run at most, the first and the last among them
READ_BYTES = 64 << 20  #: of a step's file at most, unpacked
_SHARE = 5  # a response may take one of so many parts of its step's bytes, so that every kind is there
_ANSWER = 2000  # characters: the tests of a program may be megabytes
_VOCABULARY_BYTES = 24  # that a token's text takes, about
_UNSAFE = re.compile("[<>&\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff\ufffe\uffff]")


@dataclass(frozen=True)
class Choice:
    """What is shown of a run."""

    most_bytes: int = 10_000_000  #: of all responses in the page, of all runs together
    seed: int = 0  #: decides between equal responses, and which are the random ones
    steps: tuple[int, ...] = ()  #: these; (): up to `STEPS`, evenly spread
    tokenizer: Path | None = None  #: folder; None: that of the run's model


def read_choice(most_mb: float | None, seed: int, steps: str | None, tokenizer: Path | None) -> Choice:
    """What the options of `megatron-r1 report` say. Raises ConfigError."""
    if most_mb is not None and not 0 < most_mb <= 2000:
        raise ConfigError(f"--most-mb {most_mb:g} is not above 0, or more than a browser opens (2000)")
    numbers = [] if steps is None else steps.split(",")
    if not all(re.fullmatch("[0-9]{1,9}", number) for number in numbers):
        raise ConfigError(f"--steps {steps!r} are no steps: give numbers with commas between, such as 1,50,100")
    most_bytes = Choice.most_bytes if most_mb is None else int(most_mb * 1e6)
    return Choice(most_bytes, seed, tuple(map(int, numbers)), tokenizer)


@dataclass
class Shown:
    """The responses of one run in the page."""

    responses: list[dict[str, Any]] = field(default_factory=list)
    vocabulary: dict[int, str | list[int]] = field(default_factory=dict)  #: id -> text, or bytes that are none by themselves
    note: str = ""  #: how many of how many, and what they are


def choose_shown(run: RunRecord, choice: Choice, most_bytes: float) -> Shown:
    """Read some steps' files, one in memory at a time, and choose.

    It reads at most `STEPS` * `READ_BYTES`, whatever the run's size.

    Raises:
        DataError: a file is not one of responses, or the run has not the steps that were asked for.
    """
    files = _spread(run.rollout_files, choice)
    shown, left, read, cut, ids = Shown(), most_bytes, 0, 0, set[int]()
    for number, path in enumerate(files):
        lines, is_cut = _read_lines(path)
        read, cut = read + len(lines), cut + is_cut
        budget = left / (len(files) - number)
        most = budget / _SHARE
        candidates = [_candidate(line, columns, min(size * 1.2 + 100, most)) for line, columns, size in lines]
        for index, kind in choose_responses(candidates, budget, choice.seed).items():
            line, columns, _ = lines[index]
            entry = _entry(line, columns, step_of_file(path), index, kind, int(most))
            tokens = set() if columns is None else set(columns.ids.tolist()) - ids
            size = len(to_script(entry)) + _VOCABULARY_BYTES * len(tokens)
            if size <= left:
                left -= size
                ids |= tokens
                shown.responses.append(entry)
    note = _describe_shown(shown, len(files), len(run.rollout_files), read, choice)
    if cut:
        note += f" Of the files of {cut} steps only the first {READ_BYTES >> 20} MB were read."
    if ids:
        tokenizer, problem = _find_tokenizer(run, choice)
        shown.vocabulary = {} if tokenizer is None else {i: _as_text(b) for i, b in tokenizer.token_bytes(sorted(ids)).items()}
        note += f" Tokens are shown by their ids: {problem}." if problem else ""
    elif shown.responses:
        note += " This run kept no tokens: checkpoint.rollouts_tokens_mb was 0, or an older version made it."
    shown.note = note
    return shown


def to_script(value: Any) -> bytes:
    """JSON that may stand in a script element: no character of it begins markup, is invisible or half of a pair."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return _UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", text).encode("utf-8")


def _spread(files: Sequence[Path], choice: Choice) -> list[Path]:
    by_step = {step_of_file(path): path for path in files}
    if choice.steps:
        missing = [str(step) for step in choice.steps if step not in by_step]
        if missing:
            raise DataError(f"{files[0].parent} has no responses of step {missing[0]}: it has {min(by_step)} to {max(by_step)}")
        return [by_step[step] for step in sorted(set(choice.steps))]
    count = min(STEPS, len(files))
    return [files[round(index * (len(files) - 1) / max(count - 1, 1))] for index in range(count)]


def _describe_shown(shown: Shown, steps: int, all_steps: int, read: int, choice: Choice) -> str:
    note = f"{len(shown.responses):,} of {read:,} responses of {steps:,} of {all_steps:,} steps are in this page"
    if len(shown.responses) == read:
        return f"{note}."
    return (
        f"{note}, as many as {choice.most_bytes / 1e6:g} MB take (--most-mb): of every step in turn those with the highest and the "
        f"lowest reward, with the largest log-prob difference, the longest, and some at random (--seed {choice.seed})."
    )


def _read_lines(path: Path) -> tuple[list[tuple[dict[str, Any], TokenColumns | None, int]], bool]:
    """(line, its tokens, bytes) of a file's responses, and whether there are more."""
    try:
        with open_unpacked(path) as file:
            found, done = [], 0
            for raw in file:
                if done > READ_BYTES:
                    return found, True
                line = json.loads(raw)
                columns = TokenColumns.from_json(line[KEY]) if KEY in line else None
                found.append((_fields_of(line), columns, len(raw)))
                done += len(raw)
            return found, False
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path} is no file of a run's responses ({one_line(error)}): remove it") from None


def _fields_of(line: dict[str, Any]) -> dict[str, Any]:
    """What the page reads of a line; `reward_outcomes`, `reward_details` and others are not in every older run."""

    def texts(name: str) -> dict[str, str]:
        return {str(key): str(value) for key, value in line.get(name, {}).items()}

    return {
        "id": str(line["prompt_id"]),
        "question": str(line["question"]),
        "answer": str(line["answer"]),
        "response": str(line["response"]),
        "reward": _finite_or_none(line.get("reward")),
        "parts": {str(name): _finite_or_none(value) for name, value in line["reward_parts"].items()},
        "outcomes": texts("reward_outcomes"),
        "details": texts("reward_details"),
        "advantage": _finite_or_none(line.get("advantage")),
        "finished": line["finished"] is True,
        "length": _finite_or_none(line["length"]),
    }


def _finite_or_none(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
    return value if is_number else None


def _candidate(line: dict[str, Any], columns: TokenColumns | None, size: float) -> Candidate:
    def known(value: float | None) -> float:
        return math.nan if value is None else value

    difference = math.nan if columns is None else columns.largest_difference
    return Candidate(line["id"], known(line["reward"]), difference, int(line["length"] or 0), size)


def _entry(line: dict[str, Any], columns: TokenColumns | None, step: int, index: int, kind: str, most_bytes: int) -> dict[str, Any]:
    """What the page gets of a response; beyond `most_bytes` the middle of its text and of its tokens is left out."""
    entry = line | {"step": step, "index": index, "kind": kind}
    text_bytes = most_bytes // (4 if columns is not None else 2)
    for name, most in (("question", most_bytes // 8), ("answer", min(_ANSWER, most_bytes // 8)), ("response", text_bytes)):
        entry[name], left_out = _without_middle(line[name], most)
        if left_out:
            entry[f"{name}_left_out"] = left_out
    if columns is None:
        return entry
    count = len(columns.ids)
    most_tokens = int(most_bytes / 2 / BYTES_PER_TOKEN)
    first, last = (count, 0) if count <= most_tokens else (most_tokens - most_tokens // 2, most_tokens // 2)
    largest = columns.largest_difference
    kept = columns.part(first, last).to_json() | {"count": count, "first": first}
    return entry | {"tokens": kept, "largest": largest if math.isfinite(largest) else None}


def _without_middle(text: str, most_bytes: int) -> tuple[str, int]:
    """Args: most_bytes: in UTF-8, about. Returns the text and the number of characters that it lacks, which [...] stands for."""
    size = len(text.encode("utf-8", "surrogatepass"))
    if size <= most_bytes:
        return text, 0
    half = most_bytes * len(text) // size // 2
    left_out = len(text) - 2 * half
    return f"{text[:half]}\n[... {left_out:,} characters ...]\n{text[len(text) - half :]}", left_out


def _as_text(content: bytes) -> str | list[int]:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return list(content)


def _find_tokenizer(run: RunRecord, choice: Choice) -> tuple[Tokenizer | None, str]:
    """That of the exported model, or the one that the run began with; else why there is none."""
    if choice.tokenizer is not None:
        return Tokenizer.load(choice.tokenizer), ""
    for folder in _tokenizer_folders(run):
        if holds_tokenizer(folder):
            try:
                return Tokenizer.load(folder), ""
            except R1Error as error:
                return None, one_line(error)
    return None, "the run's tokenizer is not here (name its folder with --tokenizer)"


def _tokenizer_folders(run: RunRecord) -> Iterator[Path]:
    yield run.folder / "hf"
    try:
        config = yaml.safe_load(run.config)
        named = [config["data"].get("tokenizer"), config["model"].get("weights")]
    except (yaml.YAMLError, TypeError, KeyError, AttributeError, RecursionError):
        return
    yield from (Path(name) for name in named if isinstance(name, str) and "\0" not in name)
