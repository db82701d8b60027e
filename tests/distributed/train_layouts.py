"""Train a small model for a few steps under several layouts, in one set of processes. Started by test_layouts.py.

Arguments: rank, world size, a free port, the cases as JSON ("train": a list; "one_update": name -> arguments of
`balance_cases.build_model`; "rounds": name -> arguments of `grpo_rounds.play_rounds`), the result file (written by the last
rank; the updates go beside it, as `.pt`).
"""

from __future__ import annotations

import json
import sys
import warnings
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_r1.config.megatron import MegatronConfig
from megatron_r1.config.model import ParallelConfig
from megatron_r1.config.optimizer import MoeTrainingConfig, OptimizerConfig
from megatron_r1.config.runtime import RuntimeConfig
from megatron_r1.mcore import host
from megatron_r1.training.pretrain import loss_over
from megatron_r1.types import MicroBatch
from tests.balance_cases import build_model, one_update
from tests.cross_entropy_cases import check_temperatures
from tests.grpo_rounds import play_rounds
from tests.parity_cases import check_parts_of_a_batch
from tests.random_weights import full_architecture, further_families, qwen2_architecture

host.activate("cpu")

from megatron_r1.mcore import parallel
from megatron_r1.mcore.policy import MegatronPolicy
from tests.patience import patient
from tests.te_stand_in import transformer_engine_layers

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
        made.append(MicroBatch(tokens, labels, torch.ones(shape), positions, bounds, list(range(len(lengths)))))
    return made


def train(case: dict) -> list[dict[str, Any]]:
    """Loss per token, gradient norm and router biases of every step."""
    models = {"deepseek_v3": full_architecture(mtp=int(case["mtp"])), "qwen2": qwen2_architecture(tied=True), **further_families()}
    arch = models[case["model"]]
    moe = MoeTrainingConfig(bias_update_rate=1e-3, aux_loss_coeff=1e-2, mtp_loss_scale=0.3 * case["mtp"], mtp_trains_trunk=True)
    runtime = RuntimeConfig(recompute=case["recompute"], whole_logits_mb=0 if case["tiles"] else 256)
    switches = MegatronConfig(**case["megatron"])
    layout = parallel.resolve_layout(
        ParallelConfig(**case["parallel"]), arch, dist.get_world_size(), mtp=case["mtp"],
        stages=switches.pipeline_model_parallel_layout,
    )  # fmt: skip
    parallel.build_process_groups(layout, seed=1)
    with transformer_engine_layers() if case["te"] else nullcontext():
        policy = MegatronPolicy(
            arch, layout, runtime, moe, optimizer=OptimizerConfig(lr=1e-3, weight_decay=0.1), total_updates=10, seed=7,
            device=torch.device("cpu"), micro_batch_tokens=ROWS * WIDTH, megatron=switches,
        )  # fmt: skip
    return [step_once(batch(step, case["packed"]), policy) for step in range(STEPS)]


def step_once(micro_batches: list[MicroBatch], policy: MegatronPolicy) -> dict[str, Any]:
    """One optimizer step on this rank's share."""
    mine = micro_batches[parallel.data_parallel_rank() :: policy.layout.dp]
    stats = policy.train_on_micro_batches(mine, loss_over(len(micro_batches) * ROWS * WIDTH))
    if policy.switches.ddp["overlap_param_gather"] and policy.layout.pp == 1:
        biases = [router.expert_bias for router in policy._balance.routers]  # weights are gathered by the next forward pass alone
    else:
        biases = [tensor for name, tensor in policy.weights() if name.endswith("e_score_correction_bias")]
    return {"loss": stats.loss, "grad_norm": stats.grad_norm, "biases": torch.stack(biases).tolist() if biases else []}


def main() -> None:
    """Run every case; a case that raises is reported with its message."""
    rank, world_size, port, cases, results = sys.argv[1:]
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", int(port), int(world_size), is_master=int(rank) == 0)
    dist.init_process_group(
        "gloo", store=store, rank=int(rank), world_size=int(world_size), timeout=timedelta(seconds=patient(120))
    )
    found = {case["name"]: train(case) for case in json.loads(cases)["train"]}
    updates = {
        name: one_update(model["stage"], build_model(**model, world_size=int(world_size)))
        for name, model in json.loads(cases)["one_update"].items()
    }
    rounds = {
        name: play_rounds(sizes, owners, Path(f"{results}.{number}"), int(world_size))
        for number, (name, (sizes, owners)) in enumerate(json.loads(cases)["rounds"].items())
    }
    check_temperatures(dist.group.WORLD)
    check_parts_of_a_batch()
    if int(rank) == int(world_size) - 1:
        found["rounds"] = rounds
        Path(results).write_text(json.dumps(found))
        torch.save(updates, Path(results).with_suffix(".pt"))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
