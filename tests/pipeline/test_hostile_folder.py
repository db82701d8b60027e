"""A checkpoint from elsewhere that would run code: every command that opens one ends in one line, and nothing runs."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex

from megatron_r1 import cli
from megatron_r1.errors import CheckpointError
from megatron_r1.pipeline.builders.engine_weights import open_weights
from megatron_r1.runtime import distributed
from megatron_r1.runtime.checkpoints import COMPLETE, MANIFEST, manifest_entry
from megatron_r1.runtime.files import file_checksum
from megatron_r1.weights.boxes import whole_box
from tests.paths import ROOT

CONFIG = str(ROOT / "examples/tiny_cpu/r1_zero.yaml")


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.fixture(autouse=True)
def one_command_per_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command is a process: forget where the ranks of the commands before met."""
    monkeypatch.setattr(distributed, "_STORE", None)


def poison_index(policy: Path, marker: Path) -> None:
    """A whole index, with more in it."""
    index = pickle.loads((policy / ".metadata").read_bytes())
    index.planner_data = Evil(marker)
    (policy / ".metadata").write_bytes(pickle.dumps(index))


def poison_common(policy: Path, marker: Path) -> None:
    torch.save({"x": Evil(marker)}, policy / "common.pt")


def poison_object(policy: Path, marker: Path, kind: str) -> None:
    """One of the objects that are neither tensor nor number; the index tells where it is."""
    index = pickle.loads((policy / ".metadata").read_bytes())
    name = next(name for name in index.state_dict_metadata if kind in name)
    torch.save([Evil(marker)], policy / "__9_9.distcp")
    index.storage_data[MetadataIndex(name)] = _StorageInfo("__9_9.distcp", 0, (policy / "__9_9.distcp").stat().st_size)
    (policy / ".metadata").write_bytes(pickle.dumps(index))


def seal_again(checkpoint: Path) -> None:
    """Whoever poisons a file can also write its checksum."""
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    files = [path for path in checkpoint.rglob("*") if path.is_file() and path.name not in (MANIFEST, COMPLETE)]
    manifest["files"] = {str(path.relative_to(checkpoint)): manifest_entry(path) for path in files}
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))
    (checkpoint / COMPLETE).write_text(file_checksum(checkpoint / MANIFEST))


def complain(capfd: pytest.CaptureFixture[str], *arguments: object) -> str:
    capfd.readouterr()
    code = cli.main(list(map(str, arguments)))
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("megatron-r1")]
    assert code == 2 and len(lines) == 1, lines
    return lines[0]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs that stand ready, finished and killed; see tests/data/before_the_move."""
    folder = tmp_path_factory.mktemp("before_the_move")
    with tarfile.open(ROOT / "tests/data/before_the_move/old.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder / "old"


@pytest.fixture(scope="module")
def converted(unpacked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in Megatron's format, as one gets it from elsewhere."""
    out = tmp_path_factory.mktemp("converted") / "model"
    assert cli.main(["convert", "import", "--hf", str(unpacked / "dense/hf"), "--out", str(out)]) == 0
    return out


@pytest.mark.parametrize(
    "command, poison",
    [
        *((command, poison_index) for command in ("convert export", "convert verify", "sft", "grpo")),
        ("convert export", poison_common),
        ("sft", poison_common),
    ],
)
def test_a_model_folder_runs_nothing(capfd, tmp_path, converted, unpacked, command, poison):
    folder, marker = shutil.copytree(converted, tmp_path / "model"), tmp_path / "ran"
    poison(folder / "policy", marker)
    seal_again(folder)
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "Total 1+2?", "response": "<think>t</think><answer>3</answer>"}\n' * 4)
    run = f"run_dir={tmp_path / 'run'}"
    arguments = {
        "convert export": ["convert", "export", "--megatron", folder, "--out", tmp_path / "hf"],
        "convert verify": ["convert", "verify", "--megatron", folder, "--hf", unpacked / "dense/hf"],
        "sft": ["sft", run, f"model.weights={folder}", f"data.source={tmp_path / 'pairs.jsonl'}"],
        "grpo": ["grpo", "--config", CONFIG, run, f"model.weights={folder}"],
    }[command]
    if poison is poison_common and command.startswith("convert"):
        capfd.readouterr()
        assert cli.main(list(map(str, arguments))) == 0, "the converter does not look at it"
    else:
        line = complain(capfd, *arguments)
        assert "posix.mkdir" in line and (".metadata" in line or "common.pt" in line), line
    assert not marker.exists()
    assert not list((tmp_path / "run").glob("checkpoints/step_*"))


def test_weights_for_an_engine_are_read_without_running_anything(tmp_path, converted):
    """What evaluate, the recipe's samplers and GRPO read a Megatron folder with."""
    opened = open_weights(converted, torch.float32)
    names = list(opened.names())
    assert len(names) > 10 and opened.read(names[0], whole_box(opened.shape(names[0]))).dtype == torch.float32
    folder = shutil.copytree(converted, tmp_path / "model")
    poison_index(folder / "policy", tmp_path / "ran")
    seal_again(folder)
    with pytest.raises(CheckpointError, match="posix.mkdir"):
        open_weights(folder, torch.float32)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["index", "common", "rng", "_extra_state"])
def test_a_resume_runs_nothing(capfd, monkeypatch, tmp_path, unpacked, kind):
    shutil.copytree(unpacked, tmp_path / "old")
    monkeypatch.chdir(tmp_path)  # where these runs were made, their paths were relative
    marker = tmp_path / "ran"
    for checkpoint in Path("old/sft/checkpoints").glob("step_*"):
        if kind in ("index", "common"):
            (poison_index if kind == "index" else poison_common)(checkpoint / "policy", marker)
        else:
            poison_object(checkpoint / "policy", marker, kind)
        seal_again(checkpoint)
    if kind == "_extra_state":  # earlier checkpoints have it, and nothing reads it
        assert cli.main(["sft", "--config", "old/sft/config.yaml"]) == 0
        assert not marker.exists()
        return
    line = complain(capfd, "sft", "--config", "old/sft/config.yaml")
    assert not marker.exists()
    assert "posix.mkdir" in line and "old/sft/checkpoints" in line, line
