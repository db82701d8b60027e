"""The example's whole R1 recipe with few steps, for the benchmarks that break it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from benchmarks.processes import ROOT

SMALLER: dict[str, Any] = {
    "pretrain": {"steps": 900, "gate_accuracy": 0.0, "checkpoint_interval": 50},
    "checkpoint": {"interval": 2},
    "curation": {"mix": {"max_copies": 1000}},  # few samples are right
    "recipe": {
        "gates": {}, "cold_start_prompts": 256, "cold_start_problems": 64, "rejection_prompts": 256, "measured_problems": 32,
        "measured_requests": 16, "measured_samples": 2,
        "stages": {
            "zero": {"grpo": {"rollouts": 8}},
            "stage1": {"sft": {"epochs": 3}, "checkpoint": {"interval": 20}},
            "stage2": {"grpo": {"rollouts": 5}},
            "stage3": {"sft": {"epochs": 2}, "checkpoint": {"interval": 20}},
            "stage4": {"grpo": {"rollouts": 5, "general_updates": 6}},
            "student": {"pretrain": {"steps": 300}},
            "distill": {"checkpoint": {"interval": 20}},
            "student_rl": {"grpo": {"rollouts": 4}},
        },
    },
}  # fmt: skip


def write_small_recipe(target: Path, url: str) -> None:
    """`examples/tiny_cpu/r1.yaml` with fewer steps, no gates and another judge's address."""
    text = (ROOT / "examples/tiny_cpu/r1.yaml").read_text(encoding="utf-8").replace("http://127.0.0.1:8901/v1", url)
    target.write_text(yaml.safe_dump(_merged(yaml.safe_load(text), SMALLER), allow_unicode=True), encoding="utf-8")


def _merged(settings: dict[str, Any], others: dict[str, Any]) -> dict[str, Any]:
    both = {
        name: _merged(settings.get(name, {}), value) if isinstance(value, dict) and value else value
        for name, value in others.items()
    }
    return settings | both
