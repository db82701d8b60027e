"""How this process was started. The only module that reads or writes environment variables.

Five launchers are recognised by what they set: torchrun (`RANK`...), Open MPI's mpirun (`OMPI_COMM_WORLD_RANK`...), Slurm's
srun (`SLURM_PROCID`...), the mpiexec of MPICH and Intel MPI (`PMI_RANK`...) and none at all. torchrun wins over mpirun and mpirun
over srun, because the first of each pair is often started by the second; srun wins over PMI, which it also speaks.
"""

from __future__ import annotations

import os
import re
import socket
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from megatron_r1.errors import ConfigError

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
OPENMPI = tuple(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"))
HYDRA = ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
SLURM = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_JOB_ID")
LAUNCHER_VARIABLE = re.compile(
    r"(RANK|WORLD_SIZE|LOCAL_.*|GROUP_RANK|GROUP_WORLD_SIZE|ROLE_.*|MASTER_.*|TORCHELASTIC_.*|SLURM_.*|OMPI_.*|PMI.*|PRTE.*)"
)
JOB_FOLDER = "MEGATRON_R1_JOB"  # set by slurm/common.sh
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class LaunchInfo:
    """This process among its peers, and where they meet."""

    rank: int
    world_size: int
    local_rank: int  #: rank among the processes of this machine
    local_world_size: int
    master_address: str  #: host of rank 0
    master_port: int
    launcher: Literal["torchrun", "openmpi", "slurm", "hydra", "single"]


def read_launch(environment: Mapping[str, str] = os.environ) -> LaunchInfo:
    """Recognise the launcher from the environment.

    Raises ConfigError if the variables of a launcher are half set, are not numbers or contradict each other.
    """
    other = _other_launcher(environment)
    if "RANK" in environment or (other is None and ("WORLD_SIZE" in environment or "LOCAL_RANK" in environment)):
        launch = _read_torchrun(_with_pod(environment))
    elif "OMPI_COMM_WORLD_RANK" in environment:
        launch = _read_openmpi(environment)
    elif "SLURM_PROCID" in environment and not _is_lone_script(environment):
        launch = _read_slurm(environment)
    elif "PMI_RANK" in environment:
        launch = _read_hydra(environment)
    else:
        launch = LaunchInfo(0, 1, 0, 1, "127.0.0.1", free_port(), "single")
    _check_ranks(launch)
    return launch


def read_ranks(environment: Mapping[str, str] = os.environ) -> LaunchInfo:
    """`read_launch` for those who meet over MPI itself: it never asks MPI for a place, which would end it for this process.

    Raises ConfigError as `read_launch` does.
    """
    return read_launch({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", **environment})


def launched_rank(environment: Mapping[str, str] = os.environ) -> int:
    """The rank that the launcher gave, for callers that must not fail: rank 0 prints the error line.

    0, too, if the launch cannot be read: there may be no other rank that would say so.
    """
    try:
        return read_launch(environment).rank
    except ConfigError:
        return 0


def torchrun_holds_store(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether torchrun itself holds the store in which the ranks meet."""
    return environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def job_folder(environment: Mapping[str, str] = os.environ) -> Path | None:
    """The folder in which the batch script reads how its job went; None if there is no batch script."""
    return Path(environment[JOB_FOLDER]) if environment.get(JOB_FOLDER) else None


def terminal_has_styles(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a terminal shows dimmed text, and nobody asked for plain text (no-color.org)."""
    return environment.get("TERM", "dumb") != "dumb" and not environment.get("NO_COLOR")


def node_name(environment: Mapping[str, str] = os.environ) -> str:
    """This machine, as its scheduler calls it."""
    return environment.get("SLURMD_NODENAME") or socket.gethostname()


def visible_gpus(first: int, count: int, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Variables that show a process `count` of this machine's GPUs, from the `first` on.

    Raises ConfigError if there are fewer.
    """
    shown = environment.get("CUDA_VISIBLE_DEVICES")
    names = [str(number) for number in range(first + count)] if shown is None else [name for name in shown.split(",") if name]
    if first + count > len(names):
        raise ConfigError(
            f"an engine needs GPUs {first} to {first + count - 1} of this node, CUDA_VISIBLE_DEVICES={shown} shows fewer"
        )
    return {"CUDA_VISIBLE_DEVICES": ",".join(names[first : first + count])}


def set_environment(values: Mapping[str, str]) -> None:
    """Set variables of this process, for libraries that take a setting in no other way."""
    os.environ.update(values)


def use_mpi_abi(launch: LaunchInfo) -> None:
    """Let mpi4py load the MPI that started this process; it would take the first that it finds. Before mpi4py is imported."""
    abi = {"openmpi": "openmpi", "hydra": "mpich"}.get(launch.launcher)
    if abi is not None:
        os.environ.setdefault("MPI4PY_MPIABI", abi)


def child_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment for a process that is no rank of this job: without what a launcher set, and with `extra`."""
    inherited = {name: value for name, value in os.environ.items() if not LAUNCHER_VARIABLE.fullmatch(name)}
    return inherited | _safe_path() | dict(extra or {})


def _safe_path() -> dict[str, str]:
    """Variables with which files of the user's folder, such as a random.py, do not take the place of Python's own modules.

    Where this program itself was found in the current folder, that folder stays on the path.
    """
    known = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    here, package = os.getcwd(), str(Path(__file__).resolve().parents[2])
    if package == os.path.realpath(here) and package not in map(os.path.realpath, known):
        known.insert(0, package)
    return {"PYTHONSAFEPATH": "1"} | ({"PYTHONPATH": os.pathsep.join(known)} if known else {})


def configure_threads(threads: int) -> None:
    """Use `threads` OpenMP threads in this process and in its child processes."""
    _asked_threads()  # before it is overwritten
    set_environment({name: str(threads) for name in THREAD_VARIABLES})
    import torch  # not above: the command line's --help reads this module and must not wait for torch

    torch.set_num_threads(threads)


def requested_threads() -> int | None:
    """The number in OMP_NUM_THREADS as this process found it, of a list the first; None: it is not set.

    Raises ConfigError if it is no number of threads.
    """
    asked = _asked_threads()
    number = asked.partition(",")[0].strip()
    if number and not (number.isdecimal() and int(number)):
        raise ConfigError(f"OMP_NUM_THREADS={asked} is no number of threads: set one, or runtime.threads")
    return int(number) if number else None


@cache
def _asked_threads() -> str:
    return os.environ.get(THREAD_VARIABLES[0], "")


def first_host(node_list: str) -> str:
    """The first host of a Slurm node list: `node[03-05,9],other` gives `node03`."""
    first = re.match(r"(?:\[[^\]]*\]|[^,\[])*", node_list.strip())
    assert first is not None, "the pattern also matches nothing"
    return re.sub(r"\[([^\]]*)\]", lambda ranges: re.split("[,-]", ranges.group(1))[0], first.group())


def free_port(address: str = "127.0.0.1") -> int:
    """A port that is free at one of this machine's addresses; with "", at all its addresses."""
    with socket.socket() as probe:
        probe.bind((address, 0))
        return probe.getsockname()[1]


def address_towards(host: str) -> str:
    """The address of this machine from which it reaches a host, and so one under which that host's network knows it."""
    family, kind, _, _, target = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(target)  # sends nothing
        return probe.getsockname()[0]


def _other_launcher(environment: Mapping[str, str]) -> str | None:
    """The variable in which another launcher than torchrun tells the number of processes; None if none started this one.

    Batch scripts export WORLD_SIZE and LOCAL_RANK beside srun, and shells keep them: without RANK they mean nothing.
    """
    if "OMPI_COMM_WORLD_RANK" in environment:
        size = "OMPI_COMM_WORLD_SIZE"
    elif "SLURM_STEP_ID" in environment and "SLURM_PROCID" in environment:
        size = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environment else "SLURM_NTASKS"
    elif "PMI_RANK" in environment:
        size = "PMI_SIZE"
    else:
        return None
    counts = [environment.get(name) for name in ("WORLD_SIZE", size)]
    if "RANK" not in environment and None not in counts and counts[0] != counts[1]:
        raise ConfigError(f"WORLD_SIZE={counts[0]} contradicts {size}={counts[1]}: unset WORLD_SIZE")
    return size


def _with_pod(environment: Mapping[str, str]) -> Mapping[str, str]:
    """With the local ranks that Kubeflow's PyTorchJob leaves out: a pod that it gives a RANK has one process."""
    if "KUBERNETES_SERVICE_HOST" not in environment or "RANK" not in environment:
        return environment
    return {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", **environment}


def _is_lone_script(environment: Mapping[str, str]) -> bool:
    """Whether this is a batch script that asked for no number of tasks, so that Slurm has set none: one process."""
    is_script = "SLURM_JOB_ID" in environment and "SLURM_STEP_ID" not in environment
    return is_script and not {"SLURM_NTASKS", "SLURM_NPROCS"} & environment.keys()


def _read_torchrun(environment: Mapping[str, str]) -> LaunchInfo:
    _require_variables(environment, TORCHRUN, "torchrun")
    rank, world_size, local_rank, local_world_size = (_number(environment, name) for name in TORCHRUN[:4])
    by_hand = "TORCHELASTIC_RUN_ID" not in environment
    if by_hand and "SLURM_STEP_ID" in environment and _number(environment, "SLURM_PROCID") != rank and world_size > 1:
        raise ConfigError(f"RANK={rank} contradicts SLURM_PROCID={environment['SLURM_PROCID']}: unset one of the two")
    return LaunchInfo(
        rank, world_size, local_rank, local_world_size, environment["MASTER_ADDR"], _number(environment, "MASTER_PORT"), "torchrun"
    )


def _read_openmpi(environment: Mapping[str, str]) -> LaunchInfo:
    _require_variables(environment, OPENMPI, "mpirun")
    rank, world_size, local_rank, local_world_size = (_number(environment, name) for name in OPENMPI)
    if "MASTER_ADDR" not in environment and local_world_size < world_size:
        address, port = _meet_over_mpi(
            environment, world_size, "openmpi", "mpirun over several machines does not tell the host of rank 0"
        )
    elif "MASTER_PORT" in environment:
        address, port = environment.get("MASTER_ADDR", "127.0.0.1"), _number(environment, "MASTER_PORT")
    elif "PMIX_NAMESPACE" in environment:  # one name for all processes of this mpirun, another for the next
        address = environment.get("MASTER_ADDR", "127.0.0.1")
        port = _port_from(zlib.crc32(environment["PMIX_NAMESPACE"].encode()))
    else:
        address, port = _meet_over_mpi(environment, world_size, "openmpi", "mpirun has set no PMIX_NAMESPACE to choose a port from")
    return LaunchInfo(rank, world_size, local_rank, local_world_size, address, port, "openmpi")


def _read_hydra(environment: Mapping[str, str]) -> LaunchInfo:
    _require_variables(environment, HYDRA, "mpiexec")
    rank, world_size, local_rank, local_world_size = (_number(environment, name) for name in HYDRA)
    if "MASTER_ADDR" in environment and "MASTER_PORT" in environment:
        address, port = environment["MASTER_ADDR"], _number(environment, "MASTER_PORT")
    else:
        address, port = _meet_over_mpi(environment, world_size, "mpich", "mpiexec tells no place to meet")
    return LaunchInfo(rank, world_size, local_rank, local_world_size, address, port, "hydra")


def _meet_over_mpi(environment: Mapping[str, str], world_size: int, abi: Literal["openmpi", "mpich"], why: str) -> tuple[str, int]:
    """Host of rank 0 and a port that is free there, which MPI itself sends to all. For this process's own environment only.

    Args:
        abi: of the MPI that started this process; mpi4py would take the first that it finds.
    """
    remedy = "set MASTER_ADDR=<that host> and MASTER_PORT=<free port> for all ranks, or install mpi4py"
    if environment is not os.environ:
        raise ConfigError(f"{why}: {remedy}")
    os.environ.setdefault("MPI4PY_MPIABI", abi)
    try:
        size, meeting = _ask_mpi()
    except (ImportError, RuntimeError) as error:  # RuntimeError: it found no MPI library
        raise ConfigError(f"{why}: {remedy} (importing it: {error})") from None
    if size != world_size:
        raise ConfigError(f"{why}, and mpi4py sees {size} of {world_size} ranks, as with another MPI than its own: {remedy}")
    return meeting


@cache
def _ask_mpi() -> tuple[int, tuple[str, int]]:
    """Number of ranks that MPI knows, and where they meet. Once in a process: MPI cannot start again after its end."""
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    size = world.size
    meeting = world.bcast((socket.gethostname(), free_port("")) if world.rank == 0 else None)
    MPI.Finalize()  # now, together: at the end of a rank that fails alone it would wait for the others
    return size, meeting


def _read_slurm(environment: Mapping[str, str]) -> LaunchInfo:
    _require_variables(environment, SLURM, "srun")
    rank, local_rank = _number(environment, "SLURM_PROCID"), _number(environment, "SLURM_LOCALID")
    size_name = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environment else "SLURM_NTASKS"
    world_size = _number(environment, size_name)
    if world_size > 1 and "SLURM_STEP_ID" not in environment:
        raise ConfigError(
            f"a Slurm batch script with {size_name}={world_size} started this process without srun: put srun before it"
        )
    node_list = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
    if not node_list:
        raise ConfigError("srun has set SLURM_PROCID but no SLURM_JOB_NODELIST to take the host of rank 0 from")
    address = environment.get("MASTER_ADDR") or first_host(node_list)
    if "MASTER_PORT" in environment:
        port = _number(environment, "MASTER_PORT")
    else:
        step = _number(environment, "SLURM_STEP_ID") if "SLURM_STEP_ID" in environment else 0
        # A requeued job gets another port: what blocked the first may still be there.
        restarts = _number(environment, "SLURM_RESTART_COUNT") if "SLURM_RESTART_COUNT" in environment else 0
        port = _port_from(_number(environment, "SLURM_JOB_ID") + 1009 * step + 4001 * restarts)
    return LaunchInfo(rank, world_size, local_rank, _slurm_local_world_size(environment, world_size), address, port, "slurm")


def _slurm_local_world_size(environment: Mapping[str, str], world_size: int) -> int:
    """Tasks on this node, from a list such as `4(x2),3`: four on nodes 0 and 1, three on node 2."""
    tasks = environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get("SLURM_TASKS_PER_NODE")
    if tasks is None:
        return world_size
    if not re.fullmatch(r"\d+(\(x\d+\))?(,\d+(\(x\d+\))?)*", tasks):
        raise ConfigError(f"SLURM_TASKS_PER_NODE={tasks} is not of the form '4(x2),3'")
    per_node = [int(count) for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", tasks) for _ in range(int(times or 1))]
    node = _number(environment, "SLURM_NODEID") if "SLURM_NODEID" in environment else 0
    if node >= len(per_node):
        raise ConfigError(f"SLURM_NODEID={node} is not among the {len(per_node)} nodes of SLURM_TASKS_PER_NODE={tasks}")
    return per_node[node]


def _require_variables(environment: Mapping[str, str], names: tuple[str, ...], launcher: str) -> None:
    missing = [name for name in names if name not in environment]
    if missing:
        present = next(name for name in names if name in environment)
        raise ConfigError(f"{present} is set but {', '.join(missing)} is not: start with {launcher}, or unset {present}")


def _number(environment: Mapping[str, str], name: str) -> int:
    value = environment.get(name, "")
    if not value.isdecimal():
        raise ConfigError(f"environment variable {name} is '{value}', expected a whole number from 0")
    return int(value)


def _check_ranks(launch: LaunchInfo) -> None:
    if launch.rank >= launch.world_size:
        raise ConfigError(f"{launch.launcher} gave rank {launch.rank} in a world of {launch.world_size}: ranks count from 0")
    if launch.local_rank >= launch.local_world_size:
        raise ConfigError(f"{launch.launcher} gave local rank {launch.local_rank} among {launch.local_world_size} local processes")
    if launch.local_world_size > launch.world_size:
        raise ConfigError(f"{launch.launcher} gave {launch.local_world_size} local processes in a world of {launch.world_size}")
    if not 0 < launch.master_port < 65536:
        raise ConfigError(f"{launch.launcher} gave port {launch.master_port}, expected 1 to 65535")


def _port_from(number: int) -> int:
    """A port that all ranks derive alike, below the range that the kernel hands out (32768 and up)."""
    return 15000 + number % 15000
