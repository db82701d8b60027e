"""What the commit before the move into packages wrote goes on with today's code: runs, an evaluation, a ledger, configurations.

tests/data/before_the_move/README.md says what is in the archive and how it was made.
"""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_r1 import cli
from megatron_r1.config.curation import CurationConfig, WriterConfig
from megatron_r1.config.load import load_config
from megatron_r1.curation.accept_samples import done
from megatron_r1.curation.ask_model import ServedWriter
from megatron_r1.curation.cold_start import write_cold_start
from megatron_r1.data.problem_records import Problem
from megatron_r1.rewards.protocol import Verdict
from megatron_r1.runtime import distributed
from tests.chat_server import ChatServer, Reply
from tests.paths import ROOT

ARCHIVE = ROOT / "tests/data/before_the_move/old.tar.xz"
CHECKPOINT = 4  # the step that each of the killed runs goes on from
#: Read from a clock, or nothing but rounding.
NOISE = ("seconds/", "tokens_per_second/", "flops_per_second/", "mfu/", "logprob_diff/")
#: Counted otherwise since: the tokens at which the clip binds, no longer all ratios beyond its bounds.
CHANGED = ("ratio/clipped_fraction",)
#: Another processor sums in another order. Training makes such a difference larger, by far less than a step more or less would.
TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("before_the_move")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture(autouse=True)
def in_its_folder(unpacked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the old runs were made, their paths were relative. A command is a process: it forgets where ranks met before."""
    monkeypatch.chdir(unpacked)
    monkeypatch.setattr(distributed, "_STORE", None)


def read_lines(path: str) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def compare(found: dict[str, float], expected: dict[str, float]) -> None:
    """Every metric of before is there, with its value."""
    expected = {name: value for name, value in expected.items() if not name.startswith((*NOISE, *CHANGED))}
    assert {name: found.get(name) for name in expected} == pytest.approx(expected, rel=TOLERANCE, abs=1e-6)


@pytest.mark.parametrize(("run", "command"), [("moe", "pretrain"), ("sft", "sft"), ("grpo", "grpo")])
def test_a_killed_run_goes_on_and_ends_as_it_did_with_the_old_code(run: str, command: str, capfd, monkeypatch) -> None:
    folder = Path("old") / run
    before = (folder / "metrics.jsonl").read_text().splitlines()
    rollouts = {path.name: path.read_bytes() for path in folder.glob("rollouts/step_*.jsonl")}
    kept = sum(json.loads(line)["step"] <= CHECKPOINT for line in before)
    assert 0 < kept < len(before), "a line was written after the checkpoint"

    bound = ["rollout.max_logprob_diff_mean=0.0001"] if run == "grpo" else []
    if bound:  # the gate of the log-probs stops it; with another bound on the command line alone it goes on
        assert cli.main([command, "--config", f"{folder}/config.yaml", "rollout.max_logprob_diff_mean=1e-15"]) == 1
        assert f"step {CHECKPOINT + 1}: logprob_diff/mean is " in capfd.readouterr().err
        monkeypatch.setattr(distributed, "_STORE", None)
    assert cli.main([command, "--config", f"{folder}/config.yaml", *bound]) == 0
    assert f"resuming {folder} after step {CHECKPOINT}" in capfd.readouterr().err
    after = (folder / "metrics.jsonl").read_text().splitlines()
    expected = read_lines(f"{folder}_expected.jsonl")
    assert after[:kept] == before[:kept] and len(after) == len(expected) > len(before)
    for line, wanted in zip(map(json.loads, after), expected, strict=True):
        compare(line, wanted)
    if run == "grpo":
        names = [f"step_{step:06d}.jsonl" for step in range(1, 8)]
        assert sorted(path.name for path in folder.glob("rollouts/step_*.jsonl")) == names
        assert all((folder / "rollouts" / name).read_bytes() == rollouts[name] for name in names[:CHECKPOINT])
    if run == "moe":
        mine, theirs = load_file(next(folder.glob("hf/*.safetensors"))), load_file(f"{folder}_expected.safetensors")
        assert mine.keys() == theirs.keys()
        biases = [name for name in theirs if name.endswith("e_score_correction_bias")]
        assert biases and all(torch.equal(mine[name], theirs[name]) for name in biases)
        # The balance loss, of weight 1e-4, is one of a document now and was one of a packed row: weights with next to no gradient
        # are moved differently by Adam, so all of them are compared at once (a step moves them by about 1%).
        mine, theirs = (torch.cat([weights[name].flatten() for name in sorted(theirs)]) for weights in (mine, theirs))
        assert (mine - theirs).norm() < TOLERANCE * theirs.norm()


def test_a_finished_run_is_left_alone(capfd) -> None:
    before = {path: path.stat().st_mtime_ns for path in Path("old/dense/hf").iterdir()}
    assert cli.main(["pretrain", "--config", "old/dense/config.yaml"]) == 0
    assert "old/dense/hf is finished" in capfd.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in Path("old/dense/hf").iterdir()} == before


def test_kept_responses_to_benchmarks_are_not_sampled_again(capsys) -> None:
    results = Path("old/benchmark/results.json")
    before = json.loads(results.read_text())["benchmarks"]
    with ChatServer(lambda *_: Reply(500, b"")) as server:
        command = ["evaluate", "--config", "old/benchmark/config.yaml", f"evaluate.benchmarks.endpoint.url={server.url}"]
        for again in ([], ["--rescore"]):
            results.unlink()
            assert cli.main([*command, *again]) == 0
            assert json.loads(results.read_text())["benchmarks"] == before and not server.requests
        assert cli.main([*command, "evaluate.benchmarks.temperature=1.0"]) == 2
        assert "was begun with temperature=0.6, now it is 1.0" in capsys.readouterr().err


def test_kept_answers_of_a_writer_are_not_asked_for_again() -> None:
    folder = Path("old/cold_start")
    before = (folder / "conversations.jsonl").read_text()
    (folder / "manifest.json").unlink()
    config = CurationConfig(cold_start={"ways": ["direct"]}, writer={"model": "v3"})
    problems = [Problem("p1", "What is three plus four?", "7", "en")]
    with ChatServer(lambda *_: Reply(500, b"")) as server, ServedWriter(WriterConfig(url=server.url, model="v3")) as writer:
        write_cold_start(problems, [], writer, lambda *_: done(Verdict(1.0, "correct")), folder, config, seed=0)
        assert not server.requests
    assert (folder / "conversations.jsonl").read_text() == before


def test_every_configuration_of_before_loads(unpacked: Path) -> None:
    examples, runs = sorted(unpacked.glob("examples/**/*.yaml")), sorted(unpacked.glob("old/*/config.yaml"))
    assert len(examples) == 27 and len(runs) == 5
    for path in [*examples, *runs]:
        load_config(path)
