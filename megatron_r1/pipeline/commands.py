"""What each command of the command line does, given its config."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from megatron_r1.config.schema import Config
from megatron_r1.data.problems import load_problems
from megatron_r1.data.prompts import heldout_prompts
from megatron_r1.errors import ConfigError
from megatron_r1.evaluation.evaluate import evaluate as evaluate_engine
from megatron_r1.evaluation.table import render_table
from megatron_r1.pipeline.build import build_architecture, build_tokenizer, open_engine, open_rewards
from megatron_r1.pipeline.r1_zero import run_r1_zero
from megatron_r1.pipeline.session import open_session
from megatron_r1.pipeline.stages import run_grpo, run_pretrain, run_reward_model, run_sft
from megatron_r1.runtime.distributed import on_rank_zero
from megatron_r1.runtime.files import write_atomically
from megatron_r1.weights.hf import HfFolder


def pretrain(config: Config) -> None:
    """Pretrain a base model."""
    with open_session(config.runtime) as session:
        run_pretrain(config, session)


def sft(config: Config) -> None:
    """Fine-tune on prompt/response pairs."""
    with open_session(config.runtime) as session:
        run_sft(config, session)


def reward_model(config: Config) -> None:
    """Train a reward model."""
    with open_session(config.runtime) as session:
        run_reward_model(config, session)


def grpo(config: Config) -> None:
    """Train with GRPO."""
    with open_session(config.runtime) as session:
        run_grpo(config, session)


def pipeline_r1_zero(config: Config) -> None:
    """Pretrain, train with GRPO, compare."""
    with open_session(config.runtime) as session:
        run_r1_zero(config, session)


def evaluate(config: Config) -> None:
    """Measure the model in `model.weights` on held-out problems; print the table and write `evaluation.json` into `run_dir`."""
    if config.model.weights is None:
        raise ConfigError("model.weights is not set: give the Hugging Face folder to evaluate")
    with open_session(config.runtime) as session:
        arch = build_architecture(config)
        tokenizer = build_tokenizer(config, arch)
        source = load_problems(config.data)
        prompts = heldout_prompts(
            source,
            tokenizer,
            config.data.template,
            config.evaluate.problems,
            config.evaluate.seed,
            config.data.max_prompt_tokens,
        )
        folder = HfFolder(Path(config.model.weights))
        run_dir = Path(config.run_dir)
        with (
            open_rewards(config, source, run_dir / "scoring.log") as rewards,
            open_engine(config, session, arch, tokenizer, run_dir / "engine.log") as engine,
        ):
            engine.load_weights(((name, folder.read(name)) for name in folder.files), version=0)
            result = evaluate_engine(engine, prompts, rewards.collect, config.evaluate, config.rollout.max_response_tokens)

        def write() -> None:
            write_atomically(run_dir / "evaluation.json", json.dumps(asdict(result), indent=1) + "\n")
            print(render_table({config.model.weights: result}), flush=True)

        on_rank_zero(write)
