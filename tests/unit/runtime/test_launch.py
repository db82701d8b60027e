"""What each launcher sets, what contradicts itself, and one real meeting of ranks under each launcher that is here."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from megatron_r1.config.load import load_config
from megatron_r1.errors import ConfigError, DeviceError
from megatron_r1.pipeline.builders.rewards import open_scoring
from megatron_r1.rewards.scorers import scorer_specs
from megatron_r1.runtime.device import resolve_device
from megatron_r1.runtime.launch import (
    LaunchInfo,
    child_environment,
    first_host,
    launched_rank,
    read_launch,
    read_ranks,
    visible_gpus,
)
from tests.paths import ROOT
from tests.patience import patient

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "x",
}
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_NAMESPACE": "1807876097",
}
SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "7",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_ID": "0",
    "SLURM_JOB_NODELIST": "gpu[07-08],gpu12",
    "SLURM_STEP_TASKS_PER_NODE": "4,3",
}


HYDRA = {
    "PMI_RANK": "3",
    "PMI_SIZE": "4",
    "MPI_LOCALRANKID": "1",
    "MPI_LOCALNRANKS": "2",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29500",
}


def test_each_launcher_is_read():
    assert read_launch(HYDRA) == LaunchInfo(3, 4, 1, 2, "node1", 29500, "hydra")
    assert read_launch(SLURM | HYDRA | {"PMI_RANK": "5"}).launcher == "slurm", "srun --mpi=pmi2 sets both"
    assert read_launch(TORCHRUN) == LaunchInfo(3, 4, 1, 2, "node1", 29500, "torchrun")
    slurm = read_launch(SLURM)
    assert slurm == LaunchInfo(5, 7, 1, 3, "gpu07", slurm.master_port, "slurm")
    openmpi = read_launch(OPENMPI)
    assert openmpi == LaunchInfo(1, 2, 1, 2, "127.0.0.1", openmpi.master_port, "openmpi")


def test_a_single_process_gets_a_port_that_is_free():
    launch = read_launch({})
    assert (launch.rank, launch.world_size, launch.launcher) == (0, 1, "single")
    with socket.socket() as probe:
        probe.bind((launch.master_address, launch.master_port))


def test_a_launcher_inside_another_wins():
    assert read_launch(SLURM | TORCHRUN).launcher == "torchrun"
    assert read_launch(SLURM | OPENMPI).launcher == "openmpi"
    assert read_launch({name: value for name, value in SLURM.items() if name != "SLURM_PROCID"}).launcher == "single"


def test_ranks_agree_on_a_port_and_jobs_and_steps_differ():
    port = read_launch(SLURM).master_port
    assert read_launch(SLURM | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}).master_port == port
    assert read_launch(SLURM | {"SLURM_JOB_ID": "123457"}).master_port != port
    assert read_launch(SLURM | {"SLURM_STEP_ID": "1"}).master_port != port
    assert read_launch(SLURM | {"SLURM_RESTART_COUNT": "1"}).master_port != port
    assert read_launch(SLURM | {"MASTER_PORT": "1234", "MASTER_ADDR": "head"}).master_port == 1234
    other = read_launch(OPENMPI | {"PMIX_NAMESPACE": "1807876098"}).master_port
    assert other != read_launch(OPENMPI).master_port


def test_tasks_of_a_node_are_read_from_slurms_short_form():
    spread = SLURM | {"SLURM_NTASKS": "11", "SLURM_STEP_TASKS_PER_NODE": "4(x2),3", "SLURM_PROCID": "9"}
    assert [read_launch(spread | {"SLURM_NODEID": str(node)}).local_world_size for node in range(3)] == [4, 4, 3]


@pytest.mark.parametrize(
    ("node_list", "host"),
    [
        ("node1", "node1"),
        ("a,b[1-2]", "a"),
        ("node[03-05,9],other", "node03"),
        ("rack[1-2]n[3-4]", "rack1n3"),
        ("n[7,9]-ib", "n7-ib"),
    ],
)
def test_first_host(node_list, host):
    assert first_host(node_list) == host


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"RANK": "0"}, "RANK is set but WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT is not"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is set but RANK"),
        ({"OMPI_COMM_WORLD_RANK": "0"}, "OMPI_COMM_WORLD_SIZE"),
        ({"SLURM_PROCID": "0"}, "SLURM_NTASKS"),
        (SLURM | {"WORLD_SIZE": "8"}, "WORLD_SIZE=8 contradicts SLURM_NTASKS=7: unset WORLD_SIZE"),
        (SLURM | {"WORLD_SIZE": "8", "SLURM_STEP_NUM_TASKS": "7"}, "contradicts SLURM_STEP_NUM_TASKS=7"),
        (OPENMPI | {"WORLD_SIZE": "x"}, "WORLD_SIZE=x contradicts OMPI_COMM_WORLD_SIZE=2"),
        ({"LOCAL_RANK": "0"}, "LOCAL_RANK is set but RANK"),
        ({"PMI_RANK": "0"}, "PMI_SIZE"),
        ({k: v for k, v in HYDRA.items() if k != "MASTER_PORT"}, "MASTER_PORT=<free port>"),
        (TORCHRUN | {"RANK": "4"}, "rank 4 in a world of 4"),
        (TORCHRUN | {"RANK": "-1"}, "RANK is '-1'"),
        (TORCHRUN | {"LOCAL_RANK": "2"}, "local rank 2 among 2"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "8"}, "8 local processes in a world of 4"),
        (TORCHRUN | {"MASTER_PORT": "70000"}, "port 70000"),
        (TORCHRUN | {"MASTER_PORT": "http"}, "MASTER_PORT is 'http'"),
        (SLURM | {k: v for k, v in TORCHRUN.items() if k != "TORCHELASTIC_RUN_ID"}, "RANK=3 contradicts SLURM_PROCID=5"),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "four"}, "not of the form"),
        (SLURM | {"SLURM_NODEID": "2"}, "SLURM_NODEID=2 is not among the 2 nodes"),
        ({k: v for k, v in SLURM.items() if k != "SLURM_STEP_ID"}, "without srun"),
        ({k: v for k, v in SLURM.items() if k != "SLURM_JOB_NODELIST"}, "SLURM_JOB_NODELIST"),
        (OPENMPI | {"OMPI_COMM_WORLD_SIZE": "4"}, "MASTER_ADDR"),
        ({k: v for k, v in OPENMPI.items() if k != "PMIX_NAMESPACE"}, "MASTER_PORT"),
    ],
)
def test_half_set_and_contradictory_variables_are_refused(environment, says):
    with pytest.raises(ConfigError) as caught:
        read_launch(environment)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


SCRIPT = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "SLURM_TASKS_PER_NODE": "1"}
POD = {
    "RANK": "2",
    "WORLD_SIZE": "4",
    "MASTER_ADDR": "job-master-0",
    "MASTER_PORT": "23456",
    "KUBERNETES_SERVICE_HOST": "10.0.0.1",
    "PET_NNODES": "4",
}


def test_a_batch_script_that_asked_for_no_number_of_tasks_is_one_process():
    found = read_launch(SCRIPT)
    assert (found.rank, found.world_size, found.launcher) == (0, 1, "single")
    assert read_launch(SCRIPT | {"SLURM_NTASKS": "1"}).launcher == "slurm"
    with pytest.raises(ConfigError, match="without srun"):
        read_launch(SCRIPT | {"SLURM_NTASKS": "2"})


@pytest.mark.parametrize(
    "left", [{"WORLD_SIZE": "7"}, {"LOCAL_RANK": "1"}, {"LOCAL_RANK": "0", "WORLD_SIZE": "7", "LOCAL_WORLD_SIZE": "4"}]
)
def test_what_a_script_exports_beside_srun_and_mpirun_means_nothing(left):
    assert read_launch(SLURM | left) == read_launch(SLURM)
    counts = {"WORLD_SIZE": "2"} if "WORLD_SIZE" in left else {}
    assert read_launch(OPENMPI | left | counts) == read_launch(OPENMPI)
    counts = {"WORLD_SIZE": "4"} if "WORLD_SIZE" in left else {}
    assert read_launch(HYDRA | left | counts) == read_launch(HYDRA)


def test_a_pod_of_kubeflow_has_one_process():
    assert read_launch(POD) == LaunchInfo(2, 4, 0, 1, "job-master-0", 23456, "torchrun")
    assert read_launch(POD | {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}).local_rank == 1, "torchrun in the pod"
    with pytest.raises(ConfigError, match="RANK is set but LOCAL_RANK, LOCAL_WORLD_SIZE is not"):
        read_launch({name: value for name, value in POD.items() if name != "KUBERNETES_SERVICE_HOST"})


def test_files_of_the_users_folder_do_not_shadow_modules_in_children(tmp_path, monkeypatch):
    for name in ("random", "email", "json", "inspect"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('shadowed')")
    (tmp_path / "mine.py").write_text("def score(prompt, response, reference, cut):\n    return 1.0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    rewards = load_config(None, ["reward.custom=[{name: mine, function: 'mine:score'}]"]).reward
    with open_scoring(rewards.model_copy(update={"workers": 1}), scorer_specs(rewards, ["mine"], "r1_zero")):
        pass  # its worker has started, and has found the user's own function


def test_a_child_finds_the_package_that_was_found_in_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    assert child_environment()["PYTHONPATH"] == str(ROOT)
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    assert child_environment()["PYTHONPATH"] == os.pathsep.join([str(ROOT), "/elsewhere"])
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert child_environment()["PYTHONPATH"] == str(ROOT)
    monkeypatch.chdir(tmp_path)
    assert child_environment()["PYTHONPATH"] == str(ROOT) and child_environment()["PYTHONSAFEPATH"] == "1"


def test_an_engine_is_shown_its_part_of_the_gpus():
    shown = {"CUDA_VISIBLE_DEVICES": "4,5,6,7"}
    assert visible_gpus(2, 2, shown) == {"CUDA_VISIBLE_DEVICES": "6,7"}
    assert visible_gpus(2, 2, {}) == {"CUDA_VISIBLE_DEVICES": "2,3"}
    with pytest.raises(ConfigError, match="needs GPUs 4 to 7 of this node"):
        visible_gpus(4, 4, shown)


def test_launched_rank_never_fails():
    assert [launched_rank(e) for e in (TORCHRUN, OPENMPI, SLURM, {}, {"RANK": "x"})] == [3, 1, 5, 0, 0]


def test_a_process_whose_launch_cannot_be_read_speaks_itself():
    """RANK=1 left in a shell ended every command in silence: it waited for a rank 0 that did not exist."""
    half = [{"RANK": "1"}, {"SLURM_PROCID": "3"}, {"PMI_RANK": "2"}, {"OMPI_COMM_WORLD_RANK": "1"}, {**TORCHRUN, "RANK": "99"}]
    assert [launched_rank(e) for e in half] == [0] * len(half)


def test_a_child_inherits_nothing_of_the_launcher(monkeypatch):
    for name, value in (TORCHRUN | OPENMPI | SLURM | {"PMI_RANK": "1", "GROUP_RANK": "0"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("KEPT", "yes")
    child = child_environment({"EXTRA": "1", "MASTER_PORT": "7"})
    assert child["KEPT"] == "yes"
    assert child["EXTRA"] == "1"
    assert child["MASTER_PORT"] == "7", "what is asked for is there"
    assert child["PATH"] == os.environ["PATH"]
    gone = (TORCHRUN | OPENMPI | SLURM).keys() - {"MASTER_PORT"} | {"PMI_RANK", "GROUP_RANK"}
    assert not gone & child.keys()


def test_device_choice_without_cuda():
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    device = resolve_device("auto")
    assert (device.kind, device.backend) == ("cpu", "gloo")
    with pytest.raises(DeviceError, match="runtime.device is 'cuda' but this torch is built without CUDA"):
        resolve_device("cuda")


WORKER = """
    import json, os, sys, time
    from megatron_r1.errors import DataError, R1Error
    from megatron_r1.runtime import distributed, waiting
    from megatron_r1.runtime.open_files import needed_file_descriptors
    from megatron_r1.runtime.peers import find_peers
    from megatron_r1.runtime.device import resolve_device
    from megatron_r1.runtime.launch import read_launch

    launch = read_launch()
    distributed.join_process_group(launch, resolve_device("cpu"), timeout_seconds=600)
    rank = distributed.rank()
    assert distributed.broadcast_object({"from": rank}) == {"from": 0}
    assert distributed.gather_objects(rank) == list(range(launch.world_size))

    def errors(rank_that_fails):
        try:
            with distributed.failing_together():
                if rank == rank_that_fails:
                    raise DataError(f"rank {rank} failed")
        except R1Error as error:
            return str(error)

    def fail():
        raise DataError("file is empty")

    seen = [errors(0), errors(launch.world_size - 1)]
    try:
        distributed.on_rank_zero(fail)
    except DataError as error:
        seen.append(str(error))
    if launch.world_size == 4:  # ranks 0 and 2 hold one thing together, on what may be two nodes; 1 and 3 have no part in it
        before = len(os.listdir("/proc/self/fd"))
        peers = find_peers((0, 2) if rank % 2 == 0 else (), "127.0.0.1")
        opened = len(os.listdir("/proc/self/fd")) - before
        sizes = [2] if peers else []
        assert opened <= needed_file_descriptors(4, sizes) - needed_file_descriptors(4), opened
        assert (peers and (peers.ranks, peers.gather(rank), peers.number)) == (((0, 2), [0, 2], rank // 2) if peers else None)
        assert (peers is None) == (rank % 2 == 1)
        waiting.open_waiting_place(distributed._STORE, 4, silence=SILENCE)
        until = time.monotonic() + 1.5 * SILENCE
        with distributed.failing_together(is_long=True):
            while rank == 2 and time.monotonic() < until:  # longer than the others wait for a sign
                waiting.give_sign()
                time.sleep(SILENCE / 50)
    claims = distributed.gather_objects(distributed.claim_error_line())
    distributed.barrier()
    distributed.shutdown()
    if rank == 0:
        print(json.dumps([launch.launcher, launch.world_size, seen, sum(claims)]))
"""


def meet(tmp_path: Path, launcher: list[str]) -> str:
    script = tmp_path / "worker.py"
    script.write_text(textwrap.dedent(WORKER).replace("SILENCE", str(patient(1.0))))
    environment = child_environment({"OMP_NUM_THREADS": "1"})
    done = subprocess.run(
        [*launcher, str(script)], env=environment, capture_output=True, text=True, timeout=patient(120), check=False
    )
    assert done.returncode == 0, done.stderr
    return next(line for line in done.stdout.splitlines() if line.startswith("["))


def test_one_process_is_a_group_too(tmp_path):
    line = meet(tmp_path, [sys.executable])
    assert line == '["single", 1, ["rank 0 failed", "rank 0 failed", "file is empty"], 1]'


@pytest.mark.slow
def test_torchrun_ranks_meet_and_fail_together(tmp_path):
    line = meet(tmp_path, [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"])
    assert line == '["torchrun", 4, ["rank 0 failed", "rank 3 failed", "file is empty"], 1]'


def test_who_meets_over_mpi_is_told_the_ranks_without_starting_mpi():
    hydra = {"PMI_RANK": "1", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
    names = ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
    openmpi = {f"OMPI_COMM_WORLD_{name}": value for name, value in zip(names, ("3", "4", "1", "2"))}
    for environment, rank in ((hydra, 1), (openmpi, 3)):
        found = read_ranks(environment)
        assert (found.rank, found.world_size) == (rank, 4)
        with pytest.raises(ConfigError, match="MASTER_ADDR"):
            read_launch(environment)
    assert read_ranks({}).world_size == 1


@pytest.mark.skipif(shutil.which("mpirun") is None, reason="needs mpirun (Debian package openmpi-bin)")
@pytest.mark.slow
def test_mpirun_ranks_meet_and_fail_together(tmp_path):
    line = meet(tmp_path, ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "2", sys.executable])
    assert line == '["openmpi", 2, ["rank 0 failed", "rank 1 failed", "file is empty"], 1]'


@pytest.mark.skipif(shutil.which("mpirun") is None, reason="needs mpirun (Debian package openmpi-bin)")
@pytest.mark.slow
def test_ranks_of_mpirun_on_two_machines_learn_from_mpi_where_to_meet(tmp_path):
    """Two machines, as far as their variables say."""
    pytest.importorskip("mpi4py")
    machine = ["env", "OMPI_COMM_WORLD_LOCAL_SIZE=1", "OMPI_COMM_WORLD_LOCAL_RANK=0", sys.executable]
    line = meet(tmp_path, ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "2", *machine])
    assert line == '["openmpi", 2, ["rank 0 failed", "rank 1 failed", "file is empty"], 1]'
