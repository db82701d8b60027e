"""A checkpoint behind vLLM's server, as a user starts it, asked by the client with which evaluations ask endpoints."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_r1 import cli
from megatron_r1.config.endpoint import EndpointConfig
from megatron_r1.data.problem_records import Problem
from megatron_r1.data.prompts import PromptWriter
from megatron_r1.data.tokenizer import Tokenizer, train_tokenizer
from megatron_r1.errors import RolloutError
from megatron_r1.evaluation.benchmark_problems import BenchmarkProblem
from megatron_r1.evaluation.models import EndpointModel
from megatron_r1.evaluation.sample_ledger import open_samples
from megatron_r1.model.presets import PRESETS
from megatron_r1.pipeline.talk.model import find_model
from megatron_r1.pipeline.talk.serve import CACHE
from megatron_r1.runtime.launch import free_port
from megatron_r1.types import Sampling
from tests.paths import ROOT
from tests.patience import patient, wait_until
from tests.random_weights import write_random_model

QUESTION = "a few words"


def test_a_served_checkpoint_gives_its_likeliest_tokens_to_whoever_has_the_key(tmp_path: Path) -> None:
    folder = write_random_model(tmp_path / "hf", PRESETS["tiny"])
    tokenizer = train_tokenizer([QUESTION], 300)
    tokenizer.save(folder)
    assert cli.main(["convert", "import", "--hf", str(folder), "--out", str(tmp_path / "model")]) == 0
    (tmp_path / "key").write_text("hush\n")
    port = free_port()
    command = [sys.executable, "-m", "megatron_r1.cli", "serve", str(tmp_path / "model"), "--port", str(port)]
    command += ["--name", "tiny", "--api-key-file", str(tmp_path / "key"), "runtime.threads=1", "runtime.device=cpu"]
    log = tmp_path / "serve.log"
    with log.open("wb") as output:
        server = subprocess.Popen(command, stdout=output, stderr=output, cwd=ROOT, start_new_session=True)
    try:
        wait_until(lambda: b"tiny answers at" in log.read_bytes() or server.poll() is not None, 120)
        assert server.poll() is None, log.read_text()[-3000:]
        children = _processes_below(server.pid)
        assert len(children) >= 2
        problem, sampling = BenchmarkProblem("p", QUESTION, ""), Sampling(1, 0.0, 1.0, 12)
        asking = EndpointConfig(url=f"http://127.0.0.1:{port}/v1", model="tiny", retries=0)
        keyless = pytest.raises(RolloutError, match="401")
        with EndpointModel(asking) as model, open_samples(tmp_path / "no.jsonl", {}) as kept, keyless:
            model.sample([problem], sampling, "seed", kept, lambda _: None)
        asking = asking.model_copy(update={"api_key_file": str(tmp_path / "key")})
        with EndpointModel(asking) as model, open_samples(tmp_path / "yes.jsonl", {}) as kept:
            model.sample([problem], sampling, "seed", kept, lambda _: None)
            (answer,) = kept.records.values()
    finally:
        server.send_signal(signal.SIGTERM)
        code = server.wait(timeout=patient(60))
    assert code == 0 and not [pid for pid in children if _runs(pid)], log.read_text()[-3000:]
    assert len(list((tmp_path / CACHE).iterdir())) == 1
    expected = _likeliest(folder, tokenizer, 12)
    assert (answer["response"], answer["tokens"]) == (tokenizer.decode(expected), len(expected))


def _likeliest(folder: Path, tokenizer: Tokenizer, tokens: int) -> list[int]:
    """What the model says to the question, as transformers computes it."""
    writer = PromptWriter(find_model(folder, None, ["runtime.device=cpu"]).config.data, tokenizer)
    _, ids = writer.encode(Problem("p", QUESTION, ""))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    said: list[int] = []
    with torch.no_grad():
        while len(said) < tokens and tokenizer.eos_id not in said:
            said.append(int(model(torch.tensor([[*ids, *said]])).logits[0, -1].argmax()))
    return said


def _processes_below(pid: int) -> list[int]:
    own = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return own + [below for child in own for below in _processes_below(child)]


def _runs(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return os.path.exists(stat) and stat.read_text().rpartition(")")[2].split()[0] not in "ZX"
