"""A tiny DeepSeek-V3's pretraining with everything that the recipe has, for the benchmark that breaks it."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import yaml

from megatron_r1.config.load import load_config
from megatron_r1.data.fill_in_middle import MARKS
from megatron_r1.data.tally.arithmetic import pretraining_document
from megatron_r1.data.tokenizer import TAGS, TALLY_PATTERN, train_tokenizer
from megatron_r1.training.pretrain_plan import PretrainPlan

RUN = Path("run")  #: the run folder, in the working folder: all runs have the same paths in their files
SOURCES = {"one": 400, "other": 300}  #: documents of each
LAYOUTS = {
    "dp2": [],
    "pp2": ["parallel.pp=2"],
    "tp2": ["parallel.tp=2"],
    "ep2": ["parallel.ep=2"],
}  #: what two ranks are told

_YARN = {"type": "yarn", "original_max_position_embeddings": 16, "mscale": 1.0, "mscale_all_dim": 1.0}
_VOCABULARY = 448
SETTINGS: dict[str, Any] = {
    "run_dir": str(RUN),
    "model": {
        "preset": "tiny",
        "overrides": {
            "num_nextn_predict_layers": 1, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 3, "kv_lora_rank": 32,
            "num_attention_heads": 2, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16,
            "max_position_embeddings": 256, "n_routed_experts": 4, "moe_intermediate_size": 16, "vocab_size": _VOCABULARY,
        },
    },
    "runtime": {"device": "cpu", "threads": 1, "heartbeat": {"interval_seconds": 1, "lost_seconds": 30}},
    "checkpoint": {"keep": 1000},  # all are compared
    "data": {
        "tokenizer": "tokenizer",
        "blend": [{"path": "one_text_document", "weight": 3.0}, {"path": "other_text_document", "weight": 1.0}],
        "split": [9, 1],
    },
    "pretrain": {
        "sequence_length": 16,
        "global_batch_size": 8,
        "micro_batch_size": 2,
        "fill_in_middle_rate": 0.3,
        "checkpoint_interval": 3,
        "ema_decay": 0.9,
        "validation": {"interval": 7, "batches": 1},
        "optimizer": {"lr": 1e-3, "warmup_steps": 4, "skip_grad_norm": 2.25},  # which some updates are above
        "moe": {"bias_update_rate": 1e-3, "aux_loss_coeff": 1e-4, "mtp_loss_scale": 0.3},
        "phases": [
            {
                "tokens": 1600,
                "batch_ramp": {"start": 4, "increment": 4, "tokens": 512},
                "learning_rate": [{"tokens": 800, "lr": 1e-3}, {"tokens": 800, "lr": 2e-4, "shape": "cosine"}],
                "mtp_loss_scale": [{"tokens": 1000, "value": 0.3}, {"value": 0.1}],
            },
            {
                "updates": 12,
                "sequence_length": 32,
                "global_batch_size": 4,
                "rope_scaling": _YARN | {"factor": 4},
                "learning_rate": [{"lr": 2e-4}],
                "bias_update_rate": [{"value": 0.0}],
                "blend": [{"path": "other_text_document", "weight": 1.0}, {"path": "one_text_document", "weight": 1.0}],
            },
            {
                "updates": 12,
                "sequence_length": 64,
                "global_batch_size": 4,
                "rope_scaling": _YARN | {"factor": 8},
                "learning_rate": [{"lr": 1e-4}],
            },
        ],
    },
}  # fmt: skip


def write_texts(folder: Path) -> None:
    """Documents of both sources, which follow from their names, and a tokenizer with the tokens of fill in the middle."""
    texts = []
    for name, count in SOURCES.items():
        rng = random.Random(name)
        documents = ["".join(pretraining_document(rng, 0.1)) for _ in range(count)]
        for tag in TAGS:
            documents = [document.replace(tag, " ") for document in documents]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
        texts += documents
    train_tokenizer(texts, _VOCABULARY, TALLY_PATTERN, MARKS[0]).save(folder / "tokenizer")


def write_settings(path: Path) -> None:
    """The settings as a file."""
    path.write_text(yaml.safe_dump(SETTINGS), encoding="utf-8")


def phase_ends(path: Path) -> list[int]:
    """The last update of every phase."""
    return [phase.last_update for phase in PretrainPlan(load_config(path).pretrain).phases]
