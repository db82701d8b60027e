"""What ranks give each other arrives to the bit, in messages of bounded size, and an error on one of them leaves none waiting."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_r1.runtime.exchange import add_tables, gather_numbers, move_arrays, stream_to_rank_zero
from megatron_r1.training.outlines import outline_bytes
from tests.ranks import run_ranks

RANKS = """
import random, struct, sys
from contextlib import closing
import numpy as np, torch, torch.distributed as dist
from megatron_r1.errors import RolloutError
from megatron_r1.runtime import exchange
from megatron_r1.training.outlines import outline_bytes, share_outlines, stream_groups
from megatron_r1.types import Prompt, Rollout, RolloutGroup

rank, world = int(sys.argv[1]), int(sys.argv[2])
dist.init_process_group("gloo", store=dist.FileStore(sys.argv[3], world), rank=rank, world_size=world)
exchange.MESSAGE_BYTES = 200
sent = []
for name in ("isend", "broadcast", "all_reduce"):
    own = getattr(dist, name)
    def watch(tensor, *a, _own=own, _name=name, **k):
        sent.append((_name, tensor.numel() * tensor.element_size()))
        return _own(tensor, *a, **k)
    setattr(dist, name, watch)

# tables: what one rank wrote, to the bit
odd = np.array([np.nan, np.inf, -np.inf, -0.0, 1e-320, 0.1])
table = np.zeros((world, 6))
table[rank] = odd
assert exchange.add_tables(table).tobytes() == np.tile(odd, (world, 1)).tobytes()
assert exchange.gather_numbers([rank, 2.5])[:, 0].tolist() == list(range(world))

# arrays: every item's, where it is needed and nowhere else
draw = random.Random(1)
items = range(40)
holders, targets = ([draw.randrange(world) for _ in items] for _ in range(2))
sizes = [(n, n - 1) for n in (draw.choice([1, 3, 30, 120]) for _ in items)]
made = [[np.random.default_rng(i).integers(0, 99, a, np.int32), np.random.default_rng(i).random(b, np.float32)]
        for i, (a, b) in zip(items, sizes)]
sent.clear()
found = exchange.move_arrays(holders, targets, sizes, lambda i: made[i] if holders[i] == rank else 1 / 0)
assert sorted(found) == [i for i in items if targets[i] == rank]
for i, arrays in found.items():
    assert [a.tobytes() for a in arrays] == [a.tobytes() for a in made[i]]
assert all(size <= max(200, 4 * 239) and name == "isend" for name, size in sent) and len(sent) > 3, sent
assert sum(size for _, size in sent) == sum(4 * sum(sizes[i]) for i in items if holders[i] == rank != targets[i])

# a broadcast
got = {}
exchange.broadcast_arrays(items, sizes, made if rank == 1 else {}, 1, dist.group.WORLD, got.__setitem__)
assert all(g.tobytes() == m.tobytes() for i in items for g, m in zip(got[i], made[i]))

# a stream to rank 0, in order; readers that give up and makers that fail leave nobody waiting
owners = [i % world for i in range(7)]
stream = lambda make: exchange.stream_to_rank_zero(owners, make)
made_here = []
content = list(stream(lambda i: made_here.append(i) or b"x" * i * 1000))
assert [len(c) for c in content] == ([i * 1000 for i in range(7)] if rank == 0 else [])
assert made_here == list(range(rank, 7, world)), "each makes its own, and when it is due"
try:
    with closing(stream(lambda i: b"y")) as pieces:
        for piece in pieces:
            raise OSError(28, "No space left on device")
except OSError:
    assert rank == 0
try:
    list(stream(lambda i: 1 / 0 if i == 2 else b"z"))
except ZeroDivisionError:
    assert rank == 2 % world
else:
    assert rank != 2 % world

# outlines: rank 1 samples nothing
prompts = [Prompt(f"p{i}", "", "", "", (1, 2)) for i in range(5)]
def group(position, owner):
    sizes = range(position + 1, position + 2 + position % 2)
    rollouts = [Rollout([7] * size, [-0.5] * size, "long text" * 999, n == 0) for n, size in enumerate(sizes)]
    made = RolloutGroup(prompts[position], rollouts, 3, torch.tensor([-0.0, 0.3][: len(rollouts)], dtype=torch.float64))
    made.position, made.owner, made.reward_magnitude = position, owner, 0.1 * position
    made.reward_parts = {"accuracy": [1.0, None][: len(rollouts)], **({"length": [-0.25] * len(rollouts)} if position == 3 else {})}
    made.reward_outcomes = {"accuracy": ["correct", "timeout"][: len(rollouts)]}
    made.reward_details = {"accuracy": ["because"] * len(rollouts)}
    return made
owner_of = [0, 2, 2, 0, 2]
own = [group(i, rank) for i in range(5) if owner_of[i] == rank]
sent.clear()
everything = share_outlines(own, prompts)
assert sum(size for _, size in sent) <= outline_bytes(5, 2, 2), "whatever the texts and tokens"
for position, found in enumerate(everything):
    want = group(position, owner_of[position])
    assert (found is own[own.index(found)]) if found.owner == rank else True
    for name in ("weights_version", "position", "owner", "reward_magnitude", "reward_parts", "reward_outcomes"):
        assert getattr(found, name) == getattr(want, name), name
    assert found.rewards_G.numpy().tobytes() == want.rewards_G.numpy().tobytes(), "-0.0, too"
    assert [(len(r.token_ids), r.finished) for r in found.rollouts] == [(len(r.token_ids), r.finished) for r in want.rollouts]
    if found.owner != rank:
        assert found.reward_details == {} and not any(r.text for r in found.rollouts)
        assert all(r.token_ids.strides == r.rollout_logprobs.strides == (0,) for r in found.rollouts), "they take no memory"
texts = [(g.position, g.owner, len(g.rollouts[0].text)) for g in stream_groups(owner_of, own)]
assert texts == ([(i, owner_of[i], 9 * 999) for i in range(5)] if rank == 0 else [])
for broken in (own if rank != 2 else own[1:], own if rank != 1 else [group(0, 1)]):
    try:
        share_outlines(broken, prompts)
    except RolloutError as error:
        assert "was not sampled by exactly one rank" in str(error)
    else:
        raise AssertionError("no error")
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_ranks_exchange_what_they_need_and_no_more(tmp_path: Path) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    run_ranks(script, 3, tmp_path / "store", timeout=120)


def test_what_every_rank_knows_of_a_round_is_small_whatever_the_tokens_and_ranks() -> None:
    """512 prompts of 16 answers with six reward components: 1.8 MB. 32K tokens of each with log-probs are 2.1 GB."""
    assert outline_bytes(512, 16, 6) < 2e6 < 8192 * 32768 * 8 / 1000


def test_one_rank_alone_has_everything() -> None:
    table = np.array([[1.0, np.nan]])
    assert add_tables(table) is table and gather_numbers([1.0, 2.0]).tolist() == [[1.0, 2.0]]
    held = {0: [np.array([1, 2], np.int32)], 1: [np.array([0.5], np.float32)]}
    moved = move_arrays([0, 0], [0, 0], [(2,), (1,)], held.__getitem__)
    assert moved[0][0].tolist() == [1, 2] and moved[1][0].view(np.float32).tolist() == [0.5]
    assert np.shares_memory(moved[0][0], held[0][0]), "nothing is copied"
    assert list(stream_to_rank_zero([0, 0], lambda number: b"%d" % number)) == [b"0", b"1"]
