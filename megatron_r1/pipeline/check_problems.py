"""Look at a file of problems before a run uses it: what `megatron-r1 check-problems` does, and what grpo does at its start.

The file is read once, record by record. What is kept of a record are hashes and lengths, so memory does not grow with the texts.
"""

from __future__ import annotations

import hashlib
import json
import re
import statistics
import time
import unicodedata
from array import array
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_r1.config.schema import Config
from megatron_r1.data.coding_records import reference_solution
from megatron_r1.data.problem_records import Problem, read_problem
from megatron_r1.data.problems import ProblemSource
from megatron_r1.data.prompts import PromptWriter
from megatron_r1.data.record_files import read_records
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.errors import ConfigError, DataError
from megatron_r1.pipeline.builders.rewards import open_scoring
from megatron_r1.rewards.protocol import Verdict
from megatron_r1.rewards.scorers import ScorerSpec, accuracy_reference, accuracy_scorer, accuracy_scorers, scorer_specs
from megatron_r1.rewards.workers.pool import ScoringPool
from megatron_r1.runtime.distributed import on_rank_zero
from megatron_r1.runtime.files import write_atomically
from megatron_r1.runtime.markdown_table import align_table
from megatron_r1.runtime.progress import Progress

#: kind of finding -> what it says
FINDINGS = {
    "malformed": "record with a missing, blank or malformed field",
    "no_scorer": "domain without a scorer",
    "unscorable": "reference that its scorer cannot read",
    "unusable_tests": "tests that cannot be used",
    "not_itself": "reference that does not agree with itself",
    "contradicting": "tests that contradict each other",
    "solution": "reference solution that fails its tests",
    "grader": "reference on which the scorer failed",
    "duplicate": "same question as an earlier one",
    "near_duplicate": "same question but for case, space and signs",
    "other_answer": "same question as an earlier one, with another answer",
    "language": "question in another language than the record says",
    "long_prompt": "prompt longer than data.max_prompt_tokens",
}
REPORT_FILE = "references.json"  #: in a run folder
_CHECKED = ("math", "choice", "code")  #: scorers whose references `ReferenceChecker` knows
_REFERENCES, _LANGUAGE, _CODE = "references", "question_language", "code"
_RULES = "megatron_r1.rewards.rules.references"
_EXAMPLES = 3  #: of each finding that are shown
_KEPT_EXAMPLES = 100  #: of each finding in a file
_MANY = 10_000  #: references whose check takes long enough to show it
_WINDOW = 256  #: records under way
_READ_CHARACTERS = 2000  #: of a question: enough to know its language
_NO_SIGN = re.compile(r"[$\"'\u2018-\u201d]|\\[,;!: ]|[.,;:!?\u3002]+(?=\s|$)")
_SPACE = re.compile(r"(?<=\W)\s+|\s+(?=\W|$)")


@dataclass
class Report:
    """What was found in a file."""

    problems: int = 0
    seconds: float = 0.0
    domains: Counter[str] = field(default_factory=Counter)
    languages: Counter[str] = field(default_factory=Counter)  #: as found; "" if unknown
    counts: Counter[str] = field(default_factory=Counter)  #: kind of finding -> number of problems
    examples: dict[str, list[tuple[str, str]]] = field(default_factory=dict)  #: kind -> (file and line, detail)
    lengths: dict[str, array[int]] = field(default_factory=dict)  #: of what -> one length a problem

    def add(self, kind: str, where: str, detail: str = "") -> None:
        """Count a finding."""
        self.counts[kind] += 1
        kept = self.examples.setdefault(kind, [])
        if len(kept) < _KEPT_EXAMPLES:
            kept.append((where, detail))

    def measure(self, what: str, length: int) -> None:
        """Keep a length."""
        self.lengths.setdefault(what, array("I")).append(length)

    def as_record(self) -> dict[str, Any]:
        """Fit for JSON."""
        return {
            "problems": self.problems,
            "seconds": round(self.seconds, 2),
            "domains": dict(self.domains.most_common()),
            "languages": {name or "unknown": count for name, count in self.languages.most_common()},
            "lengths": {what: _summary(values) for what, values in self.lengths.items()},
            "findings": {
                kind: {
                    "meaning": meaning,
                    "count": self.counts[kind],
                    "examples": [{"where": where, "detail": detail} for where, detail in self.examples[kind]],
                }
                for kind, meaning in FINDINGS.items()
                if self.counts[kind]
            },
        }


def check_problems(config: Config, json_file: Path | None = None, runs_solutions: bool = True) -> Report:
    """Check the problems of `data.source`, and write the report as JSON if a file is named.

    Args:
        runs_solutions: run the reference solutions that records of domain code hold (`solution`, `solutions`, `code` ...).

    Raises:
        DataError: the file cannot be read, or is no list of objects.
        RewardError: a scorer cannot work here.
    """
    source = Path(config.data.source)
    if json_file is not None and json_file.exists() and source.exists() and json_file.samefile(source):
        raise ConfigError(f"--json {json_file} is the file of problems: name another one")
    started = time.monotonic()
    tokenizer = Tokenizer.load(config.data.tokenizer) if config.data.tokenizer else None
    total, has_solutions = 0, False
    for _, record in read_records(source):  # also refuses a file that cannot be read, before anything is scored
        total += 1
        has_solutions = has_solutions or (runs_solutions and bool(_solution_of(record)))
    with open_scoring(config.reward, _specs(config, has_solutions)) as scoring, Progress(total, "check problems") as progress:
        checker = _Checker(config, scoring, tokenizer, has_solutions)
        for number, (where, record) in enumerate(read_records(source), start=1):
            checker.take(record, where, f"{source.stem}-{number}")
            progress.show({"found": checker.report.counts.total()})
            progress.advance()
        report = checker.finish()
    report.seconds = time.monotonic() - started
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(json_file, json.dumps({"source": str(source), **report.as_record()}, ensure_ascii=False, indent=1) + "\n")
    return report


def render_report(report: Report, source: str) -> str:
    """Tables for people: findings with the first examples, then languages and lengths."""
    domains = ", ".join(f"{name} {count}" for name, count in report.domains.most_common())
    lines = [f"{source}: {report.problems} problems in {report.seconds:.1f} s ({domains or 'none can be used'})", ""]
    rows = [["found", "problems"], *([FINDINGS[kind], str(report.counts[kind])] for kind in FINDINGS if report.counts[kind])]
    lines += [align_table(rows, numbers=True)] if len(rows) > 1 else ["Nothing was found."]
    for kind, meaning in FINDINGS.items():
        for where, detail in report.examples.get(kind, [])[:_EXAMPLES]:
            lines.append(f"{where}: {meaning}{f': {detail}' if detail else ''}")
    languages = ", ".join(f"{name or 'unknown'} {count}" for name, count in report.languages.most_common())
    lengths = [["length", "mean", "median", "95%", "longest"]]
    for what, values in report.lengths.items():
        lengths.append([what, *(str(number) for number in _summary(values).values())])
    return "\n".join([*lines, "", f"languages: {languages or 'none'}", "", align_table(lengths, numbers=True)])


class _Checker:
    """Takes one record after the other; a bounded number of them is being scored."""

    def __init__(self, config: Config, scoring: ScoringPool, tokenizer: Tokenizer | None, has_solutions: bool) -> None:
        self.report = Report()
        self._config, self._scoring, self._tokenizer, self._has_solutions = config, scoring, tokenizer, has_solutions
        self._writer = None if tokenizer is None else PromptWriter(config.data, tokenizer)
        self._domains = accuracy_scorers(config.reward)
        self._pending: deque[tuple[Problem, dict[str, Future[Verdict]]]] = deque()
        self._questions: dict[bytes, tuple[str, bytes]] = {}  # hash of a question -> where it stands, hash of its answer
        self._normalised: dict[bytes, tuple[str, bytes]] = {}

    def take(self, record: dict[str, Any], where: str, id: str) -> None:
        """Check what needs no scorer, and start the rest."""
        report, data = self.report, self._config.data
        report.problems += 1
        domain = record.get("domain")
        if isinstance(domain, str) and domain not in self._domains and record.get("kind", "reasoning") != "general":
            report.add("no_scorer", where, f"{domain!r}: set reward.domains.{domain}")
            return
        try:
            problem = read_problem(record, data, self._domains, where, id)
        except DataError as error:
            report.add("malformed", where, str(error).removeprefix(f"{where}: "))
            return
        report.domains[problem.domain if problem.kind == "reasoning" else "general"] += 1
        self._look_for_twins(problem)
        report.measure("question, characters", len(problem.question))
        report.measure("answer, characters", len(problem.answer))
        if self._writer is not None and self._tokenizer is not None:
            try:
                tokens = len(self._writer.encode(problem)[1])
            except DataError as error:  # the template has no place for what the problem holds
                report.add("malformed", where, str(error).removeprefix(f"{where}: "))
                return
            report.measure("prompt, tokens", tokens)
            report.measure("answer, tokens", len(self._tokenizer.encode_plain(problem.answer)))
            if tokens > data.max_prompt_tokens:
                report.add("long_prompt", where, f"{tokens} tokens")
        started = self._start(problem, record)
        self._pending.append((replace(problem, question="", answer=""), started))  # while it waits, its texts are not needed
        if len(self._pending) >= _WINDOW:
            self._collect()

    def finish(self) -> Report:
        """Wait for what is being scored."""
        while self._pending:
            self._collect()
        return self.report

    def _start(self, problem: Problem, record: dict[str, Any]) -> dict[str, Future[Verdict]]:
        started = {_LANGUAGE: self._scoring.submit(_LANGUAGE, problem.question[:_READ_CHARACTERS])}
        if problem.kind == "general":
            return started
        scorer = accuracy_scorer(self._config.reward, problem)
        if scorer in _CHECKED:
            reference = accuracy_reference(self._config.reward, scorer, problem)
            started[_REFERENCES] = self._scoring.submit(_REFERENCES, scorer, reference)
            solution = _solution_of(record) if self._has_solutions and scorer == "code" else ""
            if solution:
                started[_CODE] = self._scoring.submit(_CODE, solution, reference)
        return started

    def _collect(self) -> None:
        problem, started = self._pending.popleft()
        verdicts = {name: future.result() for name, future in started.items()}
        found = (verdicts[_LANGUAGE].parts or {}).get("language", "")
        declared = problem.language.lower().replace("_", "-").partition("-")[0]
        self.report.languages[found] += 1
        if found and declared and declared != found:
            self.report.add("language", problem.where, f"{problem.language}, but most words are {found}")
        reference = verdicts.get(_REFERENCES)
        kind = _finding(reference, problem.domain, self._domains) if reference is not None else None
        if reference is not None and kind is not None:
            self.report.add(kind, problem.where, reference.detail)
        solution = verdicts.get(_CODE)
        if solution is not None and kind is None and solution.outcome != "correct":
            self.report.add("solution", problem.where, solution.detail)

    def _look_for_twins(self, problem: Problem) -> None:
        answer = _text_hash(problem.answer)
        for text, seen, kind in (
            (problem.question, self._questions, "duplicate"),
            (_normalised(problem.question), self._normalised, "near_duplicate"),
        ):
            first, its_answer = seen.setdefault(_text_hash(text), (problem.where, answer))
            if first != problem.where:
                self.report.add(kind, problem.where, f"see {first}")
                if its_answer != answer:
                    self.report.add("other_answer", problem.where, f"see {first}")
                return


def check_references(config: Config, source: ProblemSource, folder: Path) -> None:
    """Count the problems whose references no scorer can use, before a run builds its models; all ranks call it.

    It says in one line where the first ones stand, and writes them into `REPORT_FILE` of the run folder. A resumed run finds that
    file and does not check again.

    Raises:
        DataError: their share is above `reward.max_unscorable_share`.
    """

    def check() -> None:
        path = folder / REPORT_FILE
        problems = [problem for problem in source.fixed_problems() if problem.kind == "reasoning"]
        if not problems:
            return
        fingerprint = _fingerprint(config, problems)
        report = _read_report(path, fingerprint)
        if report is None:
            report = {"fingerprint": fingerprint} | _count_unusable(config, problems)
            write_atomically(path, json.dumps(report, ensure_ascii=False, indent=1) + "\n")
        count = report["unusable"]
        if not count:
            return
        first = "; ".join(f"{example['where']} ({example['detail']})" for example in report["examples"][:_EXAMPLES])
        said = f"{count} of {report['problems']} problems have a reference that no scorer can use, first {first}"
        if count > config.reward.max_unscorable_share * report["problems"]:
            raise DataError(
                f"{said}: correct them, or raise reward.max_unscorable_share={config.reward.max_unscorable_share:g};"
                f" see {path} and `megatron-r1 check-problems`"
            )
        print(f"{said}; see {path}", flush=True)

    on_rank_zero(check)


def _count_unusable(config: Config, problems: list[Problem]) -> dict[str, Any]:
    report = Report()
    checked = [(problem, accuracy_scorer(config.reward, problem)) for problem in problems]
    checked = [(problem, scorer) for problem, scorer in checked if scorer in _CHECKED]

    def references() -> Iterator[tuple[str, str, Any]]:
        for problem, scorer in checked:
            yield _REFERENCES, scorer, accuracy_reference(config.reward, scorer, problem)

    specs = {_REFERENCES: _reference_spec(config)}
    domains = accuracy_scorers(config.reward)
    if checked:
        with open_scoring(config.reward, specs) as scoring, _quiet_progress(len(checked)) as progress:
            for (problem, _), verdict in zip(checked, scoring.stream(references()), strict=True):
                kind = _finding(verdict, problem.domain, domains)
                if kind is not None:
                    report.add("unscorable", problem.where or problem.id, f"{FINDINGS[kind]}: {verdict.detail}")
                progress.advance()
    examples = [{"where": where, "detail": detail} for where, detail in report.examples.get("unscorable", [])]
    return {"problems": len(problems), "unusable": report.counts["unscorable"], "examples": examples}


def _fingerprint(config: Config, problems: list[Problem]) -> str:
    """Changes with the references and with what is asked of them."""
    rewards = config.reward
    found = hashlib.blake2b(
        json.dumps([rewards.answer_location, rewards.math.model_dump(), rewards.domains]).encode(), digest_size=8
    )
    for problem in problems:
        found.update(f"{problem.where}\0{problem.domain}\0{problem.answer}\0".encode("utf-8", "replace"))
    return found.hexdigest()


def _quiet_progress(total: int) -> Progress:
    """Of a check at the start of a run: a few seconds are not worth a line."""
    return Progress(total, "check references", enabled=total >= _MANY)


def _read_report(path: Path, fingerprint: str) -> dict[str, Any] | None:
    """What an earlier start of the run wrote about the same problems."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        return report if report["fingerprint"] == fingerprint else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _specs(config: Config, has_solutions: bool) -> dict[str, ScorerSpec]:
    specs = {
        _REFERENCES: _reference_spec(config),
        _LANGUAGE: ScorerSpec(f"{_RULES}:QuestionLanguage", config.reward.time_limit_seconds),
    }
    return specs | (scorer_specs(config.reward, [_CODE], "r1_zero") if has_solutions else {})


def _reference_spec(config: Config) -> ScorerSpec:
    settings = {"answer_location": config.reward.answer_location, "policy": config.reward.math.model_dump()}
    return ScorerSpec(f"{_RULES}:ReferenceChecker", config.reward.time_limit_seconds, settings)


def _finding(verdict: Verdict, domain: str, scorers: dict[str, str]) -> str | None:
    """The kind of finding that a verdict on a reference is; None: the reference is fine."""
    if verdict.outcome == "correct":
        return None
    is_code = scorers[domain] == "code"
    if verdict.outcome == "wrong":
        return "contradicting" if is_code else "not_itself"
    if verdict.outcome == "unscorable":
        return "unusable_tests" if is_code else "unscorable"
    return "grader"


def _solution_of(record: dict[str, Any]) -> str:
    """A response with the reference solution of a record; "" if it has none."""
    solution = reference_solution(record)
    return solution if "```" in solution or not solution else f"```\n{solution}\n```"


def _normalised(question: str) -> str:
    """A question without what two copies of it differ in: case, width, space that parts no words, quotes, signs at the end."""
    return _SPACE.sub("", " ".join(_NO_SIGN.sub("", unicodedata.normalize("NFKC", question).casefold()).split()))


def _text_hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=16).digest()


def _summary(values: array[int]) -> dict[str, int]:
    ordered = sorted(values)
    return {
        "mean": round(statistics.fmean(ordered)),
        "median": ordered[len(ordered) // 2],
        "p95": ordered[min(len(ordered) - 1, round(0.95 * len(ordered)))],
        "longest": ordered[-1],
    }
