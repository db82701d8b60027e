"""Load Hugging Face folders under several layouts, compute logits and gather the weights again. Started by weights_runs.py.

Arguments: rank, world size, a file for the rendezvous, a JSON list of cases (folder, dtype, parallel sizes), the result file.
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
from megatron_r1.errors import ConversionError, ReplicasDiffer
from megatron_r1.mcore import host
from megatron_r1.model.architecture import Architecture
from megatron_r1.rollout.sync.transfer import WeightTransfer
from megatron_r1.weights.gather import gather_weights
from megatron_r1.weights.hf import HfFolder
from megatron_r1.weights.load import load_weights
from megatron_r1.weights.local_weights import local_weights
from megatron_r1.weights.trainer_shards import TrainerShards
from tests.engine_layouts import MemoryEngine, engine_boxes
from tests.random_weights import random_ids

host.activate("cpu")

from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_r1.mcore import parallel, provider
from megatron_r1.mcore.replicas import check_replicas, checksums, shared_parts
from tests.patience import patient


def build(folder: Path, dtype: str, sizes: dict[str, int]) -> tuple[list[provider.R1GPTModel], Architecture, parallel.Layout]:
    """The model of a folder, loaded, its architecture and its layout."""
    arch = HfFolder(folder).architecture()
    mtp = arch.mtp_depth > 0
    layout = parallel.resolve_layout(ParallelConfig(**sizes), arch, dist.get_world_size(), mtp=mtp)
    parallel.build_process_groups(layout, seed=1)
    moe = MoeTrainingConfig(bias_update_rate=1e-3, mtp_loss_scale=0.3 if mtp else 0.0)
    modules = provider.build_model(arch, layout, RuntimeConfig(dtype=dtype), moe, seed=7)
    load_weights(modules, arch, folder, parallel.groups())
    return modules, arch, layout


def round_trip(folder: Path, modules: list[provider.R1GPTModel], arch: Architecture) -> list[str]:
    """What is wrong on this rank with the gathered weights: nothing, if all is well."""
    source, groups = HfFolder(folder), parallel.groups()
    names, wrong = [], []
    for name, tensor in gather_weights(modules, arch, groups):
        names.append(name)
        expected = source.read(name)
        if tensor.dtype != expected.dtype or not torch.equal(tensor, expected):
            wrong.append(name)
    if sorted(names) != sorted(source.files):
        wrong.append("the names are not the folder's")
    wrong += engines_are_fed(modules, arch, groups, source)
    return wrong + surplus_is_refused_everywhere(modules, arch, groups)


def engines_are_fed(modules: list, arch: Architecture, groups: object, source: HfFolder) -> list[str]:
    """Engines of one and two workers beside the first and the last rank get exactly what they hold, twice by one plan."""
    transfer, shards = WeightTransfer(), TrainerShards(modules, arch, groups)
    last = dist.get_world_size() - 1
    layouts = {0: {"tp": 2}, last: {"dp": 2, "expert_parallel": arch.experts is not None}}
    mine = layouts.get(dist.get_rank())
    engine = None if mine is None else MemoryEngine(engine_boxes(arch, **mine), source.dtype)
    wrong = []
    for _ in range(2):
        if engine is None:
            transfer.give(shards)
            continue
        transfer.send(shards, engine)
        wrong += engine.problems(source.read)
        for held in engine.held:
            for tensor in held.values():
                tensor.zero_()
    if engine is not None and engine.plans != 1:
        wrong.append("the plan was made again")
    return wrong


def all_logits(modules: list[provider.R1GPTModel], ids: torch.Tensor, vocab_size: int) -> torch.Tensor | None:
    """[1 + depth, b, t, vocabulary]: the main model's and every multi-token prediction's; None before the last stage."""
    found: list[torch.Tensor] = []
    last = modules[-1]
    if last.post_process:  # copied, because the cross entropy works in place
        last.output_layer.register_forward_hook(lambda module, inputs, output: found.append(output[0].detach().clone()))

    def forward(batches: Iterator[torch.Tensor], model: torch.nn.Module):
        tokens = next(batches)
        positions = torch.arange(tokens.shape[1]).expand_as(tokens).contiguous()
        # Labels and a backward pass, because multi-token prediction is only run for its loss.
        nll = model(tokens, positions, None, labels=tokens)
        return nll, lambda nll: (nll.sum(), torch.tensor(nll.numel(), dtype=torch.int), {})

    rows = ids.split(1)  # as many micro-batches as an interleaved schedule needs
    iterators = [iter(rows) for _ in modules]
    get_forward_backward_func()(
        forward_step_func=forward, data_iterator=iterators if len(modules) > 1 else iterators[0],
        model=modules if len(modules) > 1 else modules[0], num_microbatches=len(rows), seq_length=ids.shape[1],
        micro_batch_size=1, forward_only=False,
    )  # fmt: skip
    if not found:
        return None
    logits = torch.stack(found).squeeze(2).unflatten(0, (len(rows), -1))  # [b, depths then main, t, vocabulary / tp]
    logits = logits.roll(1, 1).transpose(0, 1).contiguous()
    group = parallel.groups().tp
    parts = [torch.empty_like(logits) for _ in range(group.size())]
    dist.all_gather(parts, logits, group=group)
    return torch.cat(parts, -1)[..., :vocab_size]


def surplus_is_refused_everywhere(modules: list, arch: object, groups: object) -> list[str]:
    """A tensor that the table lacks, on the last rank only, must stop every rank instead of hanging the others."""
    if dist.get_rank() == dist.get_world_size() - 1:
        modules[-1].register_parameter("surplus", torch.nn.Parameter(torch.zeros(3)))
    try:
        list(gather_weights(modules, arch, groups))
    except ConversionError as error:
        return [] if "surplus" in str(error) else [str(error)]
    return ["surplus was not noticed"]


def copies_are_compared(modules: list, arch: Architecture, layout: parallel.Layout) -> list[str]:
    """A weight of every kind, broken on the last rank that holds a copy, must stop every rank with a line that names both."""
    groups = parallel.groups()
    check_replicas(modules, arch, layout, groups)
    local, parts = local_weights(modules, arch, groups), shared_parts(arch, layout)
    of_ranks: list[dict[int, list[int]]] = [{}] * dist.get_world_size()
    dist.all_gather_object(of_ranks, checksums(local, parts, groups))
    places = [i for i, count in parts.items() for _ in range(count)]
    kinds = {}
    for place, i in enumerate(places):
        holders = [rank for rank, held in enumerate(of_ranks) if place in held]
        if len(holders) > 1:
            kinds.setdefault((local.entries[i].split, local.entries[i].expert is None), (i, holders))
    wrong = []
    for i, holders in kinds.values():
        own = local.tensors[i][-1].view(-1)[:1] if dist.get_rank() == holders[-1] else torch.zeros(1)
        before = own.clone()
        own += 1
        try:
            check_replicas(modules, arch, layout, groups)
            wrong.append(f"{local.entries[i].name} is another on rank {holders[-1]}, and was not noticed")
        except ReplicasDiffer as error:
            expected = (f"differ: {local.entries[i].name} (rank", f"rank {holders[-1]})")
            wrong += [] if all(text in str(error) for text in expected) else [str(error)]
        own.copy_(before)
    return wrong


def main() -> None:
    """Run every case and collect what any rank found; the last rank has the logits."""
    rank, world_size, rendezvous, cases, results = sys.argv[1:]
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    store = dist.FileStore(rendezvous, int(world_size))
    dist.init_process_group(
        "gloo", store=store, rank=int(rank), world_size=int(world_size), timeout=timedelta(seconds=patient(120))
    )
    problems, logits = {}, {}
    for folder, dtype, sizes in json.loads(cases):
        modules, arch, layout = build(Path(folder), dtype, sizes)
        case = f"{Path(folder).name} {dtype} {sizes}"
        if dtype == "fp32":
            logits[case] = all_logits(modules, random_ids(arch), arch.vocab_size)
        everywhere: list[list[str]] = [[] for _ in range(int(world_size))]
        found = copies_are_compared(modules, arch, layout) if dtype == "fp32" else []
        dist.all_gather_object(everywhere, found + round_trip(Path(folder), modules, arch))
        problems[case] = sorted({problem for found in everywhere for problem in found})
    if int(rank) == int(world_size) - 1:
        torch.save((problems, logits), results)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
