"""Hugging Face to Megatron to Hugging Face is bit-exact under every layout, on every rank."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.random_weights import full_architecture, write_random_model

LAYOUTS = {
    1: [{}],
    2: [{"tp": 2}, {"pp": 2, "vpp": 2}, {"ep": 2}],
    4: [{"tp": 2, "ep": 2, "etp": 2}, {"tp": 2, "pp": 2, "ep": 2}],
}


@cache
def round_trips(world_size: int) -> dict[str, list[str]]:
    """Problems of every layout of this world size, without and with multi-token prediction."""
    with TemporaryDirectory() as temporary:
        folders = [str(write_random_model(Path(temporary, f"mtp{n}"), full_architecture(n))) for n in (0, 1)]
        results = Path(temporary, "results.json")
        arguments = [f"{temporary}/rendezvous", json.dumps(folders), json.dumps(LAYOUTS[world_size]), str(results)]
        script = str(Path(__file__).with_name("weights_layouts.py"))
        ranks = [
            subprocess.Popen(
                [sys.executable, script, str(rank), str(world_size), *arguments],
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )
            for rank in range(world_size)
        ]  # fmt: skip
        outputs = [rank.communicate(timeout=400)[0] for rank in ranks]
        failed = [output[-3000:] for rank, output in zip(ranks, outputs, strict=True) if rank.returncode]
        assert not failed, "\n".join(failed)
        return json.loads(results.read_text())


@pytest.mark.parametrize("mtp", [0, 1])
@pytest.mark.parametrize(("world_size", "sizes"), [(n, sizes) for n, cases in LAYOUTS.items() for sizes in cases], ids=str)
def test_round_trip_is_exact(world_size: int, sizes: dict[str, int], mtp: int) -> None:
    assert round_trips(world_size)[f"mtp{mtp} {sizes}"] == []
