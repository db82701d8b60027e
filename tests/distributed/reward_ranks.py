"""One rank of a reward model under every layout of two ranks, and of every stage with a token that breaks an update.

Started by test_reward_layouts.py.

reward_ranks.py RANK WORLD_SIZE RENDEZVOUS RESULTS
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.data_plane import play
from megatron_r1.mcore import host
from tests.nonfinite_cases import TWO_RANKS, check_faults, check_infinite_weight, check_stage
from tests.reward_cases import LAYOUTS, PLAYED, train_and_score


def main(rank: int, world_size: int, rendezvous: str, results: Path) -> None:
    """Every rank writes what it found: all must know everything."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    host.activate("cpu")
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size)
    found = {f"{model} {sizes}": train_and_score(model, sizes, world_size) for model, sizes in LAYOUTS}
    found["a played round"] = play(*PLAYED).figures
    results.with_suffix(f".{rank}").write_text(json.dumps(found))
    for number, case in enumerate(TWO_RANKS):
        check_stage(case, results.with_name(f"nonfinite{number}"), world_size, thorough=number == 0)
    check_infinite_weight("bf16", {"pp": 2}, results.with_name("infinite"), world_size)
    check_faults(world_size)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
