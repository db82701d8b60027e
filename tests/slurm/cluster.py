"""A real Slurm for tests: one munged, one slurmctld and a slurmd for each of two nodes, all on this machine and in one folder.

Its configuration, ports, key and state are its own, so it runs beside any other Slurm; what it started, it ends. Each node says it
has 16 cores and 8 GPUs, whatever the machine has. 64 more nodes are known and never started: the real batch scripts ask for so
many.
"""

from __future__ import annotations

import os
import pwd
import re
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

from tests.patience import patient, wait_until

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
NODES = ("n1", "n2")
_ADMIN_PATH = "/usr/local/sbin:/usr/sbin:/sbin"

CONFIG = """
ClusterName=r1test
FirstJobId={first_job}
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire={limit:.0f}
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmctldParameters=idle_on_node_suspend
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_min_interval=0,batch_sched_delay=0,sched_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
SlurmdTimeout={slurmd_limit:.0f}
MessageTimeout={message_limit:.0f}
KillWait={limit:.0f}
MinJobAge=3600
GresTypes=gpu
SuspendProgram=/bin/true
ResumeProgram=/bin/true
SuspendTime=100000
SuspendExcNodes={nodes}
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={port1} CPUs=16 Gres=gpu:8
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={port2} CPUs=16 Gres=gpu:8
NodeName=h[1-64] NodeAddr=127.0.0.1 CPUs=128 Gres=gpu:8 State=CLOUD
PartitionName=main Nodes={nodes} Default=YES PriorityTier=1 GraceTime=60 State=UP MaxTime=INFINITE
PartitionName=urgent Nodes={nodes} PriorityTier=10 PreemptMode=OFF State=UP MaxTime=INFINITE
PartitionName=closed Nodes={nodes} State=DOWN
PartitionName=h800 Nodes=h[1-64] State=UP MaxTime=INFINITE
"""


def missing_programs() -> list[str]:
    """Programs of Slurm and munge that are not on this machine."""
    return [name for name in PROGRAMS if shutil.which(name, path=f"{os.environ['PATH']}:{_ADMIN_PATH}") is None]


class Cluster:
    """A running cluster, as a context manager.

    Args:
        folder: takes everything; short, since it holds a socket.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_", "SRUN_"))
        }
        self.environment |= {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": f"{os.environ['PATH']}:{_ADMIN_PATH}"}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        try:
            self._configure()
            self._start("munged", "munged", "--foreground", "--force", f"--socket={self.folder}/munge.socket",
                        f"--key-file={self.folder}/munge.key", f"--pid-file={self.folder}/munged.pid",
                        f"--log-file={self.folder}/munged.log", f"--seed-file={self.folder}/munged.seed")  # fmt: skip
            self.wait(lambda: (self.folder / "munge.socket").exists(), 20, "munged")
            self._start("slurmctld", "slurmctld", "-D", "-i")
            for node in NODES:
                self.start_node(node)
            self.wait(lambda: self.node_states().count("idle") >= len(NODES), 60, "idle nodes")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if "slurmctld" in self._daemons:
            self.cancel_all()
        for name in [*reversed(self._daemons)]:
            self.stop_daemon(name)
        for pid in self.processes():
            _kill(pid)

    def cancel_all(self) -> None:
        """End all jobs that there are, and wait for it."""
        deadline = time.monotonic() + patient(15)
        while self.run("squeue", "--noheader", check=False).strip() and time.monotonic() < deadline:
            self.run("scancel", f"--user={_user()}", check=False)
            time.sleep(0.3)

    def start_node(self, node: str) -> None:
        """Start a node's slurmd."""
        self._start(node, "slurmd", "-D", "-N", node)

    def stop_daemon(self, name: str, number: int = signal.SIGTERM) -> None:
        """End munged, slurmctld or a node's slurmd. With SIGKILL it is as if the node lost its power, but jobs go on."""
        process = self._daemons.pop(name)
        process.send_signal(number)
        try:
            process.wait(patient(10))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def run(self, *command: str, check: bool = True, cwd: Path | None = None, **variables: str) -> str:
        """Run a command of Slurm; returns its output, stderr included."""
        done = subprocess.run(
            command, env=self.environment | variables, cwd=cwd, capture_output=True, text=True, timeout=patient(120), check=False
        )
        assert not check or done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def submit(self, *arguments: str, cwd: Path, **variables: str) -> str:
        """sbatch; returns the job's id."""
        return self.run("sbatch", "--parsable", *arguments, cwd=cwd, **variables).strip().splitlines()[-1]

    def job(self, job: str) -> dict[str, str]:
        """What Slurm tells of a job: JobState, Restarts, NodeList..."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.run("scontrol", "show", "job", "--oneliner", job)))

    def state(self, job: str) -> str:
        """PENDING, RUNNING, COMPLETED, FAILED..."""
        return self.job(job)["JobState"]

    def node_states(self) -> list[str]:
        """Of the nodes that are started."""
        return self.run(
            "sinfo", "--noheader", "--Node", f"--nodes={','.join(NODES)}", "--partition=main", "--format=%t", check=False
        ).split()

    def finish(self, job: str, timeout: float, log: Path) -> None:
        """Wait for a job's good end; its log is shown where it has another."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL")
        self.wait(lambda: self.state(job) in ended, timeout, f"the end of job {job}", log)
        assert self.state(job) == "COMPLETED", f"{self.job(job)}\n{_tail(log)}"

    def wait(self, condition: Callable[[], bool], timeout: float, what: str, log: Path | None = None) -> None:
        """Wait until a condition holds, at most `timeout` seconds of an idle machine."""
        try:
            wait_until(condition, timeout, what, pause=0.2)
        except AssertionError as error:
            shown = log or self.folder / "slurmctld.log"
            raise AssertionError(f"{error}; end of {shown}:\n{_tail(shown)}") from None

    def processes(self, command: str = "", node: str | None = None) -> list[int]:
        """Processes of this cluster's jobs whose command line begins with `command`, without children of such processes.

        Args:
            node: those that run there; default: on both.
        """
        daemons = {daemon.pid for daemon in self._daemons.values()} | {os.getpid()}
        lines, parents, variables = _all_processes()
        mark = f"SLURM_CONF={self.folder}/slurm.conf"

        def belongs(pid: int, wanted: str) -> bool:
            """Itself or an ancestor has the variable; ranks start engines without the variables of Slurm."""
            while pid in parents:
                if wanted in variables[pid]:
                    return pid not in daemons
                pid = parents[pid]
            return False

        found = {pid for pid, line in lines.items() if line.startswith(command) and pid not in daemons and belongs(pid, mark)}
        if node is not None:
            found = {pid for pid in found if belongs(pid, f"SLURMD_NODENAME={node}")}
        return sorted(pid for pid in found if not command or parents[pid] not in found)

    def _configure(self) -> None:
        host = socket.gethostname()
        ports = _free_ports(1 + len(NODES))
        self.folder.mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o755)
        for name in ("state", *(f"spool-{node}" for node in NODES)):
            (self.folder / name).mkdir()
        text = CONFIG.format(
            first_job=1 + secrets.randbelow(100_000),  # ranks meet at a port that follows from it, and another cluster may run here
            host=host,
            user=_user(),
            folder=self.folder,
            nodes=",".join(NODES),
            limit=patient(5),
            slurmd_limit=patient(20),
            message_limit=min(patient(10), 99),  # Slurm takes no more than 100
            ctld_port=ports[0],
            port1=ports[1],
            port2=ports[2],
        )
        (self.folder / "slurm.conf").write_text(text)
        for number in range(8):
            (self.folder / f"gpu{number}").touch()
        (self.folder / "gres.conf").write_text(
            f"NodeName={','.join(NODES)} Name=gpu File={self.folder}/gpu[0-7]\nNodeName=h[1-64] Name=gpu Count=8\n"
        )
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o600)

    def _start(self, name: str, *command: str) -> None:
        program = shutil.which(command[0], path=self.environment["PATH"])
        with (self.folder / f"{name}.out").open("ab") as output:
            self._daemons[name] = subprocess.Popen(
                [program, *command[1:]],
                env=self.environment,
                stdout=output,
                stderr=output,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )


def _all_processes() -> tuple[dict[int, str], dict[int, int], dict[int, set[str]]]:
    """Of every process of this machine: command line, parent, environment."""
    lines, parents, variables = {}, {}, {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            line = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            found = set((path / "environ").read_bytes().decode(errors="replace").split("\0"))
        except OSError:
            continue  # it ended meanwhile
        lines[int(path.name)], parents[int(path.name)], variables[int(path.name)] = line, parent, found
    return lines, parents, variables


def _free_ports(count: int) -> Sequence[int]:
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def _user() -> str:
    return pwd.getpwuid(os.getuid()).pw_name


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-4000:] if log.exists() else "(not there)"
