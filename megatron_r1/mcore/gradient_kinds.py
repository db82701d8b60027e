"""The norm of the gradient by kind of parameter, so that a spike can be told from where it comes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist

from megatron_r1.mcore.active import require_active
from megatron_r1.mcore.adam_state import distributed_optimizers, holds_master_weights, updated_tensor
from megatron_r1.mcore.collectives import all_reduce
from megatron_r1.types import Metric

require_active()

from megatron.core.optimizer.optimizer import ChainedOptimizer

#: part of a parameter's name in Megatron-Core -> kind; the first that fits counts
KINDS = {
    "mtp.": "mtp", "embedding.": "embedding", "output_layer.": "head", "norm": "norms", ".self_attention.": "attention",
    ".router.": "router", ".shared_experts.": "shared_experts", ".experts.": "experts", ".mlp.": "mlp",
}  # fmt: skip
_NAMES = tuple(KINDS.values())


class GradientKinds:
    """What kind of parameter each gradient of this rank's optimizer is of.

    Args:
        modules: the model's, without wrappers.
        optimizer: of these modules.
    """

    def __init__(self, modules: Sequence[torch.nn.Module], optimizer: ChainedOptimizer) -> None:
        self._optimizer = optimizer
        kinds = {id(parameter): kind_of(name) for module in modules for name, parameter in module.named_parameters()}
        self._kind = {
            id(updated_tensor(part, parameter)): _NAMES.index(kinds[id(parameter)])
            for part in distributed_optimizers(optimizer)
            for parameter in part.model_param_group_index_map
        }
        present = torch.zeros(len(_NAMES))
        for kind in set(self._kind.values()):
            present[kind] = 1.0
        group = optimizer.get_grad_stats_parallel_group()
        self._device = next(modules[0].parameters()).device
        present = present.to(self._device)
        all_reduce(present, dist.ReduceOp.MAX, group=group)
        self._present = [bool(one) for one in present.tolist()]  # the same on every rank

    def measure(self, norms: Mapping[int, torch.Tensor]) -> dict[str, Metric[float]]:
        """`grad_norm/<kind>` of the gradient that is about to be applied, before clipping, of all ranks. Collective: nine numbers.

        What the whole norm leaves out is left out here, so the squares add up to its square.

        Args:
            norms: what `nonfinite.gradient_norm` gave.
        """
        of_kind: list[list[torch.Tensor]] = [[] for _ in _NAMES]
        for part in distributed_optimizers(self._optimizer):
            decoupled = holds_master_weights(part)
            for parameter in part.get_parameters():
                gradient = parameter.decoupled_grad if decoupled else parameter.grad
                if gradient is not None and (norm := norms.get(gradient.data_ptr())) is not None:
                    of_kind[self._kind[id(parameter)]].append(norm)
        squares = torch.stack([_square(found, self._device) for found in of_kind])
        all_reduce(squares, group=self._optimizer.get_grad_stats_parallel_group())
        norms = squares.sqrt().tolist()
        return {
            f"grad_norm/{name}": Metric(norm, "update_mean")
            for name, norm, is_there in zip(_NAMES, norms, self._present, strict=True)
            if is_there
        }


def kind_of(name: str) -> str:
    """Of a parameter of Megatron-Core's model. Raises ValueError for one that nobody thought of."""
    for part, kind in KINDS.items():
        if part in name:
            return kind
    raise ValueError(f"parameter {name} is of no kind: see mcore/gradient_kinds.py")


def _square(norms: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    """The sum of all squares."""
    if not norms:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack(list(norms)).double().square().sum()
