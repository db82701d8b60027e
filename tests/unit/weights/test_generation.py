"""What a published folder says of generation, and what of it stands in the trained one."""

from __future__ import annotations

import json

import pytest
import torch

from megatron_r1.errors import CheckpointError
from megatron_r1.model.presets import PRESETS
from megatron_r1.weights.generation import Generation, read_generation
from megatron_r1.weights.hf_export import write_configs

ARCH = PRESETS["tiny"]
BASE = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "pad_token_id": 7, "transformers_version": "4.48.3"}


@pytest.mark.parametrize(
    ("config_eos", "generation", "config_gets", "generation_gets"),
    [
        (5, None, 5, {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 5}),
        ([5, 6], None, [5, 6], {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": [5, 6]}),
        (9, BASE | {"eos_token_id": [9, 5]}, [9, 5], BASE | {"eos_token_id": [9, 5]}),
        ([9, 8], BASE | {"eos_token_id": [9, 8, 7], "bos_token_id": 2}, [9, 8, 5],
         BASE | {"eos_token_id": [9, 8, 7, 5], "bos_token_id": 2}),
        (9, BASE, [9, 5], BASE | {"eos_token_id": [9, 5]}),
        (None, BASE | {"eos_token_id": 5}, 5, BASE | {"eos_token_id": 5}),
    ],
)  # fmt: skip
def test_all_ends_and_all_settings_are_kept(tmp_path, config_eos, generation, config_gets, generation_gets):
    """5 is the tokenizer's end, with which the model was trained."""
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": config_eos}))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    (tmp_path / "out").mkdir()
    said = read_generation(tmp_path, 448)
    write_configs(tmp_path / "out", ARCH, torch.bfloat16, bos_token_id=1, eos_token_id=5, generation=said)
    config, settings = (json.loads((tmp_path / "out" / name).read_text()) for name in ("config.json", "generation_config.json"))
    assert (config["eos_token_id"], settings) == (config_gets, generation_gets)
    assert read_generation(tmp_path / "out", 448).to_json(1, 5) == settings, "also after a second stage"


def test_a_fresh_model_ends_as_its_tokenizer():
    assert read_generation(None, 448) == Generation()
    assert Generation().to_json(1, 2) == {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2}


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"eos_token_id": 448}', '{"eos_token_id": true}', '{"eos_token_id": [1, "</s>"]}']
)
def test_files_that_cannot_be_used_are_named_on_one_line(tmp_path, text):
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(CheckpointError, match="generation_config.json") as caught:
        read_generation(tmp_path, 448)
    assert "\n" not in str(caught.value)
