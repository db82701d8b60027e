"""The comparison with TRL, without TRL: that both sides are asked for the same, and that nothing else is called a result."""

from __future__ import annotations

import argparse
import inspect
import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from benchmarks import measure, rl_step
from benchmarks.against_trl import environment
from benchmarks.against_trl import ours as our_side
from benchmarks.against_trl.folder import link_given_folder, make_random_folder
from benchmarks.against_trl.sides import RunningSide, Turn
from benchmarks.against_trl.workloads import WORKLOADS, Workload, kv_cache_bytes, our_config, sums, trl_settings
from benchmarks.measure import Comparison, Disagreement, Side
from benchmarks.processes import CommandFailed
from megatron_r1.config.data import DataConfig
from megatron_r1.config.load import load_config
from megatron_r1.config.schema import Config
from megatron_r1.data.problems import load_problems
from megatron_r1.data.prompts import PromptStream, PromptWriter
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.errors import ConfigError
from megatron_r1.pipeline.builders.models import build_architecture, build_tokenizer
from megatron_r1.pipeline.stages.grpo import check_grpo
from megatron_r1.runtime.run import Run
from tests.random_weights import llama_architecture, qwen2_architecture

SIDE = """
import os, sys
from benchmarks.against_trl.gate import Gate
gate, report = Gate(int(sys.argv[1]), int(sys.argv[2])), {}
while (command := gate.wait(report)) != "end":
    if command == "die":
        raise ValueError("no such thing")
    if command == "be killed":
        os.kill(os.getpid(), 9)
    kept, report = bytearray(100 << 20), {"lengths": [3], "was": command}
    sum(range(10_000_000))
open(sys.argv[3], "w").close()
"""


def side(tmp_path: Path) -> RunningSide:
    return RunningSide("a side", [sys.executable, "-c", SIDE], [str(tmp_path / "ended")], {}, tmp_path / "side.log")


@pytest.mark.parametrize("workload", WORKLOADS.values(), ids=WORKLOADS)
def test_both_sides_are_asked_for_the_same_round(workload, tmp_path: Path) -> None:
    folders = {"run_dir": tmp_path / "run", "model": tmp_path, "data": DataConfig(max_prompt_tokens=64)}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(our_config(workload, **folders, threads=1, seed=3)))
    config = load_config(tmp_path / "config.yaml")
    check_grpo(config)
    choices = [trl_settings(workload, output=tmp_path, batch=batch, seed=3) for batch in workload.trl_batches]
    assert len({settings["per_device_train_batch_size"] for settings in choices}) == 2
    for settings in choices:
        check_settings(workload, settings, config)


def check_settings(workload: Workload, settings: dict[str, Any], config: Config) -> None:
    batch, group = settings["per_device_train_batch_size"], settings["num_generations"]
    assert batch * settings["steps_per_generation"] == group * config.grpo.prompts_per_rollout
    assert batch * settings["gradient_accumulation_steps"] == config.grpo.minibatch_size
    assert settings["steps_per_generation"] % settings["gradient_accumulation_steps"] == 0
    assert (group, settings["max_completion_length"]) == (config.grpo.group_size, config.rollout.max_response_tokens)
    assert (settings["beta"], settings["learning_rate"]) == (config.grpo.kl_coef, config.grpo.optimizer.lr)
    assert workload.updates == config.grpo.updates_per_rollout and config.seed == settings["seed"] == 3
    assert config.runtime.threads == 1


def test_the_chosen_threads_are_not_written() -> None:
    config = our_config(WORKLOADS["tiny"], run_dir=Path("r"), model=Path("m"), data=DataConfig(), threads=None, seed=0)
    assert "threads" not in config["runtime"]


def test_the_cache_holds_a_round() -> None:
    smollm2 = WORKLOADS["mixed"]  # 30 layers, keys and values of 3 heads of 64 numbers of 4 bytes
    assert kv_cache_bytes(smollm2, 64) == int(1.1 * 4 * 2 * 3 * 64 * 30 * 32 * (64 + 256))
    assert kv_cache_bytes(WORKLOADS["tiny"], 16) == int(1.1 * 4 * (512 + 64) * 3 * 256 * (16 + 32))
    assert kv_cache_bytes(replace(smollm2, prompts=1, tokens=1), 1) == 64 << 20


@pytest.mark.parametrize("terms", [None, (2, 3)])
def test_prompts_of_every_round_are_those_of_the_run(terms: tuple[int, int] | None, tmp_path: Path) -> None:
    arch = llama_architecture().model_copy(update={"vocab_size": 460})
    workload = replace(WORKLOADS["smollm2"], arch=arch, terms=terms, prompts=2)
    arguments = rl_step.parse_arguments(["--repeats", "1"])
    folder, prompts, data = rl_step.prepare(workload, arguments, tmp_path)
    config = Config(data=data, model={"weights": str(folder)})
    tokenizer = build_tokenizer(config.data, config.model, build_architecture(config.model))
    of_run = PromptStream(load_problems(config.data), PromptWriter(config.data, tokenizer), config.seed)
    assert prompts == of_run.next(8) and len({prompt.text for prompt in prompts}) > 4


def test_sums_are_right_and_repeat() -> None:
    problems = sums(20, (3, 5), seed=1)
    assert problems == sums(30, (3, 5), seed=1)[:20] != sums(20, (3, 5), seed=2)
    for problem in problems:
        written = problem["question"].removeprefix("Total ").removesuffix("?")
        assert str(eval(written)) == problem["answer"] and 2 <= sum(map(written[1:].count, "+-")) <= 4


@pytest.mark.parametrize("arch", [qwen2_architecture(tied=True), llama_architecture()], ids=["tied", "untied"])
@pytest.mark.parametrize("mixed", [True, False])
def test_random_weights_end_as_often_as_asked(arch, mixed: bool, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    arch = arch.model_copy(update={"vocab_size": 460})
    workload = replace(WORKLOADS["mixed"], arch=arch, tokens=60, mixed=mixed)
    folder = make_random_folder(tmp_path / "model", workload, seed=0)
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.vocab_size == 460 and tokenizer.decode([459, 458]) == "word459word458"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    token_ids = torch.randint(3, 460, (4, 60), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ends = model(token_ids).logits.softmax(-1)[..., tokenizer.eos_id]
    if mixed:
        assert ends.mean().item() == pytest.approx(1 / 20, rel=0.3) and ends.std() < ends.mean()
    else:
        assert ends.max() < 1e-9
        given = link_given_folder(tmp_path / "mixed", folder, [(5, 6)], mixed=True)
        assert Tokenizer.load(given).eos_id == tokenizer.eos_id and all(path.is_symlink() for path in given.iterdir())
        with pytest.raises(ConfigError, match="no unused special token"):
            link_given_folder(tmp_path / "fixed", folder, [(5, 6)], mixed=False)


def test_a_given_model_ends_fixed_responses_with_a_token_of_its_own(tmp_path: Path) -> None:
    workload = replace(WORKLOADS["smollm2"], arch=qwen2_architecture().model_copy(update={"vocab_size": 460}))
    folder = make_random_folder(tmp_path / "model", workload, seed=0)
    state = json.loads((folder / "tokenizer.json").read_text())
    tags = [token for token in state["added_tokens"] if token["content"] in ("<think>", "</think>")]
    for token in tags:
        token["special"] = True
    (folder / "tokenizer.json").write_text(json.dumps(state))
    used, free = tags
    linked = link_given_folder(tmp_path / "linked", folder, [(5, used["id"])], mixed=False)
    assert Tokenizer.load(linked).eos_id == free["id"]
    assert json.loads((linked / "config.json").read_text())["eos_token_id"] == free["id"]
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] != free["id"], "the given folder was changed"


def test_what_stands_in_for_a_runs_methods_takes_what_they_take(tmp_path: Path, monkeypatch) -> None:
    for name in ("steps", "save_rollouts"):
        monkeypatch.setattr(Run, name, getattr(Run, name))  # put back at the end
    before = {name: list(inspect.signature(getattr(Run, name)).parameters) for name in ("steps", "save_rollouts")}
    our_side.take_turns(None, tmp_path / "check.json", 2, 0)
    for name, parameters in before.items():
        assert list(inspect.signature(getattr(Run, name)).parameters) == parameters, name
        assert getattr(Run, name).__module__ == our_side.__name__


def test_a_side_waits_for_its_turns(tmp_path: Path) -> None:
    with side(tmp_path) as running:
        assert running.started().report == {}
        turn = running.turn("hello")
        assert turn.report == {"lengths": [3], "was": "hello"}
        assert turn.wall_seconds > 0 and turn.cpu_seconds > 0.05 and turn.peak_bytes > 100 << 20
        assert not (tmp_path / "ended").exists()
    assert (tmp_path / "ended").exists()


def test_a_side_that_breaks_is_told_in_its_own_words(tmp_path: Path) -> None:
    with side(tmp_path) as running:
        running.started()
        with pytest.raises(CommandFailed, match=r"^a side ended early: ValueError: no such thing$"):
            running.turn("die")


def test_a_side_that_was_killed_while_it_waited_is_told(tmp_path: Path) -> None:
    with side(tmp_path) as running:
        running.started()
        running.turn()
        os.kill(running._process.pid, signal.SIGKILL)
        running._process.wait()
        with pytest.raises(CommandFailed, match=r"^a side ended early: killed, with 0\.[1-9] GB in use: did the machine run out"):
            running.turn()


def test_a_side_that_is_killed_is_told_with_its_memory(tmp_path: Path) -> None:
    with side(tmp_path) as running:
        running.started()
        with pytest.raises(CommandFailed, match=r"^a side ended early: killed, with 0\.\d GB in use: did the machine run out"):
            running.turn("be killed")


def result(ours: list[float], peer: list[float], bar: float = 1.3) -> rl_step.Result:
    sides = (Side([64] * len(seconds), seconds, seconds) for seconds in (ours, peer))
    made = rl_step.Result("smollm2", "1", bar, Comparison("smollm2", *sides), {}, {})
    made.tokens = {"ours": [2048] * len(ours), "trl": [1024] * len(ours)}
    made.parts = {name: [dict.fromkeys(rl_step.PARTS, 1.0)] * len(ours) for name in made.tokens}
    return made


def test_the_bar_is_one_of_neighbours_in_time() -> None:
    made = result([1.0, 10.0, 2.0], [1.3, 13.0, 1.0])
    assert made.comparison.speed_ratio == pytest.approx(1.3) and made.holds and made.token_ratio == pytest.approx(2.6)
    assert not result([1.0], [1.29]).holds


@pytest.mark.parametrize(("seconds", "code"), [(1.5, 0), (1.2, 1)])
def test_the_exit_code_is_that_of_the_bars(seconds: float, code: int, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(environment, "make_environment", lambda *_: Path("python"))
    monkeypatch.setattr(rl_step, "measure", lambda *_: result([1.0], [seconds]))
    out = tmp_path / "result.json"
    arguments = rl_step.parse_arguments(["--workloads", "smollm2", "--threads", "1", "--out", str(out)])
    assert measure.run(rl_step.benchmark, arguments) == code
    printed = capsys.readouterr()
    assert ("below the bar: smollm2 (1.20 of 1.3, threads 1)" in printed.err) == ("MISSED" in printed.out) == bool(code)
    (kept,) = json.loads(out.read_text())["rl_step"]
    assert kept["holds"] == (not code) and kept["comparison"]["peer"]["wall_seconds"] == [seconds]


def test_what_is_no_comparison_is_no_result() -> None:
    found = {"largest_difference": 1e-6, "mean_difference": 1e-7, "losses": [0.1, 0.3], "grad_norms": [1.0, 2.0]}
    rl_step.check_agreement(found | {"ours": {"loss": 0.2, "grad_norm": 1.5}})
    for change, message in (
        ({"largest_difference": float("nan")}, "log-probs"),
        ({"mean_difference": 1e-3}, "log-probs"),
        ({"losses": [0.3]}, "loss"),
        ({"grad_norms": [1.502]}, "gradient norm"),
    ):
        with pytest.raises(Disagreement, match=message):
            rl_step.check_agreement(found | {"ours": {"loss": 0.2, "grad_norm": 1.5}} | change)


@pytest.mark.parametrize(
    ("name", "change", "ok"),
    [("smollm2", 0, True), ("smollm2", -1, False), ("smollm2", 1, False), ("mixed", -200, True), ("mixed", 1, False)],
)
def test_responses_have_the_lengths_asked_for(name: str, change: int, ok: bool) -> None:
    workload = WORKLOADS[name]
    lengths = [workload.tokens] * (workload.responses - 1)
    if ok:
        rl_step.check_lengths(workload, "ours", [*lengths, workload.tokens + change])
    for wrong in [lengths] if ok else [[*lengths, workload.tokens + change], lengths]:
        with pytest.raises(Disagreement, match=f"asked for were {workload.responses} of"):
            rl_step.check_lengths(workload, "ours", wrong)


def test_parts_add_up_to_the_round() -> None:
    turn = Turn(10.0, 9.0, 1, {"seconds": {"rollout": 4.0, "logprob": 2.0, "reward": 1.0, "update/forward": 2.0}})
    assert rl_step.trl_parts(turn)["update"] == 3.0
    ours = rl_step.our_parts({"seconds/rollout": 4.0, "seconds/train": 3.0, "seconds/sync": 1.0, "seconds/step": 99.0}, turn)
    for parts in (rl_step.trl_parts(turn), ours):
        assert sorted(parts) == sorted(rl_step.PARTS) and sum(parts.values()) == turn.wall_seconds


def test_an_environment_is_made_once(tmp_path: Path, monkeypatch) -> None:
    commands: list[list[str]] = []

    def run(command: list[str]) -> None:
        commands.append(command)
        (tmp_path / "trl/bin").mkdir(parents=True, exist_ok=True)
        (tmp_path / "trl/bin/python").touch()

    monkeypatch.setattr(environment, "_run", run)
    for _ in range(2):
        assert environment.make_environment(tmp_path / "trl", "https://wheels") == tmp_path / "trl/bin/python"
    assert [command[2] for command in commands] == ["venv", "pip", "pip"]
    assert commands[1][-3:] == ["--index-url", "https://wheels", f"torch=={environment.versions()['torch']}"]
    assert "trl==1.16.0" in commands[2] and "https://wheels" not in commands[2]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").touch()
    with pytest.raises(ConfigError, match="is no Python environment"):
        environment.make_environment(tmp_path / "mine", None)
    assert os.listdir(tmp_path / "mine") == ["thesis.tex"]


def test_a_failed_installation_is_one_line() -> None:
    code = "print('ERROR: no matching distribution'); print('[notice] pip'); raise SystemExit(1)"
    with pytest.raises(environment.EnvironmentFailed, match=r"failed: ERROR: no matching distribution$"):
        environment._run([sys.executable, "-c", code])


def test_arguments(tmp_path: Path, capsys) -> None:
    arguments = rl_step.parse_arguments([])
    assert (arguments.repeats, arguments.threads, arguments.workloads) == (5, ["1", "default"], list(WORKLOADS))
    for wrong in (["--threads", "0"], ["--threads", "many"], ["--workloads", "huge"], ["--device", "cuda"]):
        with pytest.raises(SystemExit):
            rl_step.parse_arguments(wrong)
    capsys.readouterr()
    assert measure.run(rl_step.benchmark, argparse.Namespace(out=None, model=tmp_path)) == 2
    assert "has no config.json" in capsys.readouterr().err
