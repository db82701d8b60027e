"""What each command of the command line does, given its config."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

from megatron_r1.config.load import load_config, override_config
from megatron_r1.config.schema import Config
from megatron_r1.curation.curate import curate_files
from megatron_r1.data.prompts import PromptWriter, heldout_prompts
from megatron_r1.errors import ConfigError
from megatron_r1.evaluation.heldout import evaluate_heldout
from megatron_r1.evaluation.heldout_table import EVALUATION, render_heldout, render_table
from megatron_r1.evaluation.recipe_table import render_recipe_table
from megatron_r1.evaluation.result_files import named_results
from megatron_r1.pipeline.builders.engine_weights import load_engine
from megatron_r1.pipeline.builders.engines import open_engine
from megatron_r1.pipeline.builders.models import build_architecture, build_tokenizer, require_weights
from megatron_r1.pipeline.builders.pretrain_rows import PretrainData
from megatron_r1.pipeline.builders.problems import build_problems
from megatron_r1.pipeline.builders.rewards import check_custom_rewards, open_rewards
from megatron_r1.pipeline.evaluate import evaluate_benchmarks
from megatron_r1.pipeline.recipe.plan import run_recipe
from megatron_r1.pipeline.session import open_session
from megatron_r1.pipeline.stages.pretrain import check_length, check_pretrain, phase_architecture
from megatron_r1.runtime.distributed import on_rank_zero
from megatron_r1.runtime.files import write_atomically
from megatron_r1.runtime.run_folder import command_of_run
from megatron_r1.training.pretrain import count_steps


def run_recipe_command(config: Config, first: str | None, last: str | None) -> None:
    """The R1 recipe's stages from `first` to `last`, and the table that compares them."""
    with open_session(config.runtime) as session:
        check_custom_rewards(config.reward)
        run_recipe(config, session, first, last)


def run_build_index(config: Config) -> None:
    """Make the indices of `data.blend` that pretraining with these settings reads, so that no job waits for them."""
    if not config.data.blend:
        raise ConfigError("data.blend is empty: only tokenised documents have an index")
    plan, arch = check_pretrain(config), build_architecture(config.model)
    for phase in plan.phases:
        check_length(phase, phase_architecture(arch, phase))
    with open_session(config.runtime):
        tokenizer = build_tokenizer(config.data, config.model, arch)
        data = PretrainData(config, tokenizer, plan)
        on_rank_zero(lambda: print(data.describe_index(), flush=True))


def show_samples(run_dir: Path, step: int) -> None:
    """Print the texts that a step of a pretraining run trained on, row by row, each document with its source.

    Raises:
        ConfigError: no pretraining run, or one without this step.
        DataError: its data are not there any more.
    """
    path = run_dir / "config.yaml"
    config = override_config(load_config(path), {"run_dir": str(run_dir), "runtime.device": "cpu"}, f"in {path}")
    config = override_config(config, {"pretrain.mask_documents": False, "pretrain.validation.interval": 0}, f"in {path}")
    if command_of_run(run_dir) != "pretrain":
        raise ConfigError(f"{run_dir} is no run of pretrain: only its samples can be made again from the settings")
    plan = check_pretrain(config)
    last = count_steps(config.pretrain, plan.total_updates, gated=config.pretrain.gate_accuracy > 0)[-1]
    if not 0 < step <= last:
        raise ConfigError(f"{run_dir} has steps 1 to {last}, and no step {step}")
    with open_session(config.runtime):
        tokenizer = build_tokenizer(config.data, config.model, build_architecture(config.model))
        update = plan.update(step)
        rows, _ = PretrainData(config, tokenizer, plan).of_phase(update.phase)
        for number in update.rows:
            micro_batch = rows.micro_batch([number])
            tokens = micro_batch.token_ids[0]
            ends = [*((tokens == tokenizer.eos_id).nonzero()[:, 0] + 1).tolist(), len(tokens)]
            for start, end in pairwise(sorted({0, *ends})):
                text = tokenizer.decode_everything(tokens[start:end].tolist())
                print(f"--- row {number}, token {start}: {rows.name_of(micro_batch, 0, start)}\n{text}", flush=True)


def run_rescore_command(config: Config) -> None:
    """Score the kept responses to benchmarks again."""
    if not config.evaluate.benchmarks.files:
        raise ConfigError("--rescore needs evaluate.benchmarks.files: responses to held-out problems are not kept")
    evaluate_benchmarks(config, rescore=True)


def print_result_tables(runs: Sequence[str]) -> None:
    """Print what was measured in these run folders, each given as RUN or NAME=RUN.

    Evaluations on benchmarks are shown in the recipe's tables; those on held-out problems side by side.

    Raises:
        DataError: a folder holds no finished evaluation, or those of the folders cannot be compared.
    """
    pairs = [(name or None, Path(run)) for name, _, run in (text.rpartition("=") for text in runs)]
    if any((run / EVALUATION).is_file() for _, run in pairs):
        print(render_heldout({name or run.name: run / EVALUATION for name, run in pairs}), flush=True)
    else:
        print(render_recipe_table(named_results(pairs)), flush=True)


def run_curate_command(config: Config) -> None:
    """Make supervised data from `curation.inputs` in `run_dir`, and print the counts."""
    print(curate_files(config.curation, config.seed, Path(config.run_dir)), end="", flush=True)


def run_evaluate_command(config: Config) -> None:
    """Measure a model on the benchmarks of `evaluate.benchmarks.files`, or, without them, on held-out problems of `data.source`.

    With held-out problems it prints the table and writes `evaluation.json` into `run_dir`.
    """
    if config.evaluate.benchmarks.files:
        evaluate_benchmarks(config)
        return
    if not config.evaluate.problems:
        raise ConfigError("evaluate.problems=0 leaves nothing to evaluate on: raise it, or set evaluate.benchmarks.files")
    weights = require_weights(config.model, "the model to evaluate")
    with open_session(config.runtime) as session:
        check_custom_rewards(config.reward)
        arch = build_architecture(config.model)
        tokenizer = build_tokenizer(config.data, config.model, arch)
        writer = PromptWriter(config.data, tokenizer)
        source = build_problems(config, writer)
        prompts = heldout_prompts(source, writer, config.evaluate.problems, config.evaluate.seed)
        run_dir = Path(config.run_dir)
        with (
            open_rewards(config, session, source, run_dir / "scoring.log", writer.opening) as rewards,
            open_engine(config, session, arch, tokenizer, run_dir / "engine.log") as engine,
        ):
            load_engine(engine, weights, config.runtime)
            max_tokens = config.rollout.max_response_tokens
            result = evaluate_heldout(engine, prompts, rewards.collect, config.evaluate, max_tokens, rewards.submit)

        def write() -> None:
            write_atomically(run_dir / EVALUATION, json.dumps(asdict(result), indent=1) + "\n")
            print(render_table({str(config.model.weights): result}), flush=True)

        on_rank_zero(write)
