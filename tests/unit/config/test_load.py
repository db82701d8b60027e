"""The config loader: layers, types, and one line that says what is wrong and where."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_r1.config.keys import known_keys
from megatron_r1.config.load import dump, load_config, save_config
from megatron_r1.config.schema import Config
from megatron_r1.errors import ConfigError
from tests.paths import ROOT


def write(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text)
    return path


def error_of(path: Path | None, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.exit_code == 2
    return message


def test_layers_replace_each_other_from_defaults_to_command_line(tmp_path):
    path = write(tmp_path, "seed: 2\ngrpo:\n  group_size: 4\n  optimizer: {weight_decay: 0.5}\n")
    config = load_config(path, ["grpo.group_size=8", "grpo.optimizer.eps=1e-6"], {"seed": 1, "run_dir": "runs/x"})
    assert (config.run_dir, config.seed, config.grpo.group_size) == ("runs/x", 2, 8)
    optimizer = config.grpo.optimizer
    assert (optimizer.weight_decay, optimizer.eps) == (0.5, 1e-6)
    assert optimizer.lr == Config().grpo.optimizer.lr, "a section that is set in part keeps the rest of its defaults"


@pytest.mark.parametrize("override", ["pretrain.optimizer.lr=2e-4", "pretrain.optimizer.lr=0.0002", "pretrain.optimizer.lr=2.0E-4"])
def test_numbers_are_read_as_people_write_them(override):
    assert load_config(None, [override]).pretrain.optimizer.lr == 2e-4


def test_free_form_fields_take_any_key_and_typed_values(tmp_path):
    path = write(tmp_path, "model:\n  overrides: {hidden_size: 64}\n")
    config = load_config(path, ["model.overrides.rms_norm_eps=1e-5", "model.overrides.tie=true"])
    assert config.model.overrides == {"hidden_size": 64, "rms_norm_eps": 1e-5, "tie": True}


def test_lists_null_and_whole_sections_from_the_command_line():
    config = load_config(
        None, ["runtime.recompute_modules=[mlp, moe]", "parallel.etp=null", "model.weights=", "grpo={group_size: 2, kl_coef: 0}"]
    )
    assert config.runtime.recompute_modules == ["mlp", "moe"]
    assert config.parallel.etp is None
    assert config.model.weights is None
    assert (config.grpo.group_size, config.grpo.kl_coef) == (2, 0.0)


def test_an_empty_file_and_an_empty_section_change_nothing(tmp_path):
    assert load_config(write(tmp_path, "")) == Config()
    assert load_config(write(tmp_path, "grpo:\n  # group_size: 4\n")) == Config()


def test_dump_reads_back_to_the_same_config(tmp_path):
    config = load_config(
        None, ["grpo.optimizer.lr=3e-7", "model.overrides={a: [1, 2]}", "run_dir=\u8fd0\u884c", "evaluate.top_p=0.95"]
    )
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    assert (tmp_path / "config.yaml").read_text() == dump(config)
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"], "no temporary file is left"


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        ("clip_eps", "grpo.clip_eps"),
        ("grpo.clipeps", "grpo.clip_eps"),
        ("grpo.group_sise", "grpo.group_size"),
        ("temprature", "rollout.temperature"),
        ("sft.optimizer.learning_rate", "sft.optimizer.clip_grad"),
        ("model.weigths", "model.weights"),
        ("rollouts.max_num_seqs", "rollout.max_num_seqs"),
        ("paralel.tp", "parallel.tp"),
    ],
)
def test_an_unknown_key_is_fatal_and_names_the_nearest(wrong, nearest):
    message = error_of(None, f"{wrong}=1")
    assert message.startswith(f"unknown key '{wrong}' on the command line")
    if wrong != "sft.optimizer.learning_rate":  # nothing is near: any known key will do
        assert f"'{nearest}'" in message


def test_an_unknown_key_names_its_file(tmp_path):
    path = write(tmp_path, "grpo:\n  groupsize: 3\n")
    assert error_of(path) == f"unknown key 'grpo.groupsize' in {path}; the nearest known key is 'grpo.group_size'"


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("grpo.clip_eps=wide", "'grpo.clip_eps' on the command line is 'wide', expected a valid number"),
        ("grpo.clip_eps=-1", "'grpo.clip_eps' on the command line is -1, expected greater than 0"),
        ("grpo.group_size=2.5", "expected a valid integer"),
        ("grpo.group_size=true", "expected a valid integer"),
        ("grpo.kl_coef=.inf", "expected a finite number"),
        ("grpo.normalization=word", "expected 'sequence' or 'token'"),
        ("run_dir=", "'run_dir' on the command line is None, expected a valid string"),
        ("grpo=3", "'grpo' on the command line is a section, got 3"),
        ("seed", "'seed' on the command line is not of the form key.sub=value"),
        ("=3", "is not of the form key.sub=value"),
        ("seed=[1", "the value of 'seed' on the command line is not valid YAML"),
    ],
)
def test_a_wrong_value_names_key_value_and_what_is_expected(override, says):
    assert says in error_of(None, override)


def test_a_wrong_value_names_the_layer_that_set_it(tmp_path):
    path = write(tmp_path, "seed: one\n")
    assert error_of(path, "grpo.kl_coef=0.1") == f"'seed' in {path} is 'one', expected a valid integer"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("seed: 1\nseed: 2\n", "key 'seed' is given twice"),
        ("- 1\n", "holds a list"),
        ("a: [\n", "is not valid YAML"),
        ("1: 2\n", "unknown key '1'"),
    ],
)
def test_a_malformed_file_is_named(tmp_path, text, says):
    path = write(tmp_path, text)
    message = error_of(path)
    assert says in message
    assert str(path) in message


def test_a_missing_file_is_named(tmp_path):
    assert error_of(tmp_path / "none.yaml") == f"config file {tmp_path / 'none.yaml'} cannot be read: No such file or directory"


def test_known_keys_are_settings_that_can_be_set():
    keys = known_keys()
    assert {"seed", "grpo.optimizer.lr", "model.overrides"} <= keys.keys()
    assert "grpo.optimizer" not in keys


@pytest.mark.parametrize("path", sorted((ROOT / "examples").rglob("*.yaml")), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_shipped_config_loads(path):
    load_config(path)


def test_a_home_folder_and_a_number_sign_are_what_they_look_like(monkeypatch, tmp_path):
    """No shell expands the ~ behind key=, and none cuts ` #`."""
    monkeypatch.setenv("HOME", "/home/r1")
    path = tmp_path / "c.yaml"
    path.write_text("model: {weights: ~/base}\nsft: {sources: [~/a.jsonl, {path: ~/b.jsonl}]}  # a comment\n")
    config = load_config(path, ["data.source=~/problems #1.jsonl", "data.tokenizer='a #b'", "run_dir=x~/y"])
    assert (config.model.weights, config.data.source) == ("/home/r1/base", "/home/r1/problems #1.jsonl")
    assert [source.path for source in config.sft.sources] == ["/home/r1/a.jsonl", "/home/r1/b.jsonl"]
    assert (config.data.tokenizer, config.run_dir) == ("a #b", "x~/y")
    with pytest.raises(ConfigError, match="'seed' on the command line is '5 # five', expected"):
        load_config(None, ["seed=5 # five"])
    assert load_config(None, ["data.tokenizer=~"]).data.tokenizer is None, "the null of YAML stays"


@pytest.mark.parametrize(
    "setting",
    ["grpo.optimizer.beta1=1.0", "sft.optimizer.beta2=1.5", "grpo.optimizer.beta1=-0.1", "pretrain.optimizer.eps=0",
     "sft.optimizer.weight_decay=-1", "rollout.kv_cache_bytes=0", "seed=10000000000000000000000",
     "evaluate.seed=9223372036854775808",
     "evaluate.benchmarks.seed=-9223372036854775809", "reward.judge.seed=9223372036854775808"],
)  # fmt: skip
def test_numbers_with_which_no_training_works_are_refused_by_name(setting):
    key, _, value = setting.partition("=")
    with pytest.raises(ConfigError, match=f"'{key}' on the command line is {value}.*expected") as caught:
        load_config(None, [setting])
    assert "\n" not in str(caught.value)
