"""Cosines and sines are computed once for a table of angles; `test_host_fixes.py` holds the rotation against Megatron-Core's."""

from __future__ import annotations

import pytest
import torch

from megatron_r1.mcore import rotate
from megatron_r1.mcore.rotate import rotate_rows


def test_a_table_is_kept_and_a_changed_one_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rotate, "_TABLES", type(rotate._TABLES)())
    turned: list[torch.Tensor] = []
    monkeypatch.setattr(rotate.torch, "cos", lambda freqs: (turned.append(freqs), freqs.cos())[1])
    freqs, x = torch.randn(5, 1, 1, 8), torch.randn(5, 2, 3, 8)
    first = rotate_rows(x, freqs, pairs=False, scale=1.0)
    assert torch.equal(rotate_rows(x, freqs[:5], pairs=False, scale=1.0), first) and len(turned) == 1
    halved = rotate_rows(x[:4], freqs[:4], pairs=False, scale=1.0)
    assert torch.equal(halved, first[:4]) and len(turned) == 2
    rotate_rows(x, freqs, pairs=False, scale=2.0)
    rotate_rows(x.bfloat16(), freqs, pairs=False, scale=1.0)
    assert len(turned) == 4
    freqs.zero_()
    assert torch.equal(rotate_rows(x, freqs, pairs=False, scale=1.0), x), "no angle, no turn"
    for _ in range(9):
        rotate_rows(x, torch.randn(5, 1, 1, 8), pairs=False, scale=1.0)
    assert len(rotate._TABLES) == rotate._KEPT
