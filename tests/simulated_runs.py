"""Run folders of grpo whose rounds the simulator has played, so that their rates are known."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from megatron_r1.plan.simulate import Cost, Mode, Scorers, Setup, Trainer, simulate
from megatron_r1.plan.simulate_engines import EngineSpeed, PlayedEngines
from megatron_r1.plan.simulate_lengths import Lognormal, Replayed

SETUP = Setup(
    12, 4, PlayedEngines(2, 8, EngineSpeed(((1, 0.25), (2, 0.26))), dispatch="fixed", start_seconds=1.5),
    Trainer(Cost(0.5, 0.001), Cost(2.0, 0.003), sync=0.75, rest=0.125), Scorers(fixed=0.25),
)  # fmt: skip


def write_run(run: Path, setup: Setup, steps: int, seed: int = 0) -> None:
    """A run folder as grpo leaves it, but for its config."""
    rows = Lognormal(60, 0.8, 300).draw(steps * setup.prompts, setup.group_size, np.random.default_rng(seed))
    rounds = [list(rows[at : at + setup.prompts]) for at in range(0, len(rows), setup.prompts)]
    (run / "rollouts").mkdir(parents=True)
    records: list[dict[str, float]] = [{"step": 0, "seconds/step": 9.0}]  # that of evaluating
    for of, groups in zip(simulate(setup, Mode(), Replayed(rounds), steps), rounds, strict=True):
        lines = [{"prompt_id": str(n), "length": int(length)} for n, group in enumerate(groups) for length in group]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (run / f"rollouts/step_{of.number:06d}.jsonl").write_text(text, encoding="utf-8")
        parts = {"rollout": of.rollout, "reward": of.waited_for_scores, "logprob": of.logprob, "train": of.train, "sync": of.sync}
        seconds = {f"seconds/{part}": value for part, value in parts.items()}
        idle = of.engines_in_tail * of.seconds / of.rollout
        records.append({"step": of.number, **seconds, "seconds/step": of.seconds, "rollout/idle": idle})
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
