"""Which weights a run or a folder means, and how they are asked."""

from __future__ import annotations

import json

import pytest

from megatron_r1.config.load import load_config, save_config
from megatron_r1.data.tokenizer import train_tokenizer
from megatron_r1.errors import CheckpointError, ConfigError
from megatron_r1.model.presets import PRESETS
from megatron_r1.pipeline.talk.model import find_model
from megatron_r1.rollout.cache_size import sequence_bytes
from tests.random_weights import write_random_model

CPU = ["runtime.device=cpu"]


@pytest.fixture
def folder(tmp_path):
    """An exported model with a tokenizer."""
    folder = write_random_model(tmp_path / "model", PRESETS["tiny"])
    train_tokenizer(["a few words"], 300).save(folder)
    return folder


@pytest.fixture
def run(tmp_path, folder):
    """A run with two checkpoints and an unfinished one; their weights are not read."""
    run = tmp_path / "runs" / "sft"
    for step, names in ((3, ("COMPLETE",)), (12, ("COMPLETE",)), (20, ())):
        checkpoint = run / "checkpoints" / f"step_{step:06d}"
        (checkpoint / "policy").mkdir(parents=True)
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            (checkpoint / name).write_text((folder / name).read_text())
        for name in names:
            (checkpoint / name).write_text("0")
    settings = ["data.template=r1_chat", "data.tokenizer=/gone", "rollout.temperature=0.5", "rollout.max_response_tokens=20"]
    save_config(
        load_config(None, [*settings, "runtime.threads=3", "data.system_prompt=Hi", "rollout.stop=[END]"]), run / "config.yaml"
    )
    return run


def test_a_run_is_its_newest_complete_checkpoint_asked_as_it_was_trained(run):
    model = find_model(run, None, CPU)
    assert model.folder.name == "step_000012" and model.run == run and model.is_checkpoint
    data, rollout = model.config.data, model.config.rollout
    assert (data.template, data.system_prompt, data.tokenizer, rollout.temperature) == ("r1_chat", "Hi", None, 0.5)
    assert rollout.stop == ["END"] and model.config.runtime.threads is None
    assert model.most_tokens == 20 and data.max_prompt_tokens + rollout.max_response_tokens == model.context
    assert find_model(run, 3, CPU).folder.name == "step_000003"
    assert find_model(run / "checkpoints" / "step_000003", None, CPU).config.data.template == "r1_chat"


def test_a_run_without_checkpoints_is_its_exported_model(run, folder):
    for checkpoint in (run / "checkpoints").iterdir():
        (checkpoint / "COMPLETE").unlink(missing_ok=True)
    folder.rename(run / "hf")
    model = find_model(run, None, CPU)
    assert model.folder == run / "hf" and not model.is_checkpoint and model.config.data.template == "r1_chat"


def test_a_folder_is_asked_with_its_own_template_and_sampling(folder):
    assert find_model(folder, None, CPU).config.data.template == "r1_zero"
    train_tokenizer(["a few words"], 300).with_chat_template("{{ messages[0]['content'] }}").save(folder)
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "top_p": 0.9, "top_k": 20}))
    config = find_model(folder, None, CPU).config
    assert (config.data.template, config.rollout.temperature, config.rollout.top_p) == ("tokenizer", 0.6, 0.9)
    assert find_model(folder, None, [*CPU, "data.template=r1_chat"]).config.data.template == "r1_chat"


def test_what_is_no_model_is_told_in_a_line(tmp_path, run):
    wrong = [
        (tmp_path / "none", None, [], CheckpointError, "no such folder"),
        (run, 20, [], CheckpointError, "no complete checkpoint of step 20; there are: 3, 12"),
        (tmp_path, None, [], CheckpointError, "holds no model"),
        (run.parent, None, [], CheckpointError, f"give {run}"),
        (run / "checkpoints" / "step_000020", None, [], CheckpointError, "not complete"),
        (run, None, ["grpo.group_size=3"], ConfigError, "has no effect here"),
        (run, None, ["rollout.max_response_tokens=3"], ConfigError, "--max-tokens"),
        (run, None, ["data.bogus=3"], ConfigError, "unknown key 'data.bogus'"),
    ]
    for place, step, overrides, kind, said in wrong:
        with pytest.raises(kind, match=said) as raised:
            find_model(place, step, [*CPU, *overrides])
        assert "\n" not in str(raised.value)
    with pytest.raises(ConfigError, match="positions"):
        find_model(run, None, CPU, context=10**6)


def test_a_reward_model_is_refused(run):
    config = PRESETS["tiny"].as_reward_model("helpful").to_hf_config(0, 1, "float32")
    (run / "checkpoints" / "step_000012" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="is a reward model, which writes no text"):
        find_model(run, None, CPU)


def test_the_cache_has_room_for_the_sequences_that_are_asked_at_a_time_within_four_gibibytes(folder, monkeypatch):
    monkeypatch.setattr("megatron_r1.pipeline.talk.model.free_memory", lambda: 1 << 40)
    each = sequence_bytes(PRESETS["tiny"], "float32", 64)
    block = each // 4

    def size(sequences, *settings):
        return find_model(folder, None, [*CPU, *settings], 64, sequences).config.rollout.kv_cache_bytes

    assert size(1) == each + block and size(16) == 16 * each + block
    assert size(16, "rollout.max_num_seqs=2") == 2 * each + block, "the engine computes no more at a time"
    assert size(16, "runtime.dtype=bf16") * 2 == size(16) and size(16, "rollout.kv_cache_bytes=77") == 77
    assert (4 << 30) - each <= size(10**9, f"rollout.max_num_seqs={10**9}") <= 4 << 30
    monkeypatch.setattr("megatron_r1.pipeline.talk.model.free_memory", lambda: 0)
    assert size(16) == each + block, "one context always"
