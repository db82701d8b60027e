"""Random models for tests: weights large enough that distributions are peaked, and a folder that transformers loads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch

from megatron_r1.model.architecture import Architecture
from megatron_r1.model.families.deepseek_v3 import DeepseekV3
from megatron_r1.model.families.llama import Llama
from megatron_r1.model.families.qwen2 import Qwen2
from megatron_r1.model.latent_attention import LatentYarnScaling
from megatron_r1.model.registry import families
from megatron_r1.model.rope import Llama3Scaling
from megatron_r1.weights.hf_export import export_hf
from megatron_r1.weights.mapping import hf_shapes, model_entries
from megatron_r1.weights.safetensors_file import HfTensor, SafetensorsWriter
from megatron_r1.weights.shard_plan import StoredWeights


def full_architecture(mtp: int = 1) -> DeepseekV3:
    """A small model with every part of V3: q-lora, YaRN, group-limited routing, a shared expert, multi-token prediction."""
    return DeepseekV3(
        vocab_size=130, hidden_size=64, num_hidden_layers=5, first_k_dense_replace=1, num_nextn_predict_layers=mtp,
        intermediate_size=128, num_attention_heads=4, q_lora_rank=24, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8,
        v_head_dim=16, max_position_embeddings=128, rope_scaling=LatentYarnScaling(factor=4.0, original_max_position_embeddings=32),
        n_routed_experts=8, n_shared_experts=1, moe_intermediate_size=32, num_experts_per_tok=4, n_group=4, topk_group=2,
        routed_scaling_factor=2.5, init_std=0.05,
    )  # fmt: skip


def qwen2_architecture(tied: bool = True) -> Qwen2:
    """A small qwen2: three query heads for every key head, heads that together are not the hidden size."""
    return Qwen2(
        vocab_size=130, hidden_size=48, num_hidden_layers=4, intermediate_size=96, num_attention_heads=6, num_key_value_heads=2,
        head_dim=16, max_position_embeddings=128, tie_word_embeddings=tied, init_std=0.05,
    )  # fmt: skip


def uneven_qwen2() -> Qwen2:
    """The same with a vocabulary that divides over no two ranks."""
    return qwen2_architecture(tied=True).model_copy(update={"vocab_size": 131})


def llama_architecture() -> Llama:
    """A small llama whose scaled RoPE has all three of its ranges within 16 frequencies: kept, blended and divided.

    Its vocabulary divides over no two ranks.
    """
    return Llama(
        vocab_size=131, hidden_size=64, num_hidden_layers=4, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2,
        head_dim=32, max_position_embeddings=128, rope_theta=100.0, init_std=0.05,
        rope_scaling=Llama3Scaling(factor=4.0, high_freq_factor=3.0, original_max_position_embeddings=64),
    )  # fmt: skip


def further_families() -> dict[str, Architecture]:
    """The first tiny preset of every family that has no function of its own above, by `model_type`."""
    by_hand = {"deepseek_v3", "qwen2", "llama"}
    others = {name: family for name, family in families().items() if name not in by_hand}
    return {name: next(a for p, a in family.presets.items() if p.startswith("tiny")) for name, family in others.items()}


def random_weights(
    arch: Architecture, seed: int, std: float = 0.1, dtype: torch.dtype = torch.float32
) -> Iterator[tuple[str, torch.Tensor]]:
    """(Hugging Face name, tensor) of a whole model, in streaming order. Norms are around 1, router biases not zero and fp32."""
    generator = torch.Generator().manual_seed(seed)
    made: dict[str, torch.Tensor] = {}
    for name, shape in hf_shapes(arch).items():
        tensor = torch.randn(shape, generator=generator) * std + ("norm" in name)
        made[name] = tensor if name.endswith("e_score_correction_bias") else tensor.to(dtype)
    for entry in model_entries(arch):
        made.update(dict.fromkeys(entry.copies, made[entry.name]))
    yield from made.items()


def random_source(arch: Architecture, seed: int) -> StoredWeights:
    """The same for an engine."""
    return StoredWeights.of_tensors(dict(random_weights(arch, seed)))


def write_safetensors(path: Path, tensors: Sequence[HfTensor], values: Iterable[tuple[str, torch.Tensor]]) -> int:
    """Write a file, holding one tensor at a time; it appears under its name only when it is complete and on disk.

    Args:
        path: of the file.
        tensors: what it will hold.
        values: (name, tensor) of each of them once, in any order.

    Returns:
        The file's size in bytes.

    Raises:
        ConversionError: the values are not exactly what was announced.
        CheckpointError: the disk is full, or the file cannot be written.
    """
    with SafetensorsWriter(path, tensors) as writer:
        for name, tensor in values:
            writer.write(name, tensor)
            del tensor  # before the next one is made
    return writer.nbytes


def write_random_model(folder: Path, arch: Architecture, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """An exported folder of random weights."""
    export_hf(random_weights(arch, seed, dtype=dtype), arch, folder, bos_token_id=0, eos_token_id=1)
    return folder


def random_ids(arch: Architecture, rows: int = 2, length: int = 48) -> torch.Tensor:
    """[rows, length] token ids, always the same: long enough that scaled RoPE is seen."""
    return torch.randint(arch.vocab_size, (rows, length), generator=torch.Generator().manual_seed(1))
