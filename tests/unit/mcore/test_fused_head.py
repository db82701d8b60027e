"""Log-probs without whole logits: torch's numbers, on one rank and two, by torch and by Triton's kernels, in less memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_r1.mcore import head_bytes, logits_tiles
from megatron_r1.mcore.fused_head import Head, token_losses
from tests.allocations import peak_bytes
from tests.head_cases import HIDDEN, ROWS, VOCABULARY, by_tiles, check_head, draw, whole
from tests.one_rank import one_rank_world
from tests.paths import ROOT
from tests.ranks import run_ranks


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    one_rank_world()
    monkeypatch.setattr(head_bytes, "TILE", 10 * ROWS)
    monkeypatch.setattr(logits_tiles, "BLOCK", 200)


def plain_head(**more: object) -> Head:
    return Head(1.0, dist.group.WORLD, VOCABULARY, **more)


def test_losses_entropies_and_gradients_are_torchs() -> None:
    check_head(dist.group.WORLD)


@pytest.mark.parametrize("tile", [1, 2**25])
def test_a_tile_of_one_row_and_one_of_all(monkeypatch: pytest.MonkeyPatch, tile: int) -> None:
    monkeypatch.setattr(head_bytes, "TILE", tile)
    check_head(dist.group.WORLD, dtypes=(torch.float32,))


@pytest.mark.parametrize(("ranks", "kind"), [(2, "torch"), (1, "triton")])
def test_on_ranks_and_in_tritons_interpreter(tmp_path: Path, ranks: int, kind: str) -> None:
    run_ranks(ROOT / "tests/distributed/fused_head.py", ranks, tmp_path, kind, timeout=120)


def test_sums_are_added_to_and_zeros_are_returned() -> None:
    drawn = draw(torch.bfloat16)
    upstream = drawn[3]
    want = by_tiles(*drawn, plain_head())
    for slope in (None, lambda rows, losses: upstream[rows]):
        sums = torch.ones(ROWS, HIDDEN)
        found = by_tiles(*drawn, plain_head(slope=slope, sums=sums))
        assert torch.equal(found[2], want[2]) and not found[3].any() and found[3].shape == want[3].shape
        assert ((sums - 1).bfloat16() - want[3]).abs().max() <= 2e-2 * want[3].abs().max()


def test_what_needs_no_gradient_gets_none() -> None:
    hidden, weight, labels, upstream = draw(torch.float32)
    want = by_tiles(hidden, weight, labels, upstream, plain_head())
    for trained in (hidden, weight):
        leaf = trained.clone().requires_grad_()
        tensors = (leaf, weight) if trained is hidden else (hidden, leaf)
        loss, entropies = token_losses(*tensors, labels, plain_head(slope=lambda rows, losses: upstream[rows]))
        assert entropies is None
        loss.backward(upstream)
        assert torch.equal(leaf.grad, want[2 if trained is hidden else 3])
    with torch.no_grad():
        loss, _ = token_losses(
            hidden.requires_grad_(), weight, labels, plain_head(slope=lambda rows, losses: pytest.fail("nothing is derived"))
        )
    assert torch.equal(loss, want[0])


def test_no_tokens() -> None:
    hidden, weight, labels, _ = draw(torch.float32)
    hidden, weight = hidden[:0].clone().requires_grad_(), weight.clone().requires_grad_()
    loss, entropies = token_losses(hidden, weight, labels[:0], plain_head(entropy=True))
    loss.sum().backward()
    assert loss.shape == entropies.shape == (0,) and hidden.grad.shape == hidden.shape and not weight.grad.any()


def test_a_second_backward_pass_gives_the_same() -> None:
    hidden, weight, labels, upstream = draw(torch.float32)
    leaf = weight.clone().requires_grad_()
    loss, _ = token_losses(hidden, leaf, labels, plain_head(slope=lambda rows, losses: upstream[rows]))
    (first,) = torch.autograd.grad(loss, leaf, upstream, retain_graph=True)
    (second,) = torch.autograd.grad(loss, leaf, upstream)
    assert torch.equal(first, second)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_so_where_torch_has_it(value: float) -> None:
    hidden, weight, labels, upstream = draw(torch.float32)
    hidden, weight = hidden.abs() + 0.1, weight.clone()
    weight[7, 0] = value  # the logit of one token of the vocabulary, in every row
    labels[3], labels[labels == 7] = 7, 8
    want = whole(hidden, weight, labels, upstream, temperature=1.0, vocabulary=VOCABULARY)
    found = by_tiles(hidden, weight, labels, upstream, plain_head(entropy=True))
    assert torch.equal(found[0].isfinite(), want[0].isfinite()) and torch.equal(found[0].isnan(), want[0].isnan())
    hidden, weight = draw(torch.float32)[:2]
    hidden[5, 2] = value
    want = whole(hidden, weight, labels, upstream, temperature=1.0, vocabulary=VOCABULARY)
    found = by_tiles(hidden, weight, labels, upstream, plain_head(entropy=True))
    for ours, exact in zip(found[:3], want[:3], strict=True):
        assert torch.equal(ours.isfinite(), exact.isfinite()), "one row is broken, the others are not"
    assert not found[3][:VOCABULARY].isfinite().any()


def test_gradients_pass_autograds_own_check() -> None:
    hidden, weight, labels, _ = draw(torch.float64)
    hidden, weight = hidden[:3, :4].clone().requires_grad_(), weight[:12, :4].clone().requires_grad_()
    head = Head(0.8, dist.group.WORLD, vocabulary=11)
    assert torch.autograd.gradcheck(lambda h, w: token_losses(h, w, labels[:3] % 11, head)[0], (hidden, weight))


@pytest.mark.parametrize("known", [False, True])
def test_nothing_as_large_as_the_logits_is_held(monkeypatch: pytest.MonkeyPatch, known: bool) -> None:
    tokens, vocabulary, tile = 512, 4096, 2**16
    monkeypatch.setattr(head_bytes, "TILE", tile)
    monkeypatch.setattr(logits_tiles, "BLOCK", 2**14)
    hidden, weight = torch.randn(tokens, 8, requires_grad=True), torch.randn(vocabulary, 8, requires_grad=True)
    labels, upstream = torch.randint(vocabulary, (tokens,)), torch.randn(tokens)

    def work() -> None:
        head = Head(1.0, dist.group.WORLD, vocabulary, slope=(lambda rows, losses: upstream[rows]) if known else None)
        token_losses(hidden, weight, labels, head)[0].backward(upstream)

    most, _ = peak_bytes(work)
    gradients = hidden.nbytes + weight.nbytes
    assert most < 4 * tile + gradients + 4 * 2**14 + 128 * tokens < tokens * vocabulary * 4 / 8
