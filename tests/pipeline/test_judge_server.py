"""The judge against `vllm serve` itself, with a tiny model of random weights: proves the protocol, not the judgement."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from megatron_r1.config.rewards import JudgeConfig
from megatron_r1.data.tally.tokenizer import train_tally_tokenizer
from megatron_r1.errors import RewardError
from megatron_r1.rewards.judge.preference import Judge
from megatron_r1.rollout.options import engine_environment
from megatron_r1.runtime.launch import child_environment
from tests.patience import patient, wait_until

MODEL = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 448, "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 8192,
    "tie_word_embeddings": True, "torch_dtype": "float32",
}  # fmt: skip
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The base URL of a server that is ready."""
    folder = tmp_path_factory.mktemp("served")
    tokenizer = train_tally_tokenizer(MODEL["vocab_size"], "r1_zero", 0.1)
    tokenizer.save(folder)
    (folder / "config.json").write_text(json.dumps(MODEL | {"eos_token_id": tokenizer.eos_id}))
    (folder / "chat.jinja").write_text(TEMPLATE)
    port = find_port()
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--load-format", "dummy",
        "--served-model-name", "judge", "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager",
        "--max-model-len", "8192", "--max-num-seqs", "4", "--kv-cache-memory-bytes", str(64 << 20),
        "--chat-template", str(folder / "chat.jinja"),
    ]  # fmt: skip
    log = folder / "server.log"
    environment = child_environment(engine_environment("cpu", 1))
    with log.open("wb") as output:
        server = subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)
    try:
        wait_until_ready(f"http://127.0.0.1:{port}/health", server, log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        if server.poll() is None:  # or an error of its start would be hidden by one of this line
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def find_port() -> int:
    """A free port below those that the kernel gives to outgoing connections: the server takes long until it binds it."""
    for port in random.Random(os.getpid()).sample(range(20000, 32000), 100):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no free port")


def wait_until_ready(url: str, server: subprocess.Popen, log: Path, seconds: float = 300.0) -> None:
    def answers() -> bool:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return True
        except (urllib.error.URLError, OSError):
            assert server.poll() is None, log.read_text()[-3000:]
            return False

    wait_until(answers, seconds, "judge's server", pause=0.3)


def judge(url: str, **settings) -> Judge:
    return Judge(JudgeConfig(**{"url": url, "model": "judge", "retries": 0, "timeout_seconds": patient(120), "seed": 1} | settings))


def test_a_constrained_answer_is_read_as_a_verdict(url):
    with judge(url, json_schema=True, temperature=1.0, max_tokens=5000) as made:
        verdict = made.grade("1+1?", "2", "2").result()
        assert verdict.outcome in ("correct", "wrong") and verdict.score == float(verdict.outcome == "correct"), verdict
        assert made.statistics()["prompt_tokens"] > 100 and made.statistics()["requests"] == 1


def test_noise_is_no_verdict_and_an_unknown_model_ends_the_run(url):
    with judge(url, max_tokens=16) as made:
        verdict = made.grade("1+1?", "2", "2").result()
        assert verdict.outcome == "error" and "finish_reason is 'length'" in verdict.detail
    with judge(url, model="other") as made, pytest.raises(RewardError, match=r"refuses \(HTTP 404\)"):
        made.grade("1+1?", "2", "2").result()
