"""One of two ranks with a part of an engine each: `spread_ranks.py RANK 2 FOLDER`. Rank 0 writes what was sampled into FOLDER."""

from __future__ import annotations

import os
import pickle
import signal
import sys
from pathlib import Path

import torch.distributed as dist

from megatron_r1.rollout.collective import CollectiveEngine
from megatron_r1.rollout.multi_node import FollowingPart
from megatron_r1.rollout.vllm_client import VllmProcessEngine
from megatron_r1.runtime.distributed import gather_objects
from megatron_r1.runtime.launch import child_environment
from megatron_r1.runtime.peers import find_peers
from tests.pipeline.engine_cases import SAMPLING, prompts, spread_case
from tests.random_weights import random_source, random_weights

rank, world_size, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), world_size), rank=rank, world_size=world_size)
ARCH, options = spread_case()
peers = find_peers((0, 1), "127.0.0.1")
log = folder / f"engine_{rank}.log"
started = []


def start() -> VllmProcessEngine | FollowingPart:
    if rank:
        started.append(FollowingPart(options, child_environment(), log, 1, peers))
    else:
        started.append(VllmProcessEngine(options, str, child_environment(), log, peers=peers))
    return started[-1]


engine = CollectiveEngine(start, restarts=2, peers=peers)
report = engine.load_weights(random_source(ARCH, 0), 1)
draft = [name for name, _ in random_weights(ARCH, 0) if name.startswith("model.layers.3.")]
assert report.num_verified == sum(1 for _ in random_weights(ARCH, 0)) - len(draft) and draft
groups = engine.generate(prompts(ARCH, 8), SAMPLING, seed=1)

if rank:  # the part that follows dies; its head finds out as it samples
    os.killpg(started[-1]._channel.pid, signal.SIGKILL)
gather_objects(None)
again = engine.generate(prompts(ARCH, 8), SAMPLING, seed=1)
assert len(started) == 2, "both ranks start anew"
if rank == 0:
    (folder / "sampled.pickle").write_bytes(pickle.dumps((groups, again)))
engine.close()
dist.barrier()
dist.destroy_process_group()
