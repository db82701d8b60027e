"""The index of a checkpoint is read as data: nothing in it runs, whatever it is made of."""

from __future__ import annotations

import io
import os
import pickle
import time
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from megatron_r1.errors import CheckpointError
from megatron_r1.runtime.checkpoint_index import load_plain, read_index


class Evil:
    """Runs a function when it is unpickled."""

    def __init__(self, function, *arguments) -> None:
        self.what = function, arguments

    def __reduce__(self):
        return self.what


def metadata(boxes: int = 2, dtype: torch.dtype = torch.bfloat16) -> Metadata:
    """An index as Megatron-Core writes one, with the plans that it keeps in it."""
    size = torch.Size((boxes * 4, 3))
    chunks = [ChunkStorageMetadata(torch.Size((4 * i, 0)), torch.Size((4, 3))) for i in range(boxes)]
    properties = TensorProperties(dtype=dtype)
    places = {MetadataIndex("w", chunk.offsets, i): _StorageInfo("__0_0.distcp", 100 * i, 100) for i, chunk in enumerate(chunks)}
    places[MetadataIndex("rng/shard_0_1")] = _StorageInfo("__0_1.distcp", 0, 10)
    index = Metadata(
        {"w": TensorStorageMetadata(properties, size, chunks), "rng/shard_0_1": BytesStorageMetadata()},
        planner_data={"w": ("w",)}, storage_data=places, storage_meta=StorageMeta("folder", "save"), version="1.0.0",
    )  # fmt: skip
    item = WriteItem(MetadataIndex("w"), WriteItemType.SHARD, tensor_data=TensorWriteData(chunks[0], properties, size))
    index.all_local_plans = [SavePlan([item])]
    return index


def write(folder: Path, index: object, protocol: int = 4) -> Path:
    path = folder / ".metadata"
    path.write_bytes(index if isinstance(index, bytes) else pickle.dumps(index, protocol))
    return path


def refused(path: Path, match: str) -> None:
    with pytest.raises(CheckpointError, match=match) as caught:
        read_index(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.uint8])
def test_it_says_what_torch_reads_from_it(tmp_path, protocol, dtype):
    path = write(tmp_path, metadata(dtype=dtype), protocol)
    ours, theirs = read_index(path), FileSystemReader(tmp_path).read_metadata()
    assert ours.state_dict_metadata == theirs.state_dict_metadata and ours.version == "1.0.0"
    assert ours.storage_data.keys() == theirs.storage_data.keys()
    for key, place in theirs.storage_data.items():
        found = ours.storage_data[key]
        assert (found.relative_path, found.offset, found.length) == (place.relative_path, place.offset, place.length)


def hostile(marker: Path) -> dict[str, object]:
    """Indexes that make a folder where they are unpickled."""
    run = Evil(os.mkdir, str(marker))
    inside = metadata()
    inside.planner_data = {"w": run}
    deep = metadata()
    deep.state_dict_metadata["w"].properties = Evil(eval, f"__import__('os').mkdir({str(marker)!r})")
    key = metadata()
    key.storage_data[Evil(exec, f"import os; os.mkdir({str(marker)!r})")] = 1
    call = b"X%c\x00\x00\x00%s\x85R." % (len(str(marker)), str(marker).encode())
    dotted = b"\x80\x04\x8c\x29torch.distributed.checkpoint.metadata\x8c\x0bos.mkdir..\x93" + call
    instance = b"(X%c\x00\x00\x00%siposix\nmkdir\n." % (len(str(marker)), str(marker).encode())
    return {
        "alone": run, "beside": inside, "instead": deep, "as a key": key, "in a list": [metadata(), run],
        "protocol 0": b"cposix\nmkdir\n" + call, "instance": instance, "dotted": dotted, "torch's own": b"ctorch\nload\n" + call,
        "through a known module": b"ctorch.distributed.checkpoint.metadata\nos.mkdir\n" + call,
        "through a known module of torch": b"ctorch.serialization\nload\n" + call,
        "builtins": Evil(getattr, "x", "upper"), "after the index": Evil(print, run, metadata()),
    }  # fmt: skip


@pytest.mark.parametrize("kind", hostile(Path("x")))
def test_nothing_in_it_runs(tmp_path, kind):
    marker = tmp_path / "ran"
    path = write(tmp_path, hostile(marker)[kind])
    refused(path, "which no checkpoint needs|broken")
    assert not marker.exists()


def test_the_hostile_files_do_run_where_nobody_looks(tmp_path):
    """Else the test above shows nothing."""
    write(tmp_path, hostile(tmp_path / "ran")["beside"])
    FileSystemReader(tmp_path).read_metadata()
    assert (tmp_path / "ran").is_dir()


def test_it_changes_no_class_of_torch(tmp_path):
    """A pickle may also set attributes of a class that it names."""
    before = dict(vars(Metadata))
    write(tmp_path, b"\x80\x02ctorch.distributed.checkpoint.metadata\nMetadata\nN}X\x04\x00\x00\x00evilK\x01s\x86b.")
    with pytest.raises(CheckpointError):
        read_index(tmp_path / ".metadata")
    assert dict(vars(Metadata)) == before


def changed(change) -> Metadata:
    index = metadata()
    change(index, index.state_dict_metadata["w"], index.storage_data[MetadataIndex("w", (0, 0))])
    return index


@pytest.mark.parametrize(
    "change, problem",
    [
        (lambda index, w, place: setattr(place, "relative_path", "../../etc/passwd"), "expected a file of the folder"),
        (lambda index, w, place: setattr(place, "relative_path", "/etc/passwd"), "expected a file of the folder"),
        (lambda index, w, place: setattr(place, "relative_path", ".."), "expected a file of the folder"),
        (lambda index, w, place: setattr(place, "relative_path", b"x"), "a bytes where a name belongs"),
        (lambda index, w, place: setattr(place, "offset", -1), "whole numbers from 0"),
        (lambda index, w, place: setattr(place, "length", 1 << 70), "whole numbers from 0"),
        (lambda index, w, place: setattr(place, "length", 1.5), "whole numbers from 0"),
        (lambda index, w, place: setattr(place, "transform_descriptors", ["zstd"]), "packed"),
        (lambda index, w, place: setattr(w, "size", torch.Size((1 << 40, 1 << 40))), "has shape"),
        (lambda index, w, place: setattr(w, "size", (8, "3")), "whole numbers from 0"),
        (lambda index, w, place: setattr(w, "size", torch.Size((4, 3))), "has a box of"),
        (lambda index, w, place: setattr(w, "chunks", w.chunks * 2), "overlap"),
        (lambda index, w, place: setattr(w.chunks[0], "sizes", torch.Size((4, 3, 1))), "has a box of"),
        (lambda index, w, place: setattr(w.chunks[0], "sizes", torch.Size((1 << 61, 1 << 61))), "has a box of"),
        (lambda index, w, place: setattr(w, "properties", 5), "no attribute"),
        (lambda index, w, place: setattr(w.properties, "dtype", 5), "no dtype"),
        (lambda index, w, place: setattr(index, "storage_data", None), "where a mapping belongs"),
        (lambda index, w, place: setattr(index, "state_dict_metadata", [1]), "where a mapping belongs"),
        (lambda index, w, place: index.state_dict_metadata.update({7: w}), "where a name belongs"),
        (lambda index, w, place: index.state_dict_metadata.update(x=index), "where a TensorStorageMetadata belongs"),
    ],
)
def test_what_cannot_be_is_one_line(tmp_path, change, problem):
    refused(write(tmp_path, changed(change)), problem)


def test_broken_bytes_are_one_line(tmp_path):
    whole = pickle.dumps(metadata(), 4)
    for cut in range(0, len(whole), 7):
        refused(write(tmp_path, whole[:cut]), "broken")
    for place in range(0, len(whole), 11):
        spoilt = bytearray(whole)
        spoilt[place] ^= 0x55
        try:
            read_index(write(tmp_path, bytes(spoilt)))  # some bytes are names of tensors
        except CheckpointError as error:
            assert "\n" not in str(error)
    for text in (
        b"",
        b"\x80\x04]\x8f.",
        pickle.dumps([]),
        pickle.dumps("x"),
        b"\x80\x04\x8e" + b"\xff" * 7 + b"\x0f.",
        b"(" * 99999,
    ):
        refused(write(tmp_path, text), "broken")
    refused(tmp_path / "nowhere", "cannot be read")


def test_plain_values_load_and_nothing_else(tmp_path):
    def saved(value: object) -> io.BytesIO:
        file = io.BytesIO()
        torch.save(value, file)
        file.seek(0)
        return file

    plain = [{"torch": torch.get_rng_state(), "megatron": {"a": torch.zeros(3)}, "n": 1, "t": "x", "none": None}]
    loaded = load_plain(saved(plain))
    assert torch.equal(loaded[0]["torch"], plain[0]["torch"]) and loaded[0]["n"] == 1
    for value in (
        Evil(os.mkdir, str(tmp_path / "ran")),
        [Evil(eval, f"__import__('os').mkdir({str(tmp_path / 'ran')!r})")],
        os.system,
    ):
        with pytest.raises(pickle.UnpicklingError):
            load_plain(saved(value))
    for text in (b"", b"PK\x03\x04", b"\x80\x02cposix\nsystem\n.", b"x" * 1000):
        with pytest.raises(pickle.UnpicklingError):
            load_plain(io.BytesIO(text))
    assert not (tmp_path / "ran").exists()


def test_its_time_grows_with_the_boxes_alone(tmp_path):
    """V3 has 92,000 tensors. On 1,024 ranks it has at most 400,000 boxes, with its optimizer 1,200,000: 12 s once at a start."""
    boxes = 10_000
    path = write(tmp_path, metadata(boxes))
    started = time.process_time()
    read_index(path)
    middle = time.process_time()
    FileSystemReader(tmp_path).read_metadata()
    assert middle - started < 5 * (time.process_time() - middle), "torch's own reader, which checks nothing"
