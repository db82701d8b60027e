"""The models that answer: in a rollout engine of ours, or served behind an OpenAI-compatible endpoint."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

from megatron_r1.chat_endpoint import ChatEndpoint, Completion, NoCompletion, read_api_key
from megatron_r1.config.endpoint import EndpointConfig
from megatron_r1.data.chat.messages import Message
from megatron_r1.data.chat.wording import Wording
from megatron_r1.errors import ConfigError, RewardError, RolloutError
from megatron_r1.evaluation.benchmark_problems import BenchmarkProblem
from megatron_r1.runtime.ledger import Ledger
from megatron_r1.tags import THINK_CLOSE, THINK_OPEN, whole_response
from megatron_r1.types import Prompt, RolloutGroup, Sampling, SamplingEngine

OnResponses = Callable[[int], object]  #: is called with the number of responses that came


@dataclass(frozen=True)
class Pass:
    """One kind of responses to the problems of a benchmark, and where they are kept."""

    sampling: Sampling
    seed: str
    kept: Ledger
    on_responses: OnResponses

    def lacks(self, problems: Sequence[BenchmarkProblem]) -> bool:
        """Whether a response to one of these problems is not kept."""
        return any((problem.id, n) not in self.kept.records for problem in problems for n in range(self.sampling.n))

    def keep(self, lines: Iterable[dict[str, Any]]) -> None:
        """Append what is not kept yet."""
        before = len(self.kept.records)
        self.kept.append(lines)
        self.on_responses(len(self.kept.records) - before)


class Model(Protocol):
    """Samples responses into ledgers."""

    def sample(self, problems: Sequence[BenchmarkProblem], sampled: Pass, greedy: Pass | None = None) -> None:
        """Sample the responses that the ledgers lack, and append each as it comes.

        A line: problem, sample, response, finished (ended by itself), tokens (None if the server does not count tokens).

        Raises:
            RolloutError: the engine died, the endpoint does not answer. What came is kept.
        """


class EngineModel:
    """A `Model` on a rollout engine.

    The calls to the engine have fixed contents. An interrupted call is made again as a whole, so that it gives the same
    responses; those that were kept before the kill stay. A call asks for the greedy response with the samples of a problem, since
    a full batch is what makes an engine fast; greedy responses go into calls of their own only if all samples are there already.

    Args:
        make_prompt: renders and tokenises a problem.
        responses_per_call: about how many responses one call asks for.
    """

    def __init__(self, engine: SamplingEngine, make_prompt: Callable[[BenchmarkProblem], Prompt], responses_per_call: int) -> None:
        self._engine, self._make_prompt = engine, make_prompt
        self._responses_per_call = responses_per_call

    def sample(self, problems: Sequence[BenchmarkProblem], sampled: Pass, greedy: Pass | None = None) -> None:
        """See `Model.sample`."""
        self._sample_pass(problems, sampled, greedy)
        if greedy is not None:
            self._sample_pass(problems, greedy)

    def _sample_pass(self, problems: Sequence[BenchmarkProblem], asked: Pass, greedy: Pass | None = None) -> None:
        """Sample what `asked` lacks, and the `greedy` responses to the problems of the same calls."""
        sampling = asked.sampling if greedy is None else replace(asked.sampling, greedy=greedy.sampling.n)
        size = max(1, self._responses_per_call // asked.sampling.n)

        def keep(group: RolloutGroup) -> None:
            # Greedy first: whatever kills the process, a problem that has its samples has this, too.
            if greedy is not None:
                greedy.keep(self._response_line(group, n, sampling.n + n) for n in range(sampling.greedy))
            asked.keep(self._response_line(group, n, n) for n in range(sampling.n))

        for start in range(0, len(problems), size):
            of_call = problems[start : start + size]
            if asked.lacks(of_call):
                prompts = [self._make_prompt(problem) for problem in of_call]
                try:
                    self._engine.generate(prompts, sampling, seed_of(asked.seed, start), keep)
                except RolloutError as error:
                    there = _describe_kept(asked.kept, len(problems) * asked.sampling.n)
                    raise RolloutError(f"{error}; {there}") from error

    def _response_line(self, group: RolloutGroup, sample: int, position: int) -> dict[str, Any]:
        rollout = group.rollouts[position]
        text = whole_response(group.prompt.text, rollout.text)
        return _response_line(group.prompt.id, sample, text, rollout.finished, len(rollout.token_ids))


class EndpointModel:
    """A `Model` behind an endpoint: one request a response, `config.concurrency` at a time. Use it as a context manager.

    The first request that fails for good stops the sampling; responses that are under way are still kept.

    Args:
        wording: what stands around every question.
        more: further fields of every request.

    Raises:
        ConfigError: no model is named, a wrong url, a key that cannot be read.
    """

    def __init__(
        self,
        config: EndpointConfig,
        wording: Wording | None = None,
        more: Mapping[str, Any] | None = None,
        pause: Callable[[float], object] | None = None,
    ) -> None:
        if not config.model or not config.url or not config.url.startswith(("http://", "https://")):
            raise ConfigError("evaluate.benchmarks.endpoint: url begins with http:// or https://, and model names what it serves")
        key = read_api_key(config.api_key_file, "evaluate.benchmarks.endpoint.api_key_file")
        self._config, self._wording, self._more = config, wording or Wording(), more or {}
        section = "evaluate.benchmarks.endpoint"
        self._endpoint = ChatEndpoint(config.url, key, config.timeout_seconds, config.retries, section, pause)

    def sample(self, problems: Sequence[BenchmarkProblem], sampled: Pass, greedy: Pass | None = None) -> None:
        """See `Model.sample`."""
        passes = [sampled] if greedy is None else [sampled, greedy]
        wanted = [(asked, problem, n) for asked in passes for problem in problems for n in range(asked.sampling.n)]
        missing = iter([(asked, problem, n) for asked, problem, n in wanted if (problem.id, n) not in asked.kept.records])
        failure: Exception | None = None
        under_way: dict[Future[Completion], tuple[Pass, str, int]] = {}
        with ThreadPoolExecutor(self._config.concurrency, thread_name_prefix="endpoint") as threads:
            try:
                while True:
                    room = self._config.concurrency - len(under_way) if failure is None else 0
                    for asked, problem, sample in itertools.islice(missing, room):
                        request = self._request(problem.question, asked.sampling, seed_of(asked.seed, problem.id, sample))
                        under_way[threads.submit(self._endpoint.sample, request)] = (asked, problem.id, sample)
                    if not under_way:
                        break
                    for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                        asked, id, sample = under_way.pop(future)
                        try:
                            completion = future.result()
                        except (NoCompletion, RewardError) as error:
                            failure = failure or error
                            continue
                        text = _whole_text(completion)
                        asked.keep([_response_line(id, sample, text, completion.finished, completion.tokens)])
            except BaseException:
                self._endpoint.close()  # Ctrl-C, a full disk: nobody waits an hour for requests under way
                raise
        if failure is not None:
            lacking = next((asked for asked in passes if asked.lacks(problems)), sampled)
            there = _describe_kept(lacking.kept, len(problems) * lacking.sampling.n)
            raise RolloutError(f"the endpoint {self._config.url} gives no answer ({failure}); {there}")

    def _request(self, question: str, sampling: Sampling, seed: int) -> dict[str, Any]:
        return {
            "model": self._config.model,
            "messages": [message.to_json() for message in self._wording.apply([Message("user", question)])],
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_tokens,
            "seed": seed,
            **self._more,
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._endpoint.close()


def seed_of(*parts: object) -> int:
    """A seed below 2^31 that depends on all of `parts`."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=4).digest(), "big") >> 1


def _describe_kept(kept: Ledger, wanted: int) -> str:
    return f"{len(kept.records)} of {wanted} responses are kept in {kept.path}, and the same command goes on from there"


def _whole_text(completion: Completion) -> str:
    """The text with the reasoning that the server gives apart, in its tags; reasoning that was cut stays open."""
    if not completion.reasoning:
        return completion.text
    closing = f"\n{THINK_CLOSE}\n\n{completion.text}" if completion.text or completion.finished else ""
    return f"{THINK_OPEN}\n{completion.reasoning}{closing}"


def _response_line(problem: str, sample: int, text: str, finished: bool, tokens: int | None) -> dict[str, Any]:
    return {"problem": problem, "sample": sample, "response": text, "finished": finished, "tokens": tokens}
