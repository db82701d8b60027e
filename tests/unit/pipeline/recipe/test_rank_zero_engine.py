"""Rank 0 drives the engines of all ranks: every group is told once, and an error ends the work on every rank alike."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ranks import run_ranks

pytestmark = pytest.mark.slow
SCRIPT = """
import sys
from contextlib import contextmanager
import torch.distributed as dist
from megatron_r1.errors import DataError, EngineLost
from megatron_r1.pipeline.recipe import rank_zero_engine as driving
from megatron_r1.rollout.collective import CollectiveEngine
from megatron_r1.runtime import distributed
from megatron_r1.types import Prompt, Rollout, RolloutGroup
from megatron_r1.weights.shard_plan import StoredWeights

rank, world_size = int(sys.argv[1]), int(sys.argv[2])
distributed._STORE = dist.FileStore(sys.argv[3], world_size)
dist.init_process_group("gloo", store=distributed._STORE, rank=rank, world_size=world_size)
opened = []
deaths = [1] if rank == 1 else []  # groups after which the engine of rank 1 dies, once

class Engine:
    def load_weights(self, weights, version, transfer):
        transfer.give(weights)
        return version

    def sample(self, prompts, sampling, seed, take, on_group):
        groups, is_last = {}, False
        while not is_last:
            taken = take(0)
            is_last = taken.is_last
            for position in taken.positions:
                if deaths and len(groups) == deaths[0]:
                    deaths.pop()
                    lost = EngineLost("died")
                    lost.finished = groups
                    raise lost
                groups[position] = RolloutGroup(prompts[position], [Rollout([seed, rank], [0.0, 0.0], "", True)], 0)
                if on_group is not None:
                    on_group(groups[position])
        return groups

    def close(self):
        pass

@contextmanager
def open_loaded(session, config, log):
    engine = CollectiveEngine(Engine if rank < 2 else None, restarts=1)
    opened.append(log)
    engine.load_weights(StoredWeights.of_tensors({}), 0)
    yield engine
    opened.append("closed")
    engine.close()

driving._open_loaded = open_loaded
prompts = [Prompt(f"p{i}", "", "", "", (1,)) for i in range(7)]

def work(open_engine):
    told = []
    with open_engine("zero", "log") as engine:
        for seed in (5, 6):
            engine.generate(prompts, None, seed, lambda group: told.append((group.prompt.id, group.rollouts[0].token_ids[0])))
    return sorted(told)

assert driving.with_engines(None, work) == sorted((f"p{i}", seed) for i in range(7) for seed in (5, 6))
assert opened == ["log", "closed"]

def refuse(group):
    raise DataError("the disk is full")

def failing_work(open_engine):
    with open_engine("zero", "log") as engine:
        engine.generate(prompts, None, 7, refuse)

def failing_early(open_engine):
    raise DataError("nothing is accepted")

for work, message in ((failing_work, "the disk is full"), (failing_early, "nothing is accepted")):
    try:
        driving.with_engines(None, work)
    except DataError as error:
        assert str(error) == message
    else:
        raise AssertionError("no error")
assert driving.with_engines(None, lambda _: 9) == 9
dist.destroy_process_group()
"""


def test_all_engines_sample_for_rank_0(tmp_path: Path) -> None:
    script = tmp_path / "driven.py"
    script.write_text(SCRIPT)
    run_ranks(script, 3, tmp_path / "store", timeout=120)
