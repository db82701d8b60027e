"""The responses of a run: `rollouts/step_000001.jsonl`, one JSON object a line for every response of the step."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from megatron_r1.runtime.files import write_atomically
from megatron_r1.types import RolloutGroup

FOLDER = "rollouts"


def write_rollouts(run_folder: Path, step: int, groups: Iterable[RolloutGroup]) -> None:
    """Write every response of the step with its rewards. Raises OSError."""
    lines = [json.dumps(line, ensure_ascii=False) + "\n" for group in groups for line in _lines_of_group(step, group)]
    write_atomically(run_folder / FOLDER / f"step_{step:06d}.jsonl", "".join(lines))


def drop_rollouts_after(run_folder: Path, step: int) -> None:
    """Remove the files of later steps, which will be done again. Raises OSError."""
    for path in (run_folder / FOLDER).glob("step_*.jsonl"):
        if int(path.stem.removeprefix("step_")) > step:
            path.unlink()


def _lines_of_group(step: int, group: RolloutGroup) -> Iterator[dict[str, Any]]:
    for index, rollout in enumerate(group.rollouts):
        yield {
            "step": step,
            "prompt_id": group.prompt.id,
            "question": group.prompt.question,
            "answer": group.prompt.answer,
            "response": rollout.text,
            "reward": None if group.rewards_G is None else float(group.rewards_G[index]),
            "reward_parts": {name: values[index] for name, values in group.reward_parts.items()},
            "reward_outcomes": {name: values[index] for name, values in group.reward_outcomes.items()},
            "reward_details": {name: values[index] for name, values in group.reward_details.items() if values[index]},
            "advantage": None if group.advantages_G is None else float(group.advantages_G[index]),
            "finished": rollout.finished,
            "length": len(rollout.token_ids),
            "weights_version": group.weights_version,
        }
