"""Rows of a blend: what is in row i is decided by seed, sources and weights alone."""

from __future__ import annotations

import itertools
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_r1.data.fill_in_middle import MARKS, FilledDocuments, FillInMiddle, count_chosen
from megatron_r1.data.token_files import open_token_file
from megatron_r1.errors import ConfigError, DataError
from megatron_r1.mcore import host
from tests.one_rank import one_rank_world
from tests.token_sources import numbered_documents, with_tokens, write_source

host.activate("cpu")

from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_r1.mcore.blend_rows import BlendRows, WeightedPart, blend_index_bytes
from megatron_r1.mcore.source_rows import Filling, SourcePart, epoch_groups, order_of

LENGTH = 16


@pytest.fixture(scope="module", autouse=True)
def process_group():
    one_rank_world()


def part_of(prefix: str, share: tuple[float, float] = (0, 1)) -> SourcePart:
    file = open_token_file(prefix)
    return SourcePart(file, file.identify(), range(round(share[0] * file.documents), round(share[1] * file.documents)))


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> list[WeightedPart]:
    folder = tmp_path_factory.mktemp("sources")
    one = write_source(folder / "one", numbered_documents(60, 100))
    two = write_source(folder / "two", numbered_documents(30, 10_000), "uint16")
    return [WeightedPart(one, part_of(one), 3.0), WeightedPart(two, part_of(two), 1.0)]


def open_rows(parts, cache: Path, rows: int, seed: int = 1, length: int = LENGTH) -> BlendRows:
    blend = BlendRows(parts, length, seed, rows, cache)
    blend.build()
    blend.open()
    return blend


def take(blend: BlendRows, numbers) -> list[tuple[int, list[int]]]:
    return [(row.source, row.tokens.tolist()) for row in map(blend.read, numbers)]


def test_more_rows_and_other_files_of_the_same_data_go_on_with_the_same_order(sources, tmp_path):
    few, many = open_rows(sources, tmp_path / "a", 20), open_rows(sources, tmp_path / "a", 500)
    assert take(few, range(20)) == take(many, range(20))
    assert few.fingerprint == many.fingerprint
    assert take(open_rows(sources, tmp_path / "b", 20, seed=2), range(20)) != take(few, range(20))
    index = {path.name for path in (tmp_path / "a").iterdir()}
    moved = [WeightedPart(w.name, part_of(_copy(w.name, tmp_path)), w.weight) for w in sources]
    assert take(open_rows(moved, tmp_path / "a", 500), range(500)) == take(many, range(500))
    assert {path.name for path in (tmp_path / "a").iterdir()} == index, "the index made for the first place serves the other, too"


def _copy(prefix: str, folder: Path) -> str:
    for ending in (".bin", ".idx"):
        (folder / f"{Path(prefix).name}{ending}").write_bytes(Path(f"{prefix}{ending}").read_bytes())
    return str(folder / Path(prefix).name)


def test_every_epoch_takes_each_token_once(sources, tmp_path):
    part = sources[0].part
    per_epoch = (part.tokens - 1) // LENGTH
    blend = open_rows(sources[:1], tmp_path, 4 * per_epoch + 3)
    orders = []
    for epochs in ([0], [1], [2, 3]):
        first = sum(group.rows for group in epoch_groups(part.tokens, LENGTH, 10**4)[: min(epochs)])
        numbers = range(first, first + (len(epochs) * part.tokens - 1) // LENGTH)
        rows = [blend.read(number).tokens for number in numbers]
        targets = np.sort(np.concatenate([row[:-1] for row in rows]))
        unique, counts = np.unique(targets[targets != 2], return_counts=True)
        assert counts.max() <= len(epochs) and len(unique) >= part.tokens - 60 - LENGTH
        orders.append([row.tolist() for row in rows])
    assert orders[0] != orders[1]


def test_rows_say_where_their_documents_begin(sources, tmp_path):
    blend = open_rows(sources, tmp_path, 200)
    for row in map(blend.read, range(200)):
        file = sources[row.source].part.file
        assert len(row.tokens) == LENGTH + 1
        bounds = [*row.starts.tolist(), LENGTH + 1]
        for place, (number, (start, end)) in enumerate(zip(row.documents, itertools.pairwise(bounds), strict=True)):
            document, tokens = file.read(int(number)).tolist(), row.tokens[start:end].tolist()
            if place:
                assert document[: len(tokens)] == tokens
            else:
                assert tokens == document[document.index(tokens[0]) :][: len(tokens)]


def test_sources_come_by_their_weights_from_the_first_rows_on(sources, tmp_path):
    of = np.array([source for source, _ in take(open_rows(sources, tmp_path, 1000), range(1000))])
    for rows in (4, 40, 400, 1000):
        assert abs((of[:rows] == 1).sum() - rows / 4) <= 1
    assert (
        open_rows(sources, tmp_path, 1000).fingerprint
        != open_rows([sources[0], _weighted(sources[1], 2.0)], tmp_path, 9).fingerprint
    )
    doubled = [_weighted(part, 2 * part.weight) for part in sources]
    assert open_rows(doubled, tmp_path, 9).fingerprint == open_rows(sources, tmp_path, 9).fingerprint


def _weighted(part: WeightedPart, weight: float) -> WeightedPart:
    return WeightedPart(part.name, part.part, weight)


def test_parts_of_a_source_have_no_document_in_common(sources, tmp_path):
    name = sources[0].name
    seen = []
    for share in ((0, 0.8), (0.8, 1)):
        part = part_of(name, share)
        blend = open_rows([WeightedPart(name, part, 1.0)], tmp_path, 40)
        seen.append({int(number) for row in map(blend.read, range(40)) for number in row.documents})
        assert seen[-1] <= set(part.documents)
    assert not seen[0] & seen[1] and seen[1] == set(range(48, 60))


def test_a_later_blend_goes_on_where_each_source_was_left(sources, tmp_path):
    first = open_rows(sources, tmp_path, 37)
    ends = [first.ends()[order_of(weighted.part, LENGTH, 1)] for weighted in sources]
    rows = take(first, range(37))
    assert ends == [sum(source == number for source, _ in rows) for number in range(2)]
    begun = [replace(weighted, weight=w, first_row=n) for weighted, w, n in zip(sources, (1.0, 1.0), ends, strict=True)]
    then = open_rows(begun, tmp_path, 20)
    for number, weighted in enumerate(sources):
        alone = take(open_rows([replace(weighted, weight=1.0)], tmp_path, 60), range(60))
        found = [tokens for source, tokens in [*rows, *take(then, range(20))] if source == number]
        assert found == [tokens for _, tokens in alone[: len(found)]], "each source's rows one after the other, none twice"
    assert then.fingerprint != open_rows([replace(b, first_row=0) for b in begun], tmp_path, 20).fingerprint
    single = open_rows([replace(sources[0], first_row=5)], tmp_path, 9)
    assert single.ends() == {order_of(sources[0].part, LENGTH, 1): 14}
    assert take(single, range(9)) == take(open_rows(sources[:1], tmp_path, 14), range(5, 14))


def test_documents_with_their_middle_at_the_end_are_whole_in_rows_of_the_same_length(sources, tmp_path):
    tokenizer = with_tokens(*MARKS[0])
    fill = FillInMiddle(tokenizer, 0.4, 1, "one")
    fill.begin, fill.hole, fill.end = 20_001, 20_002, 20_003  # which no document holds
    part = sources[0].part
    count = count_chosen(fill, part.file.lengths, part.documents, 0, lambda: None)
    assert 15 < count < 35
    filled = replace(part, filling=Filling(fill, (), 2, count))
    assert filled.tokens == part.tokens + 3 * count
    weighted = [replace(sources[0], part=filled)]
    per_epoch = (filled.tokens - 1) // LENGTH
    blend = open_rows(weighted, tmp_path, 2 * per_epoch)
    documents = FilledDocuments(IndexedDataset(part.file.prefix), fill, 0, (), 2)
    seen = []
    for number in range(per_epoch):
        row = blend.read(number)
        assert len(row.tokens) == LENGTH + 1
        bounds = [*row.starts.tolist(), LENGTH + 1]
        for place, (document, (start, end)) in enumerate(zip(row.documents, itertools.pairwise(bounds), strict=True)):
            whole, tokens = documents.get(document).tolist(), row.tokens[start:end].tolist()
            assert tokens == whole[0 if place else whole.index(tokens[0]) :][: len(tokens)]
        seen += row.tokens[:-1].tolist()
    marks = [seen.count(mark) for mark in (fill.begin, fill.hole, fill.end)]
    assert all(count - 4 <= found <= count for found in marks), "but for what is left behind the last row"
    unique, counts = np.unique([token for token in seen if token not in (2, fill.begin, fill.hole, fill.end)], return_counts=True)
    assert counts.max() == 1 and len(unique) >= part.tokens - 60 - LENGTH, "nothing of a document is lost or twice"
    assert take(blend, range(9)) == take(open_rows(weighted, tmp_path / "b", 9), range(9))
    index = set(tmp_path.glob("rows-*"))
    plain = open_rows(sources[:1], tmp_path, 9)
    assert plain.fingerprint != blend.fingerprint and len({*tmp_path.glob("rows-*")} - index) == 1


def test_a_small_source_that_is_used_often_has_few_files():
    groups = epoch_groups(tokens=100, sequence_length=10, rows=10**6)
    assert len(groups) < 20 and groups[-1].first_row + groups[-1].rows >= 10**6
    assert [group.epochs for group in groups[:5]] == [1, 1, 2, 4, 8]


def test_the_index_of_fifteen_trillion_tokens_fits_a_disk(sources, tmp_path):
    rows = 14_800_000_000_000 // 4096
    assert 10 * rows + 12 * rows < 100e9, "which row is where, for V3's tokens"
    open_rows(sources, tmp_path, 10)
    headers = 128 * len(list(tmp_path.rglob("*.npy")))
    on_disk = sum(path.stat().st_size for path in tmp_path.rglob("*.npy")) - headers
    opened = BlendRows(sources, LENGTH, 1, 10, tmp_path)
    assert on_disk == blend_index_bytes([opened]) == blend_index_bytes([opened, opened]), "what they share counts once"


def test_what_a_killed_process_left_is_not_taken_for_an_index(sources, tmp_path):
    blend = BlendRows(sources, LENGTH, 1, 20, tmp_path)
    with pytest.raises(DataError, match="is not there on this node"):
        blend.open()
    (tmp_path / "rows-0.tmp-1").mkdir()
    blend.build()
    assert not (tmp_path / "rows-0.tmp-1").exists()
    left = next(tmp_path.glob("rows-*"))
    for path in left.glob("*shuffle_index.npy"):
        path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(DataError, match="the index cannot be read"):
        blend.open()


class _Runs:
    """What a pickle of it does where it is loaded."""

    def __reduce__(self):
        return pytest.fail, ("a file of the index was run",)


@pytest.mark.parametrize("of", ["rows-*/*-document_index.npy", "rows-*/*-sample_index.npy", "blend-*/*-dataset_sample_index.npy"])
def test_an_index_that_somebody_else_spoilt_is_told_and_not_run(sources, tmp_path, of):
    blend = open_rows(sources, tmp_path, 20)
    path = next(tmp_path.glob(of))
    whole = path.read_bytes()
    for spoil in (
        lambda: path.write_bytes(b""),
        lambda: path.write_bytes(pickle.dumps(_Runs())),
        lambda: np.save(path, np.array([_Runs()], dtype=object), allow_pickle=True),
        lambda: np.save(path, np.load(path)[:-1]),
        lambda: np.save(path, np.load(path).astype(np.float32)),
        lambda: path.with_name(f"a-{path.name}").write_bytes(whole),
        path.unlink,
    ):
        path.write_bytes(whole)
        spoil()
        with pytest.raises(DataError, match="the index cannot be read .*: remove the folder") as caught:
            blend.open()
        assert "\n" not in str(caught.value) and str(path.parent) in str(caught.value)
        path.with_name(f"a-{path.name}").unlink(missing_ok=True)
    path.write_bytes(whole)
    blend.open()


def test_a_folder_of_indices_that_cannot_be_written_is_told(sources, tmp_path):
    (tmp_path / "file").write_text("")
    for cache in (tmp_path / "file", tmp_path / "file/more", Path("/proc/nowhere"), tmp_path / ("x" * 300)):
        with pytest.raises(ConfigError, match=r"^data\.index_cache .* cannot be written \("):
            BlendRows(sources, LENGTH, 1, 20, cache).build()


def test_memory_does_not_grow_with_the_data(tmp_path):
    tokens = 1 << 20
    prefix = write_source(tmp_path / "large", [[0]] * 1024, "uint16")
    lengths = np.full(1024, tokens, np.int32)
    places = np.arange(1024, dtype=np.int64) * 2 * tokens
    with (tmp_path / "large.idx").open("r+b") as index:
        index.seek(34)
        index.write(lengths.tobytes() + places.tobytes())
    with (tmp_path / "large.bin").open("r+b") as file:
        file.truncate(2 << 30)  # holes take no disk
    parts = [WeightedPart(prefix, part_of(prefix), 1.0)]
    open_rows(parts, tmp_path / "index", 1000, length=4096)
    before = _own_memory()
    blend = BlendRows(parts, 4096, 1, 1000, tmp_path / "index")
    blend.open()
    for number in range(1000):
        assert len(blend.read(number).tokens) == 4097
    assert _own_memory() - before < 4 << 20, "of 2 GB of tokens and 3 MB of indices"


def _own_memory() -> int:
    """Bytes that this process does not share with files."""
    return 1024 * next(
        int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")
    )
