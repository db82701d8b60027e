"""Train, save and go on under several layouts, in one set of processes. Started by test_reshard.py.

Arguments: rank, world size, a free port, a JSON list of jobs, the result file (written by the last rank). A job has a name, a
model, a layout (`parallel`), a folder, and what to do: "save" trains, saves into the folder and goes on; "load" goes on from the
folder; "weights" does so without the optimizer's state.
"""

from __future__ import annotations

import json
import sys
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from train_layouts import ROWS, WIDTH, batch

from megatron_r1.config.model import ParallelConfig
from megatron_r1.config.optimizer import MoeTrainingConfig, OptimizerConfig
from megatron_r1.config.runtime import RuntimeConfig
from megatron_r1.mcore import parallel
from megatron_r1.mcore.checkpoint import load_policy, load_policy_weights, save_policy
from megatron_r1.mcore.policy import MegatronPolicy
from megatron_r1.training.pretrain import loss_over
from tests.allocations import peak_bytes
from tests.patience import patient
from tests.random_weights import full_architecture, uneven_qwen2

BEFORE, AFTER = 3, 3  # updates before and after the checkpoint


def build(model: str, layout: dict[str, int]) -> MegatronPolicy:
    """The policy with a schedule that moves in every update."""
    mtp = model.endswith("-mtp")
    arch = uneven_qwen2() if model == "qwen2" else full_architecture(mtp=int(mtp))
    resolved = parallel.resolve_layout(ParallelConfig(**layout), arch, dist.get_world_size(), mtp=mtp)
    parallel.build_process_groups(resolved, seed=1)
    return MegatronPolicy(
        arch, resolved, RuntimeConfig(), MoeTrainingConfig(bias_update_rate=1e-3, aux_loss_coeff=1e-2, mtp_loss_scale=0.3 * mtp),
        optimizer=OptimizerConfig(lr=1e-3, warmup_steps=2, schedule="cosine", min_lr_ratio=0.1), total_updates=10, seed=7,
        device=torch.device("cpu"), micro_batch_tokens=ROWS * WIDTH,
    )  # fmt: skip


def train(policy: MegatronPolicy, steps: range) -> list[list[float]]:
    """[loss, gradient norm, learning rate] of every step."""
    found = []
    for step in steps:
        micro_batches = batch(step, packed=False)
        mine = micro_batches[parallel.data_parallel_rank() :: policy.layout.dp]
        stats = policy.train_on_micro_batches(mine, loss_over(len(micro_batches) * ROWS * WIDTH))
        found.append([stats.loss, stats.grad_norm, stats.lr])
    return found


def do(job: dict) -> dict:
    """The steps after the checkpoint, and of every rank the next random number, and what saving or loading allocated."""
    policy, folder, peak = build(job["model"], job["parallel"]), Path(job["folder"]), 0
    if job["do"] == "save":
        train(policy, range(BEFORE))
        torch.rand(dist.get_rank() + 1)  # every rank's generator stands somewhere else
        if dist.get_rank() == 0:
            folder.mkdir()
        dist.barrier()
        peak, _ = peak_bytes(lambda: save_policy(policy, folder))
    elif job["do"] == "load":
        peak, _ = peak_bytes(lambda: load_policy(policy, folder))
    else:
        load_policy_weights(policy, folder)
    own = {
        "drawn": torch.rand(()).item(), "peak": peak, "weights": sum(t.nbytes for t in policy.local_state()),
        "largest": max(t.nbytes for t in policy.local_state()),
    }  # fmt: skip
    of_ranks: list[dict] = [{}] * dist.get_world_size()
    dist.all_gather_object(of_ranks, own)
    found = {name: [of_rank[name] for of_rank in of_ranks] for name in own}
    return {"steps": train(policy, range(BEFORE, BEFORE + AFTER)), "updates": policy.updates, **found}


def main() -> None:
    """Do every job."""
    rank, world_size, port, jobs, results = sys.argv[1:]
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", int(port), int(world_size), is_master=int(rank) == 0)
    dist.init_process_group(
        "gloo", store=store, rank=int(rank), world_size=int(world_size), timeout=timedelta(seconds=patient(120))
    )
    found = {job["name"]: do(job) for job in json.loads(jobs)}
    if int(rank) == int(world_size) - 1:
        Path(results).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
