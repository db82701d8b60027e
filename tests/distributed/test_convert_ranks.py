"""Two processes share a conversion, and policies of other layouts load what they wrote."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from megatron_r1.weights.hf import HfFolder
from tests.random_weights import full_architecture, write_random_model
from tests.ranks import run_ranks


def test_two_processes_share_the_work(tmp_path):
    hf = write_random_model(tmp_path / "v3", full_architecture(), dtype=torch.bfloat16)
    script = Path(__file__).with_name("convert_ranks.py")
    outputs = run_ranks(script, 2, tmp_path / "rendezvous", hf, tmp_path, timeout=400)
    assert all("tensors are equal" in output for output in outputs)
    assert json.loads((tmp_path / "problems.json").read_text()) == []
    before, after = HfFolder(hf), HfFolder(tmp_path / "hf")
    assert before.files.keys() == after.files.keys() and len(set(after.files.values())) > 2
    assert all(torch.equal(before.read(name), after.read(name)) for name in before.files)
