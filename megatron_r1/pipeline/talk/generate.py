"""`megatron-r1 generate`: responses to the prompts of a file, so that a kill at any moment loses no more than a batch.

OUTPUT.part/
    settings.json    what the responses depend on
    000000.jsonl     a finished batch
OUTPUT               all of them, when the last one is there
OUTPUT.made          what made OUTPUT, and its checksum: the same command run again has nothing to do
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from megatron_r1.data.problem_records import Problem, take_asked
from megatron_r1.data.prompts import PromptWriter
from megatron_r1.data.record_files import parse_object, read_records
from megatron_r1.data.unpacked import open_unpacked, read_once
from megatron_r1.errors import ConfigError, DataError
from megatron_r1.pipeline.builders.engine_weights import weights_fingerprint
from megatron_r1.pipeline.talk.engine import open_talk_engine
from megatron_r1.pipeline.talk.model import TalkModel
from megatron_r1.runtime.file_locks import lock_file
from megatron_r1.runtime.files import write_atomically, written_atomically
from megatron_r1.runtime.ledger import changed_settings, settle, sync_folder
from megatron_r1.runtime.progress import Progress
from megatron_r1.tags import whole_response
from megatron_r1.types import Prompt, RolloutGroup, Sampling, SamplingEngine

STANDARD = "-"  #: standard input or output
_ADDED = ("response", "sample", "finish", "tokens", "seed", "token_ids", "logprobs")


@dataclass(frozen=True)
class WantedResponses:
    """What is to be generated."""

    source: str  #: a file, or "-"
    target: str  #: a file, or "-"
    sampling: Sampling
    seed: int
    batch: int  #: about how many responses the engine is asked for at a time
    logprobs: bool  #: whether tokens and log-probs are written

    @property
    def prompts_per_batch(self) -> int:
        """At least one."""
        return max(1, self.batch // self.sampling.n)


@dataclass(frozen=True)
class AskedRecord:
    """A record that is to be answered."""

    where: str  #: file and line
    record: dict[str, Any]
    problem: Problem = field(repr=False)


def generate(model: TalkModel, wanted: WantedResponses) -> None:
    """Write `wanted.target`.

    Raises:
        ConfigError: the target is there and something else made it, or it was begun with other settings.
        DataError: file and line of a prompt that cannot be used; a file that cannot be read or written.
        EngineLost: the engine is gone; the same command goes on.
    """
    target = Path(wanted.target)
    writes_file = wanted.target != STANDARD
    part = target.with_name(f"{target.name}.part")
    is_there = writes_file and target.is_file()
    if is_there and not part.exists() and not _made_file(target).exists():
        raise _in_the_way(target)
    writer = PromptWriter(model.config.data, model.tokenizer)
    asked = read_asked_records(wanted.source, model)
    digest = _check_prompts(asked, writer, model, wanted.sampling)
    settings = _settings(model, wanted, digest)
    if is_there and _made_file(target).exists() and _is_made_by(target, settings, is_complete=not part.exists()):
        shutil.rmtree(part, ignore_errors=True)  # a kill left it
        print(f"{target} is finished: the same prompts, weights and settings made it", file=sys.stderr)
        return
    numbers = range(-(-len(asked) // wanted.prompts_per_batch))
    with ExitStack() as stack:
        done: set[int] = set()
        if writes_file:
            _claim(part, stack)
            settle(part, settings)
            done = {number for number in numbers if _batch_file(part, number).exists()}
        total = len(asked) * wanted.sampling.n
        already = sum(len(_batch(asked, wanted, number)) for number in done) * wanted.sampling.n
        if len(done) < len(numbers):
            engine = stack.enter_context(open_talk_engine(model))
            progress = stack.enter_context(Progress(total, "generate", initial=already))
            for number in numbers:
                if number not in done:
                    lines = answer_batch(engine, _batch(asked, wanted, number), writer, wanted, number, progress)
                    _keep(part, number, lines) if writes_file else _print_lines(lines)
        if writes_file:
            with written_atomically(target) as file:
                for number in numbers:
                    with _batch_file(part, number).open(encoding="utf-8", errors="surrogatepass") as batch:
                        shutil.copyfileobj(batch, file)
            if target.is_file():
                write_atomically(_made_file(target), json.dumps(settings | {"checksum": _checksum_of(target)}, indent=1) + "\n")
            shutil.rmtree(part)


def read_asked_records(source: str, model: TalkModel) -> list[AskedRecord]:
    """The prompts of a file, or of standard input.

    Raises:
        DataError: file and line of what cannot be asked, or a field of the output's in a record.
    """
    asked = []
    for number, (where, record) in enumerate(_read_prompts(source), start=1):
        *context, question = take_asked(record, model.config.data, where)
        if taken := [name for name in _ADDED if name in record]:
            raise DataError(f"{where}: the record has a field {taken[0]!r}, as the output has one: rename it")
        asked.append(AskedRecord(where, record, Problem(str(number), question.content, "", where=where, context=tuple(context))))
    if not asked:
        raise DataError(f"{_name_of_source(source)}: no prompt in it")
    return asked


def answer_batch(
    engine: SamplingEngine,
    asked: Sequence[AskedRecord],
    writer: PromptWriter,
    wanted: WantedResponses,
    number: int,
    progress: Progress,
) -> list[str]:
    """The lines of one batch, in the order of its prompts."""
    seed = int.from_bytes(hashlib.blake2b(f"{wanted.seed} {number}".encode(), digest_size=7).digest(), "big")
    prompts = [_write_prompt(entry, writer) for entry in asked]
    groups = engine.generate(prompts, wanted.sampling, seed, lambda group: progress.advance(len(group.rollouts)))
    return [line for entry, group in zip(asked, groups, strict=True) for line in _response_lines(entry, group, wanted)]


def _response_lines(asked: AskedRecord, group: RolloutGroup, wanted: WantedResponses) -> Iterator[str]:
    for sample, rollout in enumerate(group.rollouts):
        line = {
            "prompt": asked.problem.question, **asked.record,
            "response": whole_response(group.prompt.text, rollout.text), "finish": "stop" if rollout.finished else "length",
            "tokens": len(rollout.token_ids), "sample": sample, "seed": wanted.seed,
        }  # fmt: skip
        if wanted.logprobs:
            line |= {"token_ids": rollout.token_ids.tolist(), "logprobs": [float(str(p)) for p in rollout.rollout_logprobs]}
        yield json.dumps(line, ensure_ascii=False, default=str) + "\n"


def _read_prompts(source: str) -> Iterator[tuple[str, dict[str, Any]]]:
    path = Path("/dev/stdin") if source == STANDARD else Path(source)
    name = _name_of_source(source)
    if source != STANDARD and not path.is_dir() and not path.name.removesuffix(".gz").removesuffix(".zst").endswith(".txt"):
        yield from read_records(path, split=None)
        return
    try:
        read_once(path)  # a pipe is copied, so that its first line can be looked at
        with open_unpacked(path) as file:
            has_objects = None
            for number, raw in enumerate(file, start=1):
                if not raw.strip():
                    continue
                where = f"{name}:{number}"
                if has_objects is None:
                    has_objects = source == STANDARD and raw.lstrip()[:1] == b"{"
                yield where, parse_object(raw, where) if has_objects else {"prompt": _text_line(raw, where)}
    except OSError as error:
        raise DataError(f"{name}: cannot be read ({error.strerror or error})") from None


def _text_line(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8-sig").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 text (byte {error.start} of the line)") from None


def _name_of_source(source: str) -> str:
    return "standard input" if source == STANDARD else source


def _write_prompt(asked: AskedRecord, writer: PromptWriter) -> Prompt:
    text, ids = writer.encode(asked.problem)
    return Prompt(asked.where, asked.problem.question, "", text, tuple(ids))


def _check_prompts(asked: Sequence[AskedRecord], writer: PromptWriter, model: TalkModel, sampling: Sampling) -> str:
    """Digest of all prompts. Raises DataError for one that is too long, before anything is sampled."""
    digest = hashlib.blake2b(digest_size=16)
    for entry in asked:
        length = len(_write_prompt(entry, writer).token_ids)
        if length + sampling.max_tokens > model.context:
            raise DataError(
                f"{entry.where}: the prompt has {length} tokens, with --max-tokens {sampling.max_tokens} more than "
                f"--context {model.context}: lower the one or raise the other"
            )
        digest.update(json.dumps(entry.record, default=str, sort_keys=True).encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()


def _settings(model: TalkModel, wanted: WantedResponses, digest: str) -> dict[str, Any]:
    return {
        "weights": weights_fingerprint(model.folder), "input": digest, "seed": wanted.seed, "batch": wanted.batch,
        "logprobs": wanted.logprobs, "sampling": asdict(wanted.sampling), "dtype": model.config.runtime.dtype,
        "template": model.config.data.template, "asked_with": model.config.data.asked_with(), "stop": model.config.rollout.stop,
    }  # fmt: skip


def _is_made_by(target: Path, settings: dict[str, Any], is_complete: bool) -> bool:
    """Whether these settings made a file that is there.

    Args:
        is_complete: no batches wait for being put together. Then another file is in the way, which is a ConfigError.
    """
    try:
        made = json.loads(_made_file(target).read_text(encoding="utf-8"))
        checksum = made.pop("checksum")
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        made, checksum = {}, None
    if checksum != _checksum_of(target):  # it was changed or replaced, and nobody knows by what
        if is_complete:
            raise _in_the_way(target)
        return False
    for key, before, now in changed_settings(made, json.loads(json.dumps(settings))):
        if is_complete:
            raise _in_the_way(target, f", made with {key}={before!r:.80} and not {now!r:.80}")
        return False
    return True


def _in_the_way(target: Path, why: str = "") -> ConfigError:
    return ConfigError(f"--output {target} is there already{why}: remove it, or name another file")


def _made_file(target: Path) -> Path:
    return target.with_name(f"{target.name}.made")


def _checksum_of(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None


def _claim(part: Path, stack: ExitStack) -> None:
    """Lock the folder until the stack ends. Raises DataError if it cannot be written or another process writes there."""
    try:
        part.mkdir(parents=True, exist_ok=True)
        lock = stack.enter_context((part / ".lock").open("a"))
        lock_file(lock, str(part))
    except BlockingIOError:
        raise DataError(f"{part} is being written by another process: wait for it, or name another --output") from None
    except OSError as error:
        raise DataError(f"{part}: cannot be written ({error.strerror})") from None


def _batch(asked: Sequence[AskedRecord], wanted: WantedResponses, number: int) -> Sequence[AskedRecord]:
    size = wanted.prompts_per_batch
    return asked[number * size : (number + 1) * size]


def _batch_file(part: Path, number: int) -> Path:
    return part / f"{number:06d}.jsonl"


def _keep(part: Path, number: int, lines: Sequence[str]) -> None:
    with written_atomically(_batch_file(part, number)) as file:
        file.writelines(lines)
    sync_folder(part)


def _print_lines(lines: Sequence[str]) -> None:
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
    sys.stdout.writelines(lines)
    sys.stdout.flush()
