"""The peer of both benchmarks: transformers' DeepseekV3ForCausalLM with the weights of our policy."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from megatron_r1.weights.hf_export import export_hf

if TYPE_CHECKING:
    from transformers import DeepseekV3ForCausalLM

    from megatron_r1.mcore.policy import MegatronPolicy


def load_peer(
    policy: MegatronPolicy, device: torch.device, experts: str | None = None, *, bos_token_id: int = 0, eos_token_id: int = 1
) -> DeepseekV3ForCausalLM:
    """The policy's weights in transformers' model, through an exported folder.

    Args:
        experts: transformers' `experts_implementation`; None: the one that it chooses.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="megatron_r1-benchmark-") as folder:
        export_hf(policy.weights(), policy.arch, Path(folder, "hf"), bos_token_id=bos_token_id, eos_token_id=eos_token_id)
        model = AutoModelForCausalLM.from_pretrained(Path(folder, "hf"), dtype=torch.float32, experts_implementation=experts)
    return model.to(device)


def describe_peer(model: DeepseekV3ForCausalLM) -> dict[str, str]:
    """What transformers chose for attention and experts."""
    return {"attention": model.config._attn_implementation, "experts": model.config._experts_implementation}
