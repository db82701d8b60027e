"""A reward model scores and learns the same under every layout as on one rank."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.data_plane import play
from megatron_r1.config.runtime import RuntimeConfig
from megatron_r1.pipeline.session import open_session
from tests.ranks import run_ranks
from tests.reward_cases import ARCHITECTURES, LAYOUTS, PLAYED, train_and_score


def test_two_ranks_agree_with_one(tmp_path: Path) -> None:
    script = Path(__file__).with_name("reward_ranks.py")
    run_ranks(script, 2, tmp_path / "rendezvous", tmp_path / "found", timeout=300)
    of_ranks = [json.loads((tmp_path / f"found.{rank}").read_text()) for rank in range(2)]
    with open_session(RuntimeConfig(device="cpu")):
        alone = {model: train_and_score(model, {}, 1) for model in ARCHITECTURES}
        played = play(*PLAYED).figures
    for found in of_ranks:
        assert found["a played round"] == pytest.approx(played, rel=1e-6), "the data of a round, without a model"
        assert found["a played round"] == of_ranks[0]["a played round"]
    for model, sizes in LAYOUTS:
        want = alone[model]
        assert max(want["before"]) - min(want["before"]) > 0.05 and want["before"] != want["after"], "nothing to compare"
        for found in of_ranks:
            for name, values in found[f"{model} {sizes}"].items():
                assert values == pytest.approx(want[name], abs=2e-5, rel=1e-4), f"{name} of {model} under {sizes}"
