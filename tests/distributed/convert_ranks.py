"""One rank of a conversion: import, compare, load under layouts of two ranks, export. Rank 0 writes what it found wrong.

convert_ranks.py RANK WORLD_SIZE RENDEZVOUS HF_FOLDER OUT_FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_r1.config.model import ParallelConfig
from megatron_r1.config.optimizer import MoeTrainingConfig
from megatron_r1.config.runtime import RuntimeConfig
from megatron_r1.conversion.compare import compare_folders
from megatron_r1.conversion.export_hf import export_folder
from megatron_r1.conversion.import_hf import import_folder
from megatron_r1.mcore import host
from megatron_r1.weights.hf import HfFolder

LAYOUTS = ({"tp": 2}, {"pp": 2}, {"ep": 2})


def differing(policy_weights: object, source: HfFolder) -> list[str]:
    """Tensors that are not the folder's, bit for bit."""
    return [name for name, tensor in policy_weights if not torch.equal(tensor.to(source.dtype(name)), source.read(name))]


def load_under(sizes: dict[str, int], checkpoint: Path, source: HfFolder, world_size: int) -> list[str]:
    """What is wrong with the checkpoint's weights in a policy of this layout."""
    from megatron_r1.mcore import parallel
    from megatron_r1.mcore.checkpoint import load_policy_weights
    from megatron_r1.mcore.policy import MegatronPolicy

    arch = source.architecture()
    layout = parallel.resolve_layout(ParallelConfig(**sizes), arch, world_size, mtp=False)
    parallel.build_process_groups(layout, 0)
    policy = MegatronPolicy(
        arch, layout, RuntimeConfig(dtype="fp32"), MoeTrainingConfig(), optimizer=None, total_updates=1, seed=1,
        device=torch.device("cpu"), micro_batch_tokens=64,
    )  # fmt: skip
    load_policy_weights(policy, checkpoint)
    return [f"{sizes}: {name}" for name in differing(policy.weights(), source)]


def main(rank: int, world_size: int, rendezvous: str, hf: Path, out: Path) -> None:
    """See the module."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size)
    import_folder(hf, out / "m", ParallelConfig(tp=2, pp=2, ep=2, etp=1), None, 400_000)
    print(compare_folders(hf, out / "m"))
    export_folder(out / "m", out / "hf", None, 400_000)
    host.activate("cpu")
    problems = [problem for sizes in LAYOUTS for problem in load_under(sizes, out / "m", HfFolder(hf), world_size)]
    if rank == 0:
        (out / "problems.json").write_text(json.dumps(problems))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]), Path(sys.argv[5]))
