"""The comparison of a pretraining step, without a job: its bar, its jobs' command lines, its models and its blend."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import peer, pretrain_step
from benchmarks.measure import Disagreement
from megatron_r1.data.token_files import open_token_file
from megatron_r1.mcore import host
from megatron_r1.pipeline.builders.models import build_architecture

host.activate("cpu")

from benchmarks import pretrain_ranks
from benchmarks.token_blend import write_source

SIDE = {"amounts": [100, 100], "wall_seconds": [1.0, 0.5], "own_cpu_seconds": [1.0, 0.5]}


def case(speed_ratio: float, name: str = "v3, hidden 128, fp32, 1 process") -> dict[str, Any]:
    return {"workload": name, "ours": SIDE, "peer": SIDE, "speed_ratio": speed_ratio, "cpu_ratio": 0.5}


def waiting(share: float, processes: int = 2) -> dict[str, Any]:
    sizes = {"blend_bytes": 2e9, "open_seconds": 1.0, "first_wait_seconds": 0.01, "wait_share": share}
    return {"shape": "v3", "hidden": 128, "dtype": "fp32", "processes": processes, **sizes}


def test_the_bar_is_one_of_every_case_and_a_hundredth_of_the_time():
    assert pretrain_step.below_the_bar([case(1.0), case(1.3)], [waiting(0.0099)]) == []
    missed = pretrain_step.below_the_bar([case(1.2), case(0.994, "slow"), case(float("nan"), "none")], [waiting(0.01, 1)])
    assert missed == ["slow: 0.99", "none: nan", "1 processes wait 1.00% of the time for rows"]


def run_with(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: int, *results: dict[str, Any]) -> tuple[int, list[list[str]]]:
    commands: list[list[str]] = []

    def start(command: list[str], **_: Any) -> SimpleNamespace:
        commands.append(command)
        Path(command[command.index("--worker") + 1]).write_text(json.dumps(results[len(commands) - 1] | {"machine": {}}))
        return SimpleNamespace(returncode=code)

    monkeypatch.setattr(pretrain_step.subprocess, "run", start)
    argv = ["--sizes", "128", "--dir", str(tmp_path), "--out", str(tmp_path / "result.json")]
    return pretrain_step.main(argv), commands


def test_it_ends_with_0_only_where_the_bar_holds(monkeypatch, tmp_path, capsys):
    good = {"cases": [case(1.1)], "waiting": [waiting(0.001)]}
    code, commands = run_with(monkeypatch, tmp_path, 0, good, good)
    assert code == 0
    one, two = commands
    assert "torch.distributed.run" not in one and "--nproc-per-node=2" in two
    assert one[one.index("-m") + 1] == two[two.index("benchmarks.pretrain_step")] == "benchmarks.pretrain_step"
    assert all(command[command.index("--sizes") + 1] == "128" for command in commands)
    output = capsys.readouterr().out
    assert output.count("| v3, hidden 128, fp32, 1 process | 150 | 150 | 1.10 | 0.50 |") == 2 and "0.10%" in output
    content = json.loads((tmp_path / "result.json").read_text())
    assert len(content["pretrain_step"]) == len(content["waiting"]) == 2 and str(tmp_path) not in json.dumps(content)
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]

    code, _ = run_with(monkeypatch, tmp_path, 0, good, {"cases": [case(0.5, "slow one")], "waiting": [waiting(0.2)]})
    error = capsys.readouterr().err
    assert code == 1 and error.count("\n") == 1 and "slow one: 0.50; 2 processes wait 20.00%" in error
    assert len(json.loads((tmp_path / "result.json").read_text())["pretrain_step"]) == 2  # written all the same


def test_a_missing_folder_is_told_before_a_job_starts(tmp_path, capsys):
    assert pretrain_step.main(["--dir", str(tmp_path / "none")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "there is no such folder" in error


def test_a_job_that_fails_ends_it(monkeypatch, tmp_path, capsys):
    code, commands = run_with(monkeypatch, tmp_path, 3, {})
    assert code == 1 and len(commands) == 1 and "the job of 1 processes ended with code 3" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("argv", [["--shapes", "gpt"], ["--dtypes", "fp16"], ["--processes", "0"], ["--sizes", "-1"]])
def test_other_cases_are_refused(argv, capsys):
    with pytest.raises(SystemExit, match="2"):
        pretrain_step.parse_arguments(argv)
    assert "error: argument" in capsys.readouterr().err


def test_models_have_the_shape_and_grow_with_the_hidden_size():
    for hidden in (128, 512, 1024):
        v3, qwen = (
            build_architecture(pretrain_ranks.shape_config(shape, hidden, "bf16", "cpu", 0).model) for shape in ("v3", "qwen")
        )
        assert (v3.model_type, v3.experts.width, v3.intermediate_size) == ("deepseek_v3", hidden // 2, 2 * hidden)
        assert (qwen.model_type, qwen.experts, qwen.intermediate_size) == ("qwen3", None, 3 * hidden)
        assert v3.hidden_size == qwen.hidden_size == hidden and v3.num_attention_heads == qwen.num_attention_heads == hidden // 32
        assert qwen.num_key_value_heads == hidden // 64


def test_rows_are_random_and_labels_follow_them():
    rows = pretrain_ranks.random_rows(100, 3, 8, seed=1)
    assert torch.equal(rows.token_ids[:, 1:], rows.labels[:, :-1]) and rows.loss_mask.sum() == rows.num_tokens == 24
    assert not torch.equal(rows.token_ids, pretrain_ranks.random_rows(100, 3, 8, seed=2).token_ids)


def test_a_blend_of_any_size_is_made_of_whole_documents(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.token_blend._BLOCK", 5000)
    ids = {"vocab_size": 300, "eos_id": 7}
    assert write_source(tmp_path / "a", 40_000, **ids, seed=1) == open_token_file(str(tmp_path / "a")).tokens >= 40_000
    file = open_token_file(str(tmp_path / "a"))
    file._check_documents(lambda: None)
    tokens = np.fromfile(file.tokens_path, np.uint16)
    assert (
        set(np.flatnonzero(tokens == 7)) == set(file.lengths.cumsum() - 1) and tokens.max() == 299 and len(np.unique(tokens)) > 250
    )
    for name, seed, is_same in (("b", 1, True), ("c", 2, False)):
        write_source(tmp_path / name, 40_000, **ids, seed=seed)
        assert ((tmp_path / f"{name}.bin").read_bytes() == (tmp_path / "a.bin").read_bytes()) is is_same
    assert write_source(tmp_path / "d", 60, **ids, seed=1) >= 60


class Toy(torch.nn.Module):
    """What `peer_step` needs of a language model."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.scale = torch.nn.Embedding(11, 11), torch.nn.Parameter(torch.ones(11))

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> argparse.Namespace:
        assert not use_cache
        return argparse.Namespace(logits=torch.nn.functional.linear(self.embedding(input_ids) * self.scale, torch.eye(11)))


def test_the_peer_trains_and_only_autocast_computes_in_bf16():
    ids = torch.arange(10).view(2, 5)
    losses = {}
    for autocast in (False, True):
        torch.manual_seed(0)
        step = peer.peer_step(Toy(), {"input_ids": ids}, ids, autocast=autocast)
        losses[autocast] = [step()[0] for _ in range(3)]
        assert losses[autocast][0] > losses[autocast][-1]
    assert losses[False] != losses[True] and losses[False] == pytest.approx(losses[True], rel=0.02)


def test_sides_that_differ_are_not_timed(capsys):
    peer.check_agreement("x", (2.0, 1.0), (2.00005, 1.0005))
    assert "x: the first steps agree" in capsys.readouterr().out
    for ours in ((2.0002, 1.0), (2.0, 1.002), (float("nan"), 1.0), (2.0, float("nan"))):
        with pytest.raises(Disagreement, match="x: the first step of ours and of transformers differ"):
            peer.check_agreement("x", ours, (2.0, 1.0))
    peer.check_agreement("x", (2.01, 1.04), (2.0, 1.0), **pretrain_ranks.TOLERANCES["bf16"])
