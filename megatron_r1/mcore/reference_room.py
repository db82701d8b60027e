"""Where the reference's weights may stand on the device beside the policy's, so that both evaluate each micro-batch in turn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from megatron_r1.errors import ConfigError
from megatron_r1.mcore.activation_bytes import activation_bytes
from megatron_r1.mcore.layout import Layout
from megatron_r1.mcore.switches import Switches

if TYPE_CHECKING:
    from megatron_r1.mcore.megatron_model import MegatronModel


def goes_beside(choice: Literal["auto", "always", "never"], layout: Layout, switches: Switches) -> bool:
    """Whether `grpo.reference_resident` lets this model go through micro-batches with two sets of weights, memory aside.

    Raises:
        ConfigError: "always", where it cannot.
    """
    refusal = _why_apart(layout, switches)
    if choice == "always" and refusal is not None:
        raise ConfigError(f"grpo.reference_resident=always: {refusal}; set it to auto or never")
    return choice != "never" and refusal is None


def _why_apart(layout: Layout, switches: Switches) -> str | None:
    if layout.pp > 1:
        return "a pipeline sends the hidden states of one model from stage to stage"
    if switches.transformer.get("fp8"):
        return "with megatron.fp8 layers keep quantised copies of weights from one micro-batch to the next"
    if switches.transformer.get("cuda_graph_impl", "none") != "none":
        return "megatron.cuda_graph_impl records where the policy's weights are"
    if switches.transformer.get("overlap_moe_expert_parallel_comm"):
        return "megatron.overlap_moe_expert_parallel_comm runs two micro-batches at once"
    if switches.ddp.get("overlap_param_gather"):
        return "megatron.overlap_param_gather gathers the policy's weights while a forward pass goes on"
    return None


@dataclass(frozen=True)
class ReferenceRoom:
    """Bytes of one rank's device, before a walk over micro-batches."""

    free: int  #: that no process holds, and that torch holds and does not use
    absent: int  #: optimizer's state and gradients that come back for the next update
    activations: int  #: of the micro-batches of an update
    reference: int  #: of its weights that are not on the device

    @staticmethod
    def of(model: MegatronModel, *, absent: int, reference: int) -> ReferenceRoom:
        """For a model on a GPU."""
        config, device = model.modules[0].config, model.device
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        activations = activation_bytes(
            model.arch, model.layout, recompute=config.recompute_granularity or "none", tokens=model.micro_batch_tokens, stage=0,
            width=2 if config.bf16 else 4, mtp_trained=model.trains_mtp, modules=config.recompute_modules or (),
            whole_logits_mb=model.modules[0].whole_logits // 10**6,
        )  # fmt: skip
        return ReferenceRoom(torch.cuda.mem_get_info(device)[0] + unused, absent, activations.all, reference)

    @property
    def spare(self) -> int:
        """What is left of the room, negative if it is too small."""
        return self.free - self.absent - self.activations - self.reference
