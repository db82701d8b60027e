"""The data of the R1 pipeline's stages 1 and 3: sampled from the model before, written by a served model, filtered and mixed.

    stage1/zero/        R1-Zero's samples, those kept            stage3/samples/        Dev2's samples, those kept
    stage1/cold_start/  cleaned, rewritten, checked again        stage3/non_reasoning/  with a chain of thought for some
    stage1/review/      for people, if recipe.review is on       stage3/curated/        filtered, deduplicated, mixed

Everything here runs on rank 0; the other ranks take part in sampling only. "R1 v2" is DeepSeek-R1 (arXiv 2501.12948v2).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from megatron_r1.config.curation import CurationConfig, WriterConfig
from megatron_r1.config.lengths import for_responses
from megatron_r1.config.schema import Config
from megatron_r1.curation.accept_samples import Check, answer_check
from megatron_r1.curation.ask_model import ServedWriter
from megatron_r1.curation.cold_start import write_cold_start
from megatron_r1.curation.curate import CURATED, curate_files
from megatron_r1.curation.filters import FilterConfig
from megatron_r1.curation.forms import Form
from megatron_r1.curation.non_reasoning import write_non_reasoning
from megatron_r1.curation.outputs import KEPT, write_json_lines
from megatron_r1.curation.records import read_file
from megatron_r1.curation.rejection import sample_and_keep
from megatron_r1.curation.review import apply_decisions, export_review, read_decisions
from megatron_r1.data.problem_records import Problem
from megatron_r1.data.problems import ProblemSource, load_problems
from megatron_r1.data.prompts import PromptWriter
from megatron_r1.errors import ConfigError
from megatron_r1.pipeline.builders.engine_weights import weights_fingerprint
from megatron_r1.pipeline.builders.models import build_architecture, build_tokenizer
from megatron_r1.pipeline.builders.rewards import open_domain_scoring
from megatron_r1.pipeline.recipe.folder import Recipe
from megatron_r1.pipeline.recipe.rank_zero_engine import OpenEngine, with_engines
from megatron_r1.pipeline.session import Session
from megatron_r1.rewards.judge.preference import Judge
from megatron_r1.rewards.scorers import accuracy_scorers

DECISIONS = "decisions.jsonl"
_SEEDS = {"cold_start": 1, "direct": 2, "rejection": 3}  # added to the run's seed: other problems than in RL, if there are enough


def make_cold_start(recipe: Recipe, session: Session) -> Path:
    """Cold-start conversations for stage 1 (R1 v2 B.3.2). Returns their file.

    Raises:
        ConfigError: there is no endpoint of a model that should write; or `recipe.review` is on and there are no decisions yet.
        DataError: nothing is accepted.
    """
    zero = weights_fingerprint(recipe.weights("zero"))
    return with_engines(session, lambda open_engine: _make_cold_start(recipe, open_engine, zero))


def make_curated(recipe: Recipe, session: Session) -> Path:
    """Stage 3's supervised data: rejection samples of Dev2 and non-reasoning conversations, curated. Returns their file."""
    policy = weights_fingerprint(recipe.weights("stage2"))
    return with_engines(session, lambda open_engine: _make_curated(recipe, open_engine, policy))


def cold_start_path(recipe: Recipe) -> Path:
    """Where `make_cold_start` writes what stage 1 is trained on."""
    return recipe.root / "stage1" / ("review" if recipe.config.recipe.review else "cold_start") / KEPT


def curated_path(recipe: Recipe) -> Path:
    """Where `make_curated` writes."""
    return recipe.root / "stage3" / "curated" / CURATED


def _make_cold_start(recipe: Recipe, open_engine: OpenEngine, fingerprint: str) -> Path:
    config, root = recipe.config_of("stage1"), recipe.root / "stage1"
    source, settings = load_problems(config.data, accuracy_scorers(config.reward)), recipe.config.recipe
    zero = recipe.config_of("zero", {"model.weights": str(recipe.weights("zero")), "model.overrides": {}})
    # Samples that left the question's language are kept: a model translates them.
    readable = config.curation.filters.model_copy(update={"names": ["well_formed", "correct", "repetition"]})
    problems = draw_problems(source, settings.cold_start_prompts, config.seed + _SEEDS["cold_start"])
    _sample_stage(zero, fingerprint, open_engine, problems, root / "zero", config, readable)
    traces = list(read_file(root / "zero" / KEPT))
    asked = draw_problems(source, settings.cold_start_problems, config.seed + _SEEDS["direct"])
    with _open_writer(config.curation.writer) as writer, _open_check(config, source, root / "scoring.log") as check:
        write_cold_start(asked, traces, writer, check, root / "cold_start", config.curation, config.seed)
    return _review(root, config.curation) if settings.review else root / "cold_start" / KEPT


def _review(root: Path, curation: CurationConfig) -> Path:
    """Hand the conversations to people, and return the file of those that they accepted."""
    conversations, form = list(read_file(root / "cold_start" / KEPT)), Form.of(curation)
    decisions = root / "review" / DECISIONS
    if not decisions.is_file():
        page = export_review(conversations, root / "review", form)
        raise ConfigError(f"recipe.review: open {page}, decide, save the decisions as {decisions} and start again")
    kept, counts = apply_decisions(conversations, read_decisions(decisions, [c.id for c in conversations]), form)
    print(f"review: {', '.join(f'{count} {choice}' for choice, count in counts.items())}", flush=True)
    target = root / "review" / KEPT
    write_json_lines(target, (conversation.to_json() for conversation in kept))
    return target


def _make_curated(recipe: Recipe, open_engine: OpenEngine, fingerprint: str) -> Path:
    root, settings = recipe.root / "stage3", recipe.config.recipe
    config = recipe.config_of("stage3", {"model.weights": str(recipe.weights("stage2")), "model.overrides": {}})
    problems = draw_problems(
        load_problems(config.data, accuracy_scorers(config.reward)), settings.rejection_prompts, config.seed + _SEEDS["rejection"]
    )
    judged = round(settings.judged_share * len(problems))
    problems = [replace(problem, domain="logic") for problem in problems[:judged]] + problems[judged:]
    _sample_stage(config, fingerprint, open_engine, problems, root / "samples", config)
    inputs = [root / "samples" / KEPT]
    if settings.non_reasoning is not None:
        with _open_writer(config.curation.writer) as writer:
            write_non_reasoning(Path(settings.non_reasoning), writer, root / "non_reasoning", config.curation, config.seed)
        inputs.append(root / "non_reasoning" / KEPT)
    print(
        curate_files(config.curation.model_copy(update={"inputs": list(map(str, inputs))}), config.seed, root / "curated"),
        flush=True,
    )
    return curated_path(recipe)


def _sample_stage(
    policy: Config,
    fingerprint: str,
    open_engine: OpenEngine,
    problems: Sequence[Problem],
    folder: Path,
    stage: Config,
    filters: FilterConfig | None = None,
) -> None:
    """Sample the model in `policy.model.weights` on the problems and keep what `stage` asks for."""
    arch = build_architecture(policy.model)
    tokenizer = build_tokenizer(policy.data, policy.model, arch)
    writer = PromptWriter(policy.data, tokenizer)
    prompts = writer.write_fitting(problems)
    sampled_by = " ".join([fingerprint, *(f"until {text!r}" for text in policy.rollout.stop)])
    if len(prompts) < len(problems):
        print(f"{folder}: {len(problems) - len(prompts)} problems have prompts longer than data.max_prompt_tokens", flush=True)
    source = load_problems(policy.data, accuracy_scorers(policy.reward))
    with (
        _open_check(policy, source, folder.with_suffix(".scoring.log"), writer.opening) as check,
        open_engine(for_responses(policy, stage.curation.rejection.max_tokens), folder.with_suffix(".engine.log")) as engine,
    ):
        kept = sample_and_keep(engine, check, prompts, folder, stage.curation, policy.seed, policy=sampled_by, filters=filters)
    print(f"{folder}: {json.dumps(vars(kept))}", flush=True)


def draw_problems(source: ProblemSource, count: int, seed: int) -> list[Problem]:
    """`count` different training problems, or all of them if a file has fewer."""
    chosen: dict[str, Problem] = {}
    available = sum(problem.kind == "reasoning" for problem in source.fixed_problems()) or count
    for position in range(20 * count):
        if len(chosen) == min(count, available):
            break
        problem = source.train(position, seed)
        if problem.kind == "reasoning":
            chosen.setdefault(problem.id, problem)
    return list(chosen.values())


@contextmanager
def _open_check(config: Config, source: ProblemSource, log: Path, opening: str = "") -> Iterator[Check]:
    """How responses are checked: by rule, and by the judge if one is set."""
    with ExitStack() as stack:
        scoring = stack.enter_context(open_domain_scoring(config, source.domains(), log, opening))
        judge = stack.enter_context(Judge(config.reward.judge)) if config.reward.judge.url else None
        yield answer_check(scoring, judge, config.reward, opening)


@contextmanager
def _open_writer(settings: WriterConfig) -> Iterator[ServedWriter | None]:
    if settings.url is None:
        yield None
        return
    with ServedWriter(settings) as writer:
        yield writer
