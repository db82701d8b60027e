"""The engine through this project against bare vLLM: same weights, prompts, seeds, lengths, type and threads, in turn.

Ours adds to vLLM a process of its own with a hop for every prompt, seeds by prompt and sample, decoding, weights that can be
written in place and read back bit for bit. What that may cost is bounded by `BAR`. Speed is also set beside what the machine's
matrix products would allow.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.against_trl.folder import make_random_folder
from benchmarks.against_trl.sides import RunningSide, Turn
from benchmarks.against_trl.workloads import WORKLOADS, Workload
from benchmarks.measure import Comparison, Disagreement, Side, print_table
from benchmarks.processes import cpu_seconds, with_descendants
from megatron_r1.config.rollout import RolloutConfig
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.model.architecture import Architecture
from megatron_r1.pipeline.builders.engine_weights import open_weights
from megatron_r1.rollout.options import EngineOptions, engine_environment, engine_options
from megatron_r1.rollout.vllm_client import VllmProcessEngine, response_seed
from megatron_r1.runtime.launch import child_environment
from megatron_r1.types import Prompt, Sampling
from megatron_r1.weights.mapping import hf_shapes

BAR = 0.95  #: least tokens per second of ours over bare vLLM's
PROMPT_TOKENS = 48
_SAME_FIRST = 0.9  #: least share of responses whose first token is the same; the last bits of two logits may decide one
_MATRIX = 1024  #: rows and columns of the product that measures the machine
_MATRIX_SECONDS = 1.0

_BARE_BLOCK = 128  #: tokens of a block of bare vLLM's cache on a CPU, the larger of the two sides'

_BARE_STEP = 4096  #: tokens of a step of bare vLLM's, unless prompts need more

#: How bare vLLM runs its model: "compiled" is its default. Ours never compiles on a CPU, since weights are written into its layers.
HOW = ("compiled", "eager")

#: Name -> model and number of responses.
CASES = {f"{model}-{responses}": (model, responses) for model in ("tiny", "smollm2") for responses in (64, 256)}


@dataclass
class BareResult:
    """One case."""

    comparison: Comparison
    cpu_ratio: float  #: our tokens per second of all our processes' CPU time, over bare vLLM's
    same_tokens: float  #: share of the sampled tokens that are the same
    possible: float  #: tokens per second, if nothing but the products with weights took time

    @property
    def reaches_bar(self) -> bool:
        """Whether ours is fast enough."""
        return self.comparison.speed_ratio >= BAR


def compare_with_bare(case: str, how: str, arguments: argparse.Namespace, work: Path) -> BareResult:
    """Sample in turn, after one untimed turn of each.

    Args:
        case: of `CASES`.
        how: of `HOW`: how bare vLLM runs its model.

    Raises:
        Disagreement: the two do not sample the same.
        CommandFailed, RolloutError: a side ended.
    """
    model, responses = CASES[case]
    workload = WORKLOADS[model]
    work = work / f"{case}-{how}"
    work.mkdir()
    folder = make_random_folder(work / "model", workload, arguments.seed)
    prompts = make_prompts(workload, responses // workload.group_size, arguments.seed)
    sampling = Sampling(workload.group_size, 1.0, 1.0, workload.tokens)
    options = our_options(workload, responses, Tokenizer.load(folder).eos_id)
    job = work / "job.json"
    job.write_text(json.dumps(bare_job(folder, options, prompts, sampling, arguments.seed, how)), encoding="utf-8")
    environment = {"OMP_NUM_THREADS": str(arguments.threads)} | _shared_variables(arguments.threads)
    command = [sys.executable, "-m", "benchmarks.bare_vllm"]
    engine = VllmProcessEngine(options, Tokenizer.load(folder).decode, child_environment(), work / "engine.log", arguments.threads)
    try:
        engine.load_weights(open_weights(folder, torch.float32), version=0)
        with RunningSide("bare vLLM", command, [str(job)], environment, work / "bare.log") as bare:
            bare.started()
            ours, peer = _our_turn(engine, prompts, sampling, arguments.seed), bare.turn()
            same = check_same(ours.report["token_ids"], peer.report["token_ids"])
            comparison = Comparison(f"{case}, {how}", Side(), Side())
            for repetition in range(arguments.repeats):
                for name in ("ours", "bare") if repetition % 2 == 0 else ("bare", "ours"):
                    turn = _our_turn(engine, prompts, sampling, arguments.seed) if name == "ours" else bare.turn()
                    side = comparison.ours if name == "ours" else comparison.peer
                    side.amounts.append(sum(map(len, turn.report["token_ids"])))
                    side.wall_seconds.append(turn.wall_seconds)
                    side.own_cpu_seconds.append(turn.cpu_seconds)
    finally:
        engine.close()
    cpu = sum(comparison.peer.own_cpu_seconds) / sum(comparison.ours.own_cpu_seconds)
    flops = rollout_flops(workload.arch, [len(p.token_ids) for p in prompts], workload.group_size, workload.tokens)
    possible = matrix_speed(arguments.threads) / (flops / (responses * workload.tokens))
    return BareResult(comparison, cpu, same, possible)


def print_bare(results: list[BareResult]) -> None:
    """The table."""
    print_table(
        [
            "responses, and how bare vLLM runs",
            "ours, tokens/s",
            "bare vLLM, tokens/s",
            "ours / bare",
            "by CPU time",
            "same tokens",
            "share of the possible",
        ],
        [
            [
                result.comparison.workload,
                f"{result.comparison.ours.per_second:,.0f}",
                f"{result.comparison.peer.per_second:,.0f}",
                f"{result.comparison.speed_ratio:.2f}",
                f"{result.cpu_ratio:.2f}",
                f"{result.same_tokens:.1%}",
                f"{result.comparison.ours.per_second / result.possible:.1%} of {result.possible:,.0f} tokens/s",
            ]
            for result in results
        ],
    )


def describe_bare(result: BareResult) -> dict[str, Any]:
    """For the JSON file."""
    return asdict(result) | {"speed_ratio": result.comparison.speed_ratio, "bar": BAR}


def rollout_flops(arch: Architecture, prompt_lengths: list[int], group_size: int, tokens: int) -> float:
    """Floating-point operations of the products with weights that a rollout cannot do without: two for each weight and token.

    A group's prompt is computed once, logits for response tokens alone; of routed experts those that a token is sent to count.
    """
    body, head = multiplied_weights(arch)
    sampled = len(prompt_lengths) * group_size * tokens
    return 2.0 * (body * (sum(prompt_lengths) + sampled) + head * sampled)


def multiplied_weights(arch: Architecture) -> tuple[float, float]:
    """Weights that one token is multiplied with, in the layers and in the output projection."""
    body, head = 0.0, 0.0
    for name, shape in hf_shapes(arch).items():
        if len(shape) != 2:
            continue
        size = float(shape[0] * shape[1])
        if name == "lm_head.weight" or (name == "model.embed_tokens.weight" and arch.tie_word_embeddings):
            head += size
        elif ".mlp.experts." in name:
            body += size * arch.num_experts_per_tok / arch.n_routed_experts
        elif name != "model.embed_tokens.weight":
            body += size
    return body, head


def matrix_speed(threads: int) -> float:
    """Floating-point operations per second of this machine's float32 matrix products with that many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        a, b = torch.randn(2, _MATRIX, _MATRIX).unbind()
        torch.mm(a, b)
        started, products = time.perf_counter(), 0
        while (seconds := time.perf_counter() - started) < _MATRIX_SECONDS:
            torch.mm(a, b)
            products += 1
        return products * 2.0 * _MATRIX**3 / seconds
    finally:
        torch.set_num_threads(before)


def make_prompts(workload: Workload, count: int, seed: int) -> list[Prompt]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(PROMPT_TOKENS // 2, PROMPT_TOKENS + 1, (count,), generator=generator).tolist()
    ids = [torch.randint(8, workload.arch.vocab_size, (length,), generator=generator).tolist() for length in lengths]
    return [Prompt(f"prompt {number}", "", "", "", tuple(row)) for number, row in enumerate(ids)]


def cache_bytes(arch: Architecture, responses: int, tokens: int) -> int:
    """A KV cache in which all responses have room with blocks of either side, so that neither computes them in several waves."""
    blocks = responses * -(-tokens // _BARE_BLOCK) + 1
    return 4 * arch.cached_width * arch.num_hidden_layers * blocks * _BARE_BLOCK


def our_options(workload: Workload, responses: int, eos_id: int) -> EngineOptions:
    """How our engine is started."""
    cache = cache_bytes(workload.arch, responses, PROMPT_TOKENS + workload.tokens)
    return engine_options(
        workload.arch,
        RolloutConfig(max_response_tokens=workload.tokens, kv_cache_bytes=cache),
        device="cpu",
        dtype="float32",
        bos_token_id=0,
        eos_token_id=eos_id,
        max_prompt_tokens=PROMPT_TOKENS,
    )


def bare_job(
    folder: Path, options: EngineOptions, prompts: list[Prompt], sampling: Sampling, seed: int, how: str
) -> dict[str, Any]:
    """What bare vLLM is asked: our settings where they change the result or the room it has, its own defaults elsewhere."""
    engine: dict[str, Any] = {
        "model": str(folder),
        "skip_tokenizer_init": True,
        "dtype": options.dtype,
        "max_model_len": options.max_model_len,
        "max_num_seqs": options.max_num_seqs,
        "kv_cache_memory_bytes": options.kv_cache_bytes,
        "logprobs_mode": "processed_logprobs",
        "enforce_eager": how == "eager",
    }
    if options.attention == "latent":  # vLLM's CPU operator rotates the queries of latent attention wrongly, see rollout/vllm
        engine |= {"attention_backend": "CPU_MLA", "compilation_config": {"custom_ops": ["-rotary_embedding"]}}
    else:  # at a seeded prompt that two steps share bare vLLM ends on a CPU: all prompts go into one
        engine["max_num_batched_tokens"] = max(_BARE_STEP, sampling.n * sum(len(prompt.token_ids) for prompt in prompts))
    seeds = [[response_seed(seed, at, sample) for sample in range(sampling.n)] for at in range(len(prompts))]
    return {
        "engine": engine,
        "prompts": [list(prompt.token_ids) for prompt in prompts],
        "seeds": seeds,
        "tokens": sampling.max_tokens,
    }


def _shared_variables(threads: int) -> dict[str, str]:
    """Of our engine's variables those that say nothing of how vLLM works."""
    ours = engine_environment("cpu", threads)
    return {
        name: ours[name] for name in ("VLLM_LOGGING_LEVEL", "VLLM_NO_USAGE_STATS", "HF_HUB_OFFLINE", "VLLM_CPU_OMP_THREADS_BIND")
    }


def _our_turn(engine: VllmProcessEngine, prompts: list[Prompt], sampling: Sampling, seed: int) -> Turn:
    def used() -> float:  # bare vLLM is one of our descendants, and waits
        return sum(map(cpu_seconds, with_descendants(os.getpid())))

    wall, cpu = time.perf_counter(), used()
    groups = engine.generate(prompts, sampling, seed)
    seconds = time.perf_counter() - wall
    tokens = [rollout.token_ids.tolist() for group in groups for rollout in group.rollouts]
    return Turn(seconds, used() - cpu, 0, {"token_ids": tokens})


def check_same(ours: list[list[int]], bare: list[list[int]]) -> float:
    """Share of tokens that are the same. Raises Disagreement where sequences do not begin alike or have other lengths."""
    if [len(row) for row in ours] != [len(row) for row in bare]:
        raise Disagreement("the engine and bare vLLM sampled responses of different lengths")
    first = sum(a[0] == b[0] for a, b in zip(ours, bare, strict=True)) / len(ours)
    if first < _SAME_FIRST:
        raise Disagreement(f"of the responses of the engine and of bare vLLM only {first:.0%} begin with the same token")
    pairs = [x == y for a, b in zip(ours, bare, strict=True) for x, y in zip(a, b, strict=True)]
    return sum(pairs) / len(pairs)
