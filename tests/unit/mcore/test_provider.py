"""The architectures on one rank: V3's equal to transformers' DeepseekV3, and what the settings switch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_r1.config.model import ParallelConfig
from megatron_r1.config.optimizer import MoeTrainingConfig
from megatron_r1.config.runtime import RuntimeConfig
from megatron_r1.errors import ConfigError, ConversionError
from megatron_r1.mcore import host
from megatron_r1.model.architecture import Architecture
from megatron_r1.model.latent_attention import LatentYarnScaling
from megatron_r1.model.presets import PRESETS, resolve_architecture
from tests.one_rank import one_rank_world
from tests.random_weights import (
    full_architecture,
    llama_architecture,
    qwen2_architecture,
    random_ids,
    random_weights,
    write_random_model,
)

host.activate("cpu")

from megatron.core.packed_seq_params import PackedSeqParams

from megatron_r1.mcore import parallel, provider
from megatron_r1.weights.hf import HfFolder
from megatron_r1.weights.hf_export import export_hf
from megatron_r1.weights.load import load_weights

SMALL = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
    "v_head_dim": 16, "moe_intermediate_size": 32, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 4,
    "routed_scaling_factor": 2.5, "rope_theta": 10000.0, "init_std": 0.05,
}  # fmt: skip


def build(arch: Architecture, moe: MoeTrainingConfig | None = None, seed: int = 1, **options: object) -> provider.R1GPTModel:
    """The whole model on this process."""
    one_rank_world()
    layout = parallel.resolve_layout(ParallelConfig(), arch, 1, mtp=False)
    parallel.build_process_groups(layout, seed=1)
    return provider.build_model(arch, layout, RuntimeConfig(), moe or MoeTrainingConfig(), seed=seed, **options)[0]


def rows(count: int = 2, length: int = 48) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids, positions and labels."""
    generator = torch.Generator().manual_seed(3)
    tokens, labels = torch.randint(96, (2, count, length), generator=generator).unbind()
    return tokens.contiguous(), torch.arange(length).expand(count, length).contiguous(), labels.contiguous()


@pytest.mark.parametrize(
    ("q_lora_rank", "scaling"),
    [
        (None, None),
        (24, LatentYarnScaling(factor=8.0, original_max_position_embeddings=16)),
        (24, LatentYarnScaling(factor=8.0, original_max_position_embeddings=16, mscale=1.0, mscale_all_dim=0.5)),
    ],
    ids=["plain", "yarn", "yarn-mscale"],
)
def test_logits_equal_those_of_transformers(q_lora_rank: int | None, scaling: LatentYarnScaling | None, tmp_path: Path) -> None:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    arch = resolve_architecture("tiny", SMALL | {"q_lora_rank": q_lora_rank, "rope_scaling": scaling})
    torch.manual_seed(0)
    config = arch.to_hf_config(bos_token_id=0, eos_token_id=1, dtype="float32")
    theirs = DeepseekV3ForCausalLM(DeepseekV3Config(**config)).float().eval()
    for name, bias in theirs.named_buffers():
        if name.endswith("e_score_correction_bias"):
            bias.copy_(torch.randn_like(bias) * 0.05)
    theirs.save_pretrained(tmp_path)
    ours = build(arch)
    load_weights([ours], arch, tmp_path, parallel.groups())
    tokens, positions, _ = rows()
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens, positions, None), theirs(tokens).logits, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("lengths", [[20, 1, 11], [100, 2, 3, 1, 1, 5, 2, 2]], ids=["one group", "two or more groups"])
@pytest.mark.parametrize("arch", [resolve_architecture("tiny", SMALL), llama_architecture()], ids=["deepseek_v3", "llama"])
def test_packed_sequences_do_not_see_each_other(arch: Architecture, lengths: list[int]) -> None:
    model = build(arch)
    tokens, _, labels = rows(1, sum(lengths))
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    packing = PackedSeqParams("thd", bounds, bounds, max_seqlen_q=max(lengths), max_seqlen_kv=max(lengths))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    with torch.no_grad():
        packed = model(tokens, positions, None, labels=labels, packed_seq_params=packing)
        alone = [
            model(t, torch.arange(t.shape[1])[None], None, labels=y)
            for t, y in zip(tokens.split(lengths, 1), labels.split(lengths, 1), strict=True)
        ]
    torch.testing.assert_close(packed, torch.cat(alone, 1), atol=1e-5, rtol=1e-5)


def test_temperature_divides_the_logits() -> None:
    model = build(resolve_architecture("tiny", SMALL))
    tokens, positions, labels = rows()
    with torch.no_grad():
        logits = model(tokens, positions, None)
        model.logit_temperature = 0.7
        nll = model(tokens, positions, None, labels=labels)
    expected = -(logits / 0.7).log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(nll, expected)


def test_frozen_mtp_keeps_its_weights_and_costs_nothing() -> None:
    arch = resolve_architecture("tiny", SMALL | {"num_nextn_predict_layers": 1})
    frozen, trained = build(arch), build(arch, MoeTrainingConfig(mtp_loss_scale=0.3))
    assert frozen.state_dict().keys() == trained.state_dict().keys()
    tokens, positions, labels = rows()
    calls = []
    for model in (frozen, trained):
        model.mtp.register_forward_hook(lambda *_, m=model: calls.append(m))
        model(tokens, positions, None, labels=labels).sum().backward()
    assert calls == [trained]
    for name, parameter in frozen.named_parameters():
        assert (parameter.grad is None) == name.startswith("mtp.")
    assert all(parameter.grad is not None for parameter in trained.parameters())


def test_frozen_router_gets_no_gradient() -> None:
    model = build(resolve_architecture("tiny", SMALL), freeze_router=True)
    tokens, positions, labels = rows()
    model(tokens, positions, None, labels=labels).sum().backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert without == {f"decoder.layers.{layer}.mlp.router.weight" for layer in (1, 2)}


def test_initial_weights_depend_on_seed_and_have_one_deviation() -> None:
    arch = resolve_architecture("tiny", {})
    first, again, other = (dict(build(arch, seed=seed).named_parameters()) for seed in (1, 1, 2))
    for name, parameter in first.items():
        assert torch.equal(parameter, again[name])
        if parameter.dim() == 1:
            assert torch.equal(parameter, torch.ones_like(parameter))
            continue
        assert not torch.equal(parameter, other[name])
        assert parameter.std().item() == pytest.approx(arch.init_std, rel=0.05)
    drawn = [p.flatten()[0].item() for p in first.values() if p.dim() > 1]
    assert len(set(drawn)) == len(drawn)


def test_dense_model_has_no_use_for_moe_settings() -> None:
    """Frozen routers and bias updates find nothing; tied weights are one tensor; biases start at zero."""
    moe = MoeTrainingConfig(bias_update_rate=1e-3, aux_loss_coeff=1e-2)
    model, plain = build(qwen2_architecture(), moe, freeze_router=True), build(qwen2_architecture())
    names = dict(model.named_parameters())
    assert "output_layer.weight" not in names and all(p.requires_grad for p in names.values())
    biases = [p for name, p in names.items() if name.endswith("bias")]
    assert len(biases) == 4 and not any(b.any() for b in biases)
    tokens, positions, labels = rows()
    with torch.no_grad():
        values = [m(tokens, positions, None, labels=labels) for m in (model, plain)]
    assert torch.equal(*values)


@pytest.mark.parametrize("name", ["model.layers.5.embed_tokens.weight", "model.layers.5.shared_head.head.weight"])
def test_copies_that_differ_are_refused(name: str, tmp_path: Path) -> None:
    """Published checkpoints repeat embedding and head in the multi-token-prediction layer; Megatron-Core has them once."""
    arch = full_architecture(mtp=1)
    weights = dict(random_weights(arch, 0))
    weights[name] = weights[name].clone()
    weights[name][-1, -1] += 1e-3
    export_hf(weights.items(), arch, tmp_path / "model", bos_token_id=0, eos_token_id=1)
    with pytest.raises(ConversionError, match=f"tensor {name} in .* differs from "):
        load_weights([build(arch)], arch, tmp_path / "model", parallel.groups())


def test_balance_loss_is_that_of_the_report() -> None:
    """alpha sum_i f_i P_i, averaged over sequences and times the tokens of the micro-batch (V3 equations 17 to 20)."""
    alpha = 0.1
    arch = resolve_architecture("tiny", SMALL)
    layers = [build(arch, MoeTrainingConfig(aux_loss_coeff=coeff)).decoder.layers[1].mlp.router for coeff in (alpha, 0.0)]
    hidden = torch.randn(12, 3, 64, generator=torch.Generator().manual_seed(0))  # [sequence, rows, hidden]
    gradients = []
    for router in layers:
        probs, _ = router(hidden)
        (probs.sum() * 0.0).backward()
        gradients.append(router.weight.grad)
    weight = layers[0].weight.detach().clone().requires_grad_()
    scores = (hidden @ weight.T).sigmoid()
    chosen = torch.zeros_like(scores).scatter(-1, scores.topk(4, dim=-1).indices, 1.0)
    f = chosen.sum(0) * 8 / (4 * 12)
    p = (scores / scores.sum(-1, keepdim=True)).mean(0)
    (alpha * (f * p).sum(-1).mean() * hidden.shape[0] * hidden.shape[1]).backward()
    torch.testing.assert_close(gradients[0], weight.grad, atol=1e-5, rtol=1e-4)
    assert gradients[1].abs().max() == 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"norm_topk_prob": False}, "norm_topk_prob=false"),
        ({"n_group": 8, "topk_group": 4}, "n_group=8 of n_routed_experts=8: a group is scored by its best two experts"),
    ],
)
def test_routers_that_megatron_computes_differently_are_refused(overrides: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(resolve_architecture("tiny", SMALL | overrides))


#: What Megatron-Core's router has no setting for, each in another way of the same small shapes.
ROUTERS = {
    "v3, best two of a group where Megatron-Core takes one": ("tiny", {"num_experts_per_tok": 2, "n_group": 4, "topk_group": 2}),
    "v3, best two of a group where Megatron-Core takes three": ("tiny", {"num_experts_per_tok": 3, "n_group": 2, "topk_group": 1}),
    "v3, one expert": ("tiny", {"num_experts_per_tok": 1, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.5}),
    "v2, best of a group where Megatron-Core takes two": ("tiny_deepseek_v2", {}),
    "v2, best of a group as Megatron-Core does": ("tiny_deepseek_v2", {"num_experts_per_tok": 2}),
    "v2, all experts": ("tiny_deepseek_v2", {"topk_method": "greedy", "n_group": 1, "topk_group": 1, "rope_scaling": None}),
    "v2, one expert": ("tiny_deepseek_v2", {"topk_method": "greedy", "n_group": 1, "topk_group": 1, "num_experts_per_tok": 1}),
    "qwen3_moe, not normalised": ("tiny_qwen3_moe", {"norm_topk_prob": False}),
    "qwen3_moe, one expert": ("tiny_qwen3_moe", {"norm_topk_prob": False, "num_experts_per_tok": 1}),
    "qwen3_moe, every second layer": ("tiny_qwen3_moe", {"decoder_sparse_step": 2, "mlp_only_layers": (3,)}),
    "v3, YaRN without mscale": ("tiny", {"rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 16,
                                "mscale": 1.0, "mscale_all_dim": 0.0}}),
    "v3, YaRN of Kimi K2": ("tiny", {"rope_scaling": {"factor": 32.0, "original_max_position_embeddings": 16, "beta_fast": 1.0}}),
    "qwen2, YaRN": ("tiny_qwen2", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}}),
    "qwen2, Llama 3's scaling": ("tiny_qwen2", {"rope_scaling": {"rope_type": "llama3", "original_max_position_embeddings": 32}}),
}  # fmt: skip


@pytest.mark.parametrize("name", ROUTERS)
def test_routers_and_scalings_compute_what_transformers_computes(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    preset, overrides = ROUTERS[name]
    small = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 64, "kv_lora_rank": 32, "qk_rope_head_dim": 16}
    shape = PRESETS[preset]
    arch = resolve_architecture(preset, {key: value for key, value in small.items() if key in type(shape).model_fields} | overrides)
    folder = write_random_model(tmp_path / "model", arch)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    module = build(arch)
    load_weights([module], HfFolder(folder).architecture(), folder, parallel.groups())
    ids = random_ids(arch)
    with torch.no_grad():
        want, got = theirs(ids).logits, module(ids, torch.arange(ids.shape[1]).expand_as(ids), None)
    assert want.std() > 0.3
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)
