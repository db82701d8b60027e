"""One rank of the checks of log-probs by tiles: `fused_head.py RANK WORLD_SIZE FOLDER torch|triton`."""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from pathlib import Path

if sys.argv[4] == "triton":
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton sees the kernels

import torch
import torch.distributed as dist

from tests.head_cases import ROWS, check_head, use_small_tiles


def main() -> None:
    """Run the checks."""
    rank, world_size, folder, kind = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
    store = dist.FileStore(str(folder / "store"), world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=300))
    use_small_tiles()
    if kind == "triton":
        from megatron_r1.mcore import logits_triton

        logits_triton._COLUMNS = 64
        dtypes = (torch.float32, torch.bfloat16)
        check_head(dist.group.WORLD, tiles=logits_triton.TritonTiles, dtypes=dtypes, temperatures=(0.7,), slopes=(1.0,))
    else:
        check_head(dist.group.WORLD)
        # The last rank has padding alone.
        check_head(dist.group.WORLD, vocabulary=ROWS // 2 - 1)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
