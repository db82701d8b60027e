"""Breaks real jobs on a real Slurm, one way after the other, and says how each ended: python -m benchmarks.slurm_faults --help

A cluster of two nodes is started on this machine (tests/slurm/cluster.py), a base pretrained there, and from it
`slurm/r1_stage4.sbatch` submitted over both nodes, with the tiny CPU settings: a rank and a vLLM engine on each. First nothing is
done to it. Then each fault is, and the run's metrics, which must not know of it, are compared with the first run's, number by
number.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.kills import differences
from benchmarks.processes import serve_rules
from benchmarks.slurm_campaign import TIMEOUT, Campaign, Failed
from benchmarks.small_recipe import write_small_recipe
from tests.slurm.cluster import Cluster, missing_programs
from tests.slurm.jobs import ROOT, last_step, python_path, read_metrics


def undisturbed(campaign: Campaign) -> str:
    """Nothing is done to it."""
    return f"{len(campaign.undisturbed())} lines of metrics"


def usr1(campaign: Campaign) -> str:
    """SIGUSR1, as ahead of a time limit."""
    return _signal(campaign, "USR1")


def term(campaign: Campaign) -> str:
    """SIGTERM, as at the beginning of a preemption."""
    return _signal(campaign, "TERM")


def torchrun(campaign: Campaign) -> str:
    """SIGUSR1 where a torchrun on each node starts the ranks."""
    site = campaign.jobs.site.read_text()
    campaign.jobs.site.write_text(f"{site}R1_LAUNCHER=torchrun\n")
    try:
        return _signal(campaign, "USR1", run="torchrun")
    finally:
        campaign.jobs.site.write_text(site)


def _signal(campaign: Campaign, name: str, run: str | None = None) -> str:
    job, run = campaign.start(run or name.lower(), "checkpoint.interval=100")
    campaign.when(job, lambda: last_step(run) >= 2, "step 2")
    campaign.cluster.run("scancel", f"--signal={name}", job)
    told = campaign.finish(job, run, restarts=1)
    if not re.search(rf"SIG{name}: stopped after step", campaign.jobs.log(job).read_text()):
        raise Failed("it did not say that it stopped and saved")
    return told


def preemption(campaign: Campaign) -> str:
    """A job of a partition of higher priority takes the nodes."""
    job, run = campaign.start("preemption", "checkpoint.interval=100", options=("--nodes=2", "--exclusive"))
    campaign.when(job, lambda: last_step(run) >= 2, "step 2")
    urgent = campaign.cluster.submit(
        "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 5", cwd=ROOT
    )
    campaign.when(job, lambda: campaign.cluster.state(urgent) == "COMPLETED", "end of the urgent job")
    return campaign.finish(job, run, restarts=1)


def rank_killed(campaign: Campaign) -> str:
    """SIGKILL of a rank in an update."""
    job, run = campaign.start("rank_killed")
    campaign.when(job, lambda: last_step(run) >= 2 and bool(campaign.ranks("n2")), "step 2")
    os.kill(campaign.ranks("n2")[0], signal.SIGKILL)
    return campaign.finish(job, run, restarts=1)


def step_killed(campaign: Campaign) -> str:
    """SIGKILL of everything of the job's step on one node, slurmstepd included."""
    job, run = campaign.start("step_killed")
    campaign.when(job, lambda: last_step(run) >= 2 and bool(campaign.ranks("n2")), "step 2")
    _kill_step(campaign, campaign.ranks("n2")[0])
    return campaign.finish(job, run, restarts=1)


def save_killed(campaign: Campaign) -> str:
    """SIGKILL of a rank while a checkpoint is written."""
    job, run = campaign.start("save_killed")
    campaign.when(
        job, lambda: last_step(run) >= 2 and bool(list((run / "checkpoints").glob(".tmp-step_*"))), "a checkpoint being written"
    )
    os.kill(campaign.ranks("n1")[0], signal.SIGKILL)
    return campaign.finish(job, run, restarts=1)


def node_lost(campaign: Campaign) -> str:
    """SIGKILL of a slurmd with all that ran under it; the node comes back later."""
    job, run = campaign.start("node_lost")
    campaign.when(job, lambda: last_step(run) >= 2 and bool(campaign.ranks("n2")), "step 2")
    rank = campaign.ranks("n2")[0]
    campaign.cluster.stop_daemon("n2", signal.SIGKILL)
    _kill_step(campaign, rank)
    campaign.when(job, lambda: campaign.cluster.state(job) == "PENDING", "requeued job")
    campaign.cluster.start_node("n2")
    return campaign.finish(job, run)


def rank_stopped(campaign: Campaign) -> str:
    """SIGSTOP of a rank: found within the heartbeat's time, stacks of all ranks written."""
    job, run = campaign.start("rank_stopped")
    campaign.when(job, lambda: last_step(run) >= 2 and bool(campaign.ranks("n1")), "step 2")
    os.kill(campaign.ranks("n1")[0], signal.SIGSTOP)
    began = time.monotonic()
    campaign.when(job, lambda: (run / "health/abort.json").exists(), "notice of the stopped rank")
    found = time.monotonic() - began
    told = campaign.finish(job, run, restarts=1)
    stacks = [path.name for path in (run / "health").glob("stacks_rank_*.txt") if "Thread" in path.read_text()]
    if len(stacks) != 2:
        raise Failed(f"only {stacks} hold stacks")
    return f"found after {found:.0f} s; {told}"


def engine_killed(campaign: Campaign) -> str:
    """SIGKILL of a vLLM engine in a rollout: replaced, and only what it had not finished is sampled anew."""
    return _engine(campaign, "engine_killed", signal.SIGKILL)


def engine_stopped(campaign: Campaign) -> str:
    """SIGSTOP of a vLLM engine in a rollout: given up after rollout.stall_seconds, then as if it had died."""
    return _engine(campaign, "engine_stopped", signal.SIGSTOP)


def _engine(campaign: Campaign, name: str, number: int) -> str:
    job, run = campaign.start(name)
    health = run / "health/rank_00001.json"
    campaign.when(
        job, lambda: last_step(run) >= 2 and health.exists() and '"activity": "rollout"' in health.read_text(), "a rollout"
    )
    os.kill(campaign.jobs.engines("n2")[0], number)
    told = campaign.finish(job, run, restarts=0, exactly=False)
    text = "".join(path.read_text() for path in campaign.jobs.job_folder(job).glob("rank_*.log"))
    if "starting another one" not in text:
        raise Failed("no rank says that it replaced an engine")
    for path in (run / "rollouts").glob("step_*.jsonl"):
        if len(path.read_text().splitlines()) != 32:
            raise Failed(f"{path} does not hold every response once")
    return told


def spread(campaign: Campaign) -> str:
    """One engine over both nodes, of which the second's part is killed in a rollout: replaced. Its sums are rounded otherwise."""
    job, run = campaign.start("spread", "rollout.tensor_parallel_size=2", "rollout.nodes_per_engine=2")
    health = run / "health/rank_00000.json"
    campaign.when(
        job, lambda: last_step(run) >= 2 and health.exists() and '"activity": "rollout"' in health.read_text(), "a rollout"
    )
    os.killpg(campaign.jobs.engines("n2")[0], signal.SIGKILL)  # with its worker, which would go on alone
    campaign.jobs.finish(job, TIMEOUT)
    if restarts := int(campaign.cluster.job(job)["Restarts"]):
        raise Failed(f"{restarts} restart(s) of the job; see {campaign.jobs.log(job)}")
    if "starting another one" not in (campaign.jobs.job_folder(job) / "rank_0000.log").read_text():
        raise Failed("rank 0 does not say that it replaced the engine")
    return _trained_alike(campaign, run)


def _trained_alike(campaign: Campaign, run: Path) -> str:
    """What is left to compare where an engine's last bits differ from those of the undisturbed run."""
    lines = read_metrics(run)
    worst = max(line.get("logprob_diff/max", 0.0) for line in lines)
    if [line["step"] for line in lines] != [line["step"] for line in campaign.undisturbed()] or worst > 1e-2:
        raise Failed(f"steps {[line['step'] for line in lines]}, log-probs of trainer and engine differ by {worst}")
    for path in (run / "rollouts").glob("step_*.jsonl"):
        if len(path.read_text().splitlines()) != 32:
            raise Failed(f"{path} does not hold every response once")
    return f"{len(lines)} lines of metrics, log-probs of trainer and engine differ by {worst:.1e} at most"


def disk_full(campaign: Campaign) -> str:
    """The disk fills in a save: one clear line and no restart; with room again the run goes on."""
    if os.getuid() != 0:
        return "left out: only root can make a small disk"
    disk = campaign.folder / "small_disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400m", "tmpfs", str(disk)], check=True)
    try:
        job, run = campaign.start("disk_full", run=disk / "run")
        campaign.when(job, lambda: bool(list((run / "checkpoints").glob("step_*/COMPLETE"))), "a checkpoint")
        filler = disk / "filler"
        with filler.open("wb", buffering=0) as file:  # what a buffer still holds would fail once more as the file is closed
            try:
                while True:
                    file.write(bytes(1 << 20))
            except OSError:
                pass
        campaign.when(job, lambda: campaign.cluster.state(job) == "FAILED", "failure of the job")
        log = campaign.jobs.log(job).read_text()
        if "No space left on device" not in log or int(campaign.cluster.job(job)["Restarts"]):
            raise Failed(f"no clear failure: {log[-500:]}")
        filler.unlink()
        job, run = campaign.start("disk_full", run=run)
        return f"one line, no restart; submitted again with room: {campaign.finish(job, run, restarts=0)}"
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=False)


def kills(campaign: Campaign) -> str:
    """A rank of this node or that is killed at random moments, again and again; the run is long enough for all kills."""
    settings = f"grpo.rollouts={3 * campaign.kills}"
    job, reference = campaign.start("kills_undisturbed", settings)
    campaign.jobs.finish(job, TIMEOUT)
    job, run = campaign.start("kills", settings)
    ended = ("COMPLETED", "FAILED", "CANCELLED")
    for done in range(campaign.kills):
        restarts = campaign.cluster.job(job)["Restarts"]
        campaign.when(job, lambda: len(campaign.ranks()) == 2 or campaign.cluster.state(job) in ended, "ranks")
        before, until = last_step(run), time.monotonic() + campaign.random.uniform(0, 40)
        while time.monotonic() < until and last_step(run) <= before + 1:  # in the start, or in one of the first two steps
            time.sleep(0.1)
        victims = campaign.ranks()
        if not victims:
            raise Failed(f"the job is {campaign.cluster.state(job)} after {done} kills; see {campaign.jobs.log(job)}")
        os.kill(campaign.random.choice(victims), signal.SIGKILL)
        campaign.when(
            job, lambda n=restarts: campaign.cluster.job(job)["Restarts"] != n or campaign.cluster.state(job) in ended, "requeue"
        )
    campaign.jobs.finish(job, TIMEOUT)
    if different := list(differences(read_metrics(reference), read_metrics(run), 0.0)):
        raise Failed(f"metrics differ: {'; '.join(different[:3])}; see {run}")
    return f"{campaign.kills} kills, {campaign.cluster.job(job)['Restarts']} restarts, metrics the same"


def disaggregated(campaign: Campaign) -> str:
    """A heterogeneous job: a trainer on one node, an engine on the other, weights over the network. One rank: last bits differ."""
    options = ("--nodes=1", "--ntasks-per-node=1", "--cpus-per-task=1", ":", "--nodes=1")
    job, run = campaign.start("disaggregated", options=options)
    campaign.when(job, lambda: last_step(run) >= 1, "step 1")
    if not campaign.jobs.ranks("serve-rollouts", "n2") or not campaign.ranks("n1"):
        raise Failed("no server on n2, or no trainer on n1")
    campaign.jobs.finish(job, TIMEOUT)
    return _trained_alike(campaign, run)


def launchers(campaign: Campaign) -> str:
    """The spine's job, pretraining and GRPO in one program, gives the same metrics on two ranks under torchrun, mpirun, srun."""
    settings = (
        "pretrain.steps=60", "pretrain.micro_batch_size=8", "pretrain.gate_accuracy=0.0", "grpo.rollouts=3",
        "grpo.prompts_per_rollout=8", "grpo.group_size=8", "grpo.minibatch_size=32", "evaluate.problems=8", "evaluate.samples=2",
        "rollout.max_response_tokens=20",
    )  # fmt: skip
    program = ("-m", "megatron_r1.cli", "pipeline", "r1-zero", "--config", "examples/tiny_cpu/r1_zero.yaml", *settings)
    ways = {
        "torchrun": (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
        "mpirun": ("mpirun", "--allow-run-as-root", "--oversubscribe", "-np", "2", "--bind-to", "none", sys.executable),
        "pmi2": ("srun", "--mpi=pmi2", "--nodes=2", "--ntasks-per-node=1", sys.executable),
        "none": ("srun", "--mpi=none", "--nodes=2", "--ntasks-per-node=1", sys.executable),
    }
    runs = {}
    for name, launcher in ways.items():
        run = campaign.folder / f"launched_by_{name}"
        environment = campaign.cluster.environment | {"PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1"}
        environment |= {"MASTER_ADDR": "127.0.0.1"} if launcher[0] == "srun" else {}
        done = subprocess.run(
            [*launcher, *program, f"run_dir={run}"],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            check=False,
        )
        if done.returncode:
            raise Failed(f"{name}: {done.stderr[-1000:]}")
        runs[name] = [*read_metrics(run / "base"), *read_metrics(run / "r1_zero")]
    different = [f"{name}: {text}" for name in runs for text in differences(runs["torchrun"], runs[name], 0.0)]
    if different:
        raise Failed("; ".join(different[:3]))
    return f"{len(runs['torchrun'])} lines of metrics, equal under {', '.join(ways)}"


def chain(campaign: Campaign) -> str:
    """slurm/r1.sh: the whole recipe as jobs that wait for each other, with few steps each and no gates."""
    data = campaign.folder / "chain_data"
    subprocess.run(
        [sys.executable, "tools/make_tally_chat.py", "--out", str(data)],
        cwd=ROOT,
        check=True,
        env=os.environ | {"PYTHONPATH": python_path()},
    )
    recipe = campaign.folder / "r1.yaml"
    write_small_recipe(recipe, campaign.judge)
    small = (
        f"run_dir={campaign.folder / 'chain'}", "pretrain.micro_batch_size=8", f"recipe.non_reasoning={data}/conversations.jsonl",
        f"recipe.stages.helpful.data.source={data}/helpful.jsonl", f"recipe.stages.safety.data.source={data}/safety.jsonl",
    )  # fmt: skip
    variables = {
        "RECIPE": str(recipe),
        "R1_SITE": str(campaign.folder / "site.env"),
        "R1_SBATCH_OPTIONS": f"--nodes=2 --ntasks-per-node=1 --cpus-per-task=1 --output={campaign.jobs.logs}/%j.out",
    }
    graph = campaign.cluster.run("bash", "slurm/r1.sh", *small, cwd=ROOT, **variables)
    jobs = re.findall(r"^(\w+) +job (\d+)", graph, re.MULTILINE)
    began = time.monotonic()
    for file, job in jobs:
        campaign.jobs.finish(job, 2 * TIMEOUT)
        print(f"  {file} has ended, {time.monotonic() - began:.0f} s after all were submitted", flush=True)
    again = campaign.cluster.run("bash", "slurm/r1.sh", *small, cwd=ROOT, **variables)
    if again.count("finished") != 7:
        raise Failed(f"not all is finished: {again}")
    return f"{len(jobs)} jobs, each after the one it needs"


SCENARIOS = (
    undisturbed, usr1, term, torchrun, preemption, rank_killed, step_killed, save_killed, node_lost, rank_stopped, engine_killed,
    engine_stopped, spread,
    disk_full, disaggregated, launchers, kills, chain,
)  # fmt: skip


def _kill_step(campaign: Campaign, rank: int) -> None:
    """SIGKILL of a rank and of the slurmstepd over it, which is killed first: nobody tells Slurm."""
    steps = [pid for pid in campaign.cluster.processes("slurmstepd") if pid in _ancestors(rank)]
    for pid in [*steps, rank]:
        os.kill(pid, signal.SIGKILL)


def _ancestors(pid: int) -> set[int]:
    found: set[int] = set()
    while pid > 1:
        pid = int(re.search(r"^PPid:\s+(\d+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)[1])
        found.add(pid)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the scenarios. Returns 1 where one did not end as it must."""
    names = [scenario.__name__ for scenario in SCENARIOS]
    lines = "\n".join(f"  {scenario.__name__:<15} {scenario.__doc__.splitlines()[0]}" for scenario in SCENARIOS)
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=f"scenarios:\n{lines}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="+", choices=names, metavar="SCENARIO", help="these; default: all but chain, which takes an hour"
    )
    parser.add_argument("--kills", type=int, default=20, help="random kills in a row (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of their moments and victims")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep logs and runs there")
    arguments = parser.parse_args(argv)
    if missing := missing_programs():
        print(f"slurm_faults: no {', '.join(missing)} here: apt-get install slurm-wlm munge", file=sys.stderr)
        return 2
    chosen = [s for s in SCENARIOS if (s.__name__ in arguments.only if arguments.only else s is not chain)]
    home = Path(tempfile.mkdtemp(prefix="r1-slurm-"))
    folder = arguments.keep or home / "runs"
    failed = 0
    try:
        with serve_rules() as judge, Cluster(home / "cluster") as cluster:
            campaign = Campaign(cluster, folder.resolve(), judge, arguments.kills, arguments.seed)
            for scenario in chosen:
                began = time.monotonic()
                try:
                    told = f"ok      {scenario(campaign)}"
                except (Failed, AssertionError, IndexError, OSError) as error:
                    failed += 1
                    told = f"FAILED  {error}"
                print(f"{scenario.__name__:<15} {time.monotonic() - began:6.0f} s  {told}", flush=True)
    finally:
        shutil.rmtree(home, ignore_errors=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
