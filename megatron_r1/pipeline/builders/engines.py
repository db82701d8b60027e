"""The rollout engines of a job: where they run, and how one is started. The only module that names the concrete engine."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Literal

from megatron_r1.config.schema import Config
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.model.architecture import Architecture
from megatron_r1.pipeline.builders.ends import find_end_tokens
from megatron_r1.pipeline.builders.export import config_bos_id
from megatron_r1.pipeline.builders.placement import EnginePlace, place_engine
from megatron_r1.pipeline.session import Session
from megatron_r1.rollout.cache_size import choose_cache
from megatron_r1.rollout.collective import CollectiveEngine
from megatron_r1.rollout.multi_node import FollowingPart
from megatron_r1.rollout.options import EngineOptions, engine_options
from megatron_r1.rollout.protocol import RolloutEngine, SingleEngine
from megatron_r1.rollout.vllm_client import VllmProcessEngine
from megatron_r1.runtime.cores import usable_cores
from megatron_r1.runtime.distributed import failing_together
from megatron_r1.runtime.files import path_of_rank
from megatron_r1.runtime.launch import address_towards, child_environment
from megatron_r1.runtime.memory import free_memory, memory_nodes
from megatron_r1.runtime.peers import Peers, find_peers


def build_engine_options(config: Config, device: Literal["cpu", "cuda"], arch: Architecture, tokenizer: Tokenizer) -> EngineOptions:
    """What the job's engines are started with. Raises ConfigError, see `engine_options`; a stage asks before it builds a model."""
    return engine_options(
        arch,
        config.rollout,
        device=device,
        dtype=engine_dtype(config),
        bos_token_id=config_bos_id(tokenizer),
        eos_token_id=tokenizer.eos_id,
        max_prompt_tokens=config.data.max_prompt_tokens,
        end_token_ids=find_end_tokens(config.model, arch, tokenizer, config.data),
        tokenizer_json=tokenizer.tokenizer_json,
    )


@contextmanager
def open_engine(config: Config, session: Session, arch: Architecture, tokenizer: Tokenizer, log: Path) -> Iterator[RolloutEngine]:
    """The vLLM engines for the block, placed as `rollout.placement` says and used by all ranks.

    Args:
        log: takes all output of the engine process beside rank 0. The logs of other ranks have the rank in their name.
    """
    with failing_together():
        place = place_engine(config.rollout, session.launch, session.device.kind)
    log = path_of_rank(log, session.launch.rank)
    peers = _find_engine_peers(session, place)
    session.tell_threads()
    if place is not None and not place.servers and session.device.kind == "cpu" and config.rollout.kv_cache_bytes is None:
        config = _with_cache(config, session, arch)
    start = None if place is None else partial(_start_engine, config, session, arch, tokenizer, log, place, peers)
    rollout = config.rollout
    engine = CollectiveEngine(start, rollout.restarts, peers, sleeps=rollout.engines_sleep, dispatch=rollout.dispatch)
    try:
        yield engine
    finally:
        engine.close()


def open_lone_engine(
    config: Config, device: Literal["cpu", "cuda"], arch: Architecture, tokenizer: Tokenizer, log: Path
) -> VllmProcessEngine:
    """One engine beside this process, for a command that is no job of ranks. The caller closes it."""
    options = build_engine_options(config, device, arch, tokenizer)
    log.parent.mkdir(parents=True, exist_ok=True)
    return VllmProcessEngine(options, tokenizer.decode, child_environment(), log, config.runtime.threads or usable_cores())


def _with_cache(config: Config, session: Session, arch: Architecture) -> Config:
    """Settle the size of the KV cache before the first engine starts: one that replaces it gets the same. Rank 0 tells it."""
    rollout = config.rollout
    engines = 1 if rollout.placement == "single" else rollout.engines_per_node
    workers = rollout.tensor_parallel_size // rollout.nodes_per_engine  # of an engine on this node
    chosen = choose_cache(
        arch,
        engine_dtype(config),
        max_model_len=config.data.max_prompt_tokens + rollout.max_response_tokens,
        max_num_seqs=rollout.max_num_seqs,
        workers=rollout.tensor_parallel_size,
        free_bytes=free_memory() // max(engines * workers, memory_nodes()),
        share=rollout.gpu_memory_utilization,
    )
    if session.launch.rank == 0:
        print(chosen.describe(), file=sys.stderr, flush=True)
    return config.model_copy(update={"rollout": rollout.model_copy(update={"kv_cache_bytes": chosen.bytes})})


def engine_dtype(config: Config) -> Literal["float32", "bfloat16"]:
    """What engines compute in."""
    return "bfloat16" if config.runtime.dtype == "bf16" else "float32"


def _find_engine_peers(session: Session, place: EnginePlace | None) -> Peers | None:
    """The ranks that hold the other parts of this rank's engine, if it spans nodes. All ranks call this."""
    ranks = () if place is None else place.ranks
    with failing_together():
        address = address_towards(session.launch.master_address) if ranks else ""
    return find_peers(ranks, address)


def _start_engine(
    config: Config,
    session: Session,
    arch: Architecture,
    tokenizer: Tokenizer,
    log: Path,
    place: EnginePlace,
    peers: Peers | None,
) -> SingleEngine | FollowingPart:
    options = build_engine_options(config, session.device.kind, arch, tokenizer)
    log.parent.mkdir(parents=True, exist_ok=True)
    environment, threads = child_environment(place.variables), session.threads
    if peers is not None and peers.number:
        return FollowingPart(options, environment, log, threads, peers)
    return VllmProcessEngine(options, tokenizer.decode, environment, log, threads, place.servers, peers)
