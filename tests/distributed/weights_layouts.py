"""Load a Hugging Face folder into a model under several layouts and gather it again. Started by test_weights_layouts.py.

Arguments: rank, world size, a file for the rendezvous, a JSON list of folders, a JSON list of parallel sizes, the result file.
"""

from __future__ import annotations

import itertools
import json
import sys
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_r1.config.schema import MoeTrainingConfig, ParallelConfig, RuntimeConfig
from megatron_r1.errors import ConversionError
from megatron_r1.mcore import host
from megatron_r1.weights.gather import gather_weights
from megatron_r1.weights.hf import HfFolder
from megatron_r1.weights.load import load_weights

host.activate("cpu")

from megatron_r1.mcore import parallel, provider


def round_trip(folder: Path, sizes: dict[str, int]) -> list[str]:
    """What is wrong on this rank after loading and gathering: nothing, if all is well."""
    source = HfFolder(folder)
    arch = source.architecture()
    mtp = arch.num_nextn_predict_layers > 0
    layout = parallel.resolve_layout(ParallelConfig(**sizes), arch, dist.get_world_size(), mtp=mtp, packed=False)
    parallel.initialize(layout, seed=1)
    moe = MoeTrainingConfig(bias_update_rate=1e-3, mtp_loss_scale=0.3 if mtp else 0.0)
    modules = provider.build_model(arch, layout, RuntimeConfig(), moe, seed=7)
    groups = parallel.groups()
    load_weights(modules, arch, folder, groups)
    names, wrong = [], []
    for name, tensor in gather_weights(modules, arch, groups):
        names.append(name)
        if not torch.equal(tensor, source.read(name)):
            wrong.append(name)
    if sorted(names) != sorted(source.files):
        wrong.append("the names are not the folder's")
    return wrong + surplus_is_refused_everywhere(modules, arch, groups)


def surplus_is_refused_everywhere(modules: list, arch: object, groups: object) -> list[str]:
    """A tensor that the table lacks, on the last rank only, must stop every rank instead of hanging the others."""
    if dist.get_rank() == dist.get_world_size() - 1:
        modules[-1].register_parameter("surplus", torch.nn.Parameter(torch.zeros(3)))
    try:
        list(gather_weights(modules, arch, groups))
    except ConversionError as error:
        return [] if "surplus" in str(error) else [str(error)]
    return ["surplus was not noticed"]


def main() -> None:
    """Run every case and collect what any rank found."""
    rank, world_size, rendezvous, folders, cases, results = sys.argv[1:]
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    store = dist.FileStore(rendezvous, int(world_size))
    dist.init_process_group("gloo", store=store, rank=int(rank), world_size=int(world_size), timeout=timedelta(seconds=120))
    found = {}
    for folder, sizes in itertools.product(json.loads(folders), json.loads(cases)):
        everywhere: list[list[str]] = [[] for _ in range(int(world_size))]
        dist.all_gather_object(everywhere, round_trip(Path(folder), sizes))
        found[f"{Path(folder).name} {sizes}"] = sorted({problem for problems in everywhere for problem in problems})
    if int(rank) == 0:
        Path(results).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
