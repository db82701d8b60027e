"""The engine process without vLLM: calls, errors, time limits, and death on either side."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_r1.config.rollout import RolloutConfig
from megatron_r1.errors import ConfigError, RolloutError, WeightSyncError
from megatron_r1.model.presets import PRESETS
from megatron_r1.rollout import vllm_client as engine_process
from megatron_r1.rollout.channel.local import EngineProcess
from megatron_r1.rollout.options import engine_options
from megatron_r1.rollout.sync.verify_weights import HeldReport
from megatron_r1.weights.shard_plan import StoredWeights
from tests.paths import ROOT
from tests.patience import patient, wait_until
from tests.pipeline.engine_cases import options

SERVER = """
import sys, os, time
from multiprocessing.connection import Connection
from megatron_r1.errors import RolloutError, WeightSyncError
connection = Connection(int(sys.argv[1]))
print("server is up", flush=True)
while True:
    try:
        name, args = connection.recv()
    except EOFError:
        break
    if name == "start":
        connection.send((False, RolloutError("no memory left")))
    elif name == "echo":
        connection.send((True, args))
    elif name == "parts":
        for part in args:
            connection.send((None, part))
        connection.send((True, len(args)))
    elif name == "fail":
        connection.send((False, WeightSyncError("these differ")))
    elif name == "sleep":
        time.sleep(3600)
    elif name == "exit":
        print("about to leave", flush=True)
        os._exit(3)
"""


@pytest.fixture
def environment(tmp_path):
    """In which the server can be imported."""
    (tmp_path / "toy_server.py").write_text(SERVER)
    return {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}


@pytest.fixture
def process(tmp_path, environment):
    process = EngineProcess("toy_server", tmp_path / "logs" / "server.log", environment)
    yield process
    process.close()


def test_calls_and_errors(process):
    assert process.call("echo", 1, "two", timeout=patient(30)) == (1, "two")
    with pytest.raises(WeightSyncError, match="these differ"):
        process.call("fail", timeout=patient(30))
    assert process.call("echo", timeout=patient(30)) == ()


def test_parts_come_before_the_answer_and_in_order(process):
    parts = []
    assert process.call("parts", "a", "b", timeout=patient(30), on_part=parts.append) == 2
    assert parts == ["a", "b"]


def test_death_is_told_at_once_with_the_log(process):
    started = time.monotonic()
    with pytest.raises(RolloutError, match="died in exit .exit code 3.*about to leave"):
        process.call("exit", timeout=600)
    assert time.monotonic() - started < patient(30)
    with pytest.raises(RolloutError, match="closed"):
        process.call("echo", timeout=patient(30))


def test_kill_is_told_by_signal(process):
    process.call("echo", timeout=patient(30))
    os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(RolloutError, match="SIGKILL"):
        process.call("echo", timeout=600)


def test_time_limit_ends_the_process(process):
    process.call("echo", timeout=patient(30))
    with pytest.raises(RolloutError, match="did not answer sleep in 1 s.*server is up"):
        process.call("sleep", timeout=1)
    assert process._process.returncode is not None


def test_close_ends_the_process(process):
    process.call("echo", timeout=patient(30))
    process.close()
    process.close()
    assert process._process.returncode == 0


def test_failed_start_leaves_no_process(tmp_path, environment, monkeypatch):
    started = []
    monkeypatch.setattr(engine_process, "HOST_MODULE", "toy_server")
    monkeypatch.setattr(engine_process, "EngineProcess", lambda *args: started.append(EngineProcess(*args)) or started[0])
    with pytest.raises(RolloutError, match=r"no memory left \(see .*engine.log\)"):
        engine_process.VllmProcessEngine(options(PRESETS["tiny"]), str, environment, tmp_path / "engine.log")
    assert started[0]._process.returncode is not None


def test_an_engine_sleeps_between_sampling_and_the_next_weights(monkeypatch, tmp_path):
    """Memory comes back in this order: weights, the transfer, the cache; before that nothing can be sampled."""
    calls = []

    class Channel:
        def call(self, name, *args, **limits):
            calls.append((name, *(args[0] if name == "wake_up" else ())))
            assert name == "start" or limits["stall"] == 300, "an engine that does not come back is given up"
            if name == "call_workers":
                return [[("model.norm.weight", ((0, 4),))]] if args[0] == "weight_boxes" else [HeldReport()]
            return None

        def close(self, patience=0.0):
            pass

    monkeypatch.setattr(engine_process, "_open_channel", lambda *_: Channel())
    for sleeps in (True, False):
        awake = replace(options(PRESETS["tiny"]), verify_weights=False, sleep=sleeps)
        engine = engine_process.VllmProcessEngine(awake, str, {}, tmp_path / "engine.log")
        weights = StoredWeights.of_tensors({"model.norm.weight": torch.ones(4)})
        asked = ("call_workers",)  # what workers hold, and the plan: once; what came: always
        transfer = [("start_weight_update",), ("update_weights",), ("finish_weight_update",), asked]
        first = [asked, asked, *transfer]
        calls.clear()
        engine.load_weights(weights, 1)
        assert calls == first, "it starts awake"
        engine.sleep()
        engine.sleep()
        engine.load_weights(weights, 2)
        engine.close()
        if not sleeps:
            assert calls == first + transfer
            continue
        assert calls[len(first) :] == [("sleep",), ("wake_up", "weights"), *transfer, ("wake_up", "kv_cache")]
        engine.sleep()
        with pytest.raises(RolloutError, match="no weights"):
            engine.generate([], None, 0)


def test_sleep_on_a_cpu_is_one_line():
    """vLLM itself ignores it there. Engines on other nodes have their memory to themselves."""
    settings = {"dtype": "float32", "bos_token_id": 0, "eos_token_id": 1, "max_prompt_tokens": 64}
    rollout = RolloutConfig(max_response_tokens=32, sleep=True)
    says = "rollout.sleep=true needs a CUDA device: vLLM's CPU build has no sleep mode; set rollout.sleep=false"
    with pytest.raises(ConfigError, match=says):
        engine_options(PRESETS["tiny"], rollout, device="cpu", **settings)
    assert engine_options(PRESETS["tiny"], rollout, device="cuda", **settings).sleep
    apart = rollout.model_copy(update={"placement": "disaggregated"})
    assert not engine_options(PRESETS["tiny"], apart, device="cpu", **settings).sleep


@pytest.mark.slow
def test_engine_leaves_when_its_trainer_is_killed(tmp_path):
    """The real main program, without an engine in it: SIGKILL of the parent is noticed without the socket's help."""
    parent = tmp_path / "parent.py"
    parent.write_text(
        "import os, sys, time\n"
        "from pathlib import Path\n"
        "from megatron_r1.rollout.channel.local import EngineProcess\n"
        f"child = EngineProcess('megatron_r1.rollout.vllm.main', Path({str(tmp_path / 'log')!r}), dict(os.environ))\n"
        "leaked = os.dup(child._connection.fileno())\n"
        "if os.fork() == 0:\n"  # a process that keeps the trainer's end of the socket open, as a data worker might
        "    time.sleep(3600)\n"
        "    os._exit(0)\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(3600)\n"
    )
    trainer = subprocess.Popen([sys.executable, str(parent)], stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        engine = int(trainer.stdout.readline())
        time.sleep(3)
        os.kill(engine, 0)
        trainer.kill()
        trainer.wait()
        wait_until(lambda: _state(engine) == "Z", 15, "end of the engine", pause=0.2)
    finally:
        os.killpg(trainer.pid, signal.SIGKILL)


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "Z"
