"""Good inputs of every kind, small ones: what the fuzzer changes."""

from __future__ import annotations

import gzip
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import yaml
from safetensors.torch import load_file, save_file

from megatron_r1.data.tally.tokenizer import train_tally_tokenizer
from tests.random_weights import full_architecture, llama_architecture, write_random_model

PROBLEMS = [
    {"question": "What is 3 + 5?", "answer": "8", "id": "a", "language": "en"},
    {"question": "What is 2 + 2?", "answer": "\\boxed{4}", "id": "b", "domain": "math"},
    {"question": "Add 1 and 9.", "answer": "10", "id": "c", "extra_info": {"index": 3, "split": "train"}},
]
CODE_PROBLEMS = [
    {"question": "Print it.", "domain": "code", "tests": [{"input": "1\n", "output": "1\n"}], "time_limit": 2},
    {"question": "Add.", "domain": "code", "tests": ["assert add(1, 2) == 3"], "entry_point": "add"},
    {"question": "Which?", "domain": "choice", "answer": "B", "choices": ["one", "two"]},
]
CONVERSATIONS: list[Any] = [
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "<think>a</think>Hello."}]},
    {"instruction": "Say it.", "input": "", "output": "It."},
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}], "weight": 1},
]
PAIRS = [
    {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello.", "rejected": "\n\nHuman: Hi\n\nAssistant: No."},
    {"prompt": "Hi", "chosen": "Hello.", "rejected": "No."},
]
RESPONSES = [
    {"response": "<think>a</think><answer>8</answer>", "answer": "8"},
    {"response": "<think>a</think><answer>\\frac12</answer>", "answer": "0.5"},
]
METRICS = [{"step": 1, "loss": 1.0, "reward/mean": 0.5}, {"step": 2, "loss": 0.5, "reward/mean": 0.6}]


class World:
    """Where the good inputs lie, and what is in them. The folder is one that the fuzzer makes for itself."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tokenizer = train_tally_tokenizer()
        #: a good model of each kind; a command that trains is given one with a NaN, and ends when it loads the weights
        self.models = {name: folder / name for name in ("v3", "llama")}
        for name, arch in (("v3", full_architecture()), ("llama", llama_architecture())):
            write_random_model(self.models[name], arch.model_copy(update={"vocab_size": 448}))
            self.tokenizer.save(self.models[name])
        self.spoilt = folder / "spoilt"
        shutil.copytree(self.models["llama"], self.spoilt)
        file = next(self.spoilt.glob("*.safetensors"))
        tensors = load_file(file)
        tensors["model.norm.weight"][0] = float("nan")
        save_file(tensors, file)
        self.config = {
            "run_dir": str(folder / "run"),
            "seed": 0,
            "model": {"weights": str(self.spoilt)},
            "runtime": {"device": "cpu", "dtype": "fp32"},
            "data": {"source": str(folder / "problems.jsonl"), "template": "r1_zero", "max_prompt_tokens": 96,
                     "heldout_fraction": 0.4},
            "grpo": {"rollouts": 2, "prompts_per_rollout": 2, "group_size": 2, "minibatch_size": 4, "optimizer": {"lr": 1e-4}},
            "sft": {"sources": [str(folder / "conversations.jsonl"), {"path": str(folder / "conversations.jsonl")}]},
            "pretrain": {"steps": 2, "optimizer": {"lr": 1e-3, "schedule": "cosine"}, "moe": {"bias_update_rate": 1e-3}},
            # Weights that a case finds in another place, or makes, lead here: no engine is started.
            "rollout": {"max_response_tokens": 16, "placement": "disaggregated", "servers": str(folder / "servers"),
                        "start_timeout_seconds": 0},
            "reward": {"accuracy_weight": 1.0, "workers": 1},
            "evaluate": {"interval": 1, "problems": 1, "samples": 1},
            "checkpoint": {"interval": 1},
        }  # fmt: skip
        (folder / "problems.jsonl").write_bytes(json_lines(PROBLEMS))
        (folder / "conversations.jsonl").write_bytes(json_lines(CONVERSATIONS[:1]))
        (folder / "pairs.jsonl").write_bytes(json_lines(PAIRS))
        (folder / "config.yaml").write_text(yaml.safe_dump(self.config))


def json_lines(records: list[Any]) -> bytes:
    """One object a line; lone surrogates and NaN as Python writes them."""
    return b"".join(json.dumps(record, default=str).encode() + b"\n" for record in records)


def parquet(records: list[Any]) -> bytes:
    """A Parquet file of records that share their fields."""
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), buffer)
    return buffer.getvalue()


def gzipped(data: bytes) -> bytes:
    """Always the same bytes for the same data."""
    return gzip.compress(data, mtime=0)


def zipped_zstd(data: bytes) -> bytes:
    """One zstd frame."""
    buffer = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(buffer, "zstd") as stream:
        stream.write(data)
    return buffer.getvalue().to_pybytes()


def csv(records: list[dict[str, Any]]) -> bytes:
    """Comma-separated values with a head line."""
    import csv as library

    buffer = io.StringIO()
    writer = library.DictWriter(buffer, ["question", "answer"], extrasaction="ignore")
    writer.writeheader()
    writer.writerows(records)
    return buffer.getvalue().encode()
