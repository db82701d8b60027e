"""Train a small model for a few steps under several layouts, in one set of processes. Started by test_layouts.py.

Arguments: rank, world size, a free port, a JSON list of cases, the result file (written by the last rank).
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_r1.config.model import ParallelConfig
from megatron_r1.config.optimizer import MoeTrainingConfig
from megatron_r1.config.runtime import RuntimeConfig
from megatron_r1.mcore import host
from megatron_r1.types import MicroBatch
from tests.random_weights import full_architecture, further_families, qwen2_architecture

host.activate("cpu")

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_r1.mcore import parallel, provider
from tests.patience import patient

STEPS, ROWS, WIDTH = 3, 2, 32
PACKED_LENGTHS = ([40, 24], [16, 8, 8, 32])


def batch(step: int, packed: bool) -> list[MicroBatch]:
    """The micro-batches of one step, the same for every layout."""
    generator = torch.Generator().manual_seed(step)
    made = []
    for lengths in PACKED_LENGTHS:
        shape = (1, ROWS * WIDTH) if packed else (ROWS, WIDTH)
        tokens = torch.randint(128, shape, generator=generator)
        labels = torch.randint(128, shape, generator=generator)
        lengths = lengths if packed else [WIDTH]
        positions = torch.cat([torch.arange(n) for n in lengths]).expand(shape).contiguous()
        bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32) if packed else None
        made.append(MicroBatch(tokens, labels, torch.ones(shape), positions, bounds))
    return made


def train(case: dict) -> list[dict[str, float]]:
    """Loss per token and gradient norm of every step."""
    models = {"deepseek_v3": full_architecture(mtp=int(case["mtp"])), "qwen2": qwen2_architecture(tied=True), **further_families()}
    arch = models[case["model"]]
    packed = case["packed"]
    moe = MoeTrainingConfig(bias_update_rate=1e-3, aux_loss_coeff=1e-2, mtp_loss_scale=0.3 if case["mtp"] else 0.0)
    runtime = RuntimeConfig(recompute=case["recompute"])
    # packed=False: the sequences of `batch` are as long as context parallelism needs them.
    layout = parallel.resolve_layout(ParallelConfig(**case["parallel"]), arch, dist.get_world_size(), mtp=case["mtp"], packed=False)
    parallel.build_process_groups(layout, seed=1)
    modules = provider.build_model(arch, layout, runtime, moe, seed=7)
    config = modules[0].config
    config.finalize_model_grads_func = finalize_model_grads
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
    chunks = [DistributedDataParallel(config, ddp, m, disable_bucketing=i > 0) for i, m in enumerate(modules)]
    optimizer = get_megatron_optimizer(
        OptimizerConfig(optimizer="adam", lr=1e-3, weight_decay=0.1, clip_grad=1.0, use_distributed_optimizer=True), chunks
    )
    return [step_once(batch(step, packed), layout, chunks, optimizer) for step in range(STEPS)]


def step_once(micro_batches: list[MicroBatch], layout: parallel.Layout, chunks: list, optimizer: object) -> dict[str, float]:
    """One optimizer step on this rank's share."""
    mine = micro_batches[parallel.data_parallel_rank() :: layout.dp]
    for chunk in chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()

    def forward(batches: Iterator[MicroBatch], model: torch.nn.Module):
        micro_batch = parallel.slice_context_parallel(next(batches))
        bounds = micro_batch.cu_seqlens
        packing = None
        if bounds is not None:
            longest = int(bounds.diff().max())
            packing = PackedSeqParams("thd", bounds, bounds, max_seqlen_q=longest, max_seqlen_kv=longest)
        nll = model(
            micro_batch.token_ids, micro_batch.position_ids, None, labels=micro_batch.labels,
            loss_mask=micro_batch.loss_mask, packed_seq_params=packing,
        )  # fmt: skip

        def loss(nll: torch.Tensor):
            tokens = torch.tensor(nll.numel(), dtype=torch.int)
            return nll.sum(), tokens, {"nll": nll.detach().sum(), "tokens": tokens}

        return nll, loss

    iterators = [iter(mine) for _ in chunks]
    rows, width = micro_batches[0].token_ids.shape
    results = get_forward_backward_func()(
        forward_step_func=forward, data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=chunks if len(chunks) > 1 else chunks[0], num_microbatches=len(mine), seq_length=width, micro_batch_size=rows,
        forward_only=False,
    )  # fmt: skip
    _, grad_norm, _ = optimizer.step()
    sums = torch.tensor([sum(float(r[key]) for r in results) for key in ("nll", "tokens")], dtype=torch.float64)
    if results:
        dist.all_reduce(sums, group=parallel.groups().dp_cp)
    return {"loss": float(sums[0] / sums[1]), "grad_norm": float(grad_norm)}


def main() -> None:
    """Run every case; a case that raises is reported with its message."""
    rank, world_size, port, cases, results = sys.argv[1:]
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", int(port), int(world_size), is_master=int(rank) == 0)
    dist.init_process_group(
        "gloo", store=store, rank=int(rank), world_size=int(world_size), timeout=timedelta(seconds=patient(120))
    )
    found = {case["name"]: train(case) for case in json.loads(cases)}
    if int(rank) == int(world_size) - 1:
        Path(results).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
