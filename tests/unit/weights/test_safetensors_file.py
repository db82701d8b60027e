"""The safetensors format: what we write is read by safetensors itself, and broken files are told apart on one line."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from megatron_r1.errors import CheckpointError, ConversionError
from megatron_r1.runtime import files
from megatron_r1.weights import safetensors_file
from megatron_r1.weights.safetensors_file import HfTensor, SafetensorsFile, SafetensorsWriter, plan_files
from tests.random_weights import write_safetensors

TENSORS = {
    "odd": torch.randn(3).bfloat16(),  # would leave what follows unaligned
    "matrix": torch.randn(2, 3),
    "scalar": torch.tensor(2.0),
    "empty": torch.zeros(0, 4),
    "codes": torch.randn(3, 5).to(torch.float8_e4m3fn),
    "strided": torch.randn(6, 4).half().t(),
}


def announced(tensors: dict[str, torch.Tensor]) -> list[HfTensor]:
    return [HfTensor(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]


def bits(tensor: torch.Tensor) -> list[int]:
    return tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


def test_safetensors_reads_what_is_written(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    size = write_safetensors(path, announced(TENSORS), reversed(TENSORS.items()))
    assert [file.name for file in tmp_path.iterdir()] == [path.name] and path.stat().st_size == size
    with safe_open(path, framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"} and set(opened.keys()) == set(TENSORS)
        for name, tensor in TENSORS.items():
            got = opened.get_tensor(name)
            assert got.dtype is tensor.dtype and got.shape == tensor.shape and bits(got) == bits(tensor)
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0


def test_what_safetensors_writes_is_read(tmp_path: Path) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in TENSORS.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    opened = SafetensorsFile(tmp_path / "model.safetensors")
    assert set(opened.tensors) == set(tensors)
    for name, tensor in tensors.items():
        stored, target = opened.tensors[name], torch.empty_like(tensor)
        opened.read_into(target, stored.offset)
        assert stored.shape == tuple(tensor.shape) and stored.nbytes == tensor.nbytes and bits(target) == bits(tensor)


def test_long_reads_and_writes_go_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_PIECE", 1000)
    monkeypatch.setattr(safetensors_file, "_LARGEST_READ", 1000)
    tensor, target = torch.randn(50, 51), torch.empty(50, 51)
    write_safetensors(tmp_path / "file", announced({"x": tensor}), [("x", tensor)])
    opened = SafetensorsFile(tmp_path / "file")
    opened.read_into(target, opened.tensors["x"].offset)
    assert torch.equal(target, tensor)


def test_values_must_be_the_announced_ones(tmp_path: Path) -> None:
    ones = torch.ones(2, 3)
    wanted = announced({"a": ones, "b": ones})
    for values, message in (
        ([("a", ones)], "lacks 1 tensors, the first is b"),
        ([("a", ones), ("a", ones)], "tensor a does not belong into .* or is there already"),
        ([("c", ones)], "tensor c does not belong into"),
        ([("a", ones.t())], r"tensor a for .* is \[3, 2\] torch.float32, announced was \[2, 3\] torch.float32"),
        ([("a", ones.half())], r"tensor a for .* is \[2, 3\] torch.float16, announced was"),
    ):
        with pytest.raises(ConversionError, match=message):
            write_safetensors(tmp_path / "file", wanted, values)
    with pytest.raises(ConversionError, match="would hold a tensor twice"):
        SafetensorsWriter(tmp_path / "file", wanted + wanted[:1])
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_file_never_appears(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), SafetensorsWriter(tmp_path / "file", announced(TENSORS)) as writer:
        writer.write("odd", TENSORS["odd"])
        assert [path.name.startswith("file.tmp-") for path in tmp_path.iterdir()] == [True]
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(1000), "b": torch.zeros(10_000)}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # fails where a full disk would
    try:
        with pytest.raises(CheckpointError, match=r"/file cannot be written: File too large$"):
            write_safetensors(tmp_path / "file", announced(tensors), tensors.items())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(CheckpointError, match="nowhere/file cannot be written: No such file or directory"):
        write_safetensors(tmp_path / "nowhere" / "file", announced(tensors), tensors.items())


def file_of(header: dict | bytes, data: bytes, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype: str, shape: list[int], start: int, end: int) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    "content",
    {
        "empty": b"",
        "huge header": file_of(b"{}", b"", 2**63),
        "header past the end": file_of(b"{}", b"", 10),
        "not JSON": file_of(b"{]", b""),
        "not an object": file_of(b"[]", b""),
        "truncated": file_of({"a": entry("F32", [2], 0, 8)}, bytes(7)),
        "bytes too many": file_of({"a": entry("F32", [2], 0, 8)}, bytes(9)),
        "overlap": file_of({"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 4, 12)}, bytes(12)),
        "size is not the shape's": file_of({"a": entry("F32", [3], 0, 8)}, bytes(8)),
        "huge shape": file_of({"a": entry("F32", [2**62, 4], 0, 8)}, bytes(8)),
        "backwards": file_of({"a": entry("F32", [2], 8, 0)}, bytes(8)),
        "negative": file_of({"a": entry("F32", [2], -8, 0)}, bytes(8)),
        "unknown dtype": file_of({"a": entry("F31", [2], 0, 8)}, bytes(8)),
    }.items(),
    ids=lambda content: content[0],
)
def test_broken_files_are_one_line(tmp_path: Path, content: tuple[str, bytes]) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content[1])
    with pytest.raises(CheckpointError, match=f"{path} is not a readable safetensors file: ") as caught:
        SafetensorsFile(path)
    assert "\n" not in str(caught.value) and "pickle" not in str(caught.value)


def test_missing_and_pickled_files_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no such file"):
        SafetensorsFile(tmp_path / "nowhere")
    for new_format in (True, False):
        torch.save({}, tmp_path / "model.safetensors", _use_new_zipfile_serialization=new_format)
        with pytest.raises(CheckpointError, match="it is a pickle under this name, which is never loaded; convert it"):
            SafetensorsFile(tmp_path / "model.safetensors")


def test_a_file_cut_off_while_open_is_named(tmp_path: Path) -> None:
    path, target = tmp_path / "model.safetensors", torch.empty(100)
    save_file({"x": torch.zeros(100)}, path)
    opened = SafetensorsFile(path)
    with path.open("r+b") as file:
        file.truncate(opened.tensors["x"].offset + 8)
    with pytest.raises(CheckpointError, match=f"{path} was cut off while it was read"):
        opened.read_into(target, opened.tensors["x"].offset)


def test_files_are_planned_as_published_ones_are_named() -> None:
    tensors = [HfTensor(str(i), (size,), torch.bfloat16) for i, size in enumerate((40, 10, 1, 200, 30, 20))]
    files = plan_files(tensors, max_shard_bytes=100)
    assert [[tensor.name for tensor in planned] for planned in files.values()] == [["0", "1"], ["2"], ["3"], ["4", "5"]]
    assert list(files)[:2] == ["model-00001-of-00004.safetensors", "model-00002-of-00004.safetensors"]
    assert tensors[0].nbytes == 80


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        *[(dtype, float(v)) for dtype in (torch.float32, torch.bfloat16, torch.float16) for v in ("nan", "inf", "-inf")],
        (torch.float8_e4m3fn, float("nan")),
    ],
)
def test_what_is_not_finite_is_not_written(tmp_path, dtype, value):
    tensors = {"good": torch.full((300,), 2.0).to(dtype), "bad": torch.full((300,), -2.0).to(dtype)}
    write_safetensors(tmp_path / "good", announced(tensors), tensors.items())
    tensors["bad"][123] = torch.tensor(value).to(dtype)
    with pytest.raises(ConversionError, match=f"tensor bad for .*file holds NaN or infinite values, as {dtype}"):
        write_safetensors(tmp_path / "file", announced(tensors), tensors.items())
    assert [path.name for path in tmp_path.iterdir()] == ["good"]


def test_the_largest_numbers_are_finite(tmp_path):
    for dtype in (torch.float32, torch.bfloat16, torch.float8_e4m3fn):
        limits = torch.finfo(dtype)
        tensors = {
            "x": torch.tensor([limits.max, limits.min, limits.tiny, 0.0, -0.0]).to(dtype),
            "empty": torch.zeros(0, dtype=dtype),
        }
        write_safetensors(tmp_path / str(dtype), announced(tensors), tensors.items())
