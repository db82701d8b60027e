"""`evaluate` over published benchmarks: sample what is missing, score what is not scored, measure, write the table.

    run_dir/
        <benchmark>/responses.jsonl   every response, appended as it comes, and beside it the settings that it depends on
        <benchmark>/scores.jsonl      every response's verdict, likewise
        <benchmark>/greedy_*.jsonl    the same at temperature 0, if `greedy` is set
        results.json, results.md, config.yaml

If it is killed at any moment, the same command goes on from what is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_r1.config.evaluation import BenchmarksConfig
from megatron_r1.config.lengths import for_responses
from megatron_r1.config.load import save_config
from megatron_r1.config.schema import Config
from megatron_r1.data.chat.load import load_template
from megatron_r1.data.chat.messages import Message
from megatron_r1.data.chat.wording import Wording
from megatron_r1.errors import ConfigError
from megatron_r1.evaluation.benchmark_problems import BenchmarkProblem, digest, read_benchmark
from megatron_r1.evaluation.benchmarks import Benchmark, find_benchmarks
from megatron_r1.evaluation.measure import BenchmarkResult, measure_benchmark
from megatron_r1.evaluation.models import EndpointModel, EngineModel, Model, OnResponses, Pass
from megatron_r1.evaluation.result_files import ModelResults, write_results
from megatron_r1.evaluation.sample_ledger import open_samples, read_settings, settings_path
from megatron_r1.evaluation.score_responses import evaluation_specs, judge_votes, score_responses, vote_classes
from megatron_r1.pipeline.builders.engine_weights import load_engine, weights_fingerprint
from megatron_r1.pipeline.builders.engines import open_engine
from megatron_r1.pipeline.builders.models import build_architecture, build_tokenizer, require_weights
from megatron_r1.pipeline.builders.rewards import open_scoring
from megatron_r1.pipeline.session import Session, open_session
from megatron_r1.rewards.workers.pool import ScoringPool
from megatron_r1.runtime.launch import read_launch
from megatron_r1.runtime.ledger import Ledger
from megatron_r1.runtime.progress import Progress
from megatron_r1.runtime.run_folder import lock_folder
from megatron_r1.types import Prompt, Sampling


@dataclass(frozen=True)
class Task:
    """One benchmark of an evaluation."""

    name: str
    benchmark: Benchmark
    problems: list[BenchmarkProblem]
    samples: int


def evaluate_benchmarks(config: Config, session: Session | None = None, rescore: bool = False) -> ModelResults:
    """Measure the model on `evaluate.benchmarks.files`; print the table and write it into `run_dir`.

    Args:
        session: an open session of one process; None: one is opened if an engine is needed.
        rescore: score all kept responses again with the present settings of the rewards; nothing is sampled, no model is opened.

    Raises:
        ConfigError: settings that do not fit, or that differ from those that kept responses were sampled with.
        DataError: a malformed line of a benchmark's file or of a kept one, by file and line.
        RolloutError: the engine died or the endpoint gives no answer; the responses that came are kept.
        RewardError: the scorer of a benchmark cannot work here, e.g. because there is no sandbox.
    """
    settings = config.evaluate.benchmarks
    if read_launch().world_size != 1:
        raise ConfigError("evaluate over benchmarks is one process: spread the model with rollout.tensor_parallel_size")
    find_benchmarks(list(settings.samples))
    tasks = [
        Task(
            name,
            benchmark,
            read_benchmark(benchmark, Path(settings.files[name]), settings),
            settings.samples.get(name, benchmark.samples),
        )
        for name, benchmark in find_benchmarks(list(settings.files)).items()
    ]
    model, run_dir = _describe_model(config), Path(config.run_dir)
    # Opened before hours of sampling: a scorer that cannot work here says so as it starts.
    specs = {name: spec for task in tasks for name, spec in evaluation_specs(task.benchmark, config.reward).items()}
    with lock_folder(run_dir), open_scoring(config.reward, specs, run_dir / "scoring.log") as scoring:
        save_config(config, run_dir / "config.yaml")
        if not rescore:
            _sample_missing(config, session, tasks)
        results = {task.name: _score(config, task, scoring, rescore) for task in tasks}
        sampled = {name: getattr(settings, name) for name in ("temperature", "top_p", "max_tokens", "seed")}
        name = settings.name or settings.endpoint.model or Path(model).name
        sampled |= {"template": config.data.template} | _asked_with(config)
        measured = ModelResults(name, model, sampled, results)
        print(write_results(run_dir, measured), flush=True)
    return measured


def _describe_model(config: Config) -> str:
    endpoint = config.evaluate.benchmarks.endpoint
    if (endpoint.url is None) == (config.model.weights is None):
        raise ConfigError("evaluate needs one model: set either model.weights or evaluate.benchmarks.endpoint.url")
    return f"{endpoint.model} at {endpoint.url}" if endpoint.url else str(config.model.weights)


def _passes(settings: BenchmarksConfig, task: Task) -> Iterator[tuple[str, Sampling]]:
    """The prefix of file names and the sampling of each pass: the sampled one and, if `greedy` is set, the greedy one."""
    yield "", Sampling(task.samples, settings.temperature, settings.top_p, settings.max_tokens)
    if settings.greedy:
        yield "greedy_", Sampling(1, 0.0, 1.0, settings.max_tokens)


def _settings_of(task: Task, sampling: Sampling) -> dict[str, Any]:
    """The settings that kept responses must have been sampled with."""
    return {
        "problems": digest((problem.id, problem.question) for problem in task.problems),
        "samples": sampling.n,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_tokens": sampling.max_tokens,
    }


def _asked_with(config: Config) -> dict[str, Any]:
    """The settings beside the template that responses depend on, without those that change nothing."""
    return config.data.asked_with() | ({"stop": config.rollout.stop} if config.rollout.stop else {})


def _open_responses(folder: Path, prefix: str, settings: dict[str, Any] | None) -> Ledger:
    return open_samples(folder / f"{prefix}responses.jsonl", settings)


def _sample_missing(config: Config, session: Session | None, tasks: list[Task]) -> None:
    """Bring every ledger of responses to its full length. The model is started only if one is incomplete."""
    settings = config.evaluate.benchmarks
    identity: dict[str, Any]
    if settings.endpoint.url:
        identity = {"model": settings.endpoint.model, "template": "the endpoint's"}
    else:
        fingerprint = weights_fingerprint(require_weights(config.model, "the model to evaluate"))
        identity = {"model": fingerprint, "template": config.data.template, "responses_per_call": settings.responses_per_call}
    identity |= _asked_with(config)
    with ExitStack() as stack:
        model: Model | None = None
        for task in tasks:
            with ExitStack() as of_task:
                passes = [
                    _open_pass(config, task, prefix, sampling, identity, of_task) for prefix, sampling in _passes(settings, task)
                ]
                if any(asked.lacks(task.problems) for asked in passes):
                    model = model or stack.enter_context(_open_model(config, session, tasks))
                    model.sample(task.problems, *passes)


def _open_pass(config: Config, task: Task, prefix: str, sampling: Sampling, identity: dict[str, Any], stack: ExitStack) -> Pass:
    """A pass over a benchmark with its ledger, and its progress if something is missing; the stack closes both."""
    seed = config.evaluate.benchmarks.seed
    sampled_with = _settings_of(task, sampling) | {"seed": seed} | identity
    kept = stack.enter_context(_open_responses(Path(config.run_dir) / task.name, prefix, sampled_with))
    total, there = len(task.problems) * sampling.n, len(kept.records)
    tell: OnResponses = lambda count: None
    if there < total:
        title = f"{task.benchmark.title}{', greedy' if prefix else ''}"
        tell = stack.enter_context(Progress(total, title, initial=there)).advance
    return Pass(sampling, f"{seed} {task.name} {prefix}", kept, tell)


@contextmanager
def _open_model(config: Config, session: Session | None, tasks: list[Task]) -> Iterator[Model]:
    """The endpoint, or an engine with the weights of `model.weights`, for the block."""
    settings = config.evaluate.benchmarks
    if settings.endpoint.url:
        arguments, stop = config.data.template_arguments, config.rollout.stop
        more: dict[str, Any] = {"chat_template_kwargs": arguments} if arguments else {}  # as vLLM and SGLang have it
        more |= {"stop": stop, "include_stop_str_in_output": True} if stop else {}  # as our engines do; vLLM's
        with EndpointModel(settings.endpoint, Wording.of(config.data), more) as model:
            yield model
        return
    with nullcontext(session) if session else open_session(config.runtime) as opened:
        arch = build_architecture(config.model)
        tokenizer = build_tokenizer(config.data, config.model, arch)
        template = load_template(config.data, tokenizer)

        def make_prompt(problem: BenchmarkProblem) -> Prompt:
            ids = tuple(template.encode_prompt([Message("user", problem.question)]))
            return Prompt(problem.id, problem.question, "", tokenizer.decode_everything(ids), ids)

        prompts = [make_prompt(problem) for task in tasks for problem in task.problems]
        longest = max(prompts, key=lambda prompt: len(prompt.token_ids))
        length, positions = len(longest.token_ids), arch.max_position_embeddings
        if length + settings.max_tokens > positions:
            raise ConfigError(
                f"problem {longest.id!r} has {length} tokens: with evaluate.benchmarks.max_tokens={settings.max_tokens} of "
                f"response that is more than the model's {positions} positions; lower max_tokens"
            )
        data = config.data.model_copy(update={"max_prompt_tokens": length})
        fitting = for_responses(config.model_copy(update={"data": data}), settings.max_tokens)
        with open_engine(fitting, opened, arch, tokenizer, Path(config.run_dir) / "engine.log") as engine:
            load_engine(engine, require_weights(config.model, "the model to evaluate"), config.runtime)
            yield EngineModel(engine, make_prompt, settings.responses_per_call)


def _score(config: Config, task: Task, scoring: ScoringPool, rescore: bool) -> BenchmarkResult:
    """Score what is not scored yet, or with `rescore` everything, and measure."""
    settings, folder = config.evaluate.benchmarks, Path(config.run_dir) / task.name
    specs = evaluation_specs(task.benchmark, config.reward)
    scored_by = {
        "judge": {name: dict(spec.settings) for name, spec in specs.items()},
        "references": digest((p.id, p.reference) for p in task.problems),
    }
    with ExitStack() as stack:
        ledgers: dict[str, tuple[Ledger, Ledger]] = {}
        for prefix, sampling in _passes(settings, task):
            responses = stack.enter_context(_open_responses(folder, prefix, None))
            _require_complete(task, sampling, responses)
            path = folder / f"{prefix}scores.jsonl"
            if rescore:
                settings_path(path).unlink(missing_ok=True)
            scores = stack.enter_context(open_samples(path, scored_by, replace=True))
            if len(scores.records) < len(responses.records):
                with Progress(len(responses.records), f"{task.benchmark.title}, scoring", initial=len(scores.records)) as progress:
                    score_responses(task.benchmark, task.problems, responses, scores, scoring, progress.advance)
            ledgers[prefix] = (responses, scores)
        responses, scores = ledgers[""]
        classes, right_votes, notes = None, None, _size_notes(task)
        if task.benchmark.votes:
            classes, failed = vote_classes(task.benchmark, task.problems, task.samples, scores, scoring)
            right_votes = judge_votes(task.benchmark, task.problems, classes, scores, scoring)
            notes += [f"answers to {failed} problems could not be compared, and were counted as written"] if failed else []
        return measure_benchmark(
            task.problems,
            task.samples,
            responses,
            scores,
            classes=classes,
            right_votes=right_votes,
            greedy_scores=ledgers["greedy_"][1] if settings.greedy else None,
            resamples=settings.resamples,
            seed=settings.seed,
            notes=notes,
        )


def _require_complete(task: Task, sampling: Sampling, responses: Ledger) -> None:
    """Refuse kept responses that the config does not ask for, or too few of them: --rescore samples none."""
    known = read_settings(responses.path)
    for name, value in _settings_of(task, sampling).items():
        if known[name] != value:
            raise ConfigError(f"{responses.path} was sampled with {name}={known[name]}, the config has {value}: restore it")
    missing = len(task.problems) * sampling.n - len(responses.records)
    if missing:
        raise ConfigError(f"{responses.path} lacks {missing} responses; run the same command without --rescore to sample them")


def _size_notes(task: Task) -> list[str]:
    size = task.benchmark.size
    return [f"{len(task.problems)} problems, published with {size}"] if size not in (None, len(task.problems)) else []
