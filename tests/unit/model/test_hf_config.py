"""Published config.json files are right or refused with one true line, and the table in the documents says which."""

from __future__ import annotations

import json
import re

import pytest

from megatron_r1.model.architecture import Architecture
from megatron_r1.model.hf_config import read_hf_config
from megatron_r1.model.registry import families
from megatron_r1.weights.mapping import hf_shapes
from tests.paths import ROOT
from tests.unit.model.published import CONFIGS

PAGE = (ROOT / "docs/model_families.md").read_text()
#: Test files that run a random model of every family -> what they must say to do so for one of these families.
TESTS = {
    "tests/pipeline/test_weights_parity.py": "tests/weights_runs.py",
    "tests/pipeline/test_convert.py": "tests/pipeline/test_convert.py",
    "tests/pipeline/test_vllm_folder.py": "tests/pipeline/test_vllm_folder.py",
}


def answer(config: dict) -> str:
    """The family that a config is read as, or the line that refuses it."""
    try:
        return f"`{read_hf_config(config).model_type}`"
    except ValueError as error:
        return str(error)


def rows(heading: str) -> list[list[str]]:
    """The cells of the table below a heading."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


@pytest.mark.parametrize("name", CONFIGS)
def test_the_table_of_published_models_says_what_happens(name):
    said = {cells[0]: cells[1] for cells in rows("Published models")}
    assert said[name] == answer(CONFIGS[name])
    assert "\n" not in said[name]


def test_the_table_has_no_other_models():
    assert [cells[0] for cells in rows("Published models")] == list(CONFIGS)


def test_the_table_of_families_is_the_registry():
    table = rows("Families")
    known = [f"`{name}`" for name in families()]
    assert [cells[0] for cells in table] == known
    for cells, family in zip(table, families().values(), strict=True):
        assert cells[1] == (", ".join(f"`{name}`" for name in family.architecture.ALSO_KNOWN_AS) or "-")
        assert [re.findall(r"\(\.\./(.+?)\)", cell) for cell in cells[3:6]] == [[path] for path in TESTS]


def test_the_tests_that_the_table_names_have_every_family():
    for path in TESTS.values():
        text = (ROOT / path).read_text()
        assert "further_families()" in text and all(name in text.lower() for name in ("v3", "qwen2", "llama"))


def test_sizes_are_those_of_the_model_cards():
    """Billions of parameters, those of multi-token prediction left out."""
    cards = {
        "Moonlight-16B-A3B": 16.0, "Kimi-K2": 1026.0, "DeepSeek-V2-Lite": 15.7, "DeepSeek-V2": 235.7, "Qwen3-30B-A3B": 30.5,
        "Qwen3-235B-A22B": 235.1, "Llama-3.2-1B": 1.24, "Qwen2.5-7B, R1-Distill-Qwen-7B": 7.6,
    }  # fmt: skip
    for name, billions in cards.items():
        arch = read_hf_config(CONFIGS[name])
        total = sum(shape[0] * (shape[1] if len(shape) > 1 else 1) for shape in hf_shapes(arch).values()) / 1e9
        assert total == pytest.approx(billions, rel=0.01), name


def test_a_config_that_was_read_is_written_and_read_the_same():
    for name, config in CONFIGS.items():
        if answer(config).startswith("`"):
            arch = read_hf_config(config)
            assert read_hf_config(json.loads(json.dumps(arch.to_hf_config(0, 1, "bfloat16")))) == arch, name


@pytest.mark.parametrize("model_type", families())
def test_what_config_json_lacks_is_what_transformers_takes(model_type):
    from transformers import AutoConfig

    kind = families()[model_type].architecture
    needed = {name: value for name, value in next(c for c in CONFIGS.values() if c["model_type"] == model_type).items()
              if name in kind.model_fields and kind.model_fields[name].is_required() and name != "num_key_value_heads"}  # fmt: skip
    needed["num_attention_heads"] = 32
    arch = kind.from_hf_config({"num_experts_per_tok": 2, "model_type": model_type} | needed)
    theirs = AutoConfig.for_model(model_type, **{"num_experts_per_tok": 2} | needed)
    ours_alone = {"model_type", "init_std", "score_label", "rope_theta", "rope_scaling", "num_nextn_predict_layers", "head_dim"}
    for name in kind.model_fields.keys() - ours_alone:
        got, want = getattr(arch, name), getattr(theirs, name)
        want = {"n_group": 1, "topk_group": 1}.get(name) if want is None else want
        assert (list(got) if isinstance(got, tuple) else got) == want, name
    assert arch.rope_theta == theirs.rope_parameters["rope_theta"]


BASE = CONFIGS["Qwen2.5-7B, R1-Distill-Qwen-7B"]
MLA = CONFIGS["DeepSeek-V3, R1"]
MOE = CONFIGS["Qwen3-30B-A3B"]
COUNTS = ["vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "num_key_value_heads",
          "max_position_embeddings"]  # fmt: skip
LATENT_COUNTS = ["n_routed_experts", "moe_intermediate_size", "num_experts_per_tok", "n_group", "topk_group", "kv_lora_rank",
                 "q_lora_rank", "qk_rope_head_dim", "v_head_dim", "first_k_dense_replace", "num_nextn_predict_layers"]  # fmt: skip


@pytest.mark.parametrize("value", [-1, 10**9, 10**30, 0.5, 1e400, float("nan"), "64", True, [3], {"a": 1}], ids=str)
@pytest.mark.parametrize(
    ("config", "key"),
    [(BASE, key) for key in COUNTS]
    + [(MLA, key) for key in LATENT_COUNTS]
    + [(MOE, key) for key in ("num_experts", "decoder_sparse_step")],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_counts_that_no_model_has_are_one_line(config, key, value):
    with pytest.raises(ValueError, match=key) as caught:
        read_hf_config(config | {key: value})
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("config", "change", "named"),
    [
        (MLA, {"n_shared_experts": None}, {"n_shared_experts": 0}),
        (MLA, {"n_group": None, "topk_group": None}, {"n_group": 1, "topk_group": 1}),
        (MLA, {"num_nextn_predict_layers": None}, {"num_nextn_predict_layers": 0}),
        (MLA, {"num_nextn_predict_layers": 1, "num_mtp_layers": 1}, {"num_nextn_predict_layers": 1}),
        (MLA, {"q_lora_rank": None}, {"q_lora_rank": None}),
        (BASE, {"head_dim": None, "num_key_value_heads": None}, {"head_dim": 128, "num_key_value_heads": 28}),
        (MOE, {"mlp_only_layers": None}, {"mlp_only_layers": ()}),
        (MOE, {"mlp_only_layers": [0, 3]}, {"mlp_only_layers": (0, 3)}),
    ],
    ids=lambda value: ",".join(value) if len(value) < 5 else "",
)
def test_null_is_what_the_published_code_takes_it_for(config, change, named):
    arch = read_hf_config(config | change)
    assert {name: getattr(arch, name) for name in named} == named


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (MLA, {"norm_topk_prob": None}, "norm_topk_prob is null"),
        (MLA, {"num_nextn_predict_layers": 1, "num_mtp_layers": 2}, "num_mtp_layers is 2 and num_nextn_predict_layers is 1"),
        (MLA, {"rope_scaling": {**YARN, "mscale": 0.7}}, "mscale=0.7 and mscale_all_dim=None: set both, or neither"),
        (MLA, {"rope_scaling": {**YARN, "mscale_all_dim": 0.7}}, "mscale=None and mscale_all_dim=0.7: set both, or neither"),
        (MLA, {"rope_scaling": {"type": "llama3"}}, "rope_scaling is of type 'llama3', deepseek_v3 is built with 'yarn' or none"),
        (BASE, {"rope_scaling": {"type": "yarn"}}, "rope_scaling lacks factor"),
        (BASE, {"rope_scaling": {**YARN, "extrapolation": 2}}, "rope_scaling has extrapolation, which yarn does not have"),
        (BASE, {"rope_scaling": {**YARN, "attention_factor": 1.0}}, "attention_factor is 1.0, only YaRN's own 1.138"),
        (BASE, {"rope_scaling": {**YARN, "truncate": False}}, "rope_scaling.truncate"),
        (BASE, {"rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}}, "only latent attention is built with"),
        (BASE, {"rope_scaling": {**YARN, "type": "linear"}}, "has the types 'yarn' and 'linear'"),
        (BASE, {"rope_scaling": {**YARN, "factor": -1}}, "rope_scaling.*factor"),
        (BASE, {"rope_scaling": {**YARN, "factor": float("inf")}}, "rope_scaling.*factor"),
        (BASE, {"rope_scaling": {**YARN, "original_max_position_embeddings": 10**12}}, "original_max_position_embeddings"),
        (BASE, {"rope_scaling": {"type": "llama3", "factor": 8.0}}, "rope_scaling lacks low_freq_factor"),
        (BASE, {"rope_scaling": {"factor": 8.0}}, "has factor but no rope_type"),
        (BASE, {"rope_scaling": [1]}, "rope_scaling is .1., not a mapping"),
        (BASE, {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6}}, "rope_theta is 10000.0 and"),
        (BASE, {"rope_theta": -1.0}, "rope_theta"),
        (BASE, {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        (BASE, {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types has sliding_attention"),
        (BASE, {"architectures": "Qwen2ForCausalLM"}, "architectures is 'Qwen2ForCausalLM'"),
        (BASE, {"model_type": ["qwen2"]}, "model_type is .'qwen2'."),
        (BASE, {"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        (CONFIGS["DeepSeek-V2-Lite"], {"norm_topk_prob": True}, "norm_topk_prob is True"),
        (CONFIGS["DeepSeek-V2-Lite"], {"n_group": 8, "topk_group": 2}, "topk_method is 'greedy' and n_group=8"),
        (CONFIGS["DeepSeek-V2-Lite"], {"scoring_func": "sigmoid"}, "scoring_func is 'sigmoid'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_what_nobody_can_say_is_refused_by_name(config, change, message):
    with pytest.raises(ValueError, match=message) as caught:
        read_hf_config(config | change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "want"),
    [
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, {**YARN, "original_max_position_embeddings": 131072}),
        ({"rope_scaling": {**YARN, "beta_fast": None}}, YARN),
        ({"rope_scaling": {**YARN, "attention_factor": 1.1386294361119891}}, YARN),
        ({"rope_scaling": {**YARN, "attention_factor": None}, "original_max_position_embeddings": 2048},
         {**YARN, "original_max_position_embeddings": 2048}),
        ({"rope_scaling": None, "rope_parameters": {**YARN, "rope_theta": 10000}}, YARN),
    ],
    ids=lambda value: ",".join(value.get("rope_scaling") or value.get("rope_parameters") or {}),
)  # fmt: skip
def test_keys_that_yarn_lacks_have_the_meaning_of_transformers(change, want):
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    arch = read_hf_config(BASE | change)
    assert arch.yarn_scaling() == {"beta_fast": 32.0, "beta_slow": 1.0} | {k: v for k, v in want.items() if k != "rope_type"}
    theirs, factor = ROPE_INIT_FUNCTIONS["yarn"](AutoConfig.for_model(**BASE | change))
    check_frequencies(arch, theirs)
    assert factor == pytest.approx(1.1386294361119891)


def check_frequencies(arch: Architecture, theirs) -> None:
    """Ours are transformers'."""
    import torch

    from megatron_r1.mcore.rope import yarn_frequencies

    plain = arch.rope_theta ** -(torch.arange(0, arch.head_dim, 2).float() / arch.head_dim)
    torch.testing.assert_close(yarn_frequencies(plain, arch.rope_theta, **arch.yarn_scaling()), theirs, rtol=1e-6, atol=0)
