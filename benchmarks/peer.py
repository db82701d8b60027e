"""The peer of the benchmarks: a causal language model of transformers with the weights of our policy, and how it is trained."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from megatron_r1.config.optimizer import OptimizerConfig
from megatron_r1.runtime.distributed import broadcast_object
from megatron_r1.weights.hf_export import export_hf
from megatron_r1.weights.rank_zero import consume_on_rank_zero

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from megatron_r1.mcore.policy import MegatronPolicy

OPTIMIZER = OptimizerConfig(lr=1e-4)  #: of both sides
Step = Callable[[], tuple[float, float]]  #: one update; loss and norm of the gradient


def load_peer(
    policy: MegatronPolicy, device: torch.device, experts: str | None = None, *, bos_token_id: int = 0, eos_token_id: int = 1
) -> PreTrainedModel:
    """The policy's weights in transformers' model, in float32, through an exported folder. Collective.

    Args:
        experts: transformers' `experts_implementation`; None: the one that it chooses.
    """
    with tempfile.TemporaryDirectory(prefix="megatron_r1-benchmark-") as own:
        folder = Path(broadcast_object(own), "hf")
        ids = {"bos_token_id": bos_token_id, "eos_token_id": eos_token_id}
        consume_on_rank_zero(policy.weights(), lambda weights: export_hf(weights, policy.arch, folder, **ids))
        model = open_peer(folder, device, experts)
        torch.distributed.barrier()  # rank 0 keeps its folder until all have read it
    return model


def open_peer(folder: Path, device: torch.device, experts: str | None = None) -> PreTrainedModel:
    """A Hugging Face folder in transformers' model, in float32; `experts` as for `load_peer`."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation=experts).to(device)


def describe_peer(model: PreTrainedModel) -> dict[str, str]:
    """What transformers chose for attention and experts."""
    return {"attention": model.config._attn_implementation, "experts": model.config._experts_implementation}


def peer_step(
    model: torch.nn.Module,
    inputs: Mapping[str, torch.Tensor],
    labels: torch.Tensor,
    *,
    autocast: bool = False,
) -> Step:
    """An update as a plain loop over transformers' model makes it, over all ranks where the model is wrapped for them.

    Args:
        inputs: of the model, on its device.
        labels: [B, T] int64, -100 where there is no loss; as many on every rank.
        autocast: compute in bf16 with the weights as they are, as transformers' `Trainer` does it.
    """
    # Megatron-Core decays no vectors either.
    groups: list[dict[str, Any]] = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": OPTIMIZER.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=OPTIMIZER.lr, betas=(OPTIMIZER.beta1, OPTIMIZER.beta2), eps=OPTIMIZER.eps)
    model.train()

    def step() -> tuple[float, float]:
        optimizer.zero_grad()
        with torch.autocast(labels.device.type, torch.bfloat16) if autocast else nullcontext():
            logits = model(**inputs, use_cache=False).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100)
        loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.clip_grad)
        optimizer.step()
        return loss.item(), grad_norm.item()

    return step
