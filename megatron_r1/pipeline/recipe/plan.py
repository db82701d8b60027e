"""The run of the R1 pipeline: chooses stages, checks their settings, runs and measures each, and compares the models."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any

from megatron_r1.config.schema import Config
from megatron_r1.errors import ConfigError, DataError
from megatron_r1.pipeline.dry_run.found import DryRun
from megatron_r1.pipeline.dry_run.plan import plan_training
from megatron_r1.pipeline.recipe.folder import BASE_MODELS, Recipe
from megatron_r1.pipeline.recipe.measure import Measured, lacks_requests, measure_stage, read_measured
from megatron_r1.pipeline.recipe.report import write_comparison
from megatron_r1.pipeline.recipe.stages import STAGES
from megatron_r1.pipeline.session import Session
from megatron_r1.pipeline.stages.grpo import check_grpo
from megatron_r1.runtime.distributed import is_rank_zero, on_rank_zero


def run_recipe(config: Config, session: Session, first: str | None = None, last: str | None = None) -> None:
    """Run the stages from `first` to `last`, measure every model, check it against its gate, and compare all models.

    A finished stage is not run again.

    Raises:
        ConfigError: an unknown stage, or a stage whose inputs are not there.
        DataError: a stage misses its gate.
    """
    recipe, names = Recipe(config), chosen_stages(first, last)
    check_recipe(recipe)
    for name in names:
        stage = STAGES[name]
        for needed in stage.needs:
            if not on_rank_zero(partial(recipe.is_finished, needed)):
                raise ConfigError(f"stage {name} needs {recipe.weights(needed)}, which is not there: run stage {needed} first")
        if is_rank_zero():
            print(f"== {name}: {stage.title}", flush=True)
        stage.run(recipe, session)
        if stage.is_language_model:
            check_gate(config, name, measure_stage(recipe, name, session))
    titles = {name: stage.title for name, stage in STAGES.items() if stage.is_language_model}
    for early in on_rank_zero(lambda: _measured_early(recipe, titles)):
        measure_stage(recipe, early, session)
    on_rank_zero(lambda: write_comparison(recipe.root, titles))


def _measured_early(recipe: Recipe, stages: Iterable[str]) -> list[str]:
    """Stages that were measured before the reward models for helpfulness and safety were there."""
    if not all(recipe.artifact(kind).exists for kind in ("helpful", "safety")):
        return []
    measured = {stage: read_measured(recipe.root, stage) for stage in stages if recipe.is_finished(stage)}
    return [stage for stage, found in measured.items() if found is not None and lacks_requests(recipe, found)]


def chosen_stages(first: str | None, last: str | None) -> list[str]:
    """The names from `first` to `last`, both included.

    Raises:
        ConfigError: an unknown name, or `last` before `first`.
    """
    names = list(STAGES)
    for option, name in (("--from", first), ("--to", last)):
        if name is not None and name not in STAGES:
            raise ConfigError(f"{option} {name}: there is no such stage; the stages are {', '.join(names)}")
    start = names.index(first) if first else 0
    end = names.index(last) if last else len(names) - 1
    if end < start:
        raise ConfigError(f"--to {last} comes before --from {first}; the order is {', '.join(names)}")
    return names[start : end + 1]


def check_recipe(recipe: Recipe) -> None:
    """Check every stage's settings before the first one begins.

    Raises:
        ConfigError: an unknown stage, key or measure, or a value that does not fit.
    """
    settings = recipe.config.recipe
    for section, named in (("stages", settings.stages), ("gates", settings.gates)):
        for name in named:
            if name not in STAGES:
                raise ConfigError(f"recipe.{section}.{name}: there is no such stage; the stages are {', '.join(STAGES)}")
    for name, gate in settings.gates.items():
        for measure in gate:
            if measure not in Measured.GATED:
                raise ConfigError(f"recipe.gates.{name}.{measure}: there is no such measure; there are {', '.join(Measured.GATED)}")
    for name, stage in STAGES.items():
        of_stage = recipe.config_of(name)
        if stage.command == "grpo":
            check_grpo(of_stage)


def check_gate(config: Config, name: str, measured: Measured) -> None:
    """Raises DataError if a measure of the stage's model is below its gate."""
    for measure, least in config.recipe.gates.get(name, {}).items():
        value = getattr(measured, measure)
        if value is None or value < least:
            found = "was not measured" if value is None else f"is {value:.3f}"
            raise DataError(
                f"stage {name} misses its gate: {measure} {found}, recipe.gates.{name}.{measure} is {least}; "
                "train it longer or lower the gate"
            )


def describe_plan(config: Config, first: str | None = None, last: str | None = None, job: DryRun | None = None) -> str:
    """What a run would do, stage by stage; nothing is started.

    Args:
        job: adds what the ranks of each stage's job would do.

    Raises:
        ConfigError: see `run_recipe`; or, with the stage's name, a stage that does not fit the job.
    """
    recipe = Recipe(config)
    check_recipe(recipe)
    lines = []
    for name in chosen_stages(first, last):
        stage = STAGES[name]
        state = "finished" if recipe.is_finished(name) else "to do"
        inputs = f" from {', '.join(stage.needs)}" if stage.needs else ""
        lines.append(f"{name:<11} {state:<9} {stage.title}{inputs} -> {recipe.weights(name)}")
        if job is not None and (name not in BASE_MODELS or recipe.config_of(name).model.weights is None):
            try:
                asked = replace(job, is_measured=stage.is_language_model)
                lines += ["", plan_training(stage.command, _with_model(recipe, name), asked), ""]
            except ConfigError as error:
                raise ConfigError(f"stage {name}: {error}") from None
    return "\n".join(lines)


def _with_model(recipe: Recipe, name: str) -> Config:
    """The config of a stage with the shape of the base or student that it descends from: its own model may not be there yet."""
    model = recipe.config_of("student" if "student" in (name, *STAGES[name].needs) else "base").model
    settings: dict[str, Any] = {f"model.{field}": value for field, value in model.model_dump().items()}
    if STAGES[name].command == "reward-model":
        settings["reward_model.kind"] = name
    return recipe.config_of(name, settings)
