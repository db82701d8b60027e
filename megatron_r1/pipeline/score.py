"""Score the responses of a file: what `megatron-r1 score` does."""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_r1.config.rewards import CustomRewardConfig, RewardConfig
from megatron_r1.config.schema import Config
from megatron_r1.data.problem_records import Problem
from megatron_r1.data.prompts import PromptWriter
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.data.unpacked import read_once
from megatron_r1.errors import ConfigError, DataError
from megatron_r1.import_path import is_import_path
from megatron_r1.pipeline.builders.rewards import check_custom_rewards, open_scoring
from megatron_r1.rewards.custom import custom_reference
from megatron_r1.rewards.protocol import OUTCOMES, Verdict
from megatron_r1.rewards.scorers import is_custom, scorer_specs
from megatron_r1.rewards.workers.pool import ScoringPool
from megatron_r1.runtime.files import written_atomically
from megatron_r1.runtime.progress import Progress
from megatron_r1.tags import THINK_OPEN

#: built-in scorer -> the field of a line that holds the reference; None: the scorer needs none
REFERENCE_FIELDS = {"math": "answer", "code": "tests", "choice": "answer", "format": None, "language": "language"}
_NAME_OF_FUNCTION = "function"  #: of a custom reward that is given by its import path
_PROMPT_DEFAULTS = {"question": "", "domain": "math", "language": "", "kind": "reasoning"}  #: fields that a custom reward may use


@dataclass(frozen=True)
class Line:
    """One line of the input."""

    where: str  #: "file:line"
    record: dict[str, Any]  #: empty if the line holds no object
    response: str = ""
    reference: Any = None
    problem: str = ""  #: why it cannot be scored


def score_file(config: Config, reward: str, source: Path, target: Path, mark_malformed: bool) -> Counter[str]:
    """Score every line of `source` and write it to `target` with `score`, `outcome`, `detail` and, if there are any, `parts`.

    The file is read twice and never held in memory: the first pass refuses a malformed file before anything is written. A pipe is
    copied first. `target` is written whole or not at all, unless it is a pipe. Lines keep their order; blank ones are left out.

    Args:
        reward: a built-in scorer of `REFERENCE_FIELDS`, the name of a reward in `reward.custom`, or "package.module:function".
        mark_malformed: malformed lines become "unscorable" instead of refusing the file.

    Returns:
        Number of lines by outcome.

    Raises:
        ConfigError: there is no such reward, or its function cannot be called.
        DataError: file and line of a malformed line, or a file that cannot be read or written.
        RewardError: the scorer cannot work here.
    """
    rewards, reward = _find_reward(config.reward, reward)
    opening = _opening_of_prompts(config)
    total = _check_lines(source, reward, mark_malformed)
    if target.is_file() and source.exists() and target.samefile(source):
        raise DataError(f"{target}: --output is the input file: name another one")
    counts: Counter[str] = Counter()
    with (
        open_scoring(rewards, scorer_specs(rewards, [reward], config.data.template, opening)) as scoring,
        Progress(total, f"score {reward}") as progress,
        written_atomically(target) as output,
    ):

        def keep(line: Line, verdict: Verdict) -> None:
            output.write(json.dumps(line.record | _as_fields(verdict), ensure_ascii=False) + "\n")
            counts[verdict.outcome] += 1
            progress.show({name: counts[name] for name in OUTCOMES if counts[name]})
            progress.advance()

        _stream(scoring, reward, read_lines(source, reward), keep)
    return counts


def _opening_of_prompts(config: Config) -> str | None:
    """What the prompts of the responses already held of them; None: as `data.template` says."""
    if config.data.template != "tokenizer":
        return None
    if config.data.tokenizer is None:
        raise ConfigError(
            "data.template=tokenizer: name its folder in data.tokenizer, since the chat template says whether prompts open "
            f"{THINK_OPEN}"
        )
    return PromptWriter(config.data, Tokenizer.load(config.data.tokenizer)).opening


def _find_reward(rewards: RewardConfig, reward: str) -> tuple[RewardConfig, str]:
    """The rewards with the one that is asked for, and its name. Raises ConfigError if there is no such reward or function."""
    if reward in REFERENCE_FIELDS or is_custom(rewards, reward):
        check_custom_rewards(rewards)
        return rewards, reward
    if not is_import_path(reward):
        choices = ", ".join((*REFERENCE_FIELDS, *(custom.name for custom in rewards.custom)))
        raise ConfigError(
            f"argument --reward: invalid choice: {reward!r} (choose from {choices}, or write package.module:function)"
        )
    custom = CustomRewardConfig(name=_NAME_OF_FUNCTION, function=reward)
    rewards = rewards.model_copy(update={"custom": [custom]})
    try:
        check_custom_rewards(rewards)
    except ConfigError as error:
        raise ConfigError(str(error).replace(f"reward.custom.{custom.name}.function=", "--reward ")) from None
    return rewards, custom.name


def read_lines(path: Path, reward: str) -> Iterator[Line]:
    """The lines of a .jsonl file, malformed ones with their `problem`.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        with read_once(path).open("rb") as file:
            for number, raw in enumerate(file, start=1):
                if raw.strip():
                    yield _read_line(f"{path}:{number}", raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw, reward)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None


def _read_line(where: str, raw: bytes, reward: str) -> Line:
    try:
        record = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # ValueError: also what is not UTF-8
        return Line(where, {}, problem=f"bad JSON ({str(error).splitlines()[0]})")
    if not isinstance(record, dict):
        return Line(where, {}, problem=f"expected an object, found {type(record).__name__}")
    response = record.get("response")
    if not isinstance(response, str):
        return Line(where, record, problem="field 'response' is missing or not text")
    if reward not in REFERENCE_FIELDS:
        return Line(where, record, response, _reference_of(record, where))
    field = REFERENCE_FIELDS[reward]
    reference = None if field is None else record.get(field)
    if field == "answer" and isinstance(reference, (int, float)) and not isinstance(reference, bool):
        reference = str(reference)
    if field == "tests" and not reference:
        return Line(where, record, problem="field 'tests' is missing or empty")
    if field in ("answer", "language") and (not isinstance(reference, str) or not reference.strip()):
        return Line(where, record, problem=f"field {field!r} is missing, blank or not text")
    return Line(where, record, response, reference)


def _reference_of(record: dict[str, Any], where: str) -> dict[str, Any]:
    """What a custom reward is given beside the response."""
    known = {name: str(record.get(name) or default) for name, default in _PROMPT_DEFAULTS.items()}
    problem = Problem(str(record.get("id", where)), known.pop("question"), "", **known)  # type: ignore[arg-type]
    return custom_reference(problem, record.get("answer"), cut=record.get("finished") is False)


def _check_lines(source: Path, reward: str, mark_malformed: bool) -> int:
    """The number of lines to score."""
    total = malformed = 0
    first = None
    for line in read_lines(source, reward):
        total += 1
        if line.problem:
            malformed += 1
            first = first or line
    if not total:
        raise DataError(f"{source}: the file is empty")
    if first is not None and not mark_malformed:
        others = f"; {malformed - 1} more lines are malformed" if malformed > 1 else ""
        raise DataError(f"{first.where}: {first.problem}{others}; correct the file, or pass --mark-unscorable")
    return total


def _stream(scoring: ScoringPool, reward: str, lines: Iterator[Line], keep: Callable[[Line, Verdict], None]) -> None:
    """Call `keep` for every line in order, with a bounded number of lines in flight."""
    waiting: deque[Line] = deque()  # read and not kept yet, in order; the first one is not malformed

    def keep_malformed() -> None:
        while waiting and waiting[0].problem:
            line = waiting.popleft()
            keep(line, Verdict(None, "unscorable", f"{line.where}: {line.problem}"))

    def to_score() -> Iterator[tuple[str, str, Any]]:
        for line in lines:
            waiting.append(line)
            keep_malformed()
            if not line.problem:
                yield reward, line.response, line.reference

    for verdict in scoring.stream(to_score()):
        keep(waiting.popleft(), verdict)
        keep_malformed()


def _as_fields(verdict: Verdict) -> dict[str, Any]:
    fields = {"score": verdict.score, "outcome": verdict.outcome, "detail": verdict.detail}
    return fields | ({"parts": dict(verdict.parts)} if verdict.parts else {})
