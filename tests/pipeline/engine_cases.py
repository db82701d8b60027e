"""What the tests of the real engine share."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from megatron_r1.config.rollout import RolloutConfig
from megatron_r1.errors import RolloutError, WeightSyncError
from megatron_r1.model.architecture import Architecture
from megatron_r1.model.presets import resolve_architecture
from megatron_r1.rollout.options import EngineOptions, engine_options
from megatron_r1.rollout.vllm_client import VllmProcessEngine
from megatron_r1.types import Prompt, RolloutGroup, Sampling
from tests.random_weights import random_source, random_weights

UNEVEN_V3 = {
    "vocab_size": 450, "moe_intermediate_size": 48, "q_lora_rank": 48, "n_group": 4, "topk_group": 2, "n_shared_experts": 2,
    "num_nextn_predict_layers": 1, "routed_scaling_factor": 2.5, "max_position_embeddings": 128,
    "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32},
}  # fmt: skip
SAMPLING = Sampling(n=1, temperature=1.0, top_p=1.0, max_tokens=16)


@dataclass(frozen=True)
class FolderOptions(EngineOptions):
    """What `folder_host` starts with."""

    folder: Path | None = None  #: exported model
    vllm_version: str | None = None  #: what vLLM says it is; None: the truth


def options(arch: Architecture, tensor_parallel_size: int = 1) -> EngineOptions:
    """A small fp32 engine on CPU; end-of-sequence is token 1."""
    rollout = RolloutConfig(max_response_tokens=32, kv_cache_bytes=64 << 20, tensor_parallel_size=tensor_parallel_size)
    return engine_options(arch, rollout, device="cpu", dtype="float32", bos_token_id=0, eos_token_id=1, max_prompt_tokens=64)


def spread_case() -> tuple[Architecture, EngineOptions]:
    """A V3 with every part and sizes that want padding, on an engine of two nodes with one worker each."""
    arch = resolve_architecture("tiny", UNEVEN_V3)
    return arch, replace(options(arch, 2), nodes=2)


def prompts(arch: Architecture, n: int = 32) -> list[Prompt]:
    """Random token ids of random lengths."""
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(8, 33, (n,), generator=generator).tolist()
    tokens = [tuple(torch.randint(2, arch.vocab_size, (length,), generator=generator).tolist()) for length in lengths]
    return [Prompt(f"p{i}", "", "", "", ids) for i, ids in enumerate(tokens)]


def sampled(groups: list[RolloutGroup]) -> list[tuple[list[int], list[float]]]:
    """Tokens and log-probs of every response."""
    return [(r.token_ids.tolist(), r.rollout_logprobs.tolist()) for group in groups for r in group.rollouts]


def check_corruptions(engine: VllmProcessEngine, arch: Architecture, corruptions: dict[tuple[str, int | None], str]) -> None:
    """Flip one bit of every target (parameter, row) in an update before it is compared, which must name the tensor."""
    engine.load_weights(random_source(arch, 0), version=0)  # records the constants
    wrong = []
    for target, named in corruptions.items():
        engine._call("call_workers", "damage", *target)
        try:
            engine.load_weights(random_source(arch, 0), version=0)
            wrong.append((target, "not noticed"))
        except WeightSyncError as error:
            wrong += [] if re.search(named, str(error)) else [(target, str(error))]
            with pytest.raises(RolloutError, match="no weights"):
                engine.generate(prompts(arch, 1), SAMPLING, seed=0)
    assert not wrong, wrong
    engine.load_weights(random_source(arch, 0), version=0)


def check_held_tensors(engine: VllmProcessEngine, arch: Architecture) -> None:
    """Not only the checksums: the tensors read back from vLLM's fused and packed storage are those of seed 0, bit for bit."""
    (held,) = engine._call("call_workers", "held_tensors")
    for name, tensor in random_weights(arch, 0):
        assert torch.equal(torch.from_numpy(held.pop(name)), tensor), name
    assert not held


def difference_to_transformers(folder: Path, groups: list[RolloutGroup], temperature: float) -> torch.Tensor:
    """Absolute differences of the log-probs of all sampled tokens, recomputed in fp32 from an exported folder."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    differences = []
    for group in groups:
        for rollout in group.rollouts:
            response = torch.tensor(rollout.token_ids, dtype=torch.int64)
            tokens = torch.cat([torch.tensor(group.prompt.token_ids), response])
            with torch.no_grad():
                logits = model(tokens[None]).logits[0, -len(response) - 1 : -1] / temperature
            expected = logits.log_softmax(-1).gather(1, response[:, None])[:, 0]
            differences.append((torch.tensor(rollout.rollout_logprobs) - expected).abs())
    return torch.cat(differences)
