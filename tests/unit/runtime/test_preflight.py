"""The look at the nodes before a job: which one is bad, and a real meeting of two ranks of which one has no disk."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from megatron_r1.runtime import preflight
from megatron_r1.runtime.launch import free_port
from megatron_r1.runtime.preflight import Findings, find_bad_nodes, preflight_report
from tests.paths import ROOT
from tests.patience import patient


def findings(node: str, rank: int, network: float = 10.0, **fields) -> Findings:
    return Findings(node, rank, {"device": 100.0, "memory": 20.0, "network": network}, **fields)


def test_nodes_that_are_well_are_not_blamed():
    ranks = [findings(f"n{i // 2}", i, network=9.0 + i / 10) for i in range(6)]
    assert find_bad_nodes(ranks, 0.5) == {}
    assert (
        preflight_report(ranks, {})
        .splitlines()[1]
        .startswith("preflight: n0 is well: device 100 fixed works/s, memory 20 GB/s, network 9 GB/s")
    )


def test_bad_nodes_are_named_with_the_reason():
    ranks = [findings(f"n{i}", i) for i in range(6)]
    ranks[1].speeds["device"] = 40.0
    ranks[2].problems.append("disk /local: No space left on device")
    ranks[3].clock_seconds = -30.0
    bad = find_bad_nodes(ranks, 0.5)
    assert bad == {
        "n1": ["device of rank 1: 40 fixed works/s, the median is 100"],
        "n2": ["disk /local: No space left on device"],
        "n3": ["clock is -30.0 s off that of rank 0"],
    }
    text = preflight_report(ranks, bad)
    assert "6 node(s), 6 rank(s), 3 bad node(s)" in text and "preflight: n2 is bad: disk /local: No space left on device" in text


@pytest.mark.parametrize(
    ("looks", "seconds"),
    [
        ([[0.0, 0.1], [0.0, 3600.1], [0.0, 0.2]], 0.2),  # set ahead and back, or late once
        ([[0.0, 0.0], [-3600.0, 0.0], [-3600.0, 0.0]], 3600.0),  # set back for good
        ([[0.0, -30.0], [1.0, -29.0], [2.0, -28.0]], -30.0),
    ],
)
def test_one_odd_look_at_the_clocks_blames_no_node(monkeypatch, looks, seconds):
    left = iter(looks)
    monkeypatch.setattr(preflight.distributed, "barrier", lambda: None)
    monkeypatch.setattr(preflight.distributed, "gather_objects", lambda _: next(left))
    found = findings("n1", 1)
    preflight._compare_clocks(found)
    assert found.clock_seconds == pytest.approx(seconds)


@pytest.mark.slow
def test_two_ranks_meet_and_the_one_whose_disk_is_missing_is_named(tmp_path):
    (tmp_path / "scratch-good").mkdir()
    bad_nodes = tmp_path / "bad_nodes"
    command = [
        sys.executable, "-m", "megatron_r1.cli", "preflight", "--device", "cpu", "--disk", str(tmp_path),
        "--disk", f"{tmp_path}/scratch-{{node}}", "--bad-nodes", str(bad_nodes), "--slowest", "0.01",
    ]  # fmt: skip
    shared = os.environ | {
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    ranks = [
        subprocess.Popen(
            command,
            env=shared | {"RANK": str(rank), "SLURMD_NODENAME": node},
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, node in enumerate(("good", "broken"))
    ]
    outputs = [rank.communicate(timeout=patient(120))[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [3, 3], outputs
    assert f"preflight: broken is bad: disk {tmp_path}/scratch-broken: No such file or directory" in outputs[0]
    assert "preflight: good is well" in outputs[0] and "network" in outputs[0]
    assert bad_nodes.read_text() == "broken\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad_nodes", "scratch-good"]
