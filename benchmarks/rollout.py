"""Rollouts: the engine against bare vLLM and transformers' generate; the seconds of a weight sync with and without verification.

Both sample from the same weights, at temperature 1, the same number of responses to the same prompts (those of the
quickstart's task). Before rollouts are timed, the log-probs that the engine reports must be those of the peer's model. The peer
is forced to `--tokens` tokens a response; ours stops where end-of-sequence is sampled, so both are counted in tokens per second.
Ours also returns a log-prob for every token, the peer does not.

Against bare vLLM both are forced, and both return log-probs; see `benchmarks/rollout_bare.py`. The exit code is 0 only where ours
reaches 0.95 of its tokens per second in every case.

    python -m benchmarks.rollout --out rollout.json
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.measure import Disagreement, compare, describe_machine, parser_of, positive, print_table, run, write_results
from benchmarks.peer import describe_peer, load_peer
from benchmarks.rollout_bare import BAR, CASES, HOW, BareResult, compare_with_bare, describe_bare, print_bare
from megatron_r1.config.data import DataConfig
from megatron_r1.config.optimizer import MoeTrainingConfig, OptimizerConfig
from megatron_r1.config.rollout import RolloutConfig
from megatron_r1.config.runtime import RuntimeConfig
from megatron_r1.config.schema import Config
from megatron_r1.data.problems import load_problems
from megatron_r1.data.prompts import PromptStream, PromptWriter
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.errors import R1Error
from megatron_r1.pipeline.builders.engines import open_engine
from megatron_r1.pipeline.builders.models import build_architecture, build_policy, build_tokenizer
from megatron_r1.pipeline.session import Session, open_session
from megatron_r1.rewards.scorers import accuracy_scorers
from megatron_r1.rollout.protocol import RolloutEngine, SyncReport
from megatron_r1.types import Prompt, RolloutGroup, Sampling

if TYPE_CHECKING:
    from transformers import DeepseekV3ForCausalLM

    from megatron_r1.mcore.policy import MegatronPolicy

LOGPROB_TOLERANCE = 1e-3
SYNCS = 20  #: of each kind; one takes well under a second


def our_rollout(engine: RolloutEngine, prompts: list[Prompt], sampling: Sampling, seed: int) -> Callable[[], int]:
    """All responses by the engine; returns their tokens."""

    def work() -> int:
        groups = engine.generate(prompts, sampling, seed)
        return sum(len(rollout.token_ids) for group in groups for rollout in group.rollouts)

    return work


def peer_rollout(
    model: DeepseekV3ForCausalLM, prompts: list[Prompt], sampling: Sampling, batch_size: int, pad_id: int, seed: int
) -> Callable[[], int]:
    """All responses by transformers' generate, `batch_size` at a time, left-padded; returns their tokens."""
    requests = [prompt.token_ids for prompt in prompts for _ in range(sampling.n)]
    batches = [_left_pad(requests[i : i + batch_size], pad_id, model.device) for i in range(0, len(requests), batch_size)]
    model.eval()

    def work() -> int:
        torch.manual_seed(seed)
        tokens = 0
        for token_ids, mask in batches:
            output = model.generate(
                token_ids,
                attention_mask=mask,
                do_sample=True,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=0,  # transformers' default is 50
                min_new_tokens=sampling.max_tokens,
                max_new_tokens=sampling.max_tokens,
                pad_token_id=pad_id,
            )
            tokens += output[:, token_ids.shape[1] :].numel()
        return tokens

    return work


def _left_pad(requests: list[tuple[int, ...]], pad_id: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, requests))
    token_ids = torch.tensor([[pad_id] * (longest - len(ids)) + list(ids) for ids in requests], device=device)
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in requests], device=device)
    return token_ids, mask


def largest_logprob_difference(model: DeepseekV3ForCausalLM, group: RolloutGroup, temperature: float) -> float:
    """Largest absolute difference of the engine's log-probs of a group's tokens to the peer's model."""
    largest = 0.0
    for rollout in group.rollouts:
        response = torch.tensor(rollout.token_ids, dtype=torch.int64, device=model.device)
        tokens = torch.cat([torch.tensor(group.prompt.token_ids, device=model.device), response])
        with torch.no_grad():
            logits = model(tokens[None]).logits[0, -len(response) - 1 : -1] / temperature
        expected = logits.log_softmax(-1).gather(1, response[:, None])[:, 0]
        largest = max(largest, (torch.tensor(rollout.rollout_logprobs) - expected.cpu()).abs().max().item())
    return largest


def sync_weights(engine: RolloutEngine, policy: MegatronPolicy, reports: list[SyncReport]) -> Callable[[], int]:
    """One weight sync from the policy, as in training; keeps the report, returns the tensors sent."""

    def work() -> int:
        reports.append(engine.load_weights(policy.shards(), version=0))
        return reports[-1].num_tensors

    return work


def make_config(arguments: argparse.Namespace, *, verify_weights: bool) -> Config:
    """The quickstart's model, task and engine."""
    return Config(
        seed=arguments.seed,
        runtime=RuntimeConfig(device=arguments.device),
        data=DataConfig(max_prompt_tokens=32),
        rollout=RolloutConfig(
            max_response_tokens=arguments.tokens, kv_cache_bytes=arguments.kv_cache_mib << 20, verify_weights=verify_weights
        ),
    )


def make_policy(config: Config, session: Session) -> MegatronPolicy:
    """Where the weights come from."""
    return build_policy(
        config,
        session,
        build_architecture(config.model),
        optimizer=OptimizerConfig(lr=1e-4),
        moe=MoeTrainingConfig(),
        total_updates=1,
        micro_batch_tokens=1024,
        packed=True,
    )


def make_prompts(config: Config, tokenizer: Tokenizer, count: int) -> list[Prompt]:
    """The first training prompts."""
    stream = PromptStream(
        load_problems(config.data, accuracy_scorers(config.reward)), PromptWriter(config.data, tokenizer), config.seed
    )
    return stream.next(count)


class TooSlow(R1Error):
    """The engine through this project is slower than the bar allows."""

    exit_code = 1


def benchmark(arguments: argparse.Namespace) -> None:
    """Measure, print the tables, write the JSON file.

    Raises:
        TooSlow: a case against bare vLLM is below its bar; after everything is printed and written.
    """
    results: dict[str, Any] = {}
    bare: list[BareResult] = []
    with tempfile.TemporaryDirectory(prefix="megatron_r1-benchmark-") as work:
        for case in arguments.cases:
            for how in arguments.bare:
                bare.append(compare_with_bare(case, how, arguments, Path(work)))
                print_bare(bare[-1:])
    results["bare_vllm"] = [describe_bare(result) for result in bare]
    machine = describe_machine(arguments.device)
    if not arguments.only_bare:
        results |= compare_with_transformers(arguments)
    if len(bare) > 1:
        print_bare(bare)
    if arguments.out is not None:
        write_results(arguments.out, arguments, results, machine)
    slow = [f"{result.comparison.workload} {result.comparison.speed_ratio:.3f}" for result in bare if not result.reaches_bar]
    if slow:
        raise TooSlow(f"below {BAR} of bare vLLM's tokens per second: {', '.join(slow)}")


def compare_with_transformers(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure rollouts and weight syncs, and print two tables; what goes into the JSON file."""
    verified, unverified = (make_config(arguments, verify_weights=choice) for choice in (True, False))
    sampling = Sampling(arguments.group_size, 1.0, 1.0, arguments.tokens)
    with open_session(verified.runtime) as session, ExitStack() as stack:
        policy = make_policy(verified, session)
        tokenizer = build_tokenizer(verified.data, verified.model, policy.arch)
        prompts = make_prompts(verified, tokenizer, arguments.prompts)
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="megatron_r1-benchmark-")))
        engine, plain_engine = (
            stack.enter_context(open_engine(config, session, policy.arch, tokenizer, logs / f"{name}.log"))
            for name, config in (("verified", verified), ("unverified", unverified))
        )
        reports: list[SyncReport] = []
        sync = compare(
            "weight sync",
            sync_weights(engine, policy, reports),
            sync_weights(plain_engine, policy, []),
            SYNCS,
        )
        model = load_peer(policy, session.device.torch_device, eos_token_id=tokenizer.eos_id)
        difference = largest_logprob_difference(model, engine.generate(prompts[:1], sampling, arguments.seed)[0], 1.0)
        if not difference <= LOGPROB_TOLERANCE:
            raise Disagreement(f"the engine's log-probs differ from transformers' by up to {difference:.2e}")
        print(f"log-probs of the engine and of transformers agree: largest difference {difference:.1e}", flush=True)
        name = f"{len(prompts)} prompts x {sampling.n} responses of up to {sampling.max_tokens} tokens"
        rollout = compare(
            name,
            our_rollout(engine, prompts, sampling, arguments.seed),
            peer_rollout(model, prompts, sampling, arguments.peer_batch, tokenizer.eos_id, arguments.seed),
            arguments.repeats,
        )
    print_table(
        ["workload", "ours, tokens/s", "transformers, tokens/s", "ours / transformers", "tokens of ours and of transformers"],
        [
            [
                rollout.workload,
                f"{rollout.ours.per_second:,.0f}",
                f"{rollout.peer.per_second:,.0f}",
                f"{rollout.speed_ratio:.2f}",
                f"{rollout.ours.amounts[0]:,} and {rollout.peer.amounts[0]:,}",
            ]
        ],
    )
    sent = reports[-1]
    size = f"{sent.num_tensors} tensors, {sent.num_bytes / 1e6:.1f} MB, {sent.num_verified} checksums"
    seconds = [side.median_seconds for side in (sync.ours, sync.peer)]
    print_table(
        ["weight sync", "verified, s", "not verified, s", "verified / not verified"],
        [[size, f"{seconds[0]:.3f}", f"{seconds[1]:.3f}", f"{1 / sync.speed_ratio:.2f}"]],
    )
    sides = {"verified": asdict(sync.ours), "not_verified": asdict(sync.peer)}
    return {
        "rollout": {**asdict(rollout), "speed_ratio": rollout.speed_ratio, "transformers": describe_peer(model)},
        "weight_sync": {**sides, "report": asdict(sent), "time_ratio": 1 / sync.speed_ratio},
    }


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = parser_of(
        "Rollouts of the vLLM engine against transformers' generate, and the cost of weight verification.", repeats=5
    )
    parser.add_argument("--prompts", type=positive, default=16, help="different prompts")
    parser.add_argument("--group-size", type=positive, default=16, help="responses to each")
    parser.add_argument("--tokens", type=positive, default=32, help="tokens of a response")
    parser.add_argument("--peer-batch", type=positive, default=64, help="sequences that transformers generates at a time")
    parser.add_argument("--kv-cache-mib", type=positive, default=64, help="the engine's KV cache; the quickstart has 64")
    parser.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES), help="against bare vLLM: model and responses")
    parser.add_argument("--only-bare", action="store_true", help="leave transformers and the weight syncs out")
    parser.add_argument("--bare", nargs="+", choices=HOW, default=list(HOW), help="how bare vLLM runs; compiled is its default")
    parser.add_argument("--threads", type=positive, default=1, help="of the engine and of bare vLLM")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(run(benchmark, parse_arguments()))
