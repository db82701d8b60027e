"""What an engine process is started with."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from megatron_r1.config.rollout import RolloutConfig
from megatron_r1.errors import ConfigError
from megatron_r1.model.architecture import Architecture
from megatron_r1.rollout.cache_size import block_tokens
from megatron_r1.rollout.sync.weight_buckets import bucket_bytes
from megatron_r1.weights.mapping import model_entries

#: Shapes that the attention kernels of vLLM 0.32 have on CPU; another one fails at the first token.
CPU_SHAPES = {
    "grouped_query": {"head_dim": (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)},
    "latent": {"kv_lora_rank": (512,), "qk_rope_head_dim": (64,)},
}

NODE_ADDRESS = "VLLM_HOST_IP"  #: variable in which vLLM looks for the address under which other nodes reach this one
WORKER_EXTENSION = "megatron_r1.rollout.vllm.worker.HeldWeights"


@dataclass(frozen=True)
class EngineOptions:
    """Settings of one engine; sent to the engine process as it starts."""

    hf_config: dict[str, Any]  #: the config.json of the model
    attention: Literal["grouped_query", "latent"]
    has_experts: bool
    device: Literal["cpu", "cuda"]
    dtype: Literal["float32", "bfloat16"]
    end_token_ids: tuple[int, ...]  #: each ends a response
    max_model_len: int  #: prompt and response tokens together
    max_num_seqs: int  #: sequences computed at a time
    tensor_parallel_size: int
    nodes: int  #: that the engine spans
    kv_cache_bytes: int | None  #: None: vLLM's share of the device
    block_tokens: int | None  #: of a block of the KV cache; None: vLLM's choice
    gpu_memory_utilization: float
    transfer: Literal["shm", "nccl"]
    verify_weights: bool
    start_timeout_seconds: float
    step_timeout_seconds: float | None  #: of a whole call; None: no limit beside `stall_seconds`
    stall_seconds: float  #: without a sign of life, or in one call that is no sampling
    bucket_bytes: int  #: of weights in one call
    sleep: bool = False  #: whether it gives its device memory back between sampling and the next weights
    stop: tuple[str, ...] = ()  #: texts that end a response, too
    tokenizer_json: str = ""  #: text of tokenizer.json, by which the engine finds `stop`; "" without one
    worker_extension: str = WORKER_EXTENSION  #: class mixed into vLLM's worker, as "module.Class"

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""
        return self.hf_config["vocab_size"]

    def is_draft_layer(self, name: str) -> bool:
        """Multi-token-prediction layers follow the model's own; vLLM's main model does not have them."""
        parts = name.split(".")
        return parts[:2] == ["model", "layers"] and int(parts[2]) >= self.hf_config["num_hidden_layers"]


@dataclass(frozen=True)
class Part:
    """What one node holds of an engine that spans several."""

    node: int  #: 0 is the head, which schedules and answers; the others' workers do as it asks
    address: str  #: of the head's node, at which all workers meet
    port: int  #: free there


def engine_options(
    arch: Architecture,
    rollout: RolloutConfig,
    *,
    device: Literal["cpu", "cuda"],
    dtype: Literal["float32", "bfloat16"],
    bos_token_id: int,
    eos_token_id: int,
    max_prompt_tokens: int,
    end_token_ids: tuple[int, ...] = (),
    tokenizer_json: str = "",
) -> EngineOptions:
    """Options for a model and a config.

    Args:
        eos_token_id: of config.json; it ends a response.
        end_token_ids: these do, too.
        tokenizer_json: needed with `rollout.stop`.

    Raises:
        ConfigError: a prompt and a response together are longer than the model's positions, the model does not divide over
            the engine's ranks, vLLM does not have a model of this shape, or transfer or sleep do not fit the device.
    """
    max_model_len = max_prompt_tokens + rollout.max_response_tokens
    if max_model_len > arch.max_position_embeddings:
        raise ConfigError(
            f"data.max_prompt_tokens={max_prompt_tokens} and rollout.max_response_tokens={rollout.max_response_tokens} "
            f"are more than the model's max_position_embeddings={arch.max_position_embeddings}"
        )
    if rollout.engines_sleep and device == "cpu":
        raise ConfigError("rollout.sleep=true needs a CUDA device: vLLM's CPU build has no sleep mode; set rollout.sleep=false")
    _check_shape(arch, device, rollout.tensor_parallel_size)
    if rollout.tensor_parallel_size % rollout.nodes_per_engine:
        raise ConfigError(
            f"rollout.nodes_per_engine={rollout.nodes_per_engine} does not divide "
            f"rollout.tensor_parallel_size={rollout.tensor_parallel_size}, which counts the devices of all its nodes"
        )
    weight_bytes = engine_weight_bytes(arch, dtype)
    return EngineOptions(
        hf_config=arch.to_hf_config(bos_token_id, eos_token_id, dtype),
        attention=arch.ATTENTION,
        has_experts=arch.experts is not None,
        device=device,
        dtype=dtype,
        end_token_ids=tuple(dict.fromkeys((eos_token_id, *end_token_ids))),
        max_model_len=max_model_len,
        max_num_seqs=rollout.max_num_seqs,
        tensor_parallel_size=rollout.tensor_parallel_size,
        nodes=rollout.nodes_per_engine,
        kv_cache_bytes=rollout.kv_cache_bytes,
        block_tokens=block_tokens(arch, max_model_len) if device == "cpu" else None,
        gpu_memory_utilization=rollout.gpu_memory_utilization,
        transfer=_transfer(rollout, device),
        verify_weights=rollout.verify_weights,
        start_timeout_seconds=start_limit(
            rollout.start_timeout_seconds, rollout.tensor_parallel_size, rollout.nodes_per_engine, weight_bytes
        ),
        step_timeout_seconds=rollout.step_timeout_seconds,
        stall_seconds=rollout.stall_seconds,
        bucket_bytes=bucket_bytes(rollout.bucket_mb, weight_bytes),
        sleep=rollout.engines_sleep,
        stop=tuple(rollout.stop),
        tokenizer_json=tokenizer_json if rollout.stop else "",
    )


def start_limit(setting: float | None, workers: int = 1, nodes: int = 1, weight_bytes: int = 0) -> float:
    """Seconds in which an engine must start: the setting, or what grows with what has to start.

    Workers of a node import vLLM from the same disk, nodes wait for each other, and every worker fills its share of the weights.
    64 workers on 8 nodes with 1,342 GB have 1,335 s.
    """
    if setting is not None:
        return setting
    return 600.0 + 5.0 * (workers - 1) + 30.0 * (nodes - 1) + 10.0 * weight_bytes / 1e9 / workers


def engine_weight_bytes(arch: Architecture, dtype: Literal["float32", "bfloat16"]) -> int:
    """Bytes of all weights of an engine, and so of one update; layers of multi-token prediction are not in it."""
    parameters = sum(math.prod(shape) for entry in model_entries(arch) if "mtp" not in entry.megatron[0] for shape in entry.shapes)
    return parameters * (4 if dtype == "float32" else 2)


def _transfer(rollout: RolloutConfig, device: Literal["cpu", "cuda"]) -> Literal["shm", "nccl"]:
    apart = rollout.placement == "disaggregated"
    if rollout.transfer == "nccl" and device == "cpu":
        raise ConfigError("rollout.transfer=nccl needs a CUDA device: set rollout.transfer=shm or auto")
    if rollout.transfer == "nccl" and not apart:
        raise ConfigError(
            f"rollout.transfer=nccl does not go with rollout.placement={rollout.placement}: trainer and engine "
            "are on the same GPU, and NCCL takes no two processes on one; set rollout.transfer=shm or auto"
        )
    return {"auto": "nccl" if device == "cuda" and apart else "shm"}.get(rollout.transfer, rollout.transfer)


def _check_shape(arch: Architecture, device: Literal["cpu", "cuda"], tensor_parallel_size: int) -> None:
    """Raises ConfigError for what vLLM would refuse late, or build otherwise than asked."""
    for name, size in arch.vllm_split_sizes().items():
        if size % tensor_parallel_size:
            raise ConfigError(f"rollout.tensor_parallel_size={tensor_parallel_size} does not divide the model's {name}={size}")
    refusal = arch.vllm_refusal()
    if refusal is not None:
        raise ConfigError(refusal)
    for name, sizes in CPU_SHAPES[arch.ATTENTION].items() if device == "cpu" else ():
        if (size := getattr(arch, name)) not in sizes:
            one = "the one" if len(sizes) == 1 else "one"
            raise ConfigError(f"the model's {name}={size} is not {one} that vLLM has on CPU: {', '.join(map(str, sizes))}")


def engine_environment(device: Literal["cpu", "cuda"], threads: int, address: str | None = None) -> dict[str, str]:
    """Variables that vLLM and torch read as they are imported in the engine process.

    Args:
        address: of the process's node, if the engine spans several.
    """
    common = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine process is already ours alone
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",  # everything is in the local folder
        "PYTHONUNBUFFERED": "1",
    } | ({} if address is None else {NODE_ADDRESS: address})
    if device == "cuda":
        return common
    return common | {
        "OMP_NUM_THREADS": str(threads),
        "TORCHDYNAMO_DISABLE": "1",  # the sampler would compile for 14 s at the first call
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # "auto" pins every engine of a machine to the same cores
    }
