"""Lengths from distributions and from the responses of a run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_r1.errors import ConfigError, DataError
from megatron_r1.plan.simulate_lengths import Equal, Lognormal, Recorded, Replayed, parse_lengths, recorded_lengths

RANDOM = np.random.default_rng(0)


def write_step(run: Path, step: int, groups: list[tuple[str, list[int]]], packed: bool = False) -> None:
    lines = [json.dumps({"prompt_id": name, "length": length}) for name, lengths in groups for length in lengths]
    path = run / "rollouts" / f"step_{step:06d}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    if packed:
        import pyarrow

        with pyarrow.CompressedOutputStream(str(path.with_name(path.name + ".zst")), "zstd") as file:
            file.write("".join(f"{line}\n" for line in lines).encode())
    else:
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def test_a_lognormal_has_its_mean_its_limit_and_what_answers_to_a_prompt_share() -> None:
    free = Lognormal(1000, 0.5, 100_000).draw(500, 16, RANDOM)
    assert free.mean() == pytest.approx(1000, rel=0.03) and free.min() >= 1
    assert np.log(free).std() == pytest.approx(0.5, rel=0.03)
    assert Lognormal(1000, 1.0, 1500).draw(100, 4, RANDOM).max() == 1500
    shared = np.log(Lognormal(1000, 0.5, 100_000, 0.7).draw(2000, 8, RANDOM))
    assert shared.mean(axis=1).var() / shared.var() == pytest.approx(0.7 + 0.3 / 8, rel=0.1)
    assert (np.ptp(Lognormal(1000, 0.5, 9999, 1.0).draw(9, 8, RANDOM), axis=1) == 0).all()


def test_a_run_is_read_packed_or_not_with_a_prompt_that_comes_twice(tmp_path: Path) -> None:
    write_step(tmp_path, 1, [("a", [3, 4]), ("b", [5, 6])])
    write_step(tmp_path, 2, [("b", [7, 8]), ("b", [9, 10]), ("c", [1, 2])], packed=True)
    found = {step: [group.tolist() for group in groups] for step, groups in recorded_lengths(tmp_path).items()}
    assert found == {1: [[3, 4], [5, 6]], 2: [[7, 8], [9, 10], [1, 2]]}
    replayed = parse_lengths(f"replay:{tmp_path}", 10)
    assert isinstance(replayed, Replayed)
    assert replayed.draw(3, 2, RANDOM).tolist() == [[3, 4], [5, 6], [7, 8]]
    assert replayed.draw(3, 2, RANDOM).tolist() == [[9, 10], [1, 2], [3, 4]]
    with pytest.raises(ConfigError, match="3 responses each"):
        replayed.draw(1, 3, RANDOM)
    drawn = parse_lengths(str(tmp_path), 10)
    assert isinstance(drawn, Recorded)
    rows = drawn.draw(50, 2, RANDOM).tolist()
    assert {tuple(row) for row in rows} == {(3, 4), (5, 6), (7, 8), (9, 10), (1, 2)}
    other = drawn.draw(50, 5, RANDOM)
    assert other.shape == (50, 5) and all({*row} <= {n, n + 1} for row in other.tolist() for n in [2 * ((min(row) - 1) // 2) + 1])


def test_what_the_option_says() -> None:
    assert parse_lengths("equal:7", 10) == Equal(7)
    assert parse_lengths("lognormal:4000,0.8", 99) == Lognormal(4000, 0.8, 99)
    assert parse_lengths("lognormal:4000,0.8,0.5", 99) == Lognormal(4000, 0.8, 99, 0.5)
    assert Equal(7).draw(2, 3, RANDOM).tolist() == [[7] * 3] * 2


@pytest.mark.parametrize(
    ("text", "said"),
    (
        ("equal:0", "from 1 to the limit"), ("equal:11", "from 1 to the limit of 10"), ("equal:2.5", "whole number"),
        ("equal:", "give equal:TOKENS"), ("lognormal:40", "as in"), ("lognormal:nan,1", "as in"), ("lognormal:4,-1", "sigma"),
        ("lognormal:4,1,2", "shared"), ("nowhere", "no run folder"), ("replay:", "no run folder"), ("uniform:1,2", "no run folder"),
    ),
)  # fmt: skip
def test_what_it_does_not_say(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_lengths(text, 10)


def test_a_run_without_usable_responses_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no rollouts"):
        recorded_lengths(tmp_path)
    write_step(tmp_path, 1, [("a", [3, 40])])
    with pytest.raises(ConfigError, match="40 tokens, the limit is 10"):
        parse_lengths(str(tmp_path), 10)
    for line in ("", '{"prompt_id": "a"}', '{"prompt_id": "a", "length": 0}', '{"prompt_id": "a", "length": true}', "[" * 5000):
        (tmp_path / "rollouts/step_000002.jsonl").write_text(f"{line}\n")
        with pytest.raises(DataError, match="line 1 is not a response"):
            recorded_lengths(tmp_path)
    (tmp_path / "rollouts/step_000002.jsonl").write_text("")
    with pytest.raises(DataError, match="holds no responses"):
        recorded_lengths(tmp_path)
    (tmp_path / "rollouts/step_000002.jsonl").unlink()
    (tmp_path / "rollouts/step_000002.jsonl.zst").write_bytes(b"no zstd")
    with pytest.raises(DataError, match="cannot be read"):
        recorded_lengths(tmp_path)
