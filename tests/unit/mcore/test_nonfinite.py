"""What is looked at for NaN and infinity; `tests/pipeline/test_nonfinite.py` has whole updates."""

from __future__ import annotations

import torch

from megatron_r1.mcore import host

host.activate("cpu")

from megatron_r1.mcore.nonfinite import blocks_of, doubt_of


def test_weights_side_by_side_are_one_block() -> None:
    buffer, alone = torch.zeros(20), torch.ones(3)
    weights = [buffer[2:6].view(2, 2), buffer[8:11], torch.nn.Parameter(buffer[15:16]), alone]
    blocks = blocks_of(weights)
    assert [block.shape for block in blocks] == [(14,), (3,)] and blocks[0].data_ptr() == weights[0].data_ptr()
    assert doubt_of(blocks, alone) == 0
    for at, is_seen in ((1, False), (2, True), (10, True), (15, True), (16, False)):
        buffer[at] = torch.nan
        assert doubt_of(blocks, alone).isnan() == is_seen, at
        buffer[at] = 0.0


def test_other_numbers_and_gaps_between_rows_stay_apart() -> None:
    buffer = torch.zeros(4, 4)
    blocks = blocks_of([buffer[:, :2], buffer[:, 2:], buffer.bfloat16(), torch.zeros(0)])
    assert [block.shape for block in blocks] == [(4, 2), (4, 2), (4, 4), (0,)]
