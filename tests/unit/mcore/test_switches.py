"""Which switches are on where, what Megatron-Core is given, what is refused, and that those of the CPU change no result."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch

from megatron_r1.config.megatron import MegatronConfig
from megatron_r1.config.model import ParallelConfig
from megatron_r1.config.optimizer import MoeTrainingConfig, OptimizerConfig
from megatron_r1.config.runtime import RuntimeConfig
from megatron_r1.errors import ConfigError
from megatron_r1.mcore import host
from megatron_r1.mcore.layout import resolve_layout
from megatron_r1.mcore.switch_rules import OBJECTIONS, Machine, SwitchContext, find_machine
from megatron_r1.mcore.switches import describe_defaults, resolve_switches
from megatron_r1.model.architecture import Architecture
from megatron_r1.model.presets import PRESETS
from megatron_r1.training.pretrain import loss_over
from megatron_r1.types import MicroBatch
from tests.one_rank import one_rank_world
from tests.random_weights import full_architecture, qwen2_architecture

host.activate("cpu")

from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_r1.mcore import parallel
from megatron_r1.mcore.policy import MegatronPolicy

CPU = Machine("cpu")
HOPPER = Machine("cuda", "2.11.0", apex_gradients=True, deep_ep=True, capability=9)
BARE = Machine("cuda")
MOE = MoeTrainingConfig(bias_update_rate=1e-3, aux_loss_coeff=1e-2, mtp_loss_scale=0.3, mtp_trains_trunk=True)
V3 = PRESETS["671b"]
EVERYWHERE = {"batch_p2p_comm"}
LOW = {"use_precision_aware_optimizer": True, "exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "bf16"}


def work_of(
    arch: Architecture = V3, *, world: int = 64, packed: bool = False, moe: MoeTrainingConfig = MOE, trains: bool = True,
    runtime: dict[str, Any] | None = None, **sizes: int,
) -> SwitchContext:  # fmt: skip
    layout = resolve_layout(ParallelConfig(**sizes), arch, world, mtp=False)
    return SwitchContext(arch, layout, RuntimeConfig(**({"dtype": "bf16"} | (runtime or {}))), moe, packed, trains)


def test_defaults_are_good_for_cuda_with_transformer_engine_and_off_elsewhere() -> None:
    on = resolve_switches(MegatronConfig(), work_of(ep=8), HOPPER).on
    chosen = {name for name in OBJECTIONS if MegatronConfig.model_fields[name].default is None}
    assert set(on) == chosen | EVERYWHERE
    assert set(resolve_switches(MegatronConfig(), work_of(ep=8), CPU).on) == EVERYWHERE
    on_bare = {"bias_swiglu_fusion", "overlap_grad_reduce", "overlap_param_gather"}
    assert set(resolve_switches(MegatronConfig(), work_of(ep=8), BARE).on) == on_bare | EVERYWHERE
    dense = set(resolve_switches(MegatronConfig(), work_of(PRESETS["qwen2.5_14b"]), HOPPER).on)
    assert dense == on_bare | EVERYWHERE | {"apply_rope_fusion", "gradient_accumulation_fusion"}


def test_what_megatron_is_given_by_its_own_names() -> None:
    asked = MegatronConfig(
        moe_grouped_gemm=False, moe_token_dispatcher_type="flex", overlap_moe_expert_parallel_comm=True, batch_p2p_comm=False,
        cross_entropy_loss_fusion=True, fp8="e4m3", overlap_grad_reduce=False, cuda_graph_impl="transformer_engine",
        cuda_graph_scope=["attn", "mlp"], **LOW,
    )  # fmt: skip
    given = resolve_switches(asked, work_of(ep=8, pp=4, vpp=2), HOPPER)
    assert set(given.transformer) <= {field.name for field in fields(TransformerConfig)}
    assert set(given.ddp) <= {field.name for field in fields(DistributedDataParallelConfig)}
    assert set(given.optimizer) <= {field.name for field in fields(MegatronOptimizerConfig)}
    assert given.transformer == {
        "bias_activation_fusion": True, "apply_rope_fusion": True, "gradient_accumulation_fusion": True,
        "cross_entropy_loss_fusion": True, "batch_p2p_comm": False, "overlap_p2p_comm": True, "moe_grouped_gemm": False,
        "moe_permute_fusion": True, "moe_router_fusion": True, "moe_shared_expert_overlap": False,
        "moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": "deepep", "overlap_moe_expert_parallel_comm": True,
        "fp8": "e4m3", "fp8_recipe": "blockwise", "cuda_graph_impl": "transformer_engine",
        "cuda_graph_scope": ["attn", "mlp"],
    }  # fmt: skip
    low = {"exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "bf16"}
    assert given.optimizer == low | {"use_precision_aware_optimizer": True, "store_param_remainders": False}
    assert (given.moments, given.optimizer_on_host) == ((2, 2), 0.0)
    assert "use_precision_aware_optimizer (moments bf16, bf16)" in given.on
    assert given.ddp == {"overlap_grad_reduce": False, "overlap_param_gather": False}
    assert not given.fuse_engine_gradients
    without_apex = resolve_switches(MegatronConfig(), work_of(), Machine("cuda", "2.11.0", capability=9))
    assert without_apex.fuse_engine_gradients and not without_apex.transformer["gradient_accumulation_fusion"]
    untrained = resolve_switches(MegatronConfig(), work_of(trains=False), HOPPER)
    assert untrained.ddp == untrained.optimizer == {} and untrained.moments == (4, 4)
    on_host = resolve_switches(MegatronConfig(optimizer_cpu_offload=True, optimizer_offload_fraction=0.5), work_of(), BARE)
    assert on_host.optimizer == {
        "use_precision_aware_optimizer": True, "store_param_remainders": False, "exp_avg_dtype": "fp32", "exp_avg_sq_dtype": "fp32",
        "optimizer_cpu_offload": True, "optimizer_offload_fraction": 0.5, "overlap_cpu_optimizer_d2h_h2d": False,
    }  # fmt: skip
    assert on_host.optimizer_on_host == 0.5 and "optimizer_cpu_offload (0.5 of the optimizer)" in on_host.on
    whole = resolve_switches(MegatronConfig(cuda_graph_impl="local"), work_of(PRESETS["qwen2.5_14b"]), BARE)
    assert whole.transformer["cuda_graph_scope"] == [] and "cuda_graph_impl=local (whole layers)" in whole.on


@pytest.mark.parametrize(
    ("asked", "work", "machine", "says"),
    [
        ({"moe_grouped_gemm": True}, {}, CPU, "moe_grouped_gemm=true does not fit: it needs CUDA with Transformer Engine 1.11"),
        ({"moe_grouped_gemm": True}, {"arch": "qwen2.5_14b"}, HOPPER, "qwen2 has no experts"),
        ({"moe_permute_fusion": True}, {}, Machine("cuda", "2.0", capability=9), "Transformer Engine 2.1 or newer"),
        ({"moe_router_fusion": True}, {"arch": "tiny_deepseek_v2"}, HOPPER, "groups of this deepseek_v2's experts"),
        ({"apply_rope_fusion": True}, {"arch": "tiny"}, HOPPER, "for YaRN alone"),
        ({"gradient_accumulation_fusion": True}, {}, BARE, "or Apex with its fused_weight_gradient_mlp_cuda"),
        ({"gradient_accumulation_fusion": True}, {"moe": MoeTrainingConfig(mtp_loss_scale=0.3)}, HOPPER, "moe.mtp_trains_trunk"),
        ({"overlap_param_gather": True, "overlap_grad_reduce": False}, {}, HOPPER, "needs megatron.overlap_grad_reduce=true"),
        ({"moe_shared_expert_overlap": True}, {}, CPU, "it needs CUDA"),
        ({"moe_shared_expert_overlap": True}, {"arch": "qwen3_30b_a3b"}, HOPPER, "has no shared experts"),
        ({"moe_shared_expert_overlap": True, "moe_token_dispatcher_type": "flex"}, {"ep": 8}, HOPPER, "=flex does not have it"),
        ({"overlap_moe_expert_parallel_comm": True}, {}, HOPPER, "parallel.ep is 1"),
        ({"overlap_moe_expert_parallel_comm": True}, {"ep": 8, "pp": 4}, HOPPER, "needs virtual stages"),
        ({"overlap_moe_expert_parallel_comm": True}, {"ep": 8, "pp": 4, "vpp": 2, "packed": True}, HOPPER, "packed sequences"),
        ({"moe_token_dispatcher_type": "flex"}, {"ep": 8}, BARE, "the package deep_ep"),
        ({"moe_token_dispatcher_type": "flex"}, {}, HOPPER, "parallel.ep is 1"),
        ({"batch_p2p_comm": True}, {"pp": 4, "vpp": 2}, HOPPER, "paired wrongly"),
        ({"fp8": "e4m3"}, {}, CPU, "needs Transformer Engine 2.3 or newer and a GPU of compute capability 9.0"),
        ({"fp8": "e4m3", "fp8_recipe": "mxfp8"}, {}, HOPPER, "compute capability 10.0"),
        ({"fp8": "e4m3"}, {"runtime": {"dtype": "fp32"}}, HOPPER, "runtime.dtype=fp32, it needs bf16"),
        ({"cuda_graph_impl": "local"}, {"arch": "qwen2.5_14b"}, CPU, "it needs CUDA"),
        ({"cuda_graph_impl": "local"}, {"arch": "qwen2.5_14b", "packed": True}, HOPPER, "no two shapes alike"),
        ({"cuda_graph_impl": "local"}, {}, HOPPER, "experts' numbers of tokens vary: transformer_engine captures parts"),
        ({"cuda_graph_impl": "local", "cuda_graph_scope": ["mlp"]}, {"arch": "qwen2.5_14b"}, HOPPER, "it captures whole layers"),
        ({"cuda_graph_impl": "transformer_engine"}, {}, Machine("cuda", "2.9", capability=9), "Transformer Engine 2.10 or newer"),
        ({"cuda_graph_impl": "transformer_engine"}, {"packed": True}, HOPPER, "no two shapes alike"),
        ({"cuda_graph_impl": "transformer_engine"}, {"runtime": {"dtype": "fp32"}}, HOPPER, "captures bf16 alone"),
        ({"cuda_graph_impl": "transformer_engine"}, {"runtime": {"recompute": "full"}}, HOPPER, "recompute=full excludes it"),
        ({"cuda_graph_impl": "transformer_engine"}, {"runtime": {"offload": ["gradients"]}}, HOPPER, "moves the gradients"),
        ({"cuda_graph_impl": "transformer_engine", "cuda_graph_scope": ["moe_router"]}, {}, HOPPER, "counts its choices outside"),
        ({"cuda_graph_impl": "transformer_engine"}, {"trains": False}, HOPPER, "nothing is trained"),
        ({"use_precision_aware_optimizer": True}, {}, CPU, "needs CUDA with Transformer Engine 2.4 or newer"),
        ({"use_precision_aware_optimizer": True}, {"runtime": {"dtype": "fp32"}}, HOPPER, "are their own master weights"),
        ({"exp_avg_dtype": "bf16"}, {}, HOPPER, "exp_avg_dtype=bf16 needs megatron.use_precision_aware_optimizer=true"),
        ({"exp_avg_sq_dtype": "bf16"}, {}, CPU, "exp_avg_sq_dtype=bf16 needs megatron.use_precision_aware_optimizer=true"),
        ({"optimizer_cpu_offload": True}, {}, CPU, "optimizer_cpu_offload=true does not fit: it needs CUDA"),
        ({"optimizer_cpu_offload": True}, {"runtime": {"dtype": "fp32"}}, BARE, "are their own master weights"),
        ({"optimizer_cpu_offload": True}, {"runtime": {"offload": ["optimizer"]}}, HOPPER, "runtime.offload names the optimizer"),
        (LOW | {"optimizer_cpu_offload": True}, {}, HOPPER, "keeps the moments of an optimizer on the host in fp32"),
        ({"optimizer_offload_fraction": 0.5}, {}, HOPPER, "optimizer_offload_fraction=0.5 needs megatron.optimizer_cpu_offload"),
        ({"overlap_cpu_optimizer_d2h_h2d": True}, {}, HOPPER, "=True needs megatron.optimizer_cpu_offload=true"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_line(asked: dict, work: dict, machine: Machine, says: str) -> None:
    work = {**work, "arch": PRESETS[work["arch"]]} if "arch" in work else work
    with pytest.raises(ConfigError) as raised:
        resolve_switches(MegatronConfig(**asked), work_of(**work), machine)
    assert says in str(raised.value) and "\n" not in str(raised.value) and str(raised.value).startswith("megatron.")


def test_fp8_fills_whole_tiles() -> None:
    switches = resolve_switches(MegatronConfig(fp8="e4m3"), work_of(tp=2, cp=2), HOPPER)
    layout = work_of(tp=2, cp=2).layout
    assert switches.require_tiles(layout, None) == switches.require_tiles(layout, 4096) == 512
    with pytest.raises(ConfigError, match="a multiple of 512 tokens on this layout, they have 768"):
        switches.require_tiles(layout, 768)
    assert resolve_switches(MegatronConfig(), work_of(), HOPPER).require_tiles(layout, 7 * 8) == layout.pad_multiple


def test_the_doctor_says_of_each_switch_whether_it_is_on() -> None:
    for machine in (CPU, BARE, HOPPER):
        lines = dict(describe_defaults(machine))
        assert set(OBJECTIONS) < set(lines)
    assert dict(describe_defaults(CPU))["bias_swiglu_fusion"] == "off; megatron.bias_swiglu_fusion=true turns it on"
    said = [dict(describe_defaults(machine))["use_precision_aware_optimizer"] for machine in (BARE, HOPPER)]
    assert said[0].startswith("off: it needs") and said[1] == "off; megatron.use_precision_aware_optimizer=true turns it on"
    graphs = [[line for name, line in describe_defaults(m) if name == "cuda_graph_impl"] for m in (BARE, HOPPER)]
    assert graphs[0][0].startswith("transformer_engine cannot be had: it needs") and graphs[0][1] == "local can be had"
    assert graphs[1] == ["transformer_engine can be had", "local can be had"]
    assert dict(describe_defaults(BARE))["apply_rope_fusion"].startswith("off: it needs CUDA with Transformer Engine")
    assert dict(describe_defaults(HOPPER))["apply_rope_fusion"] == "on, where the model and the layout have it"
    assert find_machine("cpu", True, 9) == CPU


def updates_of(arch: Architecture, runtime: dict[str, Any], **switches: Any) -> tuple[MegatronPolicy, dict[str, torch.Tensor]]:
    """Three updates of two micro-batches each, with log-probs between them; the policy, and numbers and weights.

    With so large an eps Adam does not blow the rounding of small gradients up to whole steps.
    """
    one_rank_world()
    parallel.build_process_groups(parallel.Layout(), seed=1)
    policy = MegatronPolicy(
        arch, parallel.Layout(), RuntimeConfig(**runtime), MOE, optimizer=OptimizerConfig(lr=0.1, eps=1.0), total_updates=4,
        seed=7, temperature=0.7, device=torch.device("cpu"), micro_batch_tokens=32,
        megatron=MegatronConfig(**switches), packed=False,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(arch.vocab_size, (2, 2, 17), generator=generator)
    rows = [
        MicroBatch(part[:, :-1].contiguous(), part[:, 1:].contiguous(), torch.ones(2, 16), torch.arange(16).expand(2, -1))
        for part in ids
    ]
    found: dict[str, torch.Tensor] = {}
    for update in range(3):
        stats = policy.train_on_micro_batches(rows, loss_over(64))
        read = policy.evaluate(rows[:1], lambda micro_batch, values: {0: values}) if update == 1 else {}
        found |= {f"numbers {update}": torch.tensor([stats.loss, stats.grad_norm])} | {f"read {n}": v for n, v in read.items()}
    return policy, found | {name: tensor.clone() for name, tensor in policy.weights()}


EXACT = [
    {"overlap_grad_reduce": True},
    {"overlap_grad_reduce": True, "overlap_param_gather": True},
    {"batch_p2p_comm": False},
]
ROUNDED = [{"bias_swiglu_fusion": True}]
MODELS = {"V3": full_architecture(mtp=1), "qwen2": qwen2_architecture()}


@pytest.mark.parametrize("model", list(MODELS))
def test_on_a_cpu_a_switch_changes_no_result(model: str) -> None:
    _, off = updates_of(MODELS[model], {})
    for asked in [*EXACT, *ROUNDED]:
        policy, on = updates_of(MODELS[model], {}, **asked)
        config, ddp = policy.modules[0].config, policy.chunks[0].ddp_config
        for name, value in asked.items():
            field = "bias_activation_fusion" if name == "bias_swiglu_fusion" else name
            assert getattr(ddp if hasattr(ddp, field) else config, field) is value, "what Megatron-Core got"
        assert on.keys() == off.keys()
        for name, tensor in on.items():
            if asked in EXACT:
                assert torch.equal(tensor, off[name]), (asked, name)
            else:
                torch.testing.assert_close(tensor, off[name], rtol=2e-4, atol=2e-5, msg=f"{asked} {name}")


def test_a_fused_cross_entropy_differs_by_the_rounding_of_bf16() -> None:
    _, off = updates_of(MODELS["qwen2"], {"dtype": "bf16"})
    policy, on = updates_of(MODELS["qwen2"], {"dtype": "bf16"}, cross_entropy_loss_fusion=True)
    assert policy.modules[0].config.cross_entropy_loss_fusion
    for name, tensor in on.items():
        torch.testing.assert_close(tensor, off[name], rtol=2e-2, atol=2e-2, msg=name)
    with pytest.raises(ConfigError, match="with runtime.dtype=fp32 does not fit: it rounds gradients to bf16"):
        updates_of(MODELS["qwen2"], {}, cross_entropy_loss_fusion=True)


def test_each_module_that_can_be_recomputed_changes_no_result() -> None:
    _, off = updates_of(MODELS["V3"], {})
    for module in ("layernorm", "mla_up_proj", "mlp", "moe", "shared_experts", "core_attn"):
        policy, on = updates_of(MODELS["V3"], {"recompute": "selective", "recompute_modules": [module]})
        assert policy.modules[0].config.recompute_modules == [module]
        for name, tensor in on.items():
            torch.testing.assert_close(tensor, off[name], rtol=1e-5, atol=1e-6, msg=f"{module} {name}")
    with pytest.raises(ConfigError, match="moe_act in recompute_modules is only supported with moe_grouped_gemm"):
        updates_of(MODELS["V3"], {"recompute": "selective", "recompute_modules": ["moe_act"]})


def test_a_block_that_the_schedule_has_run_is_not_run_again() -> None:
    """With `overlap_moe_expert_parallel_comm` the schedule hands the outputs of multi-token prediction to the model."""
    policy, _ = updates_of(MODELS["V3"], {})
    module, given, made = policy.modules[0], {}, []
    stock, block = module._postprocess, module.mtp.forward

    def keep_given(**inputs: Any) -> torch.Tensor:
        given.update(inputs)
        return stock(**inputs)

    def keep_made(**inputs: Any) -> torch.Tensor:
        made.append(block(**inputs))
        return made[-1]

    module._postprocess, module.mtp.forward = keep_given, keep_made
    ids = torch.randint(130, (2, 17), generator=torch.Generator().manual_seed(5))
    module.mtp_loss = None
    loss = module(ids[:, :-1], torch.arange(16).expand(2, -1), None, labels=ids[:, 1:], loss_mask=torch.ones(2, 16))
    expected, module.mtp_loss = module.mtp_loss, None
    again = stock(**(given | {"hidden_states": made[0].detach().requires_grad_(), "mtp_in_postprocess": False}))
    assert len(made) == 1 and torch.equal(again, loss) and torch.equal(module.mtp_loss, expected) and expected > 0
