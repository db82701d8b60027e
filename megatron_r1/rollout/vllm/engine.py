"""vLLM, inside the engine process."""

from __future__ import annotations

import json
import math
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast
from vllm import LLM, SamplingParams
from vllm.config import WeightTransferConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.inputs import TokensPrompt
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine import FinishReason
from vllm.v1.engine.core_client import InprocClient
from vllm.v1.engine.llm_engine import LLMEngine
from vllm.v1.executor.multiproc_executor import MultiprocExecutor

from megatron_r1.rollout.options import EngineOptions, Part
from megatron_r1.rollout.vllm.cpu_fixes import check_version
from megatron_r1.rollout.vllm.nccl_transfer import NCCL_BACKEND
from megatron_r1.rollout.vllm.shared_memory import SHM_BACKEND
from megatron_r1.rollout.vllm.stream import Answer, PromptFeed, Say, sample_stream
from megatron_r1.types import Sampling


class VllmEngine:
    """One `vllm.LLM` that starts with meaningless weights and receives real ones by updates.

    The four methods of weight transfer are those of vLLM's `VLLMWeightSyncClient` protocol.

    Args:
        part: this node's place in an engine that spans several nodes; starting waits for the others.
    """

    def __init__(self, options: EngineOptions, part: Part | None = None) -> None:
        check_version()
        self.end_token_ids, self.stop = list(options.end_token_ids), list(options.stop)
        with _model_folder(options) as folder:
            self.llm = LLM(folder, **_arguments(options, part))
        if self.stop:  # then text is needed here, too: vLLM decodes with this vocabulary and looks for the texts
            # Nothing is encoded. With SentencePiece's pre-tokenizer vLLM 0.32 fails at an id of the model that no token has.
            vocabulary = Tokenizer.from_str(json.dumps(json.loads(options.tokenizer_json) | {"pre_tokenizer": None}))
            self.llm.llm_engine.output_processor.tokenizer = PreTrainedTokenizerFast(tokenizer_object=vocabulary)

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Open the transfer; once."""
        self.llm.init_weight_transfer_engine({"init_info": init_info})

    def start_weight_update(self) -> None:
        """Begin an update of all weights."""
        self.llm.start_weight_update()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Receive one bucket."""
        self.llm.update_weights({"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """End the update: from here on the new weights are used, and nothing cached from the old ones is."""
        self.llm.finish_weight_update(weight_version)
        self.reset_prefix_cache()

    def call_workers(self, method: str, *args: Any) -> list[Any]:
        """Call a method of the worker extension on every worker; their results in order."""
        return self.llm.collective_rpc(method, args=args)

    def sleep(self) -> None:
        """Give back the device memory of weights and KV cache, whose content is lost."""
        self.llm.sleep(level=2)

    def wake_up(self, tags: list[str]) -> None:
        """Take the memory of "weights" or of "kv_cache" again; its content means nothing yet."""
        self.llm.wake_up(tags)

    def reset_prefix_cache(self) -> None:
        """Forget all cached keys and values."""
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not reset its prefix cache: requests are still running")

    def generate(self, sampling: Sampling, feed: PromptFeed) -> None:
        """Sample responses to the prompts of a feed; see `sample_stream`."""
        # What an earlier call left in the cache would change the order of summation in this one, and so the last bits.
        self.reset_prefix_cache()
        requests = _Requests(self.llm.llm_engine, partial(self._parameters, sampling), reads_text=bool(self.stop))
        sample_stream(requests, feed, sampling.responses)

    def answer(self, token_ids: list[int], sampling: Sampling, seed: int, say: Say) -> bool:
        """Sample one response and say its tokens as they come. The cache keeps what it holds of the conversation before.

        Returns:
            Whether it ended with end-of-sequence, and not at the limit or because nobody wants more.
        """
        parameters = self._parameters(sampling, seed)
        parameters.output_kind = RequestOutputKind.DELTA
        engine = self.llm.llm_engine
        name = engine.add_request("answer", {"prompt_token_ids": token_ids}, parameters)
        try:
            while engine.has_unfinished_requests():
                for output in engine.step():
                    ids, logprobs, ended = _read_completion(output.outputs[0])
                    if not say(ids, logprobs):
                        return False
                    if output.finished:
                        return ended
        finally:
            engine.abort_request([name], internal=True)  # nothing if it is finished
        return False

    def _parameters(self, sampling: Sampling, seed: int | None) -> SamplingParams:
        return SamplingParams(
            n=1,
            temperature=0.0 if seed is None else sampling.temperature,
            top_p=1.0 if seed is None else sampling.top_p,
            max_tokens=sampling.max_tokens,
            seed=seed,
            logprobs=0,  # of the sampled token only
            stop_token_ids=self.end_token_ids,
            stop=self.stop,
            include_stop_str_in_output=True,  # what was sampled stays, as the trainer trains on it
            detokenize=bool(self.stop),
            skip_special_tokens=False,  # a text may name one
            spaces_between_special_tokens=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )


class _Requests:
    """A `RequestEngine`: vLLM's engine in this process.

    What it samples is taken as it comes from the sampler. vLLM's output processor makes some objects of each token; it is needed
    only where there are stop texts to look for.
    """

    def __init__(self, engine: LLMEngine, parameters: Callable[[int | None], SamplingParams], *, reads_text: bool) -> None:
        self._engine, self._parameters, self._reads_text = engine, parameters, reads_text
        assert isinstance(engine.engine_core, InprocClient), "engine_environment keeps the scheduler in this process"
        self._scheduler = engine.engine_core.engine_core.scheduler
        #: by vLLM's name of a request that runs: ours, its tokens, and their log-probs
        self._sampled: dict[str, tuple[str, list[int], list[np.ndarray]]] = {}

    def add(self, request_id: str, token_ids: list[int], seed: int | None) -> None:
        """See `RequestEngine.add`."""
        engine, parameters = self._engine, self._parameters(seed)
        prompt: TokensPrompt = {"prompt_token_ids": token_ids}
        if self._reads_text:
            engine.add_request(request_id, prompt, parameters)
            return
        request = engine.input_processor.process_inputs(request_id, prompt, parameters, engine.get_supported_tasks())
        engine.input_processor.assign_request_id(request)  # a name that no earlier request had
        self._sampled[request.request_id] = (request_id, [], [])
        engine.engine_core.add_request(request)

    def step(self) -> list[tuple[str, Answer]]:
        """See `RequestEngine.step`."""
        if self._reads_text:
            return [(output.request_id, _read_completion(output.outputs[0])) for output in self._engine.step()]
        finished = []
        for output in self._engine.engine_core.get_output().outputs:
            request_id, token_ids, logprobs = self._sampled[output.request_id]
            if output.new_token_ids:
                assert output.new_logprobs is not None, "`_parameters` asks for them"
                token_ids += output.new_token_ids
                logprobs.append(output.new_logprobs.logprobs[:, 0])  # the sampled token's is the first
            if output.finish_reason is not None:
                del self._sampled[output.request_id]
                ended = output.finish_reason == FinishReason.STOP
                answer = np.array(token_ids, np.int32), np.concatenate(logprobs).astype(np.float32), ended
                finished.append((request_id, answer))
        return finished

    def waiting(self) -> int:
        """See `RequestEngine.waiting`. A request that lost its place in the cache to others waits, too."""
        return self._scheduler.get_request_counts()[1]

    def progress(self) -> tuple[int, int]:
        """See `RequestEngine.progress`: tokens computed of all open requests, and their number."""
        requests = self._scheduler.requests.values()
        return sum(request.num_computed_tokens for request in requests), len(requests)


def _read_completion(completion: Any) -> Answer:
    logprobs = [at[token].logprob for at, token in zip(completion.logprobs, completion.token_ids, strict=True)]
    return np.array(completion.token_ids, np.int32), np.array(logprobs, np.float32), completion.finish_reason == "stop"


class FollowingWorkers:
    """The workers of a node that is not the head of its engine, as `vllm serve --headless` starts them. The head commands them.

    Args:
        on_end: called, in a thread, when a worker has ended.
    """

    def __init__(self, options: EngineOptions, part: Part, on_end: Callable[[], None]) -> None:
        check_version()
        with _model_folder(options) as folder:
            config = EngineArgs(folder, **_arguments(options, part)).create_engine_config(headless=True)
            self._executor = MultiprocExecutor(config, monitor_workers=False)

        def watch() -> None:
            self._executor.start_worker_monitor(inline=True)
            on_end()

        threading.Thread(target=watch, daemon=True).start()


@contextmanager
def _model_folder(options: EngineOptions) -> Iterator[str]:
    """A folder with what vLLM reads of a model without weights; needed while the engine starts."""
    with tempfile.TemporaryDirectory(prefix="megatron_r1-engine-") as folder:
        Path(folder, "config.json").write_text(json.dumps(options.hf_config))
        yield folder


def _arguments(options: EngineOptions, part: Part | None) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "load_format": "dummy",
        "skip_tokenizer_init": True,  # text is decoded by the trainer, with its own tokenizer
        "generation_config": "vllm",
        "dtype": options.dtype,
        "max_model_len": options.max_model_len,
        "max_num_seqs": options.max_num_seqs,
        "tensor_parallel_size": options.tensor_parallel_size,
        "kv_cache_memory_bytes": options.kv_cache_bytes,
        "gpu_memory_utilization": options.gpu_memory_utilization,
        "logprobs_mode": "processed_logprobs",  # of the distribution sampled from: temperature and top-p applied
        "async_scheduling": False,
        "disable_log_stats": True,
        "weight_transfer_config": WeightTransferConfig(backend={"shm": SHM_BACKEND, "nccl": NCCL_BACKEND}[options.transfer]),
        "worker_extension_cls": options.worker_extension,
        # The workers of an engine wait for each other as it starts: the slowest may take as long as the start may.
        "distributed_timeout_seconds": math.ceil(options.start_timeout_seconds),
        "cpu_distributed_timeout_seconds": math.ceil(options.start_timeout_seconds),
        "enable_sleep_mode": options.sleep,
    }
    if part is not None:
        arguments |= {
            "nnodes": options.nodes, "node_rank": part.node, "master_addr": part.address, "master_port": part.port,
            "distributed_executor_backend": "mp",
        }  # fmt: skip
    if options.device == "cuda":
        if options.has_experts:
            arguments["moe_backend"] = "triton"  # other kernels shuffle expert weights, which `held_weights` cannot read back
        return arguments
    arguments.update(
        enforce_eager=True,
        distributed_executor_backend="uni" if options.tensor_parallel_size == 1 else "mp",
        block_size=options.block_tokens,
    )
    if options.attention == "latent":
        # vLLM's CPU operator for RoPE rotates the three-dimensional queries of MLA wrongly; its torch code is right. The
        # two-dimensional ones of grouped-query attention it rotates right.
        arguments.update(attention_backend="CPU_MLA", compilation_config={"custom_ops": ["-rotary_embedding"]})
    return arguments
