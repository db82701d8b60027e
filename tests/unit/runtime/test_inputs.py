"""Data and models are known by content: moved ones are taken, changed ones are refused with the file named."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from megatron_r1.errors import CheckpointError, DataError
from megatron_r1.runtime import files, inputs
from megatron_r1.runtime.inputs import BLOCK_BYTES, BLOCKS, NOTES, WHOLE_BYTES, bytes_to_read, compare_inputs, sampled_checksum

MIB, GIB = 1 << 20, 1 << 30


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    for name in ("config.json", "a.safetensors", "sub/b.parquet", "README.md", ".hidden.json"):
        (folder / name).write_text(f"content of {name}")
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def begin(run: Path, **paths: Path) -> None:
    compare_inputs(run, texts(paths), None)


def go_on(run: Path, before: dict[str, Path] | None = None, **paths: Path) -> None:
    compare_inputs(run, texts(paths), texts(before if before is not None else paths))


def texts(paths: dict[str, Path]) -> dict[str, str]:
    return {key.replace("_", "."): str(path) for key, path in paths.items()}


def forbid_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "file_checksum", lambda path: pytest.fail(f"{path} is read"))


def test_what_did_not_change_is_not_read_again(run, model, monkeypatch):
    monkeypatch.setattr(files, "FRESH_NANOSECONDS", 0)
    begin(run, model_weights=model)
    assert set(json.loads((run / NOTES).read_text())["model.weights"]["files"]) == {"config.json", "a.safetensors", "sub/b.parquet"}
    forbid_reading(monkeypatch)
    go_on(run, model_weights=model)


@pytest.mark.parametrize("keeps_times", [True, False])
def test_a_folder_that_moved_or_was_copied_is_the_same(run, model, tmp_path, keeps_times, monkeypatch):
    begin(run, model_weights=model)
    moved = tmp_path / "elsewhere"
    if keeps_times:
        model.rename(moved)
    else:
        shutil.copytree(model, moved, copy_function=shutil.copyfile)
    monkeypatch.setattr(files, "FRESH_NANOSECONDS", 0)
    go_on(run, {"model_weights": model}, model_weights=moved)
    forbid_reading(monkeypatch)
    go_on(run, model_weights=moved)


def test_a_file_may_have_another_name_and_be_a_link(run, tmp_path):
    source = tmp_path / "problems.jsonl"
    source.write_text("{}\n")
    begin(run, data_source=source)
    renamed = source.rename(tmp_path / "other.jsonl")
    go_on(run, {"data_source": source}, data_source=renamed)
    source.symlink_to(renamed)
    go_on(run, {"data_source": renamed}, data_source=source)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda m: (m / "a.safetensors").write_text("CONTENT of a.safetensors"), "a.safetensors has other content"),
        (lambda m: (m / "a.safetensors").write_text("longer content of a.safetensors"), "a.safetensors has 31 bytes, 24 when"),
        (lambda m: (m / "sub/b.parquet").unlink(), "sub/b.parquet is missing"),
        (lambda m: (m / "new.json").write_text("{}"), "new.json was not there when this run began"),
    ],
)
@pytest.mark.parametrize("moves", [False, True])
def test_changed_content_is_refused_with_the_file(run, model, tmp_path, change, told, moves):
    begin(run, model_weights=model)
    noted = (run / NOTES).read_text()
    change(model)
    path = model.rename(tmp_path / "elsewhere") if moves else model
    for _ in range(2):  # what is refused is not noted
        with pytest.raises(DataError) as caught:
            go_on(run, {"model_weights": model}, model_weights=path)
        assert str(caught.value).startswith(f"model.weights: {path}/") and told in str(caught.value)
        assert "\n" not in str(caught.value) and (run / NOTES).read_text() == noted


def test_content_that_changed_behind_an_old_time_is_found(run, tmp_path):
    source = tmp_path / "problems.jsonl"
    source.write_text("one\n")
    begin(run, data_source=source)
    was = source.stat()
    source.write_text("two\n")
    os.utime(source, ns=(was.st_atime_ns, was.st_mtime_ns))
    with pytest.raises(DataError, match=r"problems\.jsonl has other content than when this run began"):
        go_on(run, data_source=source)


def test_a_file_that_had_just_changed_is_read_again(run, tmp_path):
    """Two writes within one tick of a file system's clock have the same times."""
    source = tmp_path / "problems.jsonl"
    source.write_text("one\n")
    begin(run, data_source=source)
    assert json.loads((run / NOTES).read_text())["data.source"]["files"][""][1:3] == [0, 0]


def test_what_no_weights_or_tables_are_in_may_change(run, model):
    begin(run, model_weights=model)
    (model / "README.md").write_text("another text")
    (model / "artifact.json").write_text("{}")
    os.utime(model / "config.json")
    go_on(run, model_weights=model)


def test_a_path_that_is_not_there_is_left_to_the_stage(run, tmp_path):
    begin(run, data_source=tmp_path / "none.jsonl")
    go_on(run, data_source=tmp_path / "none.jsonl")


def test_a_checkpoint_is_known_by_the_checksum_that_completes_it(run, tmp_path, monkeypatch):
    other = tmp_path / "other"
    for step in (1, 2):
        checkpoint = other / "checkpoints" / f"step_{step:06d}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "COMPLETE").write_text(f"checksum {step}")
        (checkpoint / "weights.bin").write_text("never read")
    begin(run, model_weights=other)
    assert list(json.loads((run / NOTES).read_text())["model.weights"]["files"]) == ["checkpoints/step_000002/COMPLETE"]
    newer = other / "checkpoints" / "step_000003"
    shutil.copytree(other / "checkpoints" / "step_000002", newer)
    go_on(run, model_weights=other)  # that run went on
    shutil.rmtree(other / "checkpoints" / "step_000002")
    go_on(run, model_weights=other)  # and keeps what this one began from no more
    moved = other.rename(tmp_path / "moved")
    with pytest.raises(DataError, match="step_000002/COMPLETE is missing"):
        go_on(run, {"model_weights": other}, model_weights=moved)


def test_an_older_run_noted_nothing(run, model, tmp_path):
    go_on(run, model_weights=model)
    assert (run / NOTES).is_file(), "from now on it is known"
    (run / NOTES).unlink()
    copy = Path(shutil.copytree(model, tmp_path / "copy"))
    go_on(run, {"model_weights": model}, model_weights=copy)  # both are there
    (run / NOTES).unlink()
    (copy / "config.json").write_text("CONTENT of config.json")
    with pytest.raises(DataError, match=r"copy/config\.json has other content"):
        go_on(run, {"model_weights": model}, model_weights=copy)
    shutil.rmtree(model)
    with pytest.raises(CheckpointError, match=f"put it at {model}, where a link will do"):
        go_on(run, {"model_weights": model}, model_weights=copy)


def test_damaged_notes_are_named(run, model):
    for text in ("[]", "{", '{"model.weights": {"path": "x", "files": {"a": [1, 2]}}}'):
        (run / NOTES).write_text(text)
        with pytest.raises(CheckpointError, match=r"inputs\.json is damaged"):
            go_on(run, model_weights=model)


def test_a_large_input_is_sampled(run, tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "WHOLE_BYTES", MIB)
    large, size = tmp_path / "large.bin", 40 * MIB
    with large.open("wb") as file:
        file.truncate(size)
    assert bytes_to_read([size]) == BLOCKS * BLOCK_BYTES == MIB
    begin(run, model_weights=large)
    assert json.loads((run / NOTES).read_text())["model.weights"]["files"][""][3] == sampled_checksum(large)
    for place in (0, size - 1, (size - BLOCK_BYTES) // 3 + 9):
        write_byte(large, place, b"x")
        with pytest.raises(DataError, match=r"large\.bin has other content"):
            go_on(run, model_weights=large)
        write_byte(large, place, b"\0")
    go_on(run, model_weights=large)


def write_byte(path: Path, place: int, byte: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        file.write(byte)


@pytest.mark.parametrize(
    ("what", "sizes", "ranks", "most"),
    [
        ("problems", [30 * MIB], 1, 30 * MIB),
        ("a small model", [900 * MIB], 1, GIB),
        ("671B: 163 shards of 8 GiB", [8 * GIB] * 163, 1, 163 * MIB),
        ("60 TB of text in 60,000 files", [GIB] * 60_000, 512, 120 * MIB),
        ("as much in a million files", [60 * MIB] * 1_000_000, 512, 2 * GIB),
    ],
)
def test_what_a_rank_reads_once_of_inputs_of_any_size(what, sizes, ranks, most):
    """At the first start, and of a copy. Every other start looks at each file once and reads none (see above)."""
    assert bytes_to_read(sizes) / ranks <= most
    assert bytes_to_read(sizes) <= max(WHOLE_BYTES, len(sizes) * BLOCKS * BLOCK_BYTES)
