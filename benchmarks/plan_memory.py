"""Predicted against measured: the resident memory of runs on CPUs, what `megatron-r1 plan` says beside what the processes took.

Models of random weights, few updates, samples that are as long as the limits say; micro-batches have their default size, but for
SmolLM2's, which are so small that two ranks and an engine take 9 GB. Measured,
every half second, are the rank that takes most (VmHWM) and all processes together. There, pages that processes share count once;
Pss does not tell that of libraries, which programs of others may have open, too. The exit code is 0 only if every number is within
10%.

    python -m benchmarks.plan_memory --models tiny small --stages pretrain grpo --ranks 1 2
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml

from benchmarks.processes import ROOT, CommandFailed, with_descendants
from megatron_r1.config.load import load_config
from megatron_r1.data.tally.tokenizer import train_tally_tokenizer
from megatron_r1.errors import ConfigError
from megatron_r1.plan.job import Stage, read_job
from megatron_r1.plan.memory_cpu import plan_cpu_memory
from megatron_r1.runtime.launch import child_environment

BAR = 0.10
_POLL_SECONDS = 0.5
_PROMPT_TOKENS = 9  #: of every problem of the tally
_TALLY_TOKENS = 448  #: of the tokenizer of SFT
_SAMPLE_TOKENS = 64  #: of a sample of SFT
MODELS: dict[str, dict[str, Any]] = {
    "tiny": {"preset": "tiny"},
    "small": {"preset": "small"},
    "smollm2": {
        "preset": "llama3.1_8b",
        "overrides": {
            "vocab_size": 49152, "hidden_size": 576, "num_hidden_layers": 30, "intermediate_size": 1536,
            "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "tie_word_embeddings": True,
        },
    },
}  # fmt: skip
#: Smaller batches, and micro-batches of the largest model.
SMALLER: dict[str, dict[str, dict[str, int]]] = {
    "small": {"grpo": {"prompts_per_rollout": 4, "minibatch_size": 64}},
    "smollm2": {
        "pretrain": {"global_batch_size": 8, "micro_batch_size": 4},
        "sft": {"batch_size": 16, "micro_batch_tokens": 256, "epochs": 1},
        "grpo": {"prompts_per_rollout": 2, "minibatch_size": 32, "micro_batch_tokens": 256},
    },
}
STAGES = ("pretrain", "sft", "grpo")


@dataclass(frozen=True)
class Row:
    """Bytes of one run."""

    model: str
    stage: str
    ranks: int
    of: str  #: "rank": the one that takes most; "all": all processes
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        """Of the prediction, as a share of what was measured."""
        return self.predicted / self.measured - 1

    def describe(self) -> str:
        """A line of the table."""
        which = f"{self.model:8} {self.stage:9} {self.ranks:5} {self.of:5}"
        return f"{which} {self.predicted / 1e9:10.2f} {self.measured / 1e9:9.2f} {self.error:+7.1%}"


def config_of(model: str, stage: str, folder: Path) -> dict[str, Any]:
    """The settings of a run."""
    config: dict[str, Any] = {
        "run_dir": str(folder / "run"),
        "model": MODELS[model],
        "runtime": {"device": "cpu", "dtype": "fp32", "threads": 1},
        "data": {"source": "tally", "template": "r1_zero", "max_prompt_tokens": _PROMPT_TOKENS},
        "checkpoint": {"asynchronous": False},  # how much is there twice depends on how fast the disk is
        "evaluate": {"interval": 0, "problems": 0},
    }
    if stage == "pretrain":
        config["pretrain"] = {"steps": 3, "global_batch_size": 32}
    elif stage == "sft":
        config["data"] = {"template": "r1_chat", "tokenizer": str(folder / "tokenizer")}
        config["sft"] = {
            "sources": [{"path": str(folder / "samples.jsonl"), "format": "pair"}], "epochs": 2, "max_tokens": _SAMPLE_TOKENS,
            "overlong": "truncate",
        }  # fmt: skip
    else:
        config["grpo"] = {"rollouts": 3, "prompts_per_rollout": 8, "group_size": 16, "minibatch_size": 128}
        config["rollout"] = {"max_response_tokens": 32, "max_num_seqs": 128}
    config[stage] |= SMALLER.get(model, {}).get(stage, {})
    return config


def write_samples(target: Path, count: int = 64) -> None:
    """Pairs that are longer than a sample of SFT may be."""
    rows = [{"prompt": f"{number}+1?", "response": "1+2=3 " * _SAMPLE_TOKENS} for number in range(count)]
    target.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def predict(config: Path, stage: str, ranks: int) -> tuple[float, float]:
    """Bytes of the rank that needs most, and of all processes."""
    plan = plan_cpu_memory(read_job(load_config(config, []), cast(Stage, stage), "cpu", world_size=ranks))
    return plan.peak.device_bytes, plan.host_peak.host_bytes


def measure(config: Path, stage: str, ranks: int, log: Path) -> tuple[float, float]:
    """The same of a run.

    Raises:
        CommandFailed: it ended with another code than 0.
    """
    launcher = ["-m"] if ranks == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"]
    command = [sys.executable, *launcher, "megatron_r1.cli", stage, "--config", str(config)]
    environment = child_environment({"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
    largest = most = 0
    with log.open("wb") as output, subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output) as process:
        while process.poll() is None:
            tree = with_descendants(process.pid)
            largest = max([largest, *(kilobytes("VmHWM:", Path(f"/proc/{pid}/status")) for pid in tree)])
            most = max(most, resident_kilobytes(tree))
            time.sleep(_POLL_SECONDS)
    if process.returncode != 0:
        lines = log.read_text(errors="replace").splitlines()
        told = next((line for line in lines if "error: " in line), lines[-1] if lines else "")
        raise CommandFailed(f"{stage} on {ranks} rank(s) ended with code {process.returncode}: {told}")
    return largest * 1024, most * 1024


def resident_kilobytes(pids: list[int]) -> int:
    """Of processes together: their own pages, those that they share once, and of libraries those of the one that has most."""
    own = sum(kilobytes(key, Path(f"/proc/{pid}/smaps_rollup")) for pid in pids for key in ("Pss_Anon:", "Pss_Shmem:"))
    return own + max(kilobytes("RssFile:", Path(f"/proc/{pid}/status")) for pid in pids)


def kilobytes(key: str, path: Path) -> int:
    """The number after a key in a file of /proc; 0 if the process has ended."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(key)), 0)


def compare(model: str, stage: str, ranks: int) -> list[Row]:
    """One run beside its plan, in a folder of its own."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_samples(folder / "samples.jsonl")
        train_tally_tokenizer(_TALLY_TOKENS).save(folder / "tokenizer")
        config = folder / "config.yaml"
        config.write_text(yaml.safe_dump(config_of(model, stage, folder)), encoding="utf-8")
        predicted, measured = predict(config, stage, ranks), measure(config, stage, ranks, folder / "log")
    return [Row(model, stage, ranks, of, *both) for of, *both in zip(("rank", "all"), predicted, measured, strict=True)]


def main() -> int:
    """Print a row for every number. 0: all are within the bar."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), default=list(MODELS))
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--ranks", nargs="+", type=int, choices=(1, 2), default=[1, 2])
    asked = parser.parse_args()
    print(f"{'model':8} {'stage':9} ranks {'of':5} predicted  measured   error   (GB)")
    rows: list[Row] = []
    for model in asked.models:
        for stage in asked.stages:
            for ranks in asked.ranks:
                found = compare(model, stage, ranks)
                print("\n".join(row.describe() for row in found), flush=True)
                rows += found
    beyond = [row for row in rows if abs(row.error) > BAR]
    print(f"{len(rows) - len(beyond)} of {len(rows)} numbers within {BAR:.0%}")
    return 1 if beyond else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ConfigError, CommandFailed) as error:
        print(f"plan_memory: error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
