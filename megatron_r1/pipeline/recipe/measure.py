"""How every model of the R1 pipeline is measured, on held-out problems and requests.

stage/measured/
    responses.jsonl   every sampled response with its verdicts
    measured.json     the means, written last
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from megatron_r1.config.curation import CurationConfig
from megatron_r1.config.recipe import RecipeConfig
from megatron_r1.config.schema import Config
from megatron_r1.curation.filters import first_failure
from megatron_r1.curation.forms import Form, read_sample
from megatron_r1.curation.outputs import write_json_lines
from megatron_r1.curation.records import Conversation
from megatron_r1.data.general import load_general
from megatron_r1.data.problems import load_problems
from megatron_r1.data.prompts import PromptWriter, heldout_prompts
from megatron_r1.evaluation.passk import mean
from megatron_r1.pipeline.builders.engine_weights import load_engine, weights_fingerprint
from megatron_r1.pipeline.builders.engines import open_engine
from megatron_r1.pipeline.builders.models import build_architecture, build_tokenizer
from megatron_r1.pipeline.builders.preferences import open_preferences
from megatron_r1.pipeline.builders.problems import fit_problems
from megatron_r1.pipeline.builders.rewards import open_rewards
from megatron_r1.pipeline.recipe.folder import Recipe
from megatron_r1.pipeline.session import Session
from megatron_r1.rewards.scorers import accuracy_scorers
from megatron_r1.runtime.distributed import on_rank_zero
from megatron_r1.runtime.files import write_atomically
from megatron_r1.training.outlines import stream_groups
from megatron_r1.types import RolloutGroup, Sampling

MEASURED, RESPONSES = "measured.json", "responses.jsonl"


@dataclass(frozen=True)
class Measured:
    """Means over samples, in [0, 1] unless another unit is given. None: not measured."""

    GATED: ClassVar[tuple[str, ...]] = ("pass_at_1", "format", "language", "readable", "helpful", "safe")

    model: str  #: fingerprint of the measured weights
    pass_at_1: float  #: share of samples with the right answer
    format: float | None  #: share in the format that the stage rewards; None if it rewards none
    language: float  #: words of the reasoning in the question's language, over all words
    readable: (
        float  #: share that passes the filters of cold-start data, correctness aside: one language, no repetition, a clear form
    )
    length: float  #: mean tokens of a response
    helpful: float | None = None  #: mean sigmoid of the reward model's score on held-out requests to be helpful with
    safe: float | None = None  #: share of responses to held-out requests to be careful with that the reward model calls safe


def measure_stage(recipe: Recipe, stage: str, session: Session) -> Measured:
    """Measure a stage's model unless it has been measured already. All ranks call this.

    Helpfulness and safety are measured as soon as the reward models are there.
    """
    weights, folder = recipe.weights(stage), recipe.root / stage / "measured"
    models = {kind: recipe.artifact(kind) for kind in ("helpful", "safety")}
    have_models = on_rank_zero(lambda: all(artifact.exists for artifact in models.values()))
    model = weights_fingerprint(weights)
    found = on_rank_zero(lambda: read_measured(recipe.root, stage))
    if found is not None and found.model == model and not (have_models and lacks_requests(recipe, found)):
        return found
    config = recipe.config_of(
        stage,
        {
            "model.weights": str(weights), "model.overrides": {}, "reward.language_weight": 1.0,
            "reward.model": "reward_models" if have_models else "none",
        }
        | ({f"reward.{kind}_model": str(artifact.folder) for kind, artifact in models.items()} if have_models else {}),
    )  # fmt: skip
    groups = _respond(config, weights, recipe.config.recipe, session, folder, with_requests=have_models)

    def keep() -> Measured:
        measured = _average_groups(model, config.curation, groups)
        write_json_lines(folder / RESPONSES, _lines(groups))
        write_atomically(folder / MEASURED, json.dumps(asdict(measured), indent=1) + "\n")
        return measured

    return on_rank_zero(keep)


def lacks_requests(recipe: Recipe, measured: Measured) -> bool:
    """Whether helpfulness and safety should be measured and were not, because the reward models came later."""
    return measured.helpful is None and recipe.config.recipe.requests is not None


def read_measured(root: Path, stage: str) -> Measured | None:
    """What was measured of a stage's model; None if nothing was."""
    path = root / stage / "measured" / MEASURED
    return Measured(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None


def _respond(
    config: Config, weights: Path, settings: RecipeConfig, session: Session, folder: Path, with_requests: bool
) -> list[RolloutGroup]:
    """Sample the model on held-out prompts, and score every response; the groups of all ranks on rank 0, none elsewhere."""
    source = load_problems(config.data, accuracy_scorers(config.reward))
    general = load_general(config.data.model_copy(update={"general_source": settings.requests}))
    arch = build_architecture(config.model)
    tokenizer = build_tokenizer(config.data, config.model, arch)
    writer = PromptWriter(config.data, tokenizer)
    source = fit_problems(source, writer)
    general = general and fit_problems(general, writer)
    prompts = heldout_prompts(source, writer, settings.measured_problems, config.evaluate.seed)
    if with_requests and general is not None:
        prompts += heldout_prompts(general, writer, settings.measured_requests, config.evaluate.seed)
    sampling = Sampling(
        settings.measured_samples, config.evaluate.temperature, config.evaluate.top_p, config.rollout.max_response_tokens
    )
    with ExitStack() as stack:
        preferences = stack.enter_context(open_preferences(config, session))
        rewards = stack.enter_context(open_rewards(config, session, source, folder / "scoring.log", writer.opening, preferences))
        engine = stack.enter_context(open_engine(config, session, arch, tokenizer, folder / "engine.log"))
        load_engine(engine, weights, config.runtime)
        own = engine.generate(prompts, sampling, config.evaluate.seed, rewards.submit)
        outlines = rewards.collect(own, prompts)
        return list(stream_groups([group.owner for group in outlines], own))


def _average_groups(model: str, curation: CurationConfig, groups: Sequence[RolloutGroup]) -> Measured:
    reasoning = [group for group in groups if group.prompt.kind == "reasoning"]
    rollouts = [rollout for group in reasoning for rollout in group.rollouts]

    def part(name: str, chosen: Sequence[RolloutGroup]) -> list[float]:
        return [score or 0.0 for group in chosen for score in group.reward_parts[name]]

    by_set = {
        kind: [group for group in groups if group.prompt.kind == "general" and group.prompt.preference == kind]
        for kind in ("helpful", "safety")
    }
    readable = [float(_is_readable(curation, group, rollout.text)) for group in reasoning for rollout in group.rollouts]
    return Measured(
        model,
        pass_at_1=mean(part("accuracy", reasoning)),
        format=mean(part("format", reasoning)) if all("format" in group.reward_parts for group in reasoning) else None,
        language=mean(part("language", reasoning)),
        readable=mean(readable),
        length=mean([float(len(rollout.token_ids)) for rollout in rollouts]),
        helpful=mean(part("model", by_set["helpful"])) if by_set["helpful"] else None,
        safe=mean([float(score > 0.5) for score in part("model", by_set["safety"])]) if by_set["safety"] else None,
    )


def _is_readable(curation: CurationConfig, group: RolloutGroup, response: str) -> bool:
    answer = read_sample(response, curation.rejection.answer_summary)
    if answer is None:
        return False
    filters = curation.cold_start.filters
    names = [name for name in filters.names if name not in ("correct", "first_person")]
    conversation = Conversation.of_turn(
        group.prompt.id, group.prompt.question, Form().join(answer), domain="math", language=group.prompt.language
    )
    return first_failure(conversation, filters.model_copy(update={"names": names}), Form()) is None


def _lines(groups: Sequence[RolloutGroup]) -> list[dict[str, Any]]:
    return [
        {
            "prompt_id": group.prompt.id, "question": group.prompt.question, "answer": group.prompt.answer,
            "response": rollout.text, "tokens": len(rollout.token_ids),
            **{name: row[i] for name, row in group.reward_parts.items()},
        }
        for group in groups
        for i, rollout in enumerate(group.rollouts)
    ]  # fmt: skip
