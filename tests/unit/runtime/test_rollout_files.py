"""The files of a run's responses."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from megatron_r1.data.record_files import read_records
from megatron_r1.runtime.rollout_files import drop_rollouts_after, list_rollouts, write_rollouts
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
    write_rollouts(tmp_path, 3, [group], 10**6, 0)
    first, second = map(json.loads, (tmp_path / "rollouts" / "step_000003.jsonl").read_text(encoding="utf-8").splitlines())
    assert (first["response"], first["reward"], first["reward_details"], first["advantage"]) == ("\u4e8c", 2.0, {}, None)
    assert (second["reward_parts"], second["reward_outcomes"]) == ({"accuracy": None}, {"accuracy": "timeout"})
    assert (second["reward_details"], second["length"], second["weights_version"]) == ({"accuracy": "took too long"}, 1, 7)


def test_files_of_later_steps_are_dropped(tmp_path: Path) -> None:
    (tmp_path / "rollouts").mkdir()
    for step in (1, 2, 10):
        write_rollouts(tmp_path, step, [], 0 if step == 10 else 10**6, 0)
    drop_rollouts_after(tmp_path, 2)
    assert sorted(path.name for path in (tmp_path / "rollouts").iterdir()) == ["step_000001.jsonl", "step_000002.jsonl"]


def group_of(text: str, responses: int = 4) -> RolloutGroup:
    prompt = Prompt(id="p", question="1+1?", answer="2", text="1+1?", token_ids=(1, 2))
    return RolloutGroup(prompt, [Rollout([3], [-0.1], f"{i} {text}", True) for i in range(responses)], weights_version=0)


def test_a_large_step_is_compressed_and_reads_the_same(tmp_path: Path) -> None:
    (tmp_path / "rollouts").mkdir()
    group = group_of("\u4e8c and so on " * 100_000)
    for step, plain in ((1, 10**9), (2, 10**6)):
        assert write_rollouts(tmp_path, step, [group], plain, 0) == 0
    assert [path.name for path in list_rollouts(tmp_path)] == ["step_000001.jsonl", "step_000002.jsonl.zst"]
    plain, packed = ([record for _, record in read_records(path)] for path in list_rollouts(tmp_path))
    assert [line | {"step": 1} for line in packed] == plain and len(plain) == 4
    sizes = [path.stat().st_size for path in list_rollouts(tmp_path)]
    assert sizes[1] < sizes[0] / 4
    assert len(os.listdir(tmp_path / "rollouts")) == 2, "nothing temporary is left"


def test_the_oldest_steps_go_once_the_folder_is_too_large(tmp_path: Path) -> None:
    (tmp_path / "rollouts").mkdir()
    size = 0
    for step in range(1, 13):
        most = int(3.5 * size)
        removed = write_rollouts(tmp_path, step, [group_of("x" * 1000)], 10**9, most)
        size = size or list_rollouts(tmp_path)[0].stat().st_size
        assert removed == (1 if step > 3 else 0)
    assert [path.name for path in list_rollouts(tmp_path)] == [f"step_{step:06d}.jsonl" for step in (10, 11, 12)]
    write_rollouts(tmp_path, 13, [group_of("x" * 10_000)], 10**9, size)
    assert [path.name for path in list_rollouts(tmp_path)] == ["step_000013.jsonl"], "the latest stays, whatever its size"


def test_steps_are_in_order_beyond_six_digits_and_strangers_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "rollouts").mkdir()
    for step in (999_999, 1_000_000, 2):
        write_rollouts(tmp_path, step, [], 10**6, 0)
    for name in ("step_notes.txt", "step_000001.jsonl.tmp-7", "step_3"):
        (tmp_path / "rollouts" / name).write_text("mine")
    assert [path.name for path in list_rollouts(tmp_path)] == ["step_000002.jsonl", "step_999999.jsonl", "step_1000000.jsonl"]
    drop_rollouts_after(tmp_path, 0)
    assert len(list(tmp_path.glob("rollouts/*"))) == 3


def test_a_full_disk_leaves_no_half_a_file(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "rollouts").mkdir()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for plain in (10**9, 0):
        with pytest.raises(OSError, match="No space left"):
            write_rollouts(tmp_path, 1, [group_of("x")], plain, 0)
        assert list_rollouts(tmp_path) == []
