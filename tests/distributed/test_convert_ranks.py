"""Two processes share a conversion, and policies of other layouts load what they wrote."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch

from megatron_r1.weights.hf import HfFolder
from tests.random_weights import full_architecture, write_random_model


def test_two_processes_share_the_work(tmp_path):
    hf = write_random_model(tmp_path / "v3", full_architecture(), dtype=torch.bfloat16)
    script = str(Path(__file__).with_name("convert_ranks.py"))
    ranks = [
        subprocess.Popen(
            [sys.executable, script, str(rank), "2", str(tmp_path / "rendezvous"), str(hf), str(tmp_path)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    outputs = [rank.communicate(timeout=400)[0] for rank in ranks]
    assert all(rank.returncode == 0 for rank in ranks), "\n".join(output[-3000:] for output in outputs)
    assert all("tensors are equal" in output for output in outputs)
    assert json.loads((tmp_path / "problems.json").read_text()) == []
    before, after = HfFolder(hf), HfFolder(tmp_path / "hf")
    assert before.files.keys() == after.files.keys() and len(set(after.files.values())) > 2
    assert all(torch.equal(before.read(name), after.read(name)) for name in before.files)
