"""The explanation of one setting, of a section, of everything."""

from __future__ import annotations

import re

import pytest
import yaml

from megatron_r1.config.help import count_settings, describe_settings, explain, list_sections
from megatron_r1.config.keys import FIELDS, SECTIONS, known_keys
from megatron_r1.config.load import flatten_config
from megatron_r1.config.schema import Config
from megatron_r1.errors import ConfigError

READERS = {"grpo": ("grpo", "rollout"), "sft": ("sft", "data.template")}


def fact(text: str, name: str) -> str:
    found = re.search(rf"^  {name}: +(.*(?:\n {{13}}.*)*)", text, re.MULTILINE)
    assert found, text
    return " ".join(found.group(1).split())


@pytest.mark.parametrize(
    ("key", "kind", "default"),
    [
        ("grpo.clip_eps", "number above 0", "0.2"),
        ("sft.validation_fraction", "number at least 0 and below 1", "0.0"),
        ("sft.max_tokens", "whole number above 0, or null", "null"),
        ("runtime.device", "one of auto, cpu, cuda", "auto"),
        ("runtime.recompute_modules", "list whose entries are: text", "[layernorm, mla_up_proj]"),
        ("evaluate.benchmarks.samples", "mapping whose values are: whole number above 0", "{}"),
        ("curation.special_token", "text that is not empty", "'|special_token|'"),
        ("parallel.sequence_parallel", "true or false, or null", "null"),
        ("sft.sources", "list whose entries are: {path, weight, format, split}", "[]"),
    ],
)
def test_a_setting_says_type_and_default(key, kind, default):
    text = explain(key, READERS)
    assert text.startswith(f"{key}\n")
    assert (fact(text, "type"), fact(text, "default")) == (kind, default)


def test_a_setting_says_whether_it_may_change_and_who_reads_it():
    text = explain("rollout.servers", READERS)
    assert (fact(text, "on resume"), fact(text, "read by")) == ("may change", "grpo")
    text = explain("data.template", READERS)
    assert (fact(text, "on resume"), fact(text, "read by")) == (
        "must stay as it was: it says what is trained on, and in which order",
        "sft",
    )
    assert fact(explain("pretrain.steps", READERS), "read by") == "no command"


def test_papers_that_a_description_cites_are_named_in_full():
    assert fact(explain("grpo.kl_coef", READERS), "papers") == "R1 v2 is DeepSeek-R1, arXiv 2501.12948v2"
    assert "papers:" not in explain("run_dir", READERS)
    assert "R1 v2 is DeepSeek-R1, arXiv 2501.12948v2; V3 is DeepSeek-V3" in " ".join(describe_settings(["grpo"]).split())


def test_the_entries_of_a_list_are_explained():
    assert "    path\n        Conversations: a .jsonl" in explain("sft.sources", READERS)


def test_a_key_below_a_free_setting_is_explained_by_that():
    assert explain("model.overrides.hidden_size", READERS) == explain("model.overrides", READERS)


@pytest.mark.parametrize("key", FIELDS)
def test_every_key_can_be_explained(key):
    text = explain(key, READERS)
    assert max(map(len, text.splitlines())) <= 120 and key in text


def test_a_section_lists_its_keys_with_their_first_sentences():
    lines = explain("reward", READERS).splitlines()
    keys = [line.strip() for line in lines if line.startswith("  reward.")]
    assert keys == [key for key in FIELDS if key.startswith("reward.") and key.count(".") == 1]
    assert lines[lines.index("  reward.judge") + 1].strip().startswith("Section: A served model that grades answers")
    assert lines[lines.index("  reward.workers") + 1].strip() == "Number of scoring processes beside each rank that samples."
    assert "e.g. http://localhost:8000/v1." in explain("reward.judge", READERS), "the dots of e.g. end no sentence"


def test_an_unknown_key_names_the_nearest():
    with pytest.raises(ConfigError, match=r"^unknown key 'grpo\.clipeps'; the nearest known key is 'grpo\.clip_eps'$"):
        explain("grpo.clipeps", READERS)


def test_the_list_has_every_section_and_the_settings_in_none():
    listed = {line.strip() for line in list_sections().splitlines() if re.match(r"  \w", line)}
    assert listed == {key for key in FIELDS if "." not in key} >= {"run_dir", "seed", "grpo"}


def test_defaults_are_written_as_the_command_line_takes_them():
    text, defaults = describe_settings(list(Config.model_fields)), flatten_config(Config())
    written = dict(line.strip().split("=", 1) for line in text.splitlines() if re.match(r"  [a-z_.0-9]+=", line))
    assert {key: yaml.safe_load(value) for key, value in written.items()} == {key: defaults[key] for key in known_keys()}
    assert count_settings(list(SECTIONS)) == len(written) - len({"run_dir", "seed"})
