"""Real vLLM on two nodes, played by processes of this machine: beside the ranks, and behind a server on each."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_r1.rollout.channel.announcements import find_servers
from megatron_r1.rollout.vllm_client import VllmProcessEngine
from megatron_r1.runtime.launch import child_environment
from tests.pipeline.engine_cases import SAMPLING, difference_to_transformers, prompts, sampled, spread_case
from tests.random_weights import random_source, write_random_model
from tests.ranks import ROOT, run_ranks


@pytest.fixture(scope="module")
def beside_ranks(tmp_path_factory):
    """What the ranks of spread_ranks.py sampled: first, and with the same seed after a part of the engine was killed in it."""
    folder = tmp_path_factory.mktemp("spread")
    output = run_ranks(Path(__file__).with_name("spread_ranks.py"), 2, folder, timeout=400)[0]
    assert output.count("starting another one") == 1, output
    return pickle.loads((folder / "sampled.pickle").read_bytes())


def test_weights_and_logprobs_are_those_of_transformers(beside_ranks, tmp_path):
    arch, _ = spread_case()
    difference = difference_to_transformers(write_random_model(tmp_path / "model", arch), beside_ranks[0], 1.0)
    assert difference.mean() < 1e-5 and difference.max() < 1e-3


def test_a_node_that_dies_costs_no_group_and_doubles_none(beside_ranks):
    before, after = beside_ranks
    assert [group.prompt.id for group in after] == [group.prompt.id for group in before]
    assert [tokens for tokens, _ in sampled(after)] == [tokens for tokens, _ in sampled(before)]


def test_servers_of_two_nodes_hold_one_engine(beside_ranks, tmp_path):
    arch, options = spread_case()
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "SLURM_NTASKS": "2", "SLURM_JOB_ID": "1", "SLURM_STEP_ID": "0"}
    environment |= {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_LOCALID": "0"}
    command = [sys.executable, "-m", "megatron_r1.cli", "serve-rollouts", "--announce", str(tmp_path), "--address", "127.0.0.1"]
    servers = [subprocess.Popen(command, env=child_environment(environment | {"SLURM_PROCID": str(number)})) for number in range(2)]
    try:
        found = find_servers(tmp_path, 60)
        engine = VllmProcessEngine(options, str, child_environment(), tmp_path / "unused.log", servers=found)
        engine.load_weights(random_source(arch, 0), version=1)
        groups = engine.generate(prompts(arch, 8), SAMPLING, seed=1)
        engine.close()
    finally:
        for server in servers:
            server.terminate()
        codes = [server.wait(30) for server in servers]
    assert codes == [0, 0]
    assert sampled(groups) == sampled(beside_ranks[0])
