"""The command line: help, exit codes, and one line for one error, on one rank."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import subprocess
import sys
import textwrap
import types

import pytest

from megatron_r1 import cli
from megatron_r1.cli.commands import COMMANDS, EVALUATE, PIPELINES, RESCORE
from megatron_r1.errors import CheckpointError, WeightSyncError
from megatron_r1.runtime import distributed
from megatron_r1.runtime.launch import child_environment
from tests.patience import patient

TARGETS = {
    "pretrain": "megatron_r1.pipeline.stages.pretrain:run_pretrain",
    "sft": "megatron_r1.pipeline.stages.sft:run_sft",
    "reward-model": "megatron_r1.pipeline.stages.reward_model:run_reward_model",
    "grpo": "megatron_r1.pipeline.stages.grpo:run_grpo",
    "build-index": "megatron_r1.pipeline.commands:run_build_index",
    "curate": "megatron_r1.pipeline.commands:run_curate_command",
    "evaluate": "megatron_r1.pipeline.commands:run_evaluate_command",
    "evaluate --rescore": "megatron_r1.pipeline.commands:run_rescore_command",
    "pipeline r1-zero": "megatron_r1.pipeline.recipe.r1_zero:run_r1_zero",
}


@pytest.fixture(autouse=True)
def no_process_group(monkeypatch):
    """As in a fresh process, whatever ran before in this one."""
    monkeypatch.setattr(distributed, "_STORE", None)


@pytest.fixture
def commands(monkeypatch):
    """In place of the functions that commands run: `seen` keeps the config that each was called with, stages with a session."""
    seen = {}
    modules = {name: types.ModuleType(name) for name in {target.partition(":")[0] for target in TARGETS.values()}}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    for target in TARGETS.values():
        module, _, function = target.partition(":")
        keep = lambda config, *session, target=target: seen.update({target: (config, *session)})
        setattr(modules[module], function, keep)
    session = types.ModuleType("megatron_r1.pipeline.session")
    session.open_session = lambda runtime: contextlib.nullcontext("the session")
    monkeypatch.setitem(sys.modules, session.__name__, session)
    return types.SimpleNamespace(seen=seen, modules=modules)


@pytest.mark.parametrize(("arguments", "target"), [(name.split(), target) for name, target in TARGETS.items()])
def test_each_command_gets_the_merged_config(commands, tmp_path, arguments, target):
    path = tmp_path / "c.yaml"
    path.write_text("seed: 3\ngrpo: {group_size: 4}\n")
    assert cli.main([*arguments, "seed=5", "--config", str(path), "grpo.kl_coef=0"]) == 0
    config, *session = commands.seen[target]
    assert (config.seed, config.grpo.group_size, config.grpo.kl_coef) == (5, 4, 0)
    assert session == ([] if target.startswith("megatron_r1.pipeline.commands:") else ["the session"])


def test_every_command_names_a_function_that_is_there():
    for command in [*COMMANDS.values(), EVALUATE, RESCORE, *PIPELINES.values()]:
        module, _, name = command.target.partition(":")
        function = getattr(importlib.import_module(module), name)
        assert len(inspect.signature(function).parameters) == (2 if command.is_stage else 1)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["grpo", "clip_eps=1"], "unknown key 'clip_eps' on the command line; the nearest known key is 'grpo.clip_eps'"),
        (["grpo", "--config", "none.yaml"], "config file none.yaml cannot be read"),
        (["grpo", "--resume"], "unknown argument --resume"),
        (["train"], "invalid choice: 'train'"),
        ([], "COMMAND"),
        (["doctor", "seed=1"], "unknown argument seed=1"),
        (["report"], "run_dir"),
        (["config", "grpo.clipeps"], "unknown key 'grpo.clipeps'; the nearest known key is 'grpo.clip_eps'"),
        (["config", "grpo", "--all"], "unknown argument --all"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(commands, capsys, arguments, says):
    try:
        code = cli.main(arguments)
    except SystemExit as exit_of_argparse:
        code = exit_of_argparse.code
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ""
    assert captured.err.startswith("megatron-r1: error: ")
    assert captured.err.count("\n") == 1
    assert says in captured.err
    assert not commands.seen


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (CheckpointError("corrupt checkpoint: x"), 2, "megatron-r1: error: corrupt checkpoint: x\n"),
        (WeightSyncError("layer 1 differs"), 1, "megatron-r1: error: layer 1 differs\n"),
        (KeyboardInterrupt(), 130, "megatron-r1: interrupted; the same command resumes\n"),
    ],
)
def test_an_error_of_a_command_becomes_a_line_and_its_exit_code(commands, capsys, error, code, line):
    def fail(config, session):
        raise error

    commands.modules["megatron_r1.pipeline.stages.grpo"].run_grpo = fail
    assert cli.main(["grpo"]) == code
    assert capsys.readouterr().err == line


def test_a_bug_keeps_its_traceback(commands):
    def fail(config, session):
        raise ZeroDivisionError

    commands.modules["megatron_r1.pipeline.stages.grpo"].run_grpo = fail
    with pytest.raises(ZeroDivisionError):
        cli.main(["grpo"])


def test_only_rank_zero_tells_an_error_that_all_ranks_have(monkeypatch, capsys):
    launch = {"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29500}
    for name, value in launch.items():
        monkeypatch.setenv(name, str(value))
    assert cli.main(["grpo", "nonsense=1"]) == 2
    assert capsys.readouterr().err == ""


WORKER = """
    import sys, types
    from megatron_r1 import cli
    from megatron_r1.errors import DataError

    def grpo(config, session):
        from megatron_r1.runtime import distributed

        if config.seed == 1:
            with distributed.failing_together():
                if distributed.rank() == 1:
                    raise DataError("prompts.jsonl is empty")
        if distributed.rank() == 1:
            raise DataError("only rank 1 failed")
        distributed.barrier()

    sys.modules["megatron_r1.pipeline.stages.grpo"] = module = types.ModuleType("grpo")
    module.run_grpo = grpo
    sys.exit(cli.main(["grpo", "runtime.device=cpu", "runtime.collective_timeout_seconds=600", *sys.argv[1:]]))
"""


@pytest.mark.parametrize(("seed", "line"), [(1, "prompts.jsonl is empty"), (2, "only rank 1 failed")])
@pytest.mark.slow
def test_ranks_tell_an_error_once_and_all_fail(tmp_path, seed, line):
    """Also when rank 1 alone fails while rank 0 waits for it."""
    script = tmp_path / "worker.py"
    script.write_text(textwrap.dedent(WORKER))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, str(script), f"seed={seed}"],
        env=child_environment(),
        capture_output=True,
        text=True,
        timeout=patient(120),
        check=False,
    )
    assert done.returncode != 0
    assert done.stderr.count(f"megatron-r1: error: {line}\n") == 1


@pytest.mark.parametrize("value", ["x" * 100_000, "a\x1b[2J\nb\u2028c\x00\ud800", "9" * 5000])
def test_an_error_is_one_short_line_whatever_is_in_it(capsys, value):
    assert cli.main(["grpo", f"grpo.loss={json.dumps(value)}"]) == 2
    line = capsys.readouterr().err
    assert len(line) < 2000 and line.count("\n") == 1 and line.rstrip("\n").isprintable()
    assert line.startswith("megatron-r1: error: ")
