"""A dry run resolves every shipped configuration for a whole job, and says in one line what does not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_r1 import cli
from megatron_r1.config.load import load_config
from megatron_r1.model.presets import PRESETS
from megatron_r1.pipeline.dry_run.found import DryRun
from megatron_r1.pipeline.dry_run.plan import plan_training
from tests.paths import ROOT
from tests.token_sources import numbered_documents, write_source

EXAMPLES = ROOT / "examples"
#: file -> the commands that take it, and the ranks they are asked about (None: as few as the layout needs)
COMMANDS: dict[str, tuple[tuple[str, ...], int | None]] = {
    "v3_671b/pretrain": (("pretrain",), 2048),
    "v3_671b/r1_zero": (("grpo",), 512),
    "v3_671b/stage1": (("sft",), 512),
    "v3_671b/stage2": (("grpo",), 512),
    "v3_671b/reward_helpful": (("reward-model",), 512),
    "v3_671b/reward_safety": (("reward-model",), 512),
    "v3_671b/stage3": (("sft",), 512),
    "v3_671b/stage4": (("grpo",), 512),
    "v2_lite_16b/r1_zero": (("grpo",), 8),
    "distill_qwen/qwen_1_5b": (("sft",), 8),
    "distill_qwen/qwen_7b": (("sft",), 8),
    "distill_qwen/qwen_14b": (("sft",), 8),
    "distill_qwen/qwen_32b": (("sft",), 16),
    "distill_qwen/llama_8b": (("sft",), 8),
    "distill_qwen/llama_70b": (("sft",), None),
    "distill_qwen/zero_qwen_32b": (("grpo",), 64),
    "gsm8k/grpo": (("grpo",), None),
    "smollm2/arithmetic": (("sft", "grpo"), None),
    "pretrain_demo/v3": (("pretrain",), None),
    "pretrain_demo/dense": (("pretrain",), None),
    "one_node/gsm8k": (("grpo",), 8),
    "one_node/math": (("grpo",), 8),
    "reward_model/pretrain": (("pretrain",), None),
    "reward_model/tiny_cpu": (("reward-model",), 2),
    "tiny_cpu/r1_zero": (("pretrain", "grpo"), None),
    "tiny_cpu/sft_chat": (("sft",), 2),
    "tiny_cpu/stage4": (("grpo",), 2),
}
RECIPES = {"v3_671b/r1": 512, "tiny_cpu/r1": 1}
WITHOUT_RANKS = {"v3_671b/stage3_data", "evaluate/endpoint", "evaluate/recipe"}
ZERO = str(EXAMPLES / "v3_671b/r1_zero.yaml")
LITE = str(EXAMPLES / "v2_lite_16b/r1_zero.yaml")


def test_every_example_is_planned():
    files = {str(path.relative_to(EXAMPLES).with_suffix("")) for path in EXAMPLES.rglob("*.yaml")}
    assert files == COMMANDS.keys() | RECIPES.keys() | WITHOUT_RANKS


@pytest.mark.parametrize("name", COMMANDS)
def test_an_example_fits_its_job(name):
    config, (commands, size) = load_config(EXAMPLES / f"{name}.yaml"), COMMANDS[name]
    before = Path(config.run_dir).exists()  # of a run by hand
    for command in commands:
        table = plan_training(command, config, DryRun(size))
        assert table.startswith(f"dry run of {command}: {size or ''}") and "nothing is started" in table
        assert all(f"\n{part} " in table for part in ("model", "layout", "stages", "time-outs", "not checked"))
    assert not dist.is_initialized() and Path(config.run_dir).exists() == before


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_fits_its_job_stage_by_stage(name, capsys):
    given = "recipe.stages.student.model.weights=/nowhere"
    command = ["pipeline", "r1", "--config", str(EXAMPLES / f"{name}.yaml"), "--dry-run", "--world-size", str(RECIPES[name])]
    assert cli.main([*command, *(["model.weights=/nowhere", given] if name.startswith("v3") else [])]) == 0
    out = capsys.readouterr().out
    asked = [line.split()[3].rstrip(":") for line in out.splitlines() if line.startswith("dry run of")]
    trained = ["grpo", "sft", "grpo", "reward-model", "reward-model", "sft", "grpo"]
    base = [] if name.startswith("v3") else ["pretrain"]
    assert asked == [*base, *trained, *base, "sft", "grpo"]


def test_every_rank_of_the_published_job_is_told(tmp_path, capsys):
    rows = tmp_path / "ranks.tsv"
    command = ["grpo", "--dry-run", "--config", ZERO, "--world-size", "512", "--mean-tokens", "8192", "--table", str(rows)]
    assert cli.main([*command, "model.weights=/nowhere/DeepSeek-V3-Base"]) == 0
    table = capsys.readouterr().out
    for told in (
        "512 rank(s) on 64 node(s) of 8, device cuda",
        "shape from model.preset=671b, for want of model.weights",
        "512 prompts x 16 = 8,192 outputs, 16 updates of 512; 650 rounds, 10,400 updates",
        "from 1      prompt 2,048 + response 32,768 - 1 = 34,815 tokens of the 34,816 of a forward pass",
        "longest responses (32,768): 128 micro-batches of 34,816 on each of 4 data-parallel rank(s), 100% filled",
        "mean responses (8,192): 43 micro-batches of 30,720 on each of 4",  # three of 10,239 share one
        "from 514    prompt 2,048 + response 65,536 - 1 = 67,583 tokens of the 67,584 of a forward pass",
        "mean responses (8,192): 22 micro-batches of 61,440 on each of 4",
        "engines     8, beside rank(s) 0, 64, ... 448, 64 ranks with a part; each 64 device(s) on 8 nodes",
        "prompt 2,048 + response 65,536 = 67,584 tokens",
        "weights (model.weights=/nowhere/DeepSeek-V3-Base is not here)",
        "collective 7,200 s",
    ):
        assert told in table, told
    names, *lines = (line.split("\t") for line in rows.read_text().splitlines())
    ranks = [dict(zip(names, line, strict=True)) for line in lines]
    assert len(ranks) == 512
    for number, rank in enumerate(ranks):
        place = {"tp": number % 8, "cp": 0, "ep": number % 32, "etp": 0, "dp": number // 8 % 4, "expert_dp": 0, "pp": number // 32}
        assert {axis: int(rank[axis]) for axis in place} == place
        assert (int(rank["node"]), int(rank["local_rank"])) == divmod(number, 8)
        assert rank["engine"] == ("" if number % 8 else f"{number // 64}, part {number // 8 % 8}")
    assert [ranks[rank]["layers"] for rank in (0, 447, 448, 511)] == ["0-3", "52-54", "55-57", "58-60"]


def test_the_shape_of_a_config_alone_is_taken(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(PRESETS["tiny"].to_hf_config(0, 1, "float32")))
    config = load_config(EXAMPLES / "tiny_cpu/stage4.yaml", [f"model.weights={tmp_path}", "model.overrides={}"])
    assert "which has no weights beside it" in plan_training("grpo", config, DryRun())


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["grpo", "--config", ZERO, "--world-size", "500"], "parallel.tp=8 x pp=16 x cp=1 does not divide the 500 processes"),
        (["grpo", "--config", ZERO, "--world-size", "128"], "parallel.ep=32 x etp=1 x pp=16 does not divide the 128 processes"),
        (["grpo", "--config", ZERO, "grpo.micro_batch_tokens=32768"], "is less than the 34815 tokens"),
        (["grpo", "--config", ZERO, "grpo.minibatch_size=500"], "grpo.minibatch_size=500 does not divide the 8192 outputs"),
        (["grpo", "--config", ZERO, "parallel.tp=48"], "parallel.tp=48 does not divide"),
        (["grpo", "--config", ZERO, "rollout.nodes_per_engine=5"], "rollout.nodes_per_engine=5 does not divide"),
        (["grpo", "--config", ZERO, "rollout.nodes_per_engine=4"], "needs 16 GPUs of a node, which has 8"),
        (["grpo", "--config", ZERO, "--gpus-per-node", "4"], "needs 8 GPUs of a node, which has 4"),
        (["grpo", "--config", ZERO, "model.overrides.max_position_embeddings=67583"], "max_position_embeddings=67583"),
        (["grpo", "--config", ZERO, "rollout.placement=single"], "rollout.nodes_per_engine=8 does not go with"),
        (["grpo", "--config", ZERO, "rollout.placement=disaggregated"], "needs rollout.servers"),
        (["grpo", "--config", ZERO, "rollout.engines_per_node=2"], "do not fit beside the 8 rank(s) of a node"),
        (
            ["grpo", "--config", LITE, "--world-size", "24", "rollout.nodes_per_engine=2", "rollout.tensor_parallel_size=16"],
            "on a multiple of 2 nodes",
        ),
        (["grpo", "--config", LITE, "rollout.tensor_parallel_size=3"], "rollout.tensor_parallel_size=3 does not divide"),
        (["grpo", "--config", LITE, "--table", "/proc/nowhere/ranks.tsv"], "ranks.tsv: cannot be written"),
        (["grpo", "--config", LITE, "--mean-tokens", "8193"], "--mean-tokens 8193 is more than the limit of 8192 tokens"),
        (["grpo", "--config", LITE, "runtime.recompute=selective", "runtime.recompute_modules=[x]"], "Megatron-Core refuses"),
        (["grpo", "--config", LITE, "model.weights=/nowhere", "parallel.tp=3"], "for want of model.weights)"),
        (["sft", "--config", LITE, "sft.max_tokens=5000"], "sft.max_tokens=5000 is more than sft.micro_batch_tokens=4096"),
        (["reward-model", "--config", LITE], "data.template must be r1_chat"),
        (["pretrain", "--config", LITE, "--world-size", "8"], "1 micro-batches do not divide over 8 data-parallel ranks"),
        (["pretrain", "--config", LITE, "pretrain.micro_batch_size=3"], "does not divide pretrain.global_batch_size"),
        (
            ["pretrain", "--config", LITE, "parallel.ep=1", "parallel.cp=2", "pretrain.sequence_length=62"],
            "pretrain.sequence_length=62 makes rows of 62 tokens, no multiple of 4",
        ),
        (
            ["pretrain", "--config", LITE, "parallel.ep=1", "parallel.cp=2", "pretrain.mask_documents=true"],
            "cuts every document into 4 equal parts",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_line(arguments, told, capsys):
    assert cli.main([*arguments, "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1


def test_sources_of_a_blend_that_are_here_are_looked_at(tmp_path, capsys):
    here = write_source(tmp_path / "here", numbered_documents(30, 5))
    command = ["pretrain", "--dry-run", "--config", str(EXAMPLES / "tiny_cpu/r1_zero.yaml"), f"run_dir={tmp_path / 'run'}"]
    assert cli.main([*command, f"data.blend=[{here}, /nowhere/text]"]) == 0
    out = capsys.readouterr().out
    assert f"{here}: 30 documents, {sum(map(len, numbered_documents(30, 5)))} tokens" in out and "/nowhere/text: is not here" in out
    short = ["data.split=[29, 1]", "pretrain.validation.interval=1"]
    phases = [f"pretrain.phases=[{{updates: 1}}, {{updates: 1, sequence_length: 1024, blend: [{here}]}}]"]
    for settings, told in (
        ([f"data.blend=[{here}, {here}]"], f"names {here} twice"),
        ([f"data.blend=[{here}.bin]"], "leave out the ending"),
        ([f"data.blend=[{tmp_path}]"], "is a folder"),
        ([f"data.blend=[{here}]", *short], "leaves 1 documents of"),
        (["data.blend=[/nowhere/text]", *phases], "leaves 30 documents of"),
        (["data.blend=[{path: x, weight: -1}]"], "data.blend.0.weight"),
    ):
        assert cli.main([*command, *settings]) == 2
        error = capsys.readouterr().err
        assert told in error and error.count("\n") == 1, error
    (tmp_path / "here.bin").write_bytes(b"")
    assert cli.main([*command, f"data.blend=[{here}]"]) == 2
    assert "here.bin: is cut off" in capsys.readouterr().err and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "arguments", [["grpo", "--world-size", "8"], ["sft", "--table", "x.tsv"], ["pipeline", "r1", "--gpus-per-node", "8"]]
)
def test_options_of_a_dry_run_start_nothing_without_it(arguments, capsys):
    assert cli.main(arguments) == 2
    assert f"{arguments[-2]} says what a dry run is to look at: add --dry-run" in capsys.readouterr().err


@pytest.mark.parametrize("number", ["0", "-1", "x", "1e3", "10000000", "٣"])
def test_a_number_of_ranks_is_one(number, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["grpo", "--dry-run", f"--world-size={number}"])
    assert caught.value.code == 2 and "is no whole number from 1" in capsys.readouterr().err
