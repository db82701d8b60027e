"""The comparison of a pretraining step: its bar, how its sides take turns, its models and its blend."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
import torch

from benchmarks import measure, peer, pretrain_rows, pretrain_step
from benchmarks.measure import Disagreement
from megatron_r1.data.token_files import open_token_file
from megatron_r1.mcore import host
from megatron_r1.pipeline.builders.models import build_architecture
from tests.paths import ROOT
from tests.patience import patient

host.activate("cpu")

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


class Ranks:
    """A side whose steps take a known time."""

    def __init__(self, seconds: float, loss: float, share: float, log: list[str]) -> None:
        self.seconds, self.loss, self.share, self.log = seconds, loss, share, log

    def __call__(self, name: str, command: list[str], ranks: int) -> Ranks:
        assert command[command.index("--sizes") + 1] == "128"
        self.name, self.ranks, self.side = name, ranks, command[-1]
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.log.append(f"{self.name} ends")

    def order(self, name: str, **values: Any) -> list[dict[str, Any]]:
        if name == "build" and self.side == "peer":
            assert "hf" in values["folder"]
            answer: dict[str, Any] = {"first": (2.0, 1.0), "transformers": {"experts": None}, "parameters": 5}
        else:
            answer = {"build": {"first": (self.loss, 1.0)}, "machine": {"cpu": "x"}, "waiting": waiting(self.share)}[name]
        return [answer] * self.ranks

    def steps(self, count: int) -> tuple[float, float]:
        self.log.append(f"{self.name} {count}")
        return count * self.seconds, count * self.seconds * self.ranks


def run_with(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *, seconds: float = 0.25, loss: float = 2.0, share: float = 0.001
) -> tuple[int, list[str]]:
    log: list[str] = []
    sides = {"ours": Ranks(seconds, loss, share, log), "transformers": Ranks(0.5, 2.0, share, log)}
    monkeypatch.setattr(pretrain_step, "SideRanks", lambda name, command, ranks: sides[name](name, command, ranks))
    case = ["--sizes", "128", "--shapes", "v3", "--dtypes", "fp32", "--turn-seconds", "1", "--repeats", "2"]
    return pretrain_step.main([*case, "--dir", str(tmp_path), "--out", str(tmp_path / "result.json")]), log


def test_sides_take_turns_of_the_same_length_and_the_bar_decides(monkeypatch, tmp_path, capsys):
    code, log = run_with(monkeypatch, tmp_path)
    assert code == 0
    turns = ["ours 1", "transformers 1", "ours 4", "transformers 2", "transformers 2", "ours 4"]
    assert log == [*turns, "transformers ends", "ours ends"] * 2
    output = capsys.readouterr().out
    assert "| v3, hidden 128, fp32, 1 process | 4,096 | 2,048 | 2.00 | 2.00 |" in output
    assert "| v3, hidden 128, fp32, 2 processes | 8,192 | 4,096 | 2.00 | 2.00 |" in output and "0.10%" in output
    content = json.loads((tmp_path / "result.json").read_text())
    assert len(content["pretrain_step"]) == len(content["waiting"]) == 2 and str(tmp_path) not in json.dumps(content)
    assert content["pretrain_step"][0]["parameters"] == 5 and "first" not in content["pretrain_step"][0]
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]

    code, _ = run_with(monkeypatch, tmp_path, seconds=1.0, share=0.2)
    error = capsys.readouterr().err
    assert code == 1 and error.count("\n") == 1 and "1 process: 0.50; " in error and "2 processes wait 20.00%" in error
    assert len(json.loads((tmp_path / "result.json").read_text())["pretrain_step"]) == 2  # written all the same


def test_sides_that_disagree_are_not_timed(monkeypatch, tmp_path, capsys):
    code, log = run_with(monkeypatch, tmp_path, loss=2.1)
    assert code == 1 and log == ["transformers ends", "ours ends"]
    assert "the first step of ours and of transformers differ" in capsys.readouterr().err


def test_a_missing_folder_is_told_before_a_job_starts(tmp_path, capsys):
    assert pretrain_step.main(["--dir", str(tmp_path / "none")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "there is no such folder" in error


def test_each_side_has_processes_of_its_own():
    ours, other = (pretrain_step.worker_command(side, ["--sizes", "128"]) for side in ("ours", "peer"))
    assert ours[1:] == ["-m", "benchmarks.pretrain_step", "--sizes", "128", "--side", "ours"] and other[-1] == "peer"
    look = "import benchmarks.pretrain_peer, sys; sys.exit(any(name.startswith('megatron.') for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", look], cwd=ROOT, check=False).returncode == 0


@pytest.mark.slow
def test_both_sides_agree_and_are_timed(tmp_path):
    case = [
        "--sizes",
        "64",
        "--shapes",
        "qwen",
        "--dtypes",
        "fp32",
        "--rows",
        "2",
        "--tokens",
        "8",
        "--gigabytes",
        "0.001",
        "--steps",
        "2",
    ]
    turns = ["--processes", "2", "--turn-seconds", "0.01", "--repeats", "1", "--out", str(tmp_path / "result.json")]
    command = [sys.executable, "-m", "benchmarks.pretrain_step", *case, *turns, "--dir", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=patient(300))
    assert "the first steps agree" in result.stdout and result.returncode in (0, 1), result.stderr
    content = json.loads((tmp_path / "result.json").read_text())
    (found,), (waits,) = content["pretrain_step"], content["waiting"]
    assert len(found["ours"]["wall_seconds"]) == len(found["peer"]["own_cpu_seconds"]) == 1 and found["processes"] == 2
    assert len(waits["step_seconds"]) == 2 and content["machine"]["threads"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


@pytest.mark.parametrize(
    "argv", [["--shapes", "gpt"], ["--dtypes", "fp16"], ["--processes", "0"], ["--sizes", "-1"], ["--turn-seconds", "0"]]
)
def test_other_cases_are_refused(argv, capsys):
    with pytest.raises(SystemExit, match="2"):
        pretrain_step.parse_arguments(argv)
    assert "error: argument" in capsys.readouterr().err


def test_models_have_the_shape_and_grow_with_the_hidden_size():
    for hidden in (128, 512, 1024):
        v3, qwen = (
            build_architecture(pretrain_rows.shape_config(shape, hidden, "bf16", "cpu", 0).model) for shape in ("v3", "qwen")
        )
        assert (v3.model_type, v3.experts.width, v3.intermediate_size) == ("deepseek_v3", hidden // 2, 2 * hidden)
        assert (qwen.model_type, qwen.experts, qwen.intermediate_size) == ("qwen3", None, 3 * hidden)
        assert v3.hidden_size == qwen.hidden_size == hidden and v3.num_attention_heads == qwen.num_attention_heads == hidden // 32
        assert qwen.num_key_value_heads == hidden // 64


def test_rows_are_random_and_labels_follow_them():
    rows = pretrain_rows.random_rows(100, 3, 8, seed=1)
    assert torch.equal(rows.token_ids[:, 1:], rows.labels[:, :-1]) and rows.loss_mask.sum() == rows.num_tokens == 24
    assert not torch.equal(rows.token_ids, pretrain_rows.random_rows(100, 3, 8, seed=2).token_ids)


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
    measure.check_agreement("x", (2.0, 1.0), (2.00005, 1.0005))
    assert "x: the first steps agree" in capsys.readouterr().out
    for ours in ((2.0002, 1.0), (2.0, 1.002), (float("nan"), 1.0), (2.0, float("nan"))):
        with pytest.raises(Disagreement, match="x: the first step of ours and of transformers differ"):
            measure.check_agreement("x", ours, (2.0, 1.0))
    measure.check_agreement("x", (2.01, 1.04), (2.0, 1.0), **pretrain_step.TOLERANCES["bf16"])
