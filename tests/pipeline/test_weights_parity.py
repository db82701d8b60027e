"""The mapping is right, not only invertible: Megatron-Core and transformers compute the same logits from one folder."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from megatron_r1.model.presets import PRESETS
from tests.random_weights import full_architecture, write_random_model

SCRIPT = """
import sys, torch, torch.distributed as dist
from pathlib import Path
from megatron_r1.config.schema import MoeTrainingConfig, ParallelConfig, RuntimeConfig
from megatron_r1.mcore import host
from megatron_r1.weights.hf import HfFolder
from megatron_r1.weights.load import load_weights
host.activate("cpu")
from megatron_r1.mcore import parallel, provider
folder, tokens, out = map(Path, sys.argv[1:])
torch.set_num_threads(1)
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
arch = HfFolder(folder).architecture()
layout = parallel.resolve_layout(ParallelConfig(), arch, 1, mtp=False, packed=False)
parallel.initialize(layout, seed=1)
(model,) = provider.build_model(arch, layout, RuntimeConfig(), MoeTrainingConfig(bias_update_rate=1e-3), seed=7)
load_weights([model], arch, folder, parallel.groups())
ids = torch.load(tokens)
with torch.no_grad():
    torch.save(model.eval()(ids, torch.arange(ids.shape[1]).expand_as(ids), None), out)
"""


@pytest.mark.parametrize("arch", [PRESETS["tiny"], full_architecture(mtp=0)], ids=["tiny", "every part of V3"])
def test_logits_are_those_of_transformers(arch, tmp_path):
    from transformers import AutoModelForCausalLM

    folder = write_random_model(tmp_path / "model", arch)
    ids = torch.randint(arch.vocab_size, (2, 48), generator=torch.Generator().manual_seed(1))
    torch.save(ids, tmp_path / "ids.pt")
    arguments = [str(folder), str(tmp_path / "ids.pt"), str(tmp_path / "logits.pt")]
    done = subprocess.run([sys.executable, "-c", SCRIPT, *arguments], check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    logits = torch.load(tmp_path / "logits.pt")[..., : arch.vocab_size]
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(ids).logits
    assert expected.std() > 0.3
    assert (logits - expected).abs().max() < 1e-4


def test_exported_config_describes_the_model(tmp_path):
    arch = full_architecture(mtp=1)
    config = json.loads((write_random_model(tmp_path / "model", arch) / "config.json").read_text())
    assert type(arch).from_hf_config(config) == arch.model_copy(update={"init_std": 0.006})
