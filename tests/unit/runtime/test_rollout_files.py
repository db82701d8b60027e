"""The files of a run's responses."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from megatron_r1.runtime.rollout_files import drop_rollouts_after, write_rollouts
from megatron_r1.types import Prompt, Rollout, RolloutGroup


def test_a_line_holds_what_a_response_earned_and_why(tmp_path: Path) -> None:
    (tmp_path / "rollouts").mkdir()
    prompt = Prompt(id="p", question="1+1?", answer="2", text="1+1?", token_ids=(1, 2))
    group = RolloutGroup(
        prompt,
        [Rollout([3, 4], [-0.1, -0.2], "\u4e8c", True), Rollout([5], [-0.3], "x", False)],
        weights_version=7,
        rewards_G=torch.tensor([2.0, 0.0], dtype=torch.float64),
        reward_parts={"accuracy": [1.0, None]},
        reward_outcomes={"accuracy": ["correct", "timeout"]},
        reward_details={"accuracy": ["", "took too long"]},
    )
    write_rollouts(tmp_path, 3, [group])
    first, second = map(json.loads, (tmp_path / "rollouts" / "step_000003.jsonl").read_text(encoding="utf-8").splitlines())
    assert (first["response"], first["reward"], first["reward_details"], first["advantage"]) == ("\u4e8c", 2.0, {}, None)
    assert (second["reward_parts"], second["reward_outcomes"]) == ({"accuracy": None}, {"accuracy": "timeout"})
    assert (second["reward_details"], second["length"], second["weights_version"]) == ({"accuracy": "took too long"}, 1, 7)


def test_files_of_later_steps_are_dropped(tmp_path: Path) -> None:
    (tmp_path / "rollouts").mkdir()
    for step in (1, 2, 10):
        write_rollouts(tmp_path, step, [])
    drop_rollouts_after(tmp_path, 2)
    assert sorted(path.name for path in (tmp_path / "rollouts").iterdir()) == ["step_000001.jsonl", "step_000002.jsonl"]
