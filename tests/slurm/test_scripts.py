"""Every script is well-formed, asks a real Slurm for nothing that it does not know, and holds no hyper-parameter."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_r1.config.keys import known_keys
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import ROOT, SCRIPTS, SLURM, Jobs

NAMES = {"pretrain", "r1_zero", "r1_stage1", "r1_stage2", "r1_stage3", "r1_stage4", "distill", "evaluate", "convert"}
SHELL = [*SCRIPTS, *sorted(SLURM.glob("*.sh"))]


def test_all_scripts_are_there():
    assert {path.stem for path in SCRIPTS} == NAMES


@pytest.mark.parametrize("path", SHELL, ids=lambda path: path.name)
def test_bash_reads_it(path):
    subprocess.run(["bash", "-n", str(path)], check=True)


def test_shellcheck_finds_nothing():
    if shutil.which("shellcheck") is None:
        pytest.skip("no shellcheck here (apt-get install shellcheck)")
    names = [str(path.relative_to(SLURM)) for path in SHELL]
    done = subprocess.run(["shellcheck", "--external-sources", *names], cwd=SLURM, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_it_holds_resources_and_the_launch_alone(path):
    text = path.read_text()
    code = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    assert not [key for key in known_keys() if re.search(rf"\b{re.escape(key)}=", code)]
    assert len(text.splitlines()) < 25


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_slurm_would_run_it_as_it_is(cluster: Cluster, path):
    """On 64 nodes of 8 GPUs, which this cluster knows of: every option exists and the resources can be had."""
    told = cluster.run("sbatch", "--test-only", "--partition=h800", str(path.relative_to(ROOT)), cwd=ROOT)
    nodes = int(re.search(r"--nodes=(\d+)", path.read_text())[1])
    assert re.search(rf"to start at .* using {nodes * 128} processors on nodes h", told), told


@pytest.mark.parametrize(("failures", "code"), [(0, 0), (1, 0), (3, 0), (4, 1)])
def test_a_slurm_command_that_fails_is_given_again(tmp_path, failures, code):
    script = """
        source slurm/common.sh
        scontrol() {{ echo x >>{calls}; [ "$(wc -l <{calls})" -gt {failures} ] && echo n1 || return 1; }}
        found=$(r1_slurm scontrol show hostnames); echo "found $found"
    """
    calls = tmp_path / "calls"
    done = subprocess.run(
        ["bash", "-c", script.format(calls=calls, failures=failures)],
        env=dict(os.environ, R1_ROOT=str(ROOT), R1_SLURM_PAUSES="0 0 0", R1_SITE="/dev/null"),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == code and len(calls.read_text().splitlines()) == min(failures + 1, 4)
    assert done.stdout.strip() == ("" if code else "found n1")
    assert done.stderr.count("scontrol show failed, once more in 0 s") == min(failures, 3)


FAKES = {
    "squeue": """
        n=$(cat asked 2>/dev/null || echo 0); echo $((n + 1)) >asked
        [ "$n" != 0 ] || exit 1
        for option; do case $option in --name=*) grep "^${option#--name=} " queued | cut -d' ' -f2- || true ;; esac; done
    """,
    "sbatch": """
        for option; do case $option in --comment=*) mark=${option#--comment=} ;; *.sbatch) file=$option ;; esac; done
        name=$(basename "$file" .sbatch | tr _ -); n=$(wc -l <queued)
        [ "$name" != r1-zero ] || [ -e refused ] || { touch refused; exit 1; }
        echo "$name $((n + 1)) $mark" >>queued
        [ "$name" != r1-stage1 ] || exit 1
        echo "$((n + 1));cluster"
    """,
}  # the first question fails; r1_zero is refused once; r1_stage1 is queued, although sbatch says that it failed


def test_r1_sh_asks_again_where_slurm_fails_and_queues_nothing_twice(tmp_path):
    for name, body in FAKES.items():
        script = "\n".join(line.strip() for line in body.splitlines())
        (tmp_path / name).write_text(f"#!/bin/bash\ncd {tmp_path}\n{script}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "queued").touch()
    (tmp_path / "r1" / "base" / "hf").mkdir(parents=True)
    (tmp_path / "r1" / "base" / "hf" / "artifact.json").write_text("{}")
    done = subprocess.run(
        ["bash", "slurm/r1.sh", f"run_dir={tmp_path / 'r1'}"], cwd=ROOT, capture_output=True, text=True, check=False,
        env=dict(os.environ, PATH=f"{tmp_path}:{os.environ['PATH']}", R1_SLURM_PAUSES="0 0", R1_SITE="/dev/null",
                 R1_PLAN="0", R1_PYTHON=sys.executable, RECIPE="examples/tiny_cpu/r1.yaml"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ids = dict(re.findall(r"^(\S+) +job (\d+)", done.stdout, re.MULTILINE))
    assert ids == dict(zip(["r1_zero", "r1_stage1", "r1_stage2", "r1_stage3", "r1_stage4", "distill"], "123456", strict=True))
    assert len((tmp_path / "queued").read_text().splitlines()) == 6


def submit(folder: Path, script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """A script that queues jobs, with an sbatch that writes down what it is given."""
    fake = folder / "sbatch"
    fake.write_text(f"#!/bin/bash\nprintf '%s\\n' \"$*\" >>{folder / 'queued'}\necho 1\n")
    fake.chmod(0o755)
    (folder / "squeue").write_text("#!/bin/bash\n")
    (folder / "squeue").chmod(0o755)
    environment = dict(
        os.environ, PATH=f"{folder}:{os.environ['PATH']}", R1_SITE="/dev/null", R1_PYTHON=sys.executable, **variables
    )
    return subprocess.run(["bash", script, *arguments], cwd=ROOT, capture_output=True, text=True, check=False, env=environment)


def test_submit_queues_what_fits_and_nothing_else(tmp_path: Path):
    weights = "model.weights=/nowhere"
    done = submit(tmp_path, "slurm/submit.sh", "--nodes=64", "--time=1:00", "slurm/r1_zero.sbatch", weights)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "queued").read_text() == f"--nodes=64 --time=1:00 slurm/r1_zero.sbatch {weights}\n"
    done = submit(tmp_path, "slurm/submit.sh", "slurm/r1_zero.sbatch", weights, "runtime.recompute=none")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "grpo does not fit: update" in done.stderr
    assert (tmp_path / "queued").read_text().count("\n") == 1
    done = submit(tmp_path, "slurm/submit.sh", "--nodes=1", "slurm/nowhere.sbatch")
    assert done.returncode == 2 and "slurm/nowhere.sbatch is no batch script" in done.stderr


def test_r1_sh_queues_no_stage_that_does_not_fit(tmp_path: Path):
    recipe = (ROOT / "examples/v3_671b/r1.yaml").read_text().replace("recompute: full", "recompute: none")
    (tmp_path / "r1.yaml").write_text(recipe.replace("runs/v3_r1", str(tmp_path / "run")))
    settings = ["model.weights=/nowhere", "recipe.stages.student.model.weights=/nowhere"]
    done = submit(tmp_path, "slurm/r1.sh", *settings, RECIPE=str(tmp_path / "r1.yaml"))
    assert done.returncode == 2 and "stage zero: grpo does not fit: update" in done.stderr, done.stderr
    assert "r1_zero" not in ((tmp_path / "queued").read_text() if (tmp_path / "queued").exists() else "")


def test_a_job_asks_as_it_starts_and_not_again_when_it_is_requeued(tmp_path: Path):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/bash\necho "$*" >>{tmp_path / "asked"}\n[[ "$*" != *no_room* ]] || exit 2\n')
    python.chmod(0o755)
    script = """
        . slurm/common.sh
        r1_prepare() { :; }; r1_preflight() { :; }; r1_serve_rollouts() { :; }; r1_train() { echo trained; }; r1_end() { :; }
        r1_run grpo --config x "$@"
    """
    job = {"SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "8", "R1_GPU": "H20"}
    environment = dict(os.environ, R1_ROOT=str(ROOT), R1_SITE="/dev/null", R1_PYTHON=str(python), **job)

    def run(*settings: str, **more: str) -> tuple[int, str]:
        done = subprocess.run(
            ["bash", "-c", script, "bash", *settings], env=environment | more, capture_output=True, text=True, check=False
        )  # fmt: skip
        return done.returncode, done.stdout

    assert run("a=b") == (0, "trained\n")
    asked = (tmp_path / "asked").read_text()
    assert asked == "-m megatron_r1.cli grpo --config x a=b --dry-run --world-size 16 --gpus-per-node 8 --gpu H20\n"
    assert run("no_room=1") == (2, "") and run("a=b", SLURM_RESTART_COUNT="1") == (0, "trained\n")
    assert run("a=b", R1_PLAN="0") == (0, "trained\n") and (tmp_path / "asked").read_text().count("\n") == 2


def test_a_script_that_is_submitted_from_elsewhere_says_so(jobs: Jobs, tmp_path):
    job = jobs.cluster.submit("--nodes=1", f"--output={tmp_path}/%j.out", "--ntasks-per-node=1", "--cpus-per-task=1",
                              str(SLURM / "evaluate.sbatch"), cwd=tmp_path)  # fmt: skip
    jobs.cluster.wait(lambda: jobs.cluster.state(job) == "FAILED", 30, "end of the job")
    assert "slurm/common.sh: No such file" in (tmp_path / f"{job}.out").read_text()


def test_r1_sh_queues_what_is_not_finished_and_each_job_behind_the_one_it_needs(jobs: Jobs, tmp_path):
    run_dir = tmp_path / "r1"
    variables = {
        "RECIPE": "examples/tiny_cpu/r1.yaml",
        "R1_SITE": str(tmp_path / "site.env"),
        "SBATCH_PARTITION": "closed",  # takes jobs and starts none
        "R1_SBATCH_OPTIONS": "--nodes=2 --ntasks-per-node=1 --cpus-per-task=1",
    }
    command = ("bash", "slurm/r1.sh", f"run_dir={run_dir}")
    (run_dir / "base" / "hf").mkdir(parents=True)
    (run_dir / "base" / "hf" / "artifact.json").write_text("{}")
    graph = jobs.cluster.run(*command, cwd=ROOT, **variables)
    try:
        assert re.search(r"^pretrain +finished +base$", graph, re.MULTILINE), graph
        ids = dict(re.findall(r"^(\S+) +job (\d+)", graph, re.MULTILINE))
        assert list(ids) == ["r1_zero", "r1_stage1", "r1_stage2", "r1_stage3", "r1_stage4", "distill"]
        needs = {name: jobs.cluster.job(job)["Dependency"] for name, job in ids.items()}
        assert needs["r1_zero"] == "(null)"
        for name, before in (
            ("r1_stage1", "r1_zero"),
            ("r1_stage2", "r1_stage1"),
            ("r1_stage3", "r1_stage2"),
            ("r1_stage4", "r1_stage3"),
            ("distill", "r1_stage3"),
        ):
            assert needs[name] == f"afterok:{ids[before]}(unfulfilled)"
        assert "after" in graph
        again = jobs.cluster.run(*command, cwd=ROOT, **variables)
        assert dict(re.findall(r"^(\S+) +is (\d+)", again, re.MULTILINE)) == ids, "nothing is queued twice"
    finally:
        jobs.cluster.run("scancel", "--partition=closed")
    wrong = jobs.cluster.run("bash", "slurm/r1.sh", "grpo.kl_coeff=0.1", cwd=ROOT, check=False, **variables)
    assert "unknown key 'grpo.kl_coeff'" in wrong and jobs.cluster.run("squeue", "--noheader") == ""
