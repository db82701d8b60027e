"""A model on Megatron-Core with its optimizer: forward, backward and update, on any layout.

It knows no algorithm and no data: its caller brings micro-batches and a loss callable.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_r1.config.megatron import MegatronConfig
from megatron_r1.config.optimizer import MoeTrainingConfig, OptimizerConfig
from megatron_r1.config.rates import RatesOf, constant_but_lr
from megatron_r1.config.runtime import RuntimeConfig
from megatron_r1.mcore import nonfinite, parallel, provider
from megatron_r1.mcore.active import require_active
from megatron_r1.mcore.counts import count_minibatch
from megatron_r1.mcore.reduce_metrics import reduce_metrics
from megatron_r1.mcore.replicas import check_replicas
from megatron_r1.mcore.switch_rules import SwitchContext
from megatron_r1.mcore.switches import resolve_switches
from megatron_r1.model.architecture import Architecture
from megatron_r1.model.flops import Work, update_flops
from megatron_r1.runtime.distributed import failing_together
from megatron_r1.types import Metric, MicroBatch
from megatron_r1.weights.gather import GatheredWeights
from megatron_r1.weights.generation import Generation
from megatron_r1.weights.load import load_weights
from megatron_r1.weights.trainer_shards import TrainerShards

require_active()

from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module

from megatron_r1.mcore.adam_state import take_weights
from megatron_r1.mcore.balance import Balance
from megatron_r1.mcore.build_optimizer import build_optimizer
from megatron_r1.mcore.ema import HostAverage
from megatron_r1.mcore.gradient_kinds import GradientKinds
from megatron_r1.mcore.layer_graphs import LayerGraphs
from megatron_r1.mcore.left_out import LeftOut
from megatron_r1.mcore.loss_slope import LossSlope, is_asked
from megatron_r1.mcore.offload import TrainingOffload
from megatron_r1.mcore.overlap import LateWeights, free_with, wrap_for_training
from megatron_r1.mcore.routing import packed_sequences
from megatron_r1.mcore.shares import Shares
from megatron_r1.mcore.step_stats import StepStats, entropy_metric, mtp_metric
from megatron_r1.mcore.transformer_config import this_machine

#: Takes one number per token [B, N] (a policy: log-probs of the labels; a reward model: scores) of a whole micro-batch, also
#: under context parallelism; returns this micro-batch's part of the loss (already divided by the whole minibatch's denominator)
#: and metrics.
LossFn = Callable[[torch.Tensor, MicroBatch], tuple[torch.Tensor, Mapping[str, Metric[torch.Tensor]]]]
#: Is given, before every forward pass, that pass up to what a loss callable gets, and its micro-batch; returns more `token_fields`.
Beside = Callable[[Callable[[], torch.Tensor], MicroBatch], dict[str, torch.Tensor]]

#: Takes a micro-batch and its [B, N] numbers, and gives those of each sequence under its number.
Unpack = Callable[[MicroBatch, torch.Tensor], dict[int, torch.Tensor]]


class MegatronModel:
    """This rank's share of a model, and how it is run and trained.

    Attributes:
        updates: number of updates so far, those left out included: the rates go by it.
        left_out: of these, those that were not made.
        shares: which rank computes which samples, and who speaks for them.
        offloaded: what `runtime.offload` names.

    Args:
        arch: the model's shape.
        layout: from `parallel.resolve_layout`, already initialised.
        runtime: device and numerics.
        moe: how router and multi-token prediction are trained.
        optimizer: None for a model that is only run.
        total_updates: of the run; the learning rate falls over them unless the optimizer's settings say otherwise.
        rates: learning rate, bias speed and weight of multi-token prediction of every update. None: those of `optimizer` and `moe`.
        seed: of the initial weights.
        device: where the parameters live.
        micro_batch_tokens: packed tokens per forward pass.
        freeze_router: router weights get no gradient.
        megatron: Megatron-Core's switches; None: the defaults.
        ema_decay: of the average of the weights, see `HostAverage`; None: there is none.
        packed: whether micro-batches hold sequences of any length; else all are `micro_batch_tokens` long.
    """

    def __init__(
        self,
        arch: Architecture,
        layout: parallel.Layout,
        runtime: RuntimeConfig,
        moe: MoeTrainingConfig,
        *,
        optimizer: OptimizerConfig | None,
        total_updates: int,
        seed: int,
        device: torch.device,
        micro_batch_tokens: int,
        freeze_router: bool = False,
        rates: RatesOf | None = None,
        megatron: MegatronConfig | None = None,
        ema_decay: float | None = None,
        packed: bool = True,
    ) -> None:
        self.arch, self.layout, self.device, self.micro_batch_tokens = arch, layout, device, micro_batch_tokens
        self._mtp_trains_trunk = moe.mtp_trains_trunk
        self.trains_mtp = arch.mtp_depth > 0 and moe.mtp_loss_scale > 0
        self.updates, self.offloaded = 0, frozenset(runtime.offload)
        self.left_out = LeftOut(runtime.skip_nonfinite_updates, optimizer and optimizer.skip_grad_norm)
        self.generation = Generation()  #: what the folder of its weights says of generation, which goes where the model goes
        self.groups = parallel.groups()
        self.shares = Shares(parallel.find_share())
        work = SwitchContext(arch, layout, runtime, moe, packed, trains=optimizer is not None)
        self.switches = resolve_switches(megatron or MegatronConfig(), work, this_machine())
        #: what the length of a packed micro-batch is a multiple of
        self.pad_multiple = self.switches.require_tiles(layout, None if packed else micro_batch_tokens)
        self.modules = provider.build_model(
            arch, layout, runtime, moe, seed=seed, freeze_router=freeze_router, switches=self.switches
        )
        for module in self.modules:
            module.to(device)
        self.optimizer = None
        config = self.modules[0].config
        #: what the schedule runs: `modules`, inside the wrappers for bf16 and gradient reduction
        self.chunks: list[torch.nn.Module] = [Float16Module(config, m) if config.bf16 else m for m in self.modules]
        if optimizer is not None:
            self._weight_decay = optimizer.weight_decay
            self._rates = rates or constant_but_lr(optimizer, moe, total_updates)
            self._add_optimizer(optimizer, runtime)
        self._late = LateWeights(self.chunks)
        self._graphs = LayerGraphs(self.chunks, self.optimizer, self._late)
        #: of the weights, on the host
        self.average = None if self.optimizer is None or ema_decay is None else HostAverage(self.optimizer, ema_decay, device)
        self._forward_backward = get_forward_backward_func()
        self._balance = Balance(self.modules, moe, device)
        self._live = nonfinite.live_state(self.modules)

    def _add_optimizer(self, optimizer: OptimizerConfig, runtime: RuntimeConfig) -> None:
        config = self.modules[0].config
        wrapped = wrap_for_training(self.chunks, config, self.switches)
        self.chunks = list(wrapped)
        free_with(self, wrapped)
        self.optimizer = build_optimizer(self.arch, optimizer, runtime, self.chunks, self.switches)
        self._kinds = GradientKinds(self.modules, self.optimizer)
        self._state = TrainingOffload(self.offloaded, self.optimizer, self.chunks, self.device)

    def _take_rates(self) -> None:
        """Set what the update that begins is made with. Norms, biases and other vectors have no weight decay (`wd_mult`)."""
        assert self.optimizer is not None, "this model was built without an optimizer"
        rates = self._rates(self.updates + 1)
        for group in self.optimizer.param_groups:
            group["lr"] = rates.lr
            group["weight_decay"] = self._weight_decay * group.get("wd_mult", 1.0)
        self._balance.bias_update_rate = rates.bias_update_rate
        for module in self.modules:
            module.config.mtp_loss_scaling_factor = rates.mtp_loss_scale

    def train_on_micro_batches(
        self,
        micro_batches: list[MicroBatch],
        loss_fn: LossFn,
        name_of: nonfinite.NameSample = nonfinite.name_by_place,
        look: Callable[[], str | None] = lambda: None,
        beside: Beside | None = None,
    ) -> StepStats:
        """One update on this rank's micro-batches: equally many, of equal size, on every data-parallel rank.

        Args:
            name_of: names the sample at a row and a position of a micro-batch, should an update not be finite.
            look: called when all gradients are there and nothing else has changed. If it returns a problem, on all ranks alike, the
                update is left out.

        Raises:
            NonFiniteUpdate: on every rank, before any weight is touched: loss, gradient or weights are NaN or infinite, and no more
                updates may be left out.
        """
        assert self.optimizer is not None, "this model was built without an optimizer"
        self._take_rates()
        self._state.come_back()
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        self._graphs.before_passes(micro_batches)
        # Megatron divides gradients by the token count of the whole minibatch (calculate_per_token_loss) and scales its own
        # auxiliary losses to match; ours is already divided, so it is multiplied by the same count first.
        total_tokens = sum(m.num_tokens for m in micro_batches) * self.layout.dp
        counts = count_minibatch(micro_batches, self.device, self.groups.dp)
        self._balance.begin(total_tokens, counts.sequences)
        for module in self.modules:
            module.mtp_loss, module.entropy, module.mtp_token_weight = None, None, total_tokens / (counts.trained_tokens or 1)
        watch = nonfinite.UpdateWatch()
        results = self._run(micro_batches, loss_fn, total_tokens, forward_only=False, beside=beside, watch=watch)
        self._late.passed()
        if (seen := look()) is not None:
            return self.skip_update(seen)
        self.updates += 1
        lr = self._rates(self.updates).lr
        norms: dict[int, torch.Tensor] = {}
        norm = nonfinite.gradient_norm(self.optimizer, watch.doubt(self._weight_blocks()), norms)
        if not math.isfinite(norm):
            problem = watch.explain(micro_batches, name_of, self.modules)
            if problem.cause is nonfinite.Cause.GRADIENT:
                problem = replace(problem, behind=self._trace_gradient(micro_batches, loss_fn, total_tokens, name_of))
            return self._leave_out(problem.describe(self._OUTPUT), total_tokens, mends=problem.cause is not nonfinite.Cause.WEIGHT)
        if self.left_out.is_spike(norm):
            self.left_out.count_spike(self.updates, norm, watch.describe_largest(micro_batches, name_of))
            loss = reduce_metrics(results, self.groups)["loss"].value
            return StepStats(loss, norm, lr, {}, total_tokens, applied=False, skipped=self.left_out.reported)
        if self.average is not None:
            self.average.before_update()
        of_kinds = self._kinds.measure(norms)
        nonfinite.apply_gradients(self.optimizer, norm)
        if self.average is not None:
            self.average.after_update()
        self._late.updated()
        metrics = (
            reduce_metrics(results, self.groups)
            | of_kinds
            | self._balance.report(counts.sequences, self.groups.pp)
            | mtp_metric(self.modules, self.groups, counts.trained_tokens, self.device, trained=self.trains_mtp)
            | entropy_metric(self.modules, self.groups, counts.trained_tokens, self.device)
        )
        self._balance.move_biases()
        loss = metrics.pop("loss").value
        return StepStats(loss, norm, lr, metrics, total_tokens, self._flops(counts.work), skipped=self.left_out.reported)

    def _trace_gradient(
        self, micro_batches: list[MicroBatch], loss_fn: LossFn, total_tokens: int, name_of: nonfinite.NameSample
    ) -> tuple[str, ...]:
        """The samples whose gradient breaks inside the model, found by going through all of them again."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        with nonfinite.GradientTrace(self.modules) as trace:
            self._run(micro_batches, loss_fn, total_tokens, forward_only=False, beside=None)
        return trace.samples(micro_batches, name_of, parallel.held_positions)

    @property
    def reports(self) -> bool:
        """Whether this rank speaks for its data-parallel share."""
        return self.shares.reports

    def skip_update(self, problem: str) -> StepStats:
        """Leave out an update whose data are known not to be finite. All ranks call this alike.

        Args:
            problem: one line that names the sample.

        Raises:
            NonFiniteUpdate: no more updates may be left out.
        """
        assert self.optimizer is not None, "this model was built without an optimizer"
        self.updates += 1
        return self._leave_out(problem, tokens=0)

    def check_weights(self) -> None:
        """Look at every weight, before it is sampled from. Collective; it raises NonFiniteUpdate as `nonfinite.require_finite`."""
        self._late.gather()
        nonfinite.require_finite(self.modules, self.updates)

    def _leave_out(self, problem: str, tokens: int, mends: bool = True) -> StepStats:
        """See `LeftOut.count_nonfinite`."""
        self.left_out.count_nonfinite(self.updates, problem, mends)
        lr = self._rates(self.updates).lr
        return StepStats(math.nan, math.nan, lr, {}, tokens, applied=False, skipped=self.left_out.reported)

    def evaluate(
        self, micro_batches: Sequence[MicroBatch], unpack: Unpack, beside: Beside | None = None
    ) -> dict[int, torch.Tensor]:
        """The model's numbers for the sequences of this rank's share: float32, on the CPU, without gradient. Collective.

        They are there on the last pipeline stage; on other stages nothing is.

        Args:
            micro_batches: this rank's, as for `train_on_micro_batches`.
        """
        found: dict[int, torch.Tensor] = {}

        def keep(values: torch.Tensor, micro_batch: MicroBatch) -> tuple[torch.Tensor, dict[str, Metric[torch.Tensor]]]:
            found.update(unpack(micro_batch, values.detach().float().cpu()))
            return values.sum() * 0.0, {}

        self._late.gather()
        with torch.no_grad(), self._graphs.aside():
            self._run(micro_batches, keep, total_tokens=1, forward_only=True, beside=beside)
        return found

    def _run(
        self, micro_batches: Sequence[MicroBatch], loss_fn: LossFn, total_tokens: int, forward_only: bool, beside: Beside | None,
        watch: nonfinite.UpdateWatch | None = None,
    ) -> list[dict[str, Any]]:  # fmt: skip
        """Forward (and backward) over the pipeline; the loss callable's results of this rank's last stage, else empty."""
        seen_loss = loss_fn if watch is None else watch.watching(loss_fn)
        asks = watch is not None and is_asked(self.device, self.layout)

        def forward_step(batches: Iterator[MicroBatch], model: torch.nn.Module, return_schedule_plan: bool = False):
            packed = next(batches)
            whole = packed.to(self.device)
            micro_batch = parallel.slice_context_parallel(whole)
            forward = partial(
                model.build_schedule_plan if return_schedule_plan else model, micro_batch.token_ids, micro_batch.position_ids, None,
                labels=micro_batch.labels, loss_mask=micro_batch.loss_mask,
                packed_seq_params=packed_sequences(whole, self.layout, self.groups),
            )  # fmt: skip

            def per_token(output: torch.Tensor) -> torch.Tensor:
                return parallel.gather_context_parallel(self._per_token(output), whole.cu_seqlens)

            if beside is not None:
                fields = beside(lambda: per_token(forward()), whole)
                for batch in (whole, packed):  # also for whoever goes through the micro-batches again
                    batch.token_fields.update(fields)
            slope = LossSlope(lambda output: loss_fn(per_token(output), whole)[0] * total_tokens, micro_batch.labels.shape)
            for module in self.modules:
                module.loss_slope = slope if asks and not return_schedule_plan else None
            output = forward()
            for module in self.modules:
                module.loss_slope = None  # it holds the micro-batch, and this model

            def compute_loss(output: torch.Tensor):
                # Every context-parallel rank computes the whole loss and derives it by its own tokens.
                loss, metrics = seen_loss(per_token(output), whole)
                num_tokens = torch.tensor(micro_batch.num_tokens, dtype=torch.int, device=self.device)
                return loss * total_tokens, num_tokens, {"loss": Metric(loss.detach(), "sum"), **metrics}

            return output, compute_loss

        rows, width = micro_batches[0].token_ids.shape
        iterators = [iter(micro_batches) for _ in self.chunks]
        interleaved = len(self.chunks) > 1
        return self._forward_backward(
            forward_step_func=forward_step, data_iterator=iterators if interleaved else iterators[0],
            model=self.chunks if interleaved else self.chunks[0], num_microbatches=len(micro_batches), seq_length=width,
            micro_batch_size=rows, forward_only=forward_only,
        )  # fmt: skip

    _OUTPUT = "output"  # what `_per_token` gives, in words

    def _per_token(self, output: torch.Tensor) -> torch.Tensor:
        """From the modules' output [B, N] to what a loss callable is given."""
        return output

    def _flops(self, work: Work) -> float:
        return float(update_flops(self.arch, work, mtp=self.trains_mtp, mtp_trains_trunk=self._mtp_trains_trunk))

    def offload(self) -> None:
        """Move what `runtime.offload` names of optimizer and gradients to the host until the next update."""
        if self.optimizer is not None:
            self._state.leave()

    def weights(self) -> GatheredWeights:
        """(Hugging Face name, full tensor), collectively: every rank must exhaust each iteration."""
        self._late.gather()
        return GatheredWeights(self.modules, self.arch, self.groups)

    def shards(self) -> TrainerShards:
        """The same, held by all ranks together, for an engine. Collective."""
        self._late.gather()
        return TrainerShards(self.modules, self.arch, self.groups)

    def load_hf(self, folder: Path, trunk_of: Architecture | None = None) -> None:
        """Take the weights of a Hugging Face folder; each rank reads what it holds. `trunk_of`: see `load_weights`."""
        with failing_together():
            load_weights(self.modules, self.arch, folder, self.groups, trunk_of)
        self.take_loaded_weights()

    def take_loaded_weights(self) -> None:
        """Have the optimizer and the average start from weights that were put into the modules."""
        if self.optimizer is not None:
            take_weights(self.optimizer)
        if self.average is not None:
            self.average.start()

    def gather_late_weights(self) -> None:
        """Have every weight as the last update left it, see `LateWeights`. Collective; whoever reads `modules` calls it first."""
        self._late.gather()

    def local_state(self) -> list[torch.Tensor]:
        """This rank's parameters and router biases, live, in a fixed order."""
        self._late.gather()
        return [tensor for _, tensor in nonfinite.named_state(self.modules)]

    def _weight_blocks(self) -> list[torch.Tensor]:
        """All that `local_state` holds, in few tensors: the weights that are trained lie side by side."""
        self._late.gather()
        return nonfinite.blocks_of(self._live)

    def check_replicas(self) -> None:
        """Compare the replicas of every weight over ranks. Collective; raises ReplicasDiffer, see `replicas.check_replicas`."""
        check_replicas(self.modules, self.arch, self.layout, self.groups)

    def check_finite(self, source: Path) -> None:
        """Look at every weight that was loaded from `source`. Collective; raises CheckpointError if one is not finite."""
        nonfinite.require_finite_of(source, self.modules)
