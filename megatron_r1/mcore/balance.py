"""How evenly a model's experts are used: moves router biases after an update, and reports.

DeepSeek-V3 (arXiv 2412.19437) section 2.1.2: at the end of each step the bias of an expert that got more than its share of the
whole batch's tokens falls by gamma, that of one that got less rises by gamma. Megatron-Core does it before the update, also if
the update is then left out, and counts padding.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist

from megatron_r1.config.optimizer import MoeTrainingConfig
from megatron_r1.mcore.active import require_active
from megatron_r1.mcore.collectives import all_reduce
from megatron_r1.types import Metric

require_active()

from megatron.core import parallel_state

from megatron_r1.mcore.routing import Router


class Balance:
    """The routers of this rank's layers. One update is `begin`, forward and backward passes, `report`, `move_biases`.

    Args:
        modules: of every virtual pipeline stage.
        moe: gamma and the weight of the balance loss.
        device: of the model.
    """

    def __init__(self, modules: Sequence[torch.nn.Module], moe: MoeTrainingConfig, device: torch.device) -> None:
        self.routers = [m for module in modules for m in module.modules() if isinstance(m, Router)]
        for router in self.routers:
            router._maintain_float32_expert_bias()  # else bf16's wrapper leaves it rounded up to the first pass
        self.moe, self.device = moe, device
        self.bias_update_rate = moe.bias_update_rate  #: gamma of the update that is being made
        config = modules[0].config
        self._layers = config.num_layers + (config.mtp_num_layers or 0)
        self._places = [place for module in modules for place in _places_of_routers(module, config.num_layers)]
        self.choices_LE: torch.Tensor | None = None  #: [layers of this rank, experts] int64, over the whole minibatch

    def begin(self, tokens: int, sequences: int) -> None:
        """Start an update.

        Args:
            tokens: by which gradients will be divided.
            sequences: of the whole minibatch.
        """
        self.choices_LE = None
        for router in self.routers:
            router.clear()
            router.sequence_weight = tokens / max(sequences, 1)

    def report(self, sequences: int, pipeline: dist.ProcessGroup) -> dict[str, Metric[float]]:
        """Metrics of the passes since `begin`, of all ranks and stages; collective. Empty if nothing balances this model.

        `moe/balance_loss` is sum_i f_i P_i, 1 if balanced, averaged over sequences and layers; `moe/max_load` the largest share of
        an expert in a layer, 1 if balanced, and `moe/load/layer_<n>` that of each layer, numbered as in a Hugging Face folder.
        `moe/bias_spread` is how far apart the router biases of a layer are at most, before this update moves them.
        """
        if not (self.moe.bias_update_rate or self.moe.aux_loss_coeff):
            return {}
        group = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
        loss, layers = 0.0, 0
        largest = torch.zeros(self._layers + 1, dtype=torch.float64, device=self.device)  # of each layer, and the bias spread
        if self.routers:
            experts = self.routers[0].num_experts
            nothing = torch.zeros(experts, dtype=torch.int64, device=self.device)
            self.choices_LE = torch.stack([nothing if r.choices is None else r.choices for r in self.routers])
            none = torch.zeros((), device=self.device)
            losses_L = torch.stack([none if r.balance_loss is None else r.balance_loss for r in self.routers]).double()
            all_reduce(self.choices_LE, group=group)
            all_reduce(losses_L, group=group)
            totals_L = self.choices_LE.sum(1)
            loss, layers = losses_L.sum().item() / max(sequences, 1), int((totals_L > 0).sum())
            loads_L = self.choices_LE.max(1).values.double() * experts / totals_L.clamp(min=1)
            largest[self._places] = loads_L
            spreads = [(b.max() - b.min()).double() for r in self.routers if (b := r.expert_bias) is not None]
            if spreads:
                largest[-1] = torch.stack(spreads).max()
        summed = torch.tensor([loss, layers], dtype=torch.float64, device=self.device)
        if pipeline.size() > 1:
            all_reduce(summed, group=pipeline)
            all_reduce(largest, dist.ReduceOp.MAX, group=pipeline)
        loss, layers = summed.tolist()
        if not layers:
            return {}
        *loads, spread = largest.tolist()
        metrics = {"moe/max_load": Metric(max(loads), "max")}
        metrics |= {f"moe/load/layer_{layer}": Metric(load, "max") for layer, load in enumerate(loads) if load}
        if self.moe.bias_update_rate:
            metrics["moe/bias_spread"] = Metric(spread, "max")
        if self.moe.aux_loss_coeff:
            metrics["moe/balance_loss"] = Metric(loss / layers, "update_mean")
        return metrics

    def move_biases(self) -> None:
        """The end of an update that changed the weights, after `report`."""
        if self.choices_LE is None or not self.bias_update_rate:
            return
        # In whole numbers: rounding would decide what happens to an expert that has exactly its share.
        excess_LE = self.choices_LE * self.choices_LE.shape[1] - self.choices_LE.sum(1, keepdim=True)
        for router, excess_E in zip(self.routers, excess_LE, strict=True):
            if router.expert_bias is not None:
                router.expert_bias -= self.bias_update_rate * excess_E.sign()


def _places_of_routers(module: torch.nn.Module, num_layers: int) -> Iterator[int]:
    """The number of each router's layer in the whole model, those of multi-token prediction after all others."""
    for name, layer in module.named_modules():
        if isinstance(layer, Router):
            depth = re.match(r"mtp\.layers\.(\d+)\.", name)
            yield layer.layer_number - 1 if depth is None else num_layers + int(depth[1])
