"""From a Hugging Face folder through conversion, training and a checkpoint to an exported folder."""

from __future__ import annotations

import json
import subprocess
import sys

import torch

from megatron_r1 import cli
from megatron_r1.data.tally.tokenizer import train_tally_tokenizer
from megatron_r1.model.presets import resolve_architecture
from megatron_r1.weights.hf import HfFolder
from tests.paths import ROOT
from tests.random_weights import write_random_model


def test_a_converted_folder_is_trained_and_its_checkpoint_exported(tmp_path):
    hf = write_random_model(tmp_path / "hf", resolve_architecture("tiny", {"num_hidden_layers": 2}))
    train_tally_tokenizer().save(hf)
    assert cli.main(["convert", "import", "--hf", str(hf), "--out", str(tmp_path / "m")]) == 0
    pairs = [{"prompt": f"Total 7+{n}?", "response": f"<answer>{7 + n}</answer>"} for n in range(4)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    run = tmp_path / "run"
    settings = [f"run_dir={run}", f"model.weights={tmp_path / 'm'}", f"data.source={tmp_path / 'pairs.jsonl'}", "sft.epochs=1"]
    settings += ["sft.batch_size=2", "sft.micro_batch_tokens=128", "runtime.device=cpu"]
    command = [sys.executable, "-m", "megatron_r1.cli", "sft", *settings]
    result = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr[-3000:]

    assert cli.main(["convert", "export", "--megatron", str(run), "--out", str(tmp_path / "trained")]) == 0
    before, stage, exported = (HfFolder(folder) for folder in (hf, run / "hf", tmp_path / "trained"))
    assert stage.files.keys() == exported.files.keys()
    assert all(torch.equal(stage.read(name), exported.read(name)) for name in stage.files)
    moved = [(exported.read(name) - before.read(name)).abs().max() for name in before.files if "experts" not in name]
    assert 0 < max(moved) < 1e-3, "training started from other weights than the converted ones"
    assert (tmp_path / "trained/tokenizer.json").read_bytes() == (hf / "tokenizer.json").read_bytes()
