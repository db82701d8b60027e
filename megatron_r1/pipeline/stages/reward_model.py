"""Training of a reward model on preferences or on safety labels."""

from __future__ import annotations

from pathlib import Path

from megatron_r1.config.schema import Config
from megatron_r1.conversion.model_shape import find_architecture
from megatron_r1.data.preferences import READERS, split_heldout
from megatron_r1.pipeline.artifact import Artifact
from megatron_r1.pipeline.builders.models import build_reward_model, build_tokenizer
from megatron_r1.pipeline.builders.preferences import encode_examples
from megatron_r1.pipeline.session import Session
from megatron_r1.pipeline.stages.common import (
    checkpoint_writer,
    finish_stage,
    require_setting,
    resume_run,
    unless_finished,
)
from megatron_r1.runtime.run import Run
from megatron_r1.training.reward_model import count_reward_updates, train_reward_model


def check_reward_model(config: Config) -> None:
    """What can be said of the settings alone. Raises ConfigError if they contradict each other."""
    require_setting(config.data.template == "r1_chat", "data.template must be r1_chat: a reward model reads whole conversations")
    if asked_with := config.data.asked_with():
        require_setting(False, f"data.{min(asked_with)} is for prompts: a reward model reads conversations as they are; drop it")


@unless_finished
def run_reward_model(config: Config, session: Session) -> Artifact:
    """Train a reward model on the pairs or the labelled responses of `data.source`."""
    stage = config.reward_model
    check_reward_model(config)
    dialogues, heldout_dialogues = split_heldout(READERS[stage.kind](Path(config.data.source)), config.data.heldout_fraction)
    require_setting(bool(dialogues), f"data.heldout_fraction={config.data.heldout_fraction} leaves no example to train on")
    tokenizer = build_tokenizer(config.data, config.model, find_architecture(config.model))
    examples, heldout = (encode_examples(part, stage, tokenizer) for part in (dialogues, heldout_dialogues))
    with Run.open(Path(config.run_dir), config, "reward-model") as run:
        model = build_reward_model(
            config, session, label=stage.kind, optimizer=stage.optimizer, total_updates=count_reward_updates(stage, len(examples))
        )
        resume_run(run, model)
        save = checkpoint_writer(model, tokenizer)
        train_reward_model(stage, model=model, examples=examples, heldout=heldout, run=run, save=save, seed=config.seed)
        return finish_stage(config, "reward-model", model, tokenizer)
