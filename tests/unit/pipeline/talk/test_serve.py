"""What a server gets of a trained model, what is refused before it starts, and that nothing of it is left."""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from megatron_r1.data.chat.load import load_template
from megatron_r1.data.chat.messages import Message
from megatron_r1.data.chat.prompt_templates import r1_chat_jinja
from megatron_r1.data.tokenizer import train_tokenizer
from megatron_r1.errors import ConfigError, RolloutError
from megatron_r1.model.presets import PRESETS
from megatron_r1.pipeline.builders.engines import build_engine_options
from megatron_r1.pipeline.talk import serve as module
from megatron_r1.pipeline.talk.model import find_model
from megatron_r1.pipeline.talk.serve import Address, serve, serve_arguments, served_folder
from megatron_r1.runtime.launch import free_port
from tests.patience import wait_until
from tests.random_weights import write_random_model

OWN = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
CHAT = [Message("user", "a few"), Message("assistant", "words"), Message("user", 'a "few" {words}')]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = write_random_model(tmp_path_factory.mktemp("serve") / "model", PRESETS["tiny"])
    train_tokenizer(["a few words"], 300).with_chat_template(OWN).save(folder)
    return folder


def find(folder, *settings):
    return find_model(folder, None, ["runtime.device=cpu", "runtime.threads=1", *settings], 64)


def address(**changes):
    return replace(Address("127.0.0.1", free_port(), "tiny", None), **changes)


@pytest.mark.parametrize("system", [None, 'Say "no" {twice}\n\U0001f600'])
@pytest.mark.parametrize("template", ["r1_zero", "r1_chat", "r1_chat_think", "tokenizer"])
def test_the_served_template_asks_as_the_run_did(folder, template, system):
    if system and template == "r1_zero":
        pytest.skip("it has no place for one")
    model = find(folder, f"data.template={template}", f"data.system_prompt={json.dumps(system, ensure_ascii=False)}")
    chat = CHAT[-1:] if template == "r1_zero" else CHAT
    with served_folder(model, folder, (1, 2)) as served:
        tokenizer = AutoTokenizer.from_pretrained(served)

        def ids(messages):
            told = [message.to_json() for message in messages]
            return tokenizer.apply_chat_template(told, add_generation_prompt=True, return_dict=True)["input_ids"]

        assert ids(chat) == load_template(model.config.data, model.tokenizer).encode_prompt(chat)
        if system:
            own = Message("system", "Be kind")
            plain = find(folder, f"data.template={template}", "data.system_prompt=Be kind")
            assert ids([own, *chat]) == load_template(plain.config.data, plain.tokenizer).encode_prompt(chat)
        if template == "r1_zero":
            with pytest.raises(Exception, match="one question"):
                ids(CHAT)


def test_the_folder_of_the_weights_stays_and_the_run_gives_the_defaults(folder):
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    model = find(folder, "data.template=r1_chat", "rollout.temperature=0.5", "rollout.top_p=0.9")
    with served_folder(model, folder, (2, 7)) as served:
        said = json.loads((served / "generation_config.json").read_text())
        assert (said["eos_token_id"], said["temperature"], said["top_p"]) == ([2, 7], 0.5, 0.9)
        (weights,) = [path for path in served.glob("*.safetensors")]
        assert weights.resolve() == (folder / weights.name).resolve()
    assert not served.exists() and before == {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_the_server_starts_as_an_engine_does(folder):
    model = find(
        folder, "data.template=tokenizer", "runtime.dtype=bf16", "rollout.tensor_parallel_size=2", "rollout.max_num_seqs=5"
    )
    options = build_engine_options(model.config, "cpu", model.arch, model.tokenizer)
    arguments = serve_arguments(model, options, folder, address(port=81))
    pairs = dict(itertools.pairwise(arguments))
    expected = {
        "--dtype": "bfloat16",
        "--max-model-len": "64",
        "--tensor-parallel-size": "2",
        "--max-num-seqs": "5",
        "--port": "81",
    }
    assert pairs["--block-size"] == str(options.block_tokens) == "16"
    assert expected.items() <= pairs.items() and pairs["--attention-backend"] == "CPU_MLA" and "--enforce-eager" in arguments


def test_what_cannot_be_served_is_told_before_a_server_starts(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(module.subprocess, "Popen", None)
    model = find(folder)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigError, match="cannot be listened on .* choose another --port"):
            serve(model, address(port=taken.getsockname()[1]))
    with pytest.raises(ConfigError, match="--host nowhere.invalid"):
        serve(model, address(host="nowhere.invalid"))
    with pytest.raises(ConfigError, match="none.txt"):
        serve(model, address(api_key_file=str(tmp_path / "none.txt")))
    with pytest.raises(ConfigError, match="system_prompt has no place"):
        serve(find(folder, "data.template=r1_zero", "data.system_prompt=x"), address())


STUBBORN = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
open(os.environ["STARTED"], "w").write(f"{os.getpid()} {child.pid} {os.environ['VLLM_API_KEY']}")
time.sleep(100)
"""


def is_running(pid):
    """Whether a process computes; one that nobody waits for may still have its entry."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_server_and_all_that_it_started(folder, tmp_path, monkeypatch, number):
    started, real, key = tmp_path / "started", subprocess.Popen, tmp_path / "key"
    key.write_text("hush\n")
    monkeypatch.setenv("STARTED", str(started))
    monkeypatch.setattr(module, "_LEAVE_SECONDS", 0.1)
    monkeypatch.setattr(module.subprocess, "Popen", lambda command, **how: real([sys.executable, "-c", STUBBORN], **how))
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)

    def press():
        while not started.exists() or len(started.read_text().split()) < 3:
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=press)
    thread.start()
    serve(find(folder), address(api_key_file=str(key)))
    thread.join()
    monkeypatch.setattr(module.subprocess, "Popen", real)  # `wait_until` starts a process, too
    server, child, told = started.read_text().split()
    assert told == "hush" and not is_running(server)
    wait_until(lambda: not is_running(child), 5, "end of a process that was killed")
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers


def test_a_server_that_ends_by_itself_is_an_error(folder, monkeypatch):
    real = subprocess.Popen
    monkeypatch.setattr(module.subprocess, "Popen", lambda command, **how: real([sys.executable, "-c", "exit(3)"], **how))
    with pytest.raises(RolloutError, match="ended with exit code 3"):
        serve(find(folder), address())


def test_r1_chat_does_not_serve_the_template_of_another_run(folder):
    model = find(folder, "data.template=r1_chat")
    assert module.chat_jinja(model) == r1_chat_jinja(False, bool(model.tokenizer.start_ids)) != OWN
    assert module.chat_jinja(find(folder, "data.template=tokenizer")) is None
