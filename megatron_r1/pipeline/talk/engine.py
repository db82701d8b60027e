"""The engine of `chat` and `generate`: started, and given the weights."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from megatron_r1.errors import RolloutError
from megatron_r1.pipeline.builders.engine_weights import open_weights
from megatron_r1.pipeline.builders.engines import open_lone_engine
from megatron_r1.pipeline.talk.model import TalkModel
from megatron_r1.rollout.vllm_client import VllmProcessEngine


@contextmanager
def open_talk_engine(model: TalkModel) -> Iterator[VllmProcessEngine]:
    """An engine with the model's weights for the block. Its log stays where an error names it.

    Raises:
        R1Error: it did not start, or the weights cannot be read.
    """
    folder = Path(tempfile.mkdtemp(prefix="megatron_r1-talk-"))
    dtype = torch.bfloat16 if model.config.runtime.dtype == "bf16" else torch.float32
    names_log = False
    try:
        engine = open_lone_engine(model.config, model.device.kind, model.arch, model.tokenizer, folder / "engine.log")
        try:
            engine.load_weights(open_weights(model.folder, dtype), version=0)
            yield engine
        finally:
            engine.close()
    except RolloutError:
        names_log = True
        raise
    finally:
        if not names_log:
            shutil.rmtree(folder, ignore_errors=True)
