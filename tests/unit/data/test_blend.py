"""Rows of a blend as the trainer gets them: the same ones in the same order, however they are shared out."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from megatron_r1.config.data import DataConfig
from megatron_r1.data.blend import BlendedRows, TokenRow
from megatron_r1.data.prefetch import TOKEN_BYTES
from megatron_r1.errors import DataError
from megatron_r1.training.pretrain import own_rows
from tests.paths import ROOT
from tests.token_sources import numbered_documents

LENGTH, EOS = 16, 2


class Numbered:
    """Rows cut end to end from numbered documents."""

    sequence_length, fingerprint, sources = LENGTH, "f", ["one"]

    def __init__(self) -> None:
        documents = numbered_documents(200, 5)
        self.tokens, self.lengths = np.concatenate(documents), np.array([len(document) for document in documents])
        self.read_numbers: list[int] = []

    def read(self, number: int) -> TokenRow:
        self.read_numbers.append(number)
        begin = number * LENGTH
        ends = np.cumsum(self.lengths)
        first, last = np.searchsorted(ends, [begin, begin + LENGTH], side="right")
        starts = (ends - self.lengths)[first : last + 1] - begin
        return TokenRow(self.tokens[begin : begin + LENGTH + 1], 0, np.arange(first, last + 1), np.maximum(starts, 0))


def blended(rows: Numbered | None = None, **settings) -> BlendedRows:
    return BlendedRows(rows or Numbered(), eos_id=EOS, vocab_size=10_000, **settings)


def test_a_row_is_its_tokens_with_the_next_ones_as_labels():
    batch = blended().micro_batch([3, 5])
    tokens = Numbered().tokens
    for row, number in enumerate((3, 5)):
        assert batch.token_ids[row].tolist() == tokens[number * LENGTH : (number + 1) * LENGTH].tolist()
        assert batch.labels[row].tolist() == tokens[number * LENGTH + 1 : (number + 1) * LENGTH + 1].tolist()
    assert batch.cu_seqlens is None and batch.loss_mask.eq(1).all() and batch.loss_mask.dtype == torch.float32
    assert torch.equal(batch.position_ids, torch.arange(LENGTH).repeat(2, 1))
    assert blended(first_row=3).micro_batch([0, 2]).token_ids.equal(batch.token_ids)


@pytest.mark.parametrize(("ranks", "micro_batch_size"), [(1, 8), (1, 2), (2, 4), (2, 1), (4, 2)])
def test_every_layout_sees_the_same_rows_and_a_rank_reads_its_own_alone(ranks, micro_batch_size):
    expected = blended().micro_batch(range(16, 24)).token_ids
    parts, read = {}, []
    for rank in range(ranks):
        source = Numbered()
        rows = blended(source)
        for number, indices in enumerate(own_rows(range(16, 24), micro_batch_size, rank, ranks)):
            parts[number * ranks + rank] = rows.micro_batch(indices).token_ids
        assert len(source.read_numbers) == 8 // ranks
        read += source.read_numbers
    assert torch.cat([parts[number] for number in sorted(parts)]).equal(expected)
    assert sorted(read) == list(range(16, 24))


def test_masked_documents_are_the_same_rows_with_a_boundary_at_every_document_and_row():
    rows, masked = blended(), blended(mask_documents=True)
    plain, packed = rows.micro_batch(range(8)), masked.micro_batch(range(8))
    for name in ("token_ids", "labels", "loss_mask"):
        assert getattr(packed, name).equal(getattr(plain, name).view(1, -1))
    bounds = packed.cu_seqlens.tolist()
    assert packed.cu_seqlens.dtype == torch.int32 and bounds[0] == 0 and bounds[-1] == 8 * LENGTH
    tokens = packed.token_ids[0].tolist()
    assert set(bounds[1:-1]) == {p for p in range(1, 8 * LENGTH) if p % LENGTH == 0 or tokens[p - 1] == EOS}
    assert packed.sample_ids == list(range(len(bounds) - 1))
    for start, end in itertools.pairwise(bounds):
        assert packed.position_ids[0, start:end].tolist() == list(range(end - start))


def test_documents_without_an_end_of_sequence_are_kept_apart_by_the_index():
    batch = BlendedRows(Numbered(), eos_id=9_999, vocab_size=10_000, mask_documents=True).micro_batch(range(4))
    assert batch.cu_seqlens.equal(blended(mask_documents=True).micro_batch(range(4)).cu_seqlens)


def test_a_rank_that_needs_no_tokens_reads_none():
    source = Numbered()
    rows = blended(source)
    rows.reads = False
    batch, whole = rows.micro_batch([1, 2]), blended().micro_batch([1, 2])
    assert not source.read_numbers and batch.token_ids.shape == whole.token_ids.shape
    assert batch.loss_mask.equal(whole.loss_mask) and batch.position_ids.equal(whole.position_ids)
    assert rows.name_of(batch, 1, 3) == blended().name_of(whole, 1, 3)
    masked = blended(source, mask_documents=True, reads=False).micro_batch([1, 2])
    assert masked.cu_seqlens.equal(blended(mask_documents=True).micro_batch([1, 2]).cu_seqlens), "every stage knows the boundaries"


@pytest.mark.parametrize("mask", [False, True])
def test_a_place_is_named_by_its_document(mask):
    source = Numbered()
    rows = blended(source, mask_documents=mask)
    batch, ends = rows.micro_batch([7, 9]), np.cumsum(source.lengths)
    for row, number in enumerate((7, 9)):
        for position in range(LENGTH):
            document = int(np.searchsorted(ends, number * LENGTH + position, side="right")) + 1
            place = (0, row * LENGTH + position) if mask else (row, position)
            assert rows.name_of(batch, *place) == f"one, document {document}"


def test_a_token_that_the_tokenizer_does_not_have_is_told_with_its_document():
    rows = BlendedRows(Numbered(), eos_id=EOS, vocab_size=50, mask_documents=False)
    rows.micro_batch([0])
    with pytest.raises(DataError, match=r"^one, documents \d+, \d+.*: holds token \d+, and the tokenizer has 50"):
        rows.micro_batch([0, 5])


def test_what_is_saved_says_which_order_it_was():
    rows = blended()
    state = rows.state_dict()
    rows.micro_batch([0, 1])
    assert rows.state_dict() == state
    rows.load_state_dict(state)
    for other in ({"blend": "other"}, {}):
        with pytest.raises(DataError, match="data.blend"):
            rows.load_state_dict(other)


def test_what_a_rank_of_a_large_job_reads_and_holds():
    """docs/cluster.md, of V3's updates over 512 ranks with 16 pipeline stages."""
    rows, length, held = 15_360 // (512 // 16), 4096, DataConfig().read_ahead + 2
    for mask, reads, of_token in ((False, True, 28), (False, False, 12), (True, True, TOKEN_BYTES)):
        source = Numbered()
        batch = blended(source, reads=reads, mask_documents=mask).micro_batch(range(8))
        arrays = (batch.token_ids, batch.labels, batch.loss_mask, batch.position_ids, batch.documents)
        stores = {array.untyped_storage().data_ptr(): array.untyped_storage().nbytes() for array in arrays}
        assert len(source.read_numbers) == 8 * reads
        assert 0 <= sum(stores.values()) - of_token * 8 * LENGTH <= 8 * (8 + 1), "and a number a row"
    page = (ROOT / "docs/cluster.md").read_text(encoding="utf-8")
    assert f"is {rows} rows: {rows * (length + 1) * 4 / 1e6:.1f} MB that a rank" in page
    assert f"and {held * rows * length * 28 / 1e6:.0f} MB that it holds" in page
    assert f"{22 * 14_800_000_000_000 // length / 1e9:.0f} GB for 14.8T tokens" in page
