"""What a forward pass keeps: the formula against torch's own account, and every example against a device of 80 GB."""

from __future__ import annotations

import pytest
import torch

from megatron_r1.config.load import load_config
from megatron_r1.config.model import ParallelConfig
from megatron_r1.config.optimizer import MoeTrainingConfig
from megatron_r1.config.runtime import RuntimeConfig
from megatron_r1.config.schema import Config
from megatron_r1.mcore import host
from megatron_r1.mcore.activation_bytes import activation_bytes, layer_numbers, logits_bytes
from megatron_r1.mcore.layout import resolve_layout, stage_layers
from megatron_r1.mcore.state_bytes import StateBytes
from megatron_r1.model.architecture import Architecture
from megatron_r1.model.families.llama import Llama
from megatron_r1.model.families.qwen2 import Qwen2
from megatron_r1.model.presets import PRESETS
from megatron_r1.pipeline.stages.pretrain import phase_config
from megatron_r1.training.pretrain_plan import PretrainPlan
from tests.one_rank import one_rank_world
from tests.paths import ROOT
from tests.random_weights import full_architecture, qwen2_architecture

EXAMPLES = ROOT / "examples"
WIDER = {"hidden_size": 192, "num_hidden_layers": 3, "max_position_embeddings": 1024}
DENSE = qwen2_architecture().model_copy(update=WIDER | {"head_dim": 32, "intermediate_size": 1120})
SPARSE = full_architecture().model_copy(
    update=WIDER
    | {
        "intermediate_size": 640, "moe_intermediate_size": 128, "kv_lora_rank": 64, "q_lora_rank": 96, "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16, "v_head_dim": 32,
    }
)  # fmt: skip


def kept_bytes(arch: Architecture, recompute: str, tokens: int, *modules: str) -> int:
    """Bytes that torch keeps for a backward pass in float32 on the CPU, without weights and squares of the sequence."""
    host.activate("cpu")
    from megatron_r1.mcore import parallel, provider

    one_rank_world()
    layout = parallel.resolve_layout(ParallelConfig(), arch, 1, mtp=False, packed=True)
    parallel.build_process_groups(layout, seed=1)
    runtime = RuntimeConfig(recompute=recompute, **({"recompute_modules": modules} if modules else {}))
    model = provider.build_model(arch, layout, runtime, MoeTrainingConfig(), seed=1)[0].train()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tensor.shape[-2:] != (tokens, tokens):
            kept[storage.data_ptr()] = storage
        return tensor

    ids = torch.randint(arch.vocab_size, (1, tokens))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(ids, torch.arange(tokens)[None], None, labels=ids)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("arch", [DENSE, SPARSE], ids=lambda arch: arch.model_type)
def test_a_forward_pass_keeps_what_the_formula_says(arch: Architecture) -> None:
    tokens, layout = 512, resolve_layout(ParallelConfig(), arch, 1, mtp=False, packed=True)
    numbers = tokens * 4
    # On the CPU torch's attention keeps a second output, and a SwiGLU that is not an expert's no copy of its second half.
    gated = [arch.intermediate_size if arch is DENSE or layer == 0 else arch.experts.shared_width for layer in range(3)]
    copies = arch.num_hidden_layers * (192 if arch is DENSE else 96 + 64) - sum(gated)
    for recompute in ("none", "full"):
        counted = activation_bytes(arch, layout, recompute=recompute, tokens=tokens, stage=0, width=4)
        extra = copies * numbers if recompute == "none" else 0
        around = 2 * arch.hidden_size * numbers  # the last norm, and what the output layer takes
        want = counted.kept + extra + around + logits_bytes(arch, layout, tokens, 4)
        assert want * 0.93 < kept_bytes(arch, recompute, tokens) < want * 1.07
    assert counted.recomputed == max(layer_numbers(arch, layer) for layer in range(3)) * numbers


def test_modules_that_are_recomputed_keep_no_more_than_the_formula_says() -> None:
    tokens, layout = 512, resolve_layout(ParallelConfig(), SPARSE, 1, mtp=False, packed=True)

    def counted(*modules: str) -> int:
        recompute = "selective" if modules else "none"
        return activation_bytes(SPARSE, layout, recompute=recompute, tokens=tokens, stage=0, width=4, modules=modules).kept

    whole = kept_bytes(SPARSE, "none", tokens)
    for module in ("mlp", "moe", "shared_experts", "layernorm"):
        saved, planned = whole - kept_bytes(SPARSE, "selective", tokens, module), counted() - counted(module)
        least = 0.9 if module in ("moe", "layernorm") else 0.9 * 4 / 5  # of the copy see above
        assert saved > least * planned > 0, (module, saved, planned)
    assert counted("core_attn") == counted("mla_up_proj") == counted() and counted("moe_act") < counted()
    assert layer_numbers(DENSE, 0, ["layernorm"]) == layer_numbers(DENSE, 0), "fused with the next product"


_QWEN = {"vocab_size": 152064, "max_position_embeddings": 131072, "model_type": "qwen2"}
_LLAMA = {"vocab_size": 128256, "max_position_embeddings": 131072, "model_type": "llama", "head_dim": 128}


def qwen(hidden: int, layers: int, width: int, heads: int, groups: int, **more: object) -> Architecture:
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": width}
    return Qwen2(**_QWEN | sizes | {"num_attention_heads": heads, "num_key_value_heads": groups, "head_dim": 128} | more)


def llama(hidden: int, layers: int, width: int, heads: int) -> Architecture:
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": width}
    return Llama(**_LLAMA | sizes | {"num_attention_heads": heads, "num_key_value_heads": 8})


#: The example -> the published model that it starts from, and the GPUs that it says or needs at least.
DISTILLED = {
    "qwen_1_5b": (qwen(1536, 28, 8960, 12, 2, vocab_size=151936, tie_word_embeddings=True), 8),
    "qwen_7b": (qwen(3584, 28, 18944, 28, 4), 8),
    "qwen_14b": (qwen(5120, 48, 13824, 40, 8), 8),
    "qwen_32b": (qwen(5120, 64, 27648, 40, 8), 16),
    "zero_qwen_32b": (qwen(5120, 64, 27648, 40, 8), 16),
    "llama_8b": (llama(4096, 32, 14336, 32), 8),
    "llama_70b": (llama(8192, 80, 28672, 64), 32),
}


def attention_weights(arch: Architecture) -> int:
    """Of one layer; norms and biases are left out."""
    hidden, heads, settings = arch.hidden_size, arch.num_attention_heads, arch.megatron_settings()
    if arch.ATTENTION == "grouped_query":
        return hidden * settings["kv_channels"] * (2 * heads + 2 * arch.query_groups)
    ranks = (settings["q_lora_rank"], settings["kv_lora_rank"])
    plain, turned, value = settings["qk_head_dim"], settings["qk_pos_emb_head_dim"], settings["v_head_dim"]
    query = hidden * ranks[0] + ranks[0] * heads * (plain + turned) if ranks[0] else hidden * heads * (plain + turned)
    return query + hidden * (ranks[1] + turned) + ranks[1] * heads * (plain + value) + heads * value * hidden


def device_bytes(
    config: Config, arch: Architecture, world_size: int, tokens: int, *, reward_model: bool = False, packed: bool = True
) -> int:
    """Weights, gradients, optimizer, activations and logits of the fullest stage, experts used alike."""
    layout = resolve_layout(config.parallel, arch, world_size, mtp=False, packed=packed)
    hidden, fullest, first = arch.hidden_size, 0, 0
    for stage, count in enumerate(stage_layers(arch.num_hidden_layers, layout.pp)):
        dense = experts = 0
        for layer in range(first, first + count):
            split, whole = (attention_weights(arch), 0)
            if arch.is_moe_layer(layer):
                split += 3 * hidden * arch.experts.shared_width
                experts += 3 * hidden * arch.experts.width * arch.experts.count // (layout.ep * layout.etp)
            else:
                split += 3 * hidden * arch.intermediate_size
            dense += split // layout.tp + whole
        first += count
        embeddings = (stage == 0) + (stage == layout.pp - 1 and not (arch.tie_word_embeddings and layout.pp == 1))
        dense += embeddings * hidden * arch.vocab_size // layout.tp
        of_experts = layout.world_size // (layout.ep * layout.etp * layout.pp)
        moments = tuple({"fp32": 4, "bf16": 2}[one] for one in (config.megatron.exp_avg_dtype, config.megatron.exp_avg_sq_dtype))
        state = StateBytes.of(
            dense, experts, data_parallel=layout.dp, expert_data_parallel=of_experts, bf16=True, moments=moments
        )  # fmt: skip
        runtime = config.runtime
        passed = activation_bytes(
            arch, layout, recompute=runtime.recompute, tokens=tokens, stage=stage, modules=runtime.recompute_modules
        )  # fmt: skip
        logits = 0 if reward_model else passed.logits
        of_passes = passed.kept + passed.recomputed + logits
        fullest = max(fullest, state.weights + state.gradients + state.optimizer + max(of_passes, state.update))
    return fullest


def examples() -> list[str]:
    files = sorted(path for folder in ("distill_qwen", "v2_lite_16b", "v3_671b") for path in (EXAMPLES / folder).glob("*.yaml"))
    return [f"{path.parent.name}/{path.stem}" for path in files if path.stem != "stage3_data"]


USABLE = 80 * 2**30 - 6 * 10**9  # of a device of 80 GB: without the driver, NCCL and what a kernel takes while it runs


def bytes_of(name: str, **runtime: str) -> int:
    config = load_config(EXAMPLES / f"{name}.yaml", [f"runtime.{key}={value}" for key, value in runtime.items()])
    arch, world_size = DISTILLED.get(name.partition("/")[2]) or (
        PRESETS[config.model.preset], 512 if config.model.preset == "671b" else 8
    )  # fmt: skip
    if name == "v3_671b/pretrain":  # its phases, on the ranks that its layout is for
        return max(
            device_bytes(phase_config(config, phase), arch, 2048, phase.micro_batch_size * phase.sequence_length, packed=False)
            for phase in PretrainPlan(config.pretrain).phases
        )
    sections = {"r1_zero": "grpo", "stage2": "grpo", "stage4": "grpo", "zero_qwen_32b": "grpo", "r1": "grpo"}
    section = sections.get(name.partition("/")[2], "reward_model" if "reward_" in name else "sft")
    tokens = getattr(config, section).micro_batch_tokens
    return device_bytes(config, arch, world_size, tokens, reward_model=section == "reward_model")


@pytest.mark.parametrize("name", examples())
def test_an_example_fits_its_devices(name: str) -> None:
    assert bytes_of(name) < USABLE, f"{bytes_of(name) / 1e9:.0f} GB"


def test_v3s_own_recomputation_does_not_fit_without_its_fp8_and_schedule() -> None:
    assert bytes_of("v3_671b/pretrain", recompute="none") > 1000e9
    assert bytes_of("v3_671b/pretrain") == pytest.approx(68.4e9, rel=0.01)


def test_32k_tokens_of_the_smallest_student_need_recomputation() -> None:
    assert bytes_of("distill_qwen/qwen_1_5b", recompute="none") > 100e9
    arch, _ = DISTILLED["qwen_1_5b"]
    layout = resolve_layout(ParallelConfig(), arch, 8, mtp=False, packed=True)
    assert layer_numbers(arch, 0) * 2 == pytest.approx(114e3, rel=0.01), "bytes a token"
    assert logits_bytes(arch, layout, 32_768) == pytest.approx(9.96e9, rel=1e-3), "30e9 with a float32 softmax and a gradient"
