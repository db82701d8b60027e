"""Supervised fine-tuning on conversations."""

from __future__ import annotations

import sys
from pathlib import Path

from megatron_r1.config.schema import Config
from megatron_r1.data.chat.prompt_templates import r1_chat_jinja
from megatron_r1.data.sft import PREVIEW, SftData, prepare_sft, token_limit
from megatron_r1.pipeline.artifact import Artifact
from megatron_r1.pipeline.builders.models import build_architecture, build_policy, build_tokenizer
from megatron_r1.pipeline.session import Session
from megatron_r1.pipeline.stages.common import (
    checkpoint_writer,
    finish_stage,
    require_setting,
    resume_run,
    unless_finished,
)
from megatron_r1.runtime.distributed import failing_together, on_rank_zero
from megatron_r1.runtime.run import Run
from megatron_r1.training.sft import count_sft_updates, train_sft


def check_sft(config: Config) -> None:
    """What can be said of the settings alone. Raises ConfigError if they contradict each other."""
    token_limit(config.sft)


@unless_finished
def run_sft(config: Config, session: Session) -> Artifact:
    """Fine-tune on the conversations of `sft.sources`, else of `data.source`."""
    stage, folder = config.sft, Path(config.run_dir)
    check_sft(config)
    require_setting(
        config.data.tokenizer is not None or config.model.weights is not None,
        "sft needs a tokenizer: set data.tokenizer, or model.weights to a folder that has one",
    )
    arch = build_architecture(config.model)
    tokenizer = build_tokenizer(config.data, config.model, arch)
    with Run.open(folder, config, "sft") as run:
        on_rank_zero(lambda: prepare_sft(stage, config.data, tokenizer, folder / "data", _show_tokenised))
        with failing_together():
            data = SftData(folder / "data", stage, config.seed)
            data.check_same(run.state)
        on_rank_zero(lambda: print(f"sft: {data.describe()}; see {folder / 'data' / PREVIEW}", flush=True))
        policy = build_policy(
            config,
            session,
            arch,
            optimizer=stage.optimizer,
            moe=stage.moe,
            total_updates=count_sft_updates(stage, data),
            micro_batch_tokens=stage.micro_batch_tokens,
            packed=True,
        )
        resume_run(run, policy)
        if config.data.template in ("r1_chat", "r1_chat_think"):  # so that servers render what the model was trained on
            begins = bool(tokenizer.start_ids) or tokenizer.bos_id is None
            tokenizer = tokenizer.with_chat_template(r1_chat_jinja(config.data.template == "r1_chat_think", begins))
        train_sft(stage, policy=policy, data=data, run=run, save=checkpoint_writer(policy, tokenizer))
        inputs = {f"sft.sources.{number}": source.path for number, source in enumerate(stage.sources)}
        return finish_stage(config, "sft", policy, tokenizer, inputs)


def _show_tokenised(conversations: int) -> None:
    if conversations % 10_000 == 0:
        print(f"sft: {conversations:,} conversations tokenised", file=sys.stderr, flush=True)
