"""`megatron-r1 serve`: vLLM's OpenAI-compatible server on what was trained."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import FrameType

import httpx

from megatron_r1.chat_endpoint import read_api_key
from megatron_r1.conversion.export_hf import export_folder
from megatron_r1.data.chat.load import load_template
from megatron_r1.data.chat.prompt_templates import r1_chat_jinja, r1_zero_jinja, with_system_jinja
from megatron_r1.errors import ConfigError, DeviceError, RolloutError
from megatron_r1.pipeline.builders.engine_weights import weights_fingerprint
from megatron_r1.pipeline.builders.engines import build_engine_options
from megatron_r1.pipeline.talk.model import TalkModel
from megatron_r1.rollout.options import EngineOptions, engine_environment
from megatron_r1.runtime.cores import usable_cores
from megatron_r1.runtime.launch import child_environment
from megatron_r1.runtime.temporary import temporary_folder
from megatron_r1.weights.generation import GENERATION_CONFIG, read_generation

SERVED_PREFIX = "megatron_r1-serve-"  #: of the folder that vLLM reads, in the temporary directory
CACHE = "served"  #: folder in a run, or beside a checkpoint, with its exported models
_PROGRAM = "megatron_r1.rollout.vllm.api_server"
_WORKER = "megatron_r1.rollout.vllm.served_worker.ServedWorker"
_LOCAL = ("127.0.0.1", "localhost", "::1")
_MOST_FILE = 5_000_000_000
_LEAVE_SECONDS = 10.0


@dataclass(frozen=True)
class Address:
    """Where and under which name a model is served."""

    host: str
    port: int
    name: str
    api_key_file: str | None

    @property
    def url(self) -> str:
        """As this machine reaches it."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"


def serve(model: TalkModel, address: Address) -> None:
    """Serve until Ctrl-C or SIGTERM, and leave no process behind.

    Raises:
        ConfigError: the port is taken, the key cannot be read, or vLLM does not have the model as the settings want it.
        DeviceError: vLLM is not installed.
        RolloutError: the server ended by itself.
    """
    if find_spec("vllm") is None:
        raise DeviceError("vllm is not installed: docs/cluster.md says how; without it nothing can be served")
    load_template(model.config.data, model.tokenizer)  # raises for settings that do not fit the template
    options = build_engine_options(model.config, model.device.kind, model.arch, model.tokenizer)
    if options.nodes > 1:
        raise ConfigError("rollout.nodes_per_engine: a server has the devices of this machine alone; drop it")
    key = read_api_key(address.api_key_file, "--api-key-file")
    _require_free(address)
    if key is None and address.host not in _LOCAL:
        _tell_line(f"warning: whoever reaches {address.host}:{address.port} may use the model: give --api-key-file")
    weights = export_cached(model) if model.is_checkpoint else model.folder
    needed = engine_environment(model.device.kind, model.config.runtime.threads or usable_cores())
    needed.pop("VLLM_ENABLE_V1_MULTIPROCESSING")  # the server's engine is a process of its own
    environment = child_environment(needed | ({} if key is None else {"VLLM_API_KEY": key}))
    if model.config.rollout.stop:
        _tell_line(f"note: the server has no stop texts of its own: requests name them, stop={model.config.rollout.stop}")
    with served_folder(model, weights, options.end_token_ids) as folder, _signals_noted() as asked:
        command = [sys.executable, "-m", _PROGRAM, str(os.getpid()), *serve_arguments(model, options, folder, address)]
        process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True)
        try:
            _watch(process, address, asked)
        finally:
            _end_server(process)


def serve_arguments(model: TalkModel, options: EngineOptions, folder: Path, address: Address) -> list[str]:
    """Those of `vllm serve`: what an engine of ours is started with, as far as a server has it."""
    arguments = {
        "--host": address.host, "--port": address.port, "--served-model-name": address.name, "--uvicorn-log-level": "warning",
        "--dtype": options.dtype, "--max-model-len": options.max_model_len, "--max-num-seqs": options.max_num_seqs,
        "--tensor-parallel-size": options.tensor_parallel_size, "--gpu-memory-utilization": options.gpu_memory_utilization,
        "--generation-config": str(folder), "--worker-extension-cls": _WORKER,
    }  # fmt: skip
    if options.kv_cache_bytes is not None:
        arguments["--kv-cache-memory-bytes"] = options.kv_cache_bytes
    if options.block_tokens is not None:
        arguments["--block-size"] = options.block_tokens
    if model.config.data.template_arguments:
        arguments["--default-chat-template-kwargs"] = json.dumps(model.config.data.template_arguments)
    flags = []
    if options.device == "cpu":
        flags.append("--enforce-eager")
        if options.attention == "latent":  # see `rollout.vllm.engine`
            arguments["--attention-backend"] = "CPU_MLA"
            arguments["--compilation-config"] = json.dumps({"custom_ops": ["-rotary_embedding"]})
    return ["--model", str(folder), *(str(part) for pair in arguments.items() for part in pair), *flags]


def export_cached(model: TalkModel) -> Path:
    """The checkpoint as a Hugging Face folder, made once for its content and renamed into place when it is whole."""
    parent = (model.run or model.folder.parent) / CACHE
    out = parent / f"{model.folder.name}-{weights_fingerprint(model.folder)[:12]}"
    if out.is_dir():
        _tell_line(f"{out}: exported earlier")
        return out
    _tell_line(f"{out}: exporting {model.folder}, which is in Megatron's format")
    parent.mkdir(parents=True, exist_ok=True)
    export_folder(model.folder, out, None, _MOST_FILE)
    return out


@contextmanager
def served_folder(model: TalkModel, weights: Path, ends: Sequence[int]) -> Iterator[Path]:
    """A folder for vLLM: links to the weights, and the tokenizer with the chat template that the model was trained with.

    Nothing is written into the folder of the weights: its manifest covers every file. generation_config.json names every end of
    sequence and how the run sampled, which are the server's defaults. What a server that was killed left is removed first.
    """
    with temporary_folder(SERVED_PREFIX) as folder:
        template = chat_jinja(model)
        (model.tokenizer if template is None else model.tokenizer.with_chat_template(template)).save(folder)
        said = read_generation(weights, model.arch.vocab_size).settings
        rollout = model.config.rollout
        sampling = {"temperature": rollout.temperature, "top_p": rollout.top_p, "do_sample": True}
        generation = {**said, **sampling, "eos_token_id": list(ends)}
        (folder / GENERATION_CONFIG).write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
        for path in weights.iterdir():
            if not (folder / path.name).exists():
                (folder / path.name).symlink_to(path.absolute())
        yield folder


def chat_jinja(model: TalkModel) -> str | None:
    """The chat template as Jinja text, with the system message that the model was trained with if a client gives none.

    None: the tokenizer's own, as it is. Text before and after questions is the client's: evaluation adds it already.
    """
    data, tokenizer = model.config.data, model.tokenizer
    begins = bool(tokenizer.start_ids)
    if data.template == "tokenizer":
        jinja = tokenizer.chat_template or ""
    elif data.template == "r1_zero":
        return r1_zero_jinja(begins)
    else:
        jinja = r1_chat_jinja(data.template == "r1_chat_think", begins)
    if data.system_prompt is not None:
        return with_system_jinja(jinja, data.system_prompt)
    return None if data.template == "tokenizer" else jinja


def _require_free(address: Address) -> None:
    try:
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)[0]
        with socket.socket(found[0], found[1]) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(found[4])
    except OSError as error:
        raise ConfigError(
            f"--host {address.host} --port {address.port} cannot be listened on ({error.strerror}): choose another --port"
        ) from None


@contextmanager
def _signals_noted() -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM are put into the list and raise nothing."""
    asked: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        asked.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _watch(process: subprocess.Popen[bytes], address: Address, asked: list[int]) -> None:
    """Wait for a signal; say when the model answers. Raises RolloutError if the server ends before one comes."""
    is_told = False
    while not asked:
        code = process.poll()
        if code is not None:
            raise RolloutError(f"vLLM's server ended with exit code {code}: what it said stands above")
        if not is_told and _answers(address):
            is_told = True
            _tell_line(f"{address.name} answers at {address.url}/v1; Ctrl-C ends")
        time.sleep(0.2)


def _answers(address: Address) -> bool:
    try:
        return httpx.get(f"{address.url}/health", timeout=5.0, trust_env=False).status_code == httpx.codes.OK
    except httpx.HTTPError:
        return False


def _end_server(process: subprocess.Popen[bytes]) -> None:
    """Ask the server to leave, and kill whatever is left of its session."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(_LEAVE_SECONDS)
        except subprocess.TimeoutExpired:
            pass
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def _tell_line(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
