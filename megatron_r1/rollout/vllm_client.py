"""The rollout engine of a trainer process: vLLM in another process, commanded without importing vLLM here.

A process of its own, here or behind a server on another node, keeps vLLM's globals, its torch.distributed state and its rank
variables away from those of Megatron.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from megatron_r1.errors import EngineLost, RolloutError
from megatron_r1.rollout.channel.announcements import Announcement
from megatron_r1.rollout.channel.engine_channel import ASK, EngineChannel, OnPart
from megatron_r1.rollout.channel.local import HOST_MODULE, EngineProcess
from megatron_r1.rollout.channel.remote import ServedEngine
from megatron_r1.rollout.multi_node import ServedParts, take_part
from megatron_r1.rollout.options import EngineOptions, engine_environment
from megatron_r1.rollout.prompt_queue import Take, take_all
from megatron_r1.rollout.protocol import OnGroup, SyncReport
from megatron_r1.rollout.sync.links import EngineLink, NodeLink, ServerLink
from megatron_r1.rollout.sync.transfer import WeightTransfer
from megatron_r1.rollout.sync.verify_weights import verify_held
from megatron_r1.rollout.vllm.stream import Answer, Request
from megatron_r1.runtime.device import device_in_use
from megatron_r1.runtime.distributed import collective_timeout, failing_together
from megatron_r1.runtime.launch import address_towards
from megatron_r1.runtime.peers import Peers
from megatron_r1.types import Prompt, Rollout, RolloutGroup, Sampling
from megatron_r1.weights.shard_plan import WeightSource


class VllmProcessEngine:
    """A `SingleEngine` on this machine or on a server's. Starting takes seconds; the first call must be `load_weights`.

    Args:
        options: from `engine_options`.
        decode: response token ids, without end-of-sequence -> text.
        environment: of the child process, without the trainer's rank variables (`runtime.launch.child_environment()`).
        log_path: takes all output of the child.
        threads: OpenMP threads of the engine on CPU.
        servers: the rollout servers that hold the engine, one per node and the head's first; none: a child of this process.
        peers: this rank, which has the head, and the ranks that have the other nodes of an engine beside the ranks.

    Raises:
        RolloutError: the engine did not start; the message ends with the end of its log.
    """

    def __init__(
        self,
        options: EngineOptions,
        decode: Callable[[list[int]], str],
        environment: Mapping[str, str],
        log_path: Path,
        threads: int = 1,
        servers: Sequence[Announcement] = (),
        peers: Peers | None = None,
    ) -> None:
        self.options, self.decode = options, decode
        self.version: int | None = None
        self._constants: dict[str, int] | None = None
        self._servers, self._peers = servers, peers
        self._own_transfer = WeightTransfer()
        self._is_asleep = False
        needed = engine_environment(options.device, threads, None if peers is None else peers.addresses[0])
        self._channel = _open_channel(options, {**environment, **needed}, needed, log_path, servers)
        started = time.monotonic()
        try:
            if peers is None:
                self._call("start", options, timeout=options.start_timeout_seconds)
            else:
                part = take_part(peers, self._channel)
                with failing_together(peers.group):
                    self._call("start", options, part, timeout=options.start_timeout_seconds)
            self._link = self._open_link()
        except BaseException:
            self._channel.close()
            raise
        self.start_seconds = time.monotonic() - started

    def load_weights(self, weights: WeightSource, version: int, transfer: WeightTransfer | None = None) -> SyncReport:
        """See `SingleEngine.load_weights`; without a `transfer` in a job of one rank."""
        started = time.monotonic()
        self.version = None
        sent = (transfer or self._own_transfer).send(weights, self._link, self._wake_for_weights)
        self._link.release()
        self._link.finish(version)
        verify_started = time.monotonic()
        reports = self._call("call_workers", "held_weights", self.options.verify_weights)
        self._constants = verify_held(reports, self._constants if self.options.verify_weights else None)
        if self._is_asleep:
            self._call("wake_up", ["kv_cache"])
            self._is_asleep = False
        self.version = version
        now = time.monotonic()
        verified = sent.num_tensors if self.options.verify_weights else 0
        received, held = (tuple(getattr(report, kind) for report in reports) for kind in ("received_bytes", "held_bytes"))
        return SyncReport(version, sent.num_tensors, sent.num_bytes, verified, now - started, now - verify_started, received, held)

    def _wake_for_weights(self) -> None:
        if self._is_asleep:
            self._call("wake_up", ["weights"])  # the cache's memory is still the transfer's

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        seed: int,
        on_group: OnGroup | None = None,
    ) -> list[RolloutGroup]:
        """See `RolloutEngine.generate`."""
        groups = self.sample(prompts, sampling, seed, take_all(range(len(prompts))), on_group)
        return [groups[position] for position in range(len(prompts))]

    def sample(
        self, prompts: Sequence[Prompt], sampling: Sampling, seed: int, take: Take, on_group: OnGroup | None = None
    ) -> dict[int, RolloutGroup]:
        """See `SingleEngine.sample`."""
        if self.version is None:
            raise RolloutError("the rollout engine has no weights: load_weights must succeed before generate")
        for prompt in prompts:
            self._check(prompt, sampling)
        groups: dict[int, RolloutGroup] = {}
        num_taken = 0

        def more() -> tuple[list[Request], bool]:
            nonlocal num_taken
            taken = take(num_taken - len(groups))
            num_taken += len(taken.positions)
            requests = [(at, list(prompts[at].token_ids), _response_seeds(seed, at, sampling)) for at in taken.positions]
            return requests, taken.is_last

        def keep(part: tuple[int, list[Answer]] | str | None) -> tuple[list[Request], bool] | None:
            if part == ASK:
                return more()
            if part is not None:  # None: a sign of life
                at, answers = cast(tuple[int, list[Answer]], part)
                groups[at] = RolloutGroup(prompts[at], [self._rollout(*answer) for answer in answers], self.version)
                if on_group is not None:
                    on_group(groups[at])
            return None

        try:
            self._call("generate", sampling, *more(), on_part=keep)
        except EngineLost as error:
            error.finished = groups
            raise
        return groups

    def answer(self, prompt: Prompt, sampling: Sampling, seed: int, go_on: Callable[[list[int]], bool]) -> Rollout:
        """One response, told as it is sampled.

        Args:
            sampling: of one sample.
            go_on: called with the tokens that are new, end-of-sequence included; False ends the response there.

        Raises:
            RolloutError: see `RolloutEngine.generate`.
        """
        if self.version is None:
            raise RolloutError("the rollout engine has no weights: load_weights must succeed before answer")
        self._check(prompt, sampling)
        ids: list[int] = []
        logprobs: list[float] = []
        goes_on = True

        def hear(part: tuple[np.ndarray, np.ndarray] | str | None) -> bool | None:
            nonlocal goes_on
            if part == ASK:
                return goes_on
            if part is not None:
                new, of_new = cast(tuple[np.ndarray, np.ndarray], part)
                ids.extend(new.tolist())
                logprobs.extend(of_new.tolist())
                goes_on = go_on(new.tolist())
            return None

        finished = self._call("answer", list(prompt.token_ids), sampling, response_seed(seed, 0, 0), on_part=hear)
        return self._rollout(np.array(ids, np.int32), np.array(logprobs, np.float32), finished)

    def sleep(self) -> None:
        """See `RolloutEngine.sleep`."""
        if self.options.sleep and not self._is_asleep:
            self.version = None
            self._call("sleep")
            self._is_asleep = True

    def close(self) -> None:
        """See `RolloutEngine.close`."""
        self._link.close()
        self._channel.close()

    def _open_link(self) -> EngineLink:
        if self.options.transfer == "nccl":
            from megatron_r1.rollout.vllm.nccl_transfer import NcclLink  # the only part of vLLM that a trainer imports

            return NcclLink(
                self._call,
                self.options,
                address_towards(self._servers[0].host),
                min(self.options.stall_seconds, collective_timeout().total_seconds()),  # the engine's half is one call
                device_in_use().torch_device,
            )
        self._call("init_weight_transfer_engine", {})
        return ServerLink(self._call, self.options) if self._servers else NodeLink(self._call, self.options, self._peers)

    def _call(self, name: str, *args: Any, timeout: float | None = None, on_part: OnPart | None = None) -> Any:
        """Call the engine. It gives signs of life while it samples; every other call but the start ends within `stall_seconds`."""
        stall = None if name == "start" else self.options.stall_seconds
        return self._channel.call(name, *args, timeout=timeout or self.options.step_timeout_seconds, on_part=on_part, stall=stall)

    def _check(self, prompt: Prompt, sampling: Sampling) -> None:
        length, limit = len(prompt.token_ids), self.options.max_model_len
        if length == 0:
            raise RolloutError(f"prompt {prompt.id!r} has no tokens")
        if length + sampling.max_tokens > limit:
            raise RolloutError(
                f"prompt {prompt.id!r} has {length} tokens: with {sampling.max_tokens} of response that is more than the "
                f"engine's {limit}; raise data.max_prompt_tokens or shorten the prompt"
            )
        outside = [token for token in prompt.token_ids if not 0 <= token < self.options.vocab_size]
        if outside:
            raise RolloutError(
                f"prompt {prompt.id!r} has token id {outside[0]}, outside the vocabulary of {self.options.vocab_size}"
            )

    def _rollout(self, token_ids: np.ndarray, logprobs: np.ndarray, finished: bool) -> Rollout:
        ended = finished and int(token_ids[-1]) in self.options.end_token_ids  # else by a text, which is a part of the response
        return Rollout(token_ids, logprobs, self.decode((token_ids[:-1] if ended else token_ids).tolist()), finished)


def _open_channel(
    options: EngineOptions,
    environment: Mapping[str, str],
    needed: Mapping[str, str],
    log_path: Path,
    servers: Sequence[Announcement],
) -> EngineChannel:
    """The channel to the engine. A server has an environment of its own, to which only the `needed` variables are added."""
    if not servers:
        return EngineProcess(HOST_MODULE, log_path, environment)
    if len(servers) == 1:
        return ServedEngine(servers[0], needed, options.start_timeout_seconds)
    return ServedParts(servers, needed, options.start_timeout_seconds)


def _response_seeds(seed: int, prompt_index: int, sampling: Sampling) -> list[int | None]:
    return [response_seed(seed, prompt_index, g) for g in range(sampling.n)] + [None] * sampling.greedy


def response_seed(seed: int, prompt_index: int, sample_index: int) -> int:
    """Seed of one response: any two differ, and it does not depend on the process or on the other responses."""
    digest = hashlib.blake2b(f"{seed} {prompt_index} {sample_index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 2
