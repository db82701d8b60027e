"""A checkpoint behind `megatron-r1 serve`, which is vLLM's own server: asked by the judge and by evaluations, then killed.

The model is tiny and random: this proves protocols and tokens, no judgement.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_r1 import cli
from megatron_r1.config.endpoint import EndpointConfig
from megatron_r1.config.rewards import JudgeConfig
from megatron_r1.data.problem_records import Problem
from megatron_r1.data.prompts import PromptWriter
from megatron_r1.data.tally.tokenizer import train_tally_tokenizer
from megatron_r1.errors import RewardError, RolloutError
from megatron_r1.evaluation.benchmark_problems import BenchmarkProblem
from megatron_r1.evaluation.models import EndpointModel, Pass
from megatron_r1.evaluation.sample_ledger import open_samples
from megatron_r1.model.presets import PRESETS
from megatron_r1.pipeline.talk.model import find_model
from megatron_r1.pipeline.talk.serve import CACHE, SERVED_PREFIX
from megatron_r1.rewards.judge.preference import Judge
from megatron_r1.runtime.temporary import remove_left
from megatron_r1.types import Sampling
from tests.paths import ROOT
from tests.patience import patient, wait_until
from tests.random_weights import write_random_model

ARCH = PRESETS["tiny"].model_copy(update={"num_hidden_layers": 1, "first_k_dense_replace": 0, "max_position_embeddings": 8192})
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
QUESTION = "How much is 3 + 4?"


@dataclass(frozen=True)
class Served:
    """A server that is ready, and what it serves."""

    url: str
    key: Path
    folder: Path  #: the same weights in Hugging Face's format


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Started as a user starts it, on a checkpoint in Megatron's format. Killed in the end: nothing of it may stay."""
    parent = tmp_path_factory.mktemp("served")
    folder = write_random_model(parent / "hf", ARCH)
    train_tally_tokenizer(ARCH.vocab_size, "r1_zero", 0.1).with_chat_template(TEMPLATE).save(folder)
    assert cli.main(["convert", "import", "--hf", str(folder), "--out", str(parent / "model")]) == 0
    key, log, port = parent / "key", parent / "serve.log", find_port()
    key.write_text("hush\n")
    command = [sys.executable, "-m", "megatron_r1.cli", "serve", str(parent / "model"), "--port", str(port), "--name", "judge"]
    command += ["--api-key-file", str(key), "runtime.device=cpu", "runtime.threads=1", f"rollout.kv_cache_bytes={64 << 20}"]
    with log.open("wb") as output:
        server = subprocess.Popen(command, stdout=output, stderr=output, cwd=ROOT, start_new_session=True)
    try:
        wait_until(lambda: b"judge answers at" in log.read_bytes() or server.poll() is not None, 300, "server", pause=0.3)
        assert server.poll() is None, log.read_text()[-3000:]
        children = _processes_below(server.pid)
        assert len(children) >= 2  # vLLM's server and its engine
        assert len(list((parent / CACHE).iterdir())) == 1
        given = [argument.decode() for child in children for argument in Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")]
        own = Path(given[given.index("--model") + 1])
        assert own.name.startswith(SERVED_PREFIX) and own.is_dir()
        yield Served(f"http://127.0.0.1:{port}/v1", key, folder)
    finally:
        if server.poll() is None:  # or an error of its start would be hidden by one of this line
            server.send_signal(signal.SIGKILL)
        server.wait()
    wait_until(lambda: not [pid for pid in children if _runs(pid)], 20, "end of the server's processes")
    assert own.is_dir()
    remove_left(SERVED_PREFIX)  # as the next start does
    assert not own.exists()


def find_port() -> int:
    """A free port below those that the kernel gives to outgoing connections: the server takes long until it binds it."""
    for port in random.Random(os.getpid()).sample(range(20000, 32000), 100):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no free port")


def judge(served: Served, **settings: object) -> Judge:
    always = {"url": served.url, "model": "judge", "api_key_file": str(served.key), "retries": 0, "seed": 1}
    return Judge(JudgeConfig.model_validate(always | {"timeout_seconds": patient(120)} | settings))


def test_it_says_the_likeliest_tokens_to_whoever_has_the_key(served: Served, tmp_path: Path) -> None:
    problem, sampling = BenchmarkProblem("p", QUESTION, ""), Sampling(1, 0.0, 1.0, 12)
    asking = EndpointConfig(url=served.url, model="judge", retries=0)
    keyless = pytest.raises(RolloutError, match="401")
    with EndpointModel(asking) as model, open_samples(tmp_path / "no.jsonl", {}) as kept, keyless:
        model.sample([problem], Pass(sampling, "seed", kept, lambda _: None))
    asking = asking.model_copy(update={"api_key_file": str(served.key)})
    with EndpointModel(asking) as model, open_samples(tmp_path / "yes.jsonl", {}) as kept:
        model.sample([problem], Pass(sampling, "seed", kept, lambda _: None))
        (answer,) = kept.records.values()
    tokenizer = find_model(served.folder, None, ["runtime.device=cpu"]).tokenizer
    expected = _likeliest(served.folder, 12)
    assert (answer["response"], answer["tokens"]) == (tokenizer.decode(expected), len(expected))


def test_a_constrained_answer_is_read_as_a_verdict(served: Served) -> None:
    with judge(served, json_schema=True, temperature=1.0, max_tokens=5000) as made:
        verdict = made.grade("1+1?", "2", "2").result()
        assert verdict.outcome in ("correct", "wrong") and verdict.score == float(verdict.outcome == "correct"), verdict
        assert made.statistics()["prompt_tokens"] > 100 and made.statistics()["requests"] == 1


def test_noise_is_no_verdict_and_an_unknown_model_ends_the_run(served: Served) -> None:
    with judge(served, max_tokens=16) as made:
        verdict = made.grade("1+1?", "2", "2").result()
        assert verdict.outcome == "error" and "finish_reason is 'length'" in verdict.detail
    with judge(served, model="other") as made, pytest.raises(RewardError, match=r"refuses \(HTTP 404\)"):
        made.grade("1+1?", "2", "2").result()


def _likeliest(folder: Path, tokens: int) -> list[int]:
    """What the model says to the question, as transformers computes it."""
    found = find_model(folder, None, ["runtime.device=cpu"])
    _, ids = PromptWriter(found.config.data, found.tokenizer).encode(Problem("p", QUESTION, ""))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    said: list[int] = []
    with torch.no_grad():
        while len(said) < tokens and found.tokenizer.eos_id not in said:
            said.append(int(model(torch.tensor([[*ids, *said]])).logits[0, -1].argmax()))
    return said


def _processes_below(pid: int) -> list[int]:
    own = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return own + [below for child in own for below in _processes_below(child)]


def _runs(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] not in "ZX"
