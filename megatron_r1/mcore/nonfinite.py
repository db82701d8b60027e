"""Updates that are not finite: found by all ranks alike before a weight is touched, and named by the samples that broke them.

Nothing is reduced for it but the gradient's norm, which every rank waits for anyway: a rank whose losses or weights are not finite
puts a NaN into its part of the gradient first. Only an update that is refused costs another collective, to say why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.distributed as dist

from megatron_r1.errors import CheckpointError, NonFiniteUpdate
from megatron_r1.mcore.active import require_active
from megatron_r1.runtime.distributed import any_rank, failing_together, gather_objects
from megatron_r1.types import MicroBatch
from megatron_r1.weights.finite import first_nonfinite

require_active()

from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

if TYPE_CHECKING:
    from megatron.core.optimizer.optimizer import ChainedOptimizer, MegatronOptimizer

#: Names the sample at a row and a position of a micro-batch.
NameSample = Callable[[MicroBatch, int, int], str]

_SHOWN = 3  # samples in a line
_LOOKED_AT = 16  # tokens with the lowest outputs, whose samples are named


class Cause(IntEnum):
    """Where the first number is that is not finite; a lower one may be the reason of a higher one."""

    WEIGHT = 0
    OUTPUT = 1
    LOSS = 2
    LOSS_GRADIENT = 3
    GRADIENT = 4


@dataclass(frozen=True)
class NonFinite:
    """Why an update is not finite."""

    cause: Cause | None  #: None: no single number is to blame, the norm itself overflows
    where: tuple[str, ...]  #: samples, or the tensor
    behind: tuple[str, ...] = ()  #: of a tensor's gradient: the samples that it comes from

    def describe(self, output: str) -> str:
        """One line.

        Args:
            output: what the model gives for every token: "log-probability", "score".
        """
        where = _list_some(self.where)
        match self.cause:
            case Cause.WEIGHT:
                return f"weight {where} holds NaN or infinite values"
            case Cause.OUTPUT:
                return f"the {output} of a token is NaN or infinite in {where}"
            case Cause.LOSS:
                return f"the loss is NaN or infinite in the micro-batch of {where}"
            case Cause.LOSS_GRADIENT:
                return f"the loss is finite, but its gradient by the {output} of a token is NaN or infinite in {where}"
            case Cause.GRADIENT:
                behind = f", from {_list_some(self.behind)}" if self.behind else ""
                return f"the gradient of {where} holds NaN or infinite values{behind}"
        return "the norm of the gradient is beyond float32"


@dataclass
class _Seen:
    """What the loss was given and gave for one micro-batch."""

    outputs: torch.Tensor
    loss: torch.Tensor
    gradient: torch.Tensor | None = None


class UpdateWatch:
    """Looks over the shoulder of one update's loss. It holds two numbers a token of this rank's micro-batches, on the device."""

    def __init__(self) -> None:
        self._seen: list[_Seen] = []  # in the order of micro-batches; empty but on the last pipeline stage

    def watching(self, loss_fn: Callable[[torch.Tensor, MicroBatch], tuple[torch.Tensor, Any]]) -> Callable[..., Any]:
        """The same loss callable, seen."""

        def compute(outputs: torch.Tensor, micro_batch: MicroBatch) -> tuple[torch.Tensor, Any]:
            loss, metrics = loss_fn(outputs, micro_batch)
            seen = _Seen(outputs.detach(), loss.detach())
            outputs.register_hook(lambda gradient: setattr(seen, "gradient", gradient.detach()))
            self._seen.append(seen)
            return loss, metrics

        return compute

    def doubt(self, weights: Sequence[torch.Tensor]) -> torch.Tensor:
        """A scalar on the device: 0 while this rank's losses and weights are finite, else NaN. Reads each weight once."""
        losses = [seen.loss.float() for seen in self._seen]
        return doubt_of([*weights, *losses], weights[0])

    def explain(self, micro_batches: Sequence[MicroBatch], name_of: NameSample, modules: Sequence[torch.nn.Module]) -> NonFinite:
        """What is not finite, and on which rank's samples or tensors. All ranks call this, and all learn the same."""
        mine = self._find(micro_batches, name_of, modules)
        found = [problem for problem in gather_objects(mine) if problem.cause is not None]
        cause = min((problem.cause for problem in found if problem.cause is not None), default=None)
        where = dict.fromkeys(name for problem in found if problem.cause == cause for name in problem.where)
        return NonFinite(cause, tuple(where) if cause not in (Cause.WEIGHT, Cause.GRADIENT) else tuple(where)[:1])

    def describe_largest(self, micro_batches: Sequence[MicroBatch], name_of: NameSample) -> str:
        """The samples with the lowest outputs in the micro-batch, of all ranks, with the largest part of the loss. Collective."""
        found: list[tuple[float, list[str]]] = []
        if self._seen:
            losses = [seen.loss.float().item() for seen in self._seen]
            number = losses.index(max(losses))
            micro_batch, outputs = micro_batches[number], self._seen[number].outputs.float().cpu()
            trained = micro_batch.loss_mask.flatten().nonzero()[:, 0]
            lowest = trained[outputs.flatten()[trained].argsort()[:_LOOKED_AT]].tolist()
            names = [name_of(micro_batch, *divmod(place, outputs.shape[1])) for place in lowest]
            found.append((losses[number], list(dict.fromkeys(names))[:_SHOWN]))
        largest = max((of_rank for all_of in gather_objects(found) for of_rank in all_of), key=lambda pair: pair[0])
        return f"the largest part of its loss is of {', '.join(largest[1])}"

    def _find(self, micro_batches: Sequence[MicroBatch], name_of: NameSample, modules: Sequence[torch.nn.Module]) -> NonFinite:
        weight = first_nonfinite(named_state(modules))
        if weight is not None:
            return NonFinite(Cause.WEIGHT, (weight,))
        for cause, tensor_of in (
            (Cause.OUTPUT, lambda seen: seen.outputs),
            (Cause.LOSS, lambda seen: seen.loss.expand(seen.outputs.shape)),
            (Cause.LOSS_GRADIENT, lambda seen: seen.gradient),
        ):
            names: dict[str, None] = {}
            for micro_batch, seen in zip(micro_batches, self._seen, strict=False):
                tensor = tensor_of(seen)
                if tensor is not None:
                    broken = ~torch.isfinite(tensor).cpu() & (micro_batch.loss_mask != 0)
                    names |= dict.fromkeys(name_of(micro_batch, row, at) for row, at in broken.nonzero().tolist())
            if names:
                return NonFinite(cause, tuple(names))
        gradients = ((name, p.main_grad) for m in modules for name, p in m.named_parameters() if hasattr(p, "main_grad"))
        gradient = first_nonfinite(gradients)
        return NonFinite(Cause.GRADIENT, (gradient,)) if gradient is not None else NonFinite(None, ())


class GradientTrace:
    """Finds the samples at which the gradient of the first layer's input is not finite. Use around an update's passes, made again.

    What breaks inside a layer reaches the input of the first one at the positions of its own sequence.
    """

    def __init__(self, modules: Sequence[torch.nn.Module]) -> None:
        self._modules = [module for module in modules if getattr(module, "pre_process", False)]
        self._broken: list[list[torch.Tensor]] = []  # of every micro-batch: [s, b] masks of its calls of the embedding
        self._hooks: list[Any] = []

    def __enter__(self) -> Self:
        def keep(_module: torch.nn.Module, _arguments: Any, output: torch.Tensor) -> None:
            masks = self._broken[-1]
            output.register_hook(lambda gradient: masks.append(~gradient.isfinite().all(-1)))

        for module in self._modules:
            self._hooks.append(module.register_forward_pre_hook(lambda *_: self._broken.append([])))
            self._hooks.append(module.embedding.register_forward_hook(keep))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def samples(
        self, micro_batches: Sequence[MicroBatch], name_of: NameSample, positions_of: Callable[[MicroBatch, int], torch.Tensor]
    ) -> tuple[str, ...]:
        """Names of all ranks' samples. All ranks call this.

        Args:
            positions_of: from a micro-batch and a number of tokens to the positions whose embeddings this rank holds.
        """
        names: dict[str, None] = {}
        for micro_batch, masks in zip(micro_batches, self._broken, strict=False):
            for mask in masks:
                positions = positions_of(micro_batch, mask.shape[0]).tolist()
                names |= dict.fromkeys(name_of(micro_batch, row, positions[at]) for at, row in mask.nonzero().tolist())
        return tuple(dict.fromkeys(name for of_rank in gather_objects(tuple(names)) for name in of_rank))


def name_by_place(micro_batch: MicroBatch, row: int, position: int) -> str:
    """A sample's name where nobody gives another."""
    return f"row {row} at position {position}"


def _list_some(names: Sequence[str]) -> str:
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def named_state(modules: Sequence[torch.nn.Module]) -> Iterable[tuple[str, torch.Tensor]]:
    """This rank's parameters and router biases, live, in a fixed order."""
    return ((name, tensor.data) for name, tensor in _named_tensors(modules))


def live_state(modules: Sequence[torch.nn.Module]) -> list[torch.Tensor]:
    """The modules' own tensors in the order of `named_state`: giving one other data gives the module other weights."""
    return [tensor for _, tensor in _named_tensors(modules)]


def _named_tensors(modules: Sequence[torch.nn.Module]) -> Iterable[tuple[str, torch.Tensor]]:
    for module in modules:
        yield from module.named_parameters()
        yield from ((name, buffer) for name, buffer in module.named_buffers() if name.endswith("expert_bias"))


def blocks_of(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """The same numbers in fewer tensors: contiguous ones that follow each other in one storage become one, with what is between.

    Megatron-Core has trained weights in one buffer, whose gaps are zero.
    """
    shared: dict[tuple[int, torch.dtype], list[torch.Tensor]] = {}
    for tensor in tensors:
        shared.setdefault((tensor.untyped_storage().data_ptr(), tensor.dtype), []).append(tensor.detach())
    blocks = []
    for members in shared.values():
        if len(members) == 1 or not all(member.is_contiguous() for member in members):
            blocks += members
            continue
        begin = min(member.storage_offset() for member in members)
        end = max(member.storage_offset() + member.numel() for member in members)
        blocks.append(members[0].as_strided((end - begin,), (1,), begin))
    return blocks


def gradient_norm(optimizer: ChainedOptimizer, doubt: torch.Tensor, norms: dict[int, torch.Tensor] | None = None) -> float:
    """Norm of the gradient over all ranks, the same on all; not finite if any rank's gradients or its `doubt` are not. Collective.

    What `ChainedOptimizer.step` does before it clips, with the doubts added to the norm of one tensor: x + 0 is x. Megatron-Core's
    own checks would not do: bf16 has no loss scale, whose `found_inf` counts; and `check_for_nan_in_grad` raises on the rank that
    has the NaN, before its gradients are reduced, while the others wait for them.

    Args:
        norms: is given the norm of each gradient that counts, under its address.
    """
    optimizer.prepare_grads()
    gradients, beside = [], []
    for part in optimizer.chained_optimizers:
        in_norm = part.get_main_grads_for_grad_norm()
        known = {gradient.data_ptr() for gradient in in_norm}
        gradients += in_norm
        beside += [gradient for gradient in _gradients_to_apply(part) if gradient.data_ptr() not in known]
    doubt = doubt + doubt_of(beside, doubt)
    of_each = list(torch._foreach_norm(gradients, 2, torch.float32)) if gradients else [torch.zeros_like(doubt)]
    if norms is not None:
        norms |= {gradient.data_ptr(): norm for gradient, norm in zip(gradients, of_each, strict=False)}
    of_each[0] = of_each[0] + doubt
    square = torch.linalg.vector_norm(torch.stack(of_each)).view(1) ** 2.0
    dist.all_reduce(square, group=optimizer.get_grad_stats_parallel_group())
    return float(square.item() ** 0.5)


def apply_gradients(optimizer: ChainedOptimizer, norm: float) -> None:
    """The rest of `ChainedOptimizer.step`: clip, and update the weights. Collective."""
    for part in optimizer.chained_optimizers:
        if part.is_stub_optimizer or part.config.clip_grad <= 0:
            continue
        parameters = part.get_parameters()
        if parameters and parameters[0].is_cpu:
            coefficient = part.config.clip_grad / (norm + 1.0e-6)
            if coefficient < 1.0:  # Megatron-Core's own way goes through a copy of each gradient
                torch._foreach_mul_(_gradients_to_apply(part), coefficient)
        elif parameters:
            clip_grad_by_total_norm_fp32(
                parameters, max_norm=part.config.clip_grad, total_norm=norm, use_decoupled_grad=_are_decoupled(part)
            )
    optimizer.step_with_ready_grads()


def _gradients_to_apply(part: MegatronOptimizer) -> list[torch.Tensor]:
    """This rank's share of the gradient, with what the norm leaves out: copies of weights that another rank counts."""
    name = "decoupled_grad" if _are_decoupled(part) else "grad"
    found = [getattr(parameter, name, None) for parameter in part.get_parameters()]
    return [gradient for gradient in found if gradient is not None]


def _are_decoupled(part: MegatronOptimizer) -> bool:
    return part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8


def doubt_of(tensors: Sequence[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    """A scalar like another: 0 if all numbers of the tensors are finite, else NaN. Reads each tensor once."""
    extremes = [extreme.float() for tensor in tensors if tensor.numel() for extreme in torch.aminmax(tensor)]
    return torch.stack(extremes).mul(0.0).sum() if extremes else torch.zeros_like(like)


def require_finite(modules: Sequence[torch.nn.Module], updates: int) -> None:
    """Look at every weight. Collective: one pass over this rank's weights, one wait for its device, one flag between the ranks.

    Args:
        updates: the number of the last one, for the message.

    Raises:
        NonFiniteUpdate: on every rank: a weight of any is NaN or infinite, as an update of a finite gradient may leave it.
    """
    weights = [tensor for _, tensor in named_state(modules)]
    mine = bool(doubt_of(weights, weights[0]).isnan()) if weights else False
    if any_rank(mine)[0]:
        broken = next(name for name in gather_objects(first_nonfinite(named_state(modules))) if name is not None)
        raise NonFiniteUpdate(
            f"weight {broken} holds NaN or infinite values after update {updates}, whose gradient was finite; no engine was given "
            "it and no checkpoint holds it: look at the learning rate and the optimizer's eps"
        )


def require_finite_of(source: Path, modules: Sequence[torch.nn.Module]) -> None:
    """Look at every weight that was loaded from `source`. Collective.

    Raises:
        CheckpointError: on every rank: a weight is NaN or infinite.
    """
    with failing_together():
        broken = first_nonfinite(named_state(modules))
        if broken is not None:
            raise CheckpointError(f"{source}: weight {broken} holds NaN or infinite values: take an older checkpoint")
