"""The pieces of the converter that need no Megatron-Core: cutting, covering, data files and work folders."""

from __future__ import annotations

import json

import pytest
import torch
import xxhash

from megatron_r1.conversion.parts import cut, part_bytes, read_ahead
from megatron_r1.conversion.torch_dist import DataFile, StoredTensors, write_metadata
from megatron_r1.conversion.work_folder import WorkFolder
from megatron_r1.errors import CheckpointError, ConversionError
from megatron_r1.mcore.pieces import Piece, Shards, check_cover
from megatron_r1.weights.mapping import model_entries
from tests.random_weights import qwen2_architecture

ARCH = qwen2_architecture()


def whole_pieces() -> list[Piece]:
    """Every entry in one piece."""
    return [
        Piece(i, e.megatron[0], e.full_shape, (0,) * len(e.full_shape), e.full_shape) for i, e in enumerate(model_entries(ARCH))
    ]


def test_parts_are_bounded_and_hold_every_item_once():
    sizes = [3, 3, 9, 1, 1, 1, 1]
    assert cut(sizes, 4) == [range(1), range(1, 2), range(2, 3), range(3, 7)]
    assert cut(sizes, 100) == [range(7)]
    assert cut([], 4) == []
    assert part_bytes(10, 10**9) == 32 << 20 and part_bytes(10**15, 10**9) == 10**9 and part_bytes(64 << 30, 1 << 40) == 1 << 30


def test_read_ahead_keeps_the_order_and_raises_what_reading_raises():
    assert list(read_ahead(lambda x: 10 // x, [1, 2, 5])) == [(1, 10), (2, 5), (5, 2)]
    with pytest.raises(ZeroDivisionError):
        list(read_ahead(lambda x: 10 // x, [1, 0]))


def test_whole_pieces_cover_the_model():
    check_cover(Shards(whole_pieces()), ARCH)


@pytest.mark.parametrize("where", [0, 5, -1])
def test_a_missing_piece_is_named(where):
    pieces = whole_pieces()
    lost = pieces.pop(where)
    with pytest.raises(ConversionError, match=f"{model_entries(ARCH)[lost.entry].name} is not held whole"):
        check_cover(Shards(pieces), ARCH)


def test_a_piece_that_two_ranks_store_is_named():
    pieces = whole_pieces()
    halves = [pieces[0]._replace(shape=(pieces[0].shape[0] // 2, pieces[0].shape[1]))] * 2
    with pytest.raises(ConversionError, match="is not held whole"):
        check_cover(Shards([*halves, *pieces[1:]]), ARCH)
    with pytest.raises(ConversionError, match="is held more than once"):
        check_cover(Shards([*halves[:1], *pieces]), ARCH)


def test_a_shape_that_the_table_does_not_have_is_named():
    pieces = whole_pieces()
    pieces[0] = pieces[0]._replace(global_shape=(7, 7))
    with pytest.raises(ConversionError, match=r"embed_tokens.weight has shape \[7, 7\]"):
        check_cover(Shards(pieces), ARCH)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_data_file_holds_boxes_that_torch_and_we_read(tmp_path, dtype):
    whole = torch.randn(6, 400).to(dtype)
    experts = torch.randn(3, 4, 5).to(dtype)
    with DataFile(tmp_path / "a.distcp") as file:
        file.add("w", (6, 400), (0, 0), whole[:2])  # rows of a larger storage, which must not be saved whole
        file.add("w", (6, 400), (2, 0), whole[2:, :100])
        file.add("w", (6, 400), (2, 100), whole[2:, 100:])
        for e in range(3):
            file.add("e", (3, 4, 5), (e, 0, 0), experts[e : e + 1])
        file.save([None])
    size = (tmp_path / "a.distcp").stat().st_size
    assert file.bytes == size < 2 * (whole.nbytes + experts.nbytes) + 12000
    assert file.checksum() == xxhash.xxh3_128((tmp_path / "a.distcp").read_bytes()).hexdigest()
    write_metadata(tmp_path, file.chunks)
    stored = StoredTensors(tmp_path)
    assert stored.names() == {"w", "e"} and stored.shape("e") == (3, 4, 5) and stored.dtype("w") is dtype
    assert torch.equal(stored.read("w"), whole) and torch.equal(stored.read("e"), experts)
    assert all(torch.equal(stored.read("e", (e,)), experts[e]) for e in range(3))
    with pytest.raises(CheckpointError, match="has no tensor v"):
        stored.read("v")


def test_what_a_data_file_lacks_or_lost_is_named(tmp_path):
    with DataFile(tmp_path / "a.distcp") as file:
        file.add("w", (4, 2), (0, 0), torch.ones(3, 2))
    write_metadata(tmp_path, file.chunks)
    with pytest.raises(CheckpointError, match="only 6 elements of tensor w"):
        StoredTensors(tmp_path).read("w")
    (tmp_path / "a.distcp").write_bytes(b"x" * file.bytes)
    with pytest.raises(CheckpointError, match=r"tensor w in .*a\.distcp cannot be read"):
        StoredTensors(tmp_path).read("w")
    (tmp_path / "a.distcp").unlink()
    with pytest.raises(CheckpointError, match=r"a\.distcp cannot be read: No such file"):
        StoredTensors(tmp_path).read("w")
    (tmp_path / ".metadata").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="metadata is broken"):
        StoredTensors(tmp_path)


def test_a_data_file_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), DataFile(tmp_path / "a.distcp") as file:
        file.add("w", (2, 2), (0, 0), torch.ones(2, 2))
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_work_folder_goes_on_with_the_same_conversion_only(tmp_path):
    out, never = tmp_path / "out", lambda folder: False
    work = WorkFolder(out, {"from": "a"}, never)
    work.add_note("part", {"bytes": 3})
    again = WorkFolder(out, {"from": "a"}, never)
    assert again.note("part") == {"bytes": 3} and again.note("other") is None
    with pytest.raises(ConversionError, match=r"remainder of another conversion \(from differ\)"):
        WorkFolder(out, {"from": "b"}, never)
    work.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(ConversionError, match="is there already"):
        WorkFolder(out, {"from": "a"}, lambda folder: True)


def test_a_work_folder_stopped_while_it_was_renamed_goes_on(tmp_path):
    work = WorkFolder(tmp_path / "out", {"from": "a"}, lambda folder: False)
    work.folder.rename(work.out)
    assert WorkFolder(tmp_path / "out", {"from": "a"}, lambda folder: False).folder.is_dir()
    assert not work.out.exists()


def test_a_folder_of_unknown_origin_is_in_the_way(tmp_path):
    (tmp_path / ".tmp-out").mkdir()
    with pytest.raises(ConversionError, match="is in the way"):
        WorkFolder(tmp_path / "out", {}, lambda folder: False)


def test_space_is_checked(tmp_path):
    work = WorkFolder(tmp_path / "out", {}, lambda folder: False)
    with pytest.raises(ConversionError, match=r"needs 1000000.00 GB more on a disk that has [\d.]+ GB free"):
        work.require_space(10**15)
    assert json.loads((tmp_path / ".tmp-out.notes/conversion.json").read_text()) == {}
