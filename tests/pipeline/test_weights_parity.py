"""The mapping is right, not only invertible: Megatron-Core and transformers compute the same logits from one folder."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from torch.nn.functional import embedding, linear, rms_norm

from megatron_r1.weights.hf import HfFolder
from tests.random_weights import full_architecture, random_ids, write_random_model
from tests.weights_runs import LAYOUTS, MODELS, case_name, run_layouts


@cache
def expected_logits(model: str, folder: Path) -> torch.Tensor:
    """[1 + depth, b, t, vocabulary] by transformers and, for multi-token prediction, by `predict_further`."""
    from transformers import AutoModelForCausalLM

    arch = MODELS[model]
    write_random_model(folder / model, arch)
    theirs = AutoModelForCausalLM.from_pretrained(folder / model, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        ids = random_ids(arch)
        hidden = theirs.model(ids).last_hidden_state  # after the main final norm
        logits = [theirs.lm_head(hidden)]
        for depth in range(arch.mtp_depth):
            hidden, further = predict_further(theirs, HfFolder(folder / model), depth, ids, hidden)
            logits.append(further)
    return torch.stack(logits)


def predict_further(
    theirs: torch.nn.Module, weights: HfFolder, depth: int, ids: torch.Tensor, hidden: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Multi-token prediction (V3 section 2.2) with the column order of the published checkpoint: embedding, then hidden state.

    Position i combines the previous depth's state, after that depth's final norm, with token i + 1 + depth. The block itself is
    a decoder layer like the main model's, which the main logits prove.
    """
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3DecoderLayer

    config = theirs.config
    prefix = f"model.layers.{config.num_hidden_layers + depth}."
    own = {name.removeprefix(prefix): weights.read(name) for name in weights.files if name.startswith(prefix)}
    block = DeepseekV3DecoderLayer(config, layer_idx=config.num_hidden_layers + depth).eval()
    missing, _ = block.load_state_dict(fuse_experts(own, block), strict=False)
    assert not missing

    length, epsilon = ids.shape[1], config.rms_norm_eps
    tokens = ids.roll(-1 - depth, 1)
    embedded = rms_norm(embedding(tokens, own["embed_tokens.weight"]), hidden.shape[-1:], own["enorm.weight"], epsilon)
    previous = rms_norm(hidden, hidden.shape[-1:], own["hnorm.weight"], epsilon)
    combined = linear(torch.cat([embedded, previous], -1), own["eh_proj.weight"])
    mask = torch.full((1, 1, length, length), torch.finfo(torch.float32).min).triu(1)
    positions = torch.arange(length)[None]
    rope = theirs.model.rotary_emb(combined, positions)
    output = block(combined, attention_mask=mask, position_ids=positions, position_embeddings=rope)
    output = rms_norm(output, hidden.shape[-1:], own["shared_head.norm.weight"], epsilon)
    return output, linear(output, own["shared_head.head.weight"])


def fuse_experts(own: dict[str, torch.Tensor], block: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The state dict of transformers' layer, which stacks its experts."""
    fused = {name: own[name] for name in block.state_dict() if name in own}
    count = block.mlp.config.n_routed_experts
    experts = [{p: own[f"mlp.experts.{e}.{p}_proj.weight"] for p in ("gate", "up", "down")} for e in range(count)]
    fused["mlp.experts.gate_up_proj"] = torch.stack([torch.cat([e["gate"], e["up"]]) for e in experts])
    fused["mlp.experts.down_proj"] = torch.stack([e["down"] for e in experts])
    return fused


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.mark.parametrize(
    ("world_size", "model", "sizes"),
    [(n, model, sizes) for n, models in LAYOUTS.items() for model, layouts in models.items() for sizes in layouts],
    ids=str,
)
def test_logits_are_those_of_transformers(world_size: int, model: str, sizes: dict[str, int], folder: Path) -> None:
    _, logits = run_layouts(world_size)
    ours, theirs = logits[case_name(model, "fp32", sizes)], expected_logits(model, folder)
    assert ours.shape == theirs.shape
    for depth, (got, expected) in enumerate(zip(ours, theirs, strict=True)):
        known = slice(None, ours.shape[2] - depth)  # beyond it a depth has no token to look at
        assert expected.std() > 0.3
        assert (got - expected)[:, known].abs().max() < 1e-4


def test_exported_config_describes_the_model(tmp_path):
    arch = full_architecture(mtp=1)
    config = json.loads((write_random_model(tmp_path / "model", arch) / "config.json").read_text())
    assert type(arch).from_hf_config(config) == arch.model_copy(update={"init_std": 0.006})
