"""What the tests of the real engine share."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_r1.config.schema import RolloutConfig
from megatron_r1.model.architecture import Architecture
from megatron_r1.rollout.options import EngineOptions, engine_options
from megatron_r1.types import Prompt, RolloutGroup


def options(arch: Architecture, tensor_parallel_size: int = 1) -> EngineOptions:
    """A small fp32 engine on CPU; end-of-sequence is token 1."""
    rollout = RolloutConfig(max_response_tokens=32, kv_cache_bytes=64 << 20, tensor_parallel_size=tensor_parallel_size)
    return engine_options(arch, rollout, device="cpu", dtype="float32", bos_token_id=0, eos_token_id=1, max_prompt_tokens=64)


def prompts(arch: Architecture, n: int = 32) -> list[Prompt]:
    """Random token ids of random lengths."""
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(8, 33, (n,), generator=generator).tolist()
    tokens = [tuple(torch.randint(2, arch.vocab_size, (length,), generator=generator).tolist()) for length in lengths]
    return [Prompt(f"p{i}", "", "", "", ids) for i, ids in enumerate(tokens)]


def difference_to_transformers(folder: Path, groups: list[RolloutGroup], temperature: float) -> torch.Tensor:
    """Absolute differences of the log-probs of all sampled tokens, recomputed in fp32 from an exported folder."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    differences = []
    for group in groups:
        for rollout in group.rollouts:
            response = torch.tensor(rollout.token_ids)
            tokens = torch.cat([torch.tensor(group.prompt.token_ids), response])
            with torch.no_grad():
                logits = model(tokens[None]).logits[0, -len(response) - 1 : -1] / temperature
            expected = logits.log_softmax(-1).gather(1, response[:, None])[:, 0]
            differences.append((torch.tensor(rollout.rollout_logprobs) - expected).abs())
    return torch.cat(differences)
