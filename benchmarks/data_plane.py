"""A round of GRPO's data on many ranks, without a model: what each rank holds at its fullest moment, and how long the round takes.

Every rank samples synthetic responses and trains on as many. A round is what `training.grpo` does with them between engine and
optimizer: outlines, advantages, the move of each sample to the rank that trains on it, packed micro-batches, the return of
log-probabilities, parity, minibatches and metrics. It is played at a quarter, half and the whole of the size.

Beside it stands the way of before, re-created here and nowhere else: every rank gathers all responses, as lists of Python numbers.
It is run at a size that fits, and its memory at the whole size is calculated from what it took there.

    python -m benchmarks.data_plane --ranks 8 16 --out data_plane.json

The command ends with 1 unless every rank keeps to three times its own share and half a gigabyte, and time is linear in tokens.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import pickle
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.measure import Disagreement, describe_machine, positive, print_table, run, write_results
from megatron_r1.algorithms.advantage import group_advantages
from megatron_r1.config.rollout import RolloutConfig
from megatron_r1.data.packing import pack_samples, unpack_token_values
from megatron_r1.mcore.shares import Place, Shares
from megatron_r1.runtime.distributed import gather_objects
from megatron_r1.training.metrics import mean_sampled_logprob
from megatron_r1.training.outlines import share_outlines
from megatron_r1.training.parity import compare_logprobs, over_ranks
from megatron_r1.training.samples import find_nonfinite, plan_epochs, to_training_samples, with_logprobs
from megatron_r1.types import Prompt, Rollout, RolloutGroup, TrainingSample, filled

GROUP = 16
PROMPT_TOKENS = 64
BYTES_OF_TOKEN = 8  #: its int32 id and its float32 log-probability
TIMES_SHARE, BESIDE_SHARE = 3, 500_000_000  #: the bar: times a rank's own share, and bytes for everything else
LINEAR = 1.5  #: the most that a token of the whole size may take of the time of one at a quarter
OLD_PART = 64  #: the way of before is run at this part of the size


@dataclass(frozen=True)
class Round:
    """What one rank measured."""

    responses: int
    tokens: int  #: of all ranks
    share_bytes: int  #: the larger of what this rank sampled and what it trains on
    peak_bytes: int  #: resident memory of the whole process
    base_bytes: int  #: of it before the round
    wall_seconds: float
    cpu_seconds: float
    figures: dict[str, float]  #: metrics, which every rank must know alike


class PlayedPolicy:
    """A policy whose log-probs are the engine's and a little more. It holds no weights and trains nothing."""

    def __init__(self, micro_batch_tokens: int) -> None:
        own = dist.new_group([dist.get_rank()], use_local_synchronization=True)
        place = Place(dist.get_rank(), dist.get_world_size(), speaks=True, is_first=True, is_last=True, peers=own)
        self.shares, self.reports = Shares(place), True
        self.micro_batch_tokens = micro_batch_tokens

    def place(self, samples: list[TrainingSample], batches: list[list[int]]) -> list[TrainingSample]:
        """As `MegatronPolicy.place`."""
        return self.shares.place(samples, self.shares.assign(samples, batches))

    def logprobs(self, samples: list[TrainingSample]) -> list[torch.Tensor | None]:
        """As `MegatronPolicy.logprobs`, by way of packed micro-batches."""
        found: dict[int, torch.Tensor] = {}
        for micro_batch in self.pack(samples):
            found |= unpack_token_values(micro_batch, micro_batch.token_fields["rollout_logprobs"] + 1e-3)
        return [found.get(number) for number in range(len(samples))]

    def logprobs_of_both(self, samples: list[TrainingSample]) -> tuple[list[torch.Tensor | None], list[torch.Tensor | None]]:
        """As `ReferencePolicy.logprobs_of_both`: it is its own reference."""
        return self.logprobs(samples), self.logprobs(samples)

    def pack(self, samples: list[TrainingSample]) -> Any:
        """This rank's micro-batches."""
        per_rank = pack_samples(samples, max_tokens=self.micro_batch_tokens, dp_size=dist.get_world_size(), pad_multiple=16)
        return per_rank[self.shares.number]


def lengths_of(responses: int, tokens: int) -> np.ndarray:
    """[responses] tokens of each: of about `tokens` in the mean and at most four times as many, as answers of a model are."""
    drawn = np.random.default_rng(0).lognormal(0.0, 0.6, responses)
    return np.clip(drawn / drawn.mean() * tokens, 1, 4 * tokens).astype(int)


def sample_groups(prompts: list[Prompt], lengths: np.ndarray) -> list[RolloutGroup]:
    """The groups of this rank, every so many-th prompt's, scored."""
    groups = []
    for position in range(dist.get_rank(), len(prompts), dist.get_world_size()):
        draw = np.random.default_rng(position)
        rollouts = []
        for length in lengths[position * GROUP : (position + 1) * GROUP]:
            ids, logprobs = draw.integers(0, 128_000, length, np.int32), -draw.random(length, np.float32)
            rollouts.append(Rollout(ids, logprobs, "", True))
        group = RolloutGroup(prompts[position], rollouts, 0, torch.from_numpy(draw.integers(0, 2, GROUP).astype(float)))
        group.reward_parts["accuracy"] = filled(group.rewards_G).tolist()
        group.position, group.owner = position, dist.get_rank()
        groups.append(group)
    return groups


def play(responses: int, tokens: int, minibatches: int, epochs: int) -> Round:
    """One round on every rank; see the module."""
    lengths = lengths_of(responses, tokens)
    prompts = [Prompt(str(i), "", "", "", tuple(range(PROMPT_TOKENS))) for i in range(responses // GROUP)]
    policy = PlayedPolicy(int(lengths.max()) + PROMPT_TOKENS)
    own = sample_groups(prompts, lengths)
    sampled = sum(len(rollout.token_ids) for group in own for rollout in group.rollouts)
    dist.barrier()
    base, wall, cpu = resident_bytes(), time.perf_counter(), time.process_time()
    groups = share_outlines(own, prompts)
    for group in groups:
        group.advantages_G = group_advantages(filled(group.rewards_G), "population", group.reward_magnitude)
    samples = to_training_samples(groups)
    planned = plan_epochs(len(samples), max(1, responses // minibatches), "0", epochs)
    samples = policy.place(samples, planned[0])
    samples = with_logprobs(samples, policy, policy)  # type: ignore[arg-type]
    settings = RolloutConfig()
    figures = over_ranks(compare_logprobs([sample for sample in samples if sample.here], settings)).metrics(settings)
    for batches in planned:
        samples = policy.place(samples, batches)
        for batch in batches:
            minibatch = [samples[number] for number in batch]
            assert find_nonfinite(minibatch) is None
            for micro_batch in policy.pack(minibatch):
                assert micro_batch.token_fields["ref_logprobs"].shape == micro_batch.token_ids.shape
    figures["entropy/sampled"] = -mean_sampled_logprob(groups)
    figures["reward/mean"] = torch.cat([filled(group.rewards_G) for group in groups]).mean().item()
    seconds = time.perf_counter() - wall, time.process_time() - cpu
    trained = sum(sample.num_targets for sample in samples if sample.here)
    share = max(sampled, trained) * BYTES_OF_TOKEN
    check_samples(samples, lengths)
    return Round(responses, int(lengths.sum()), share, peak_bytes(), base, *seconds, figures)


def check_samples(samples: list[TrainingSample], lengths: np.ndarray) -> None:
    """Every sample that this rank trains on has what was sampled for it, to the bit. Raises Disagreement."""
    for number, sample in enumerate(samples):
        position, place = divmod(number, GROUP)
        if not sample.here or place:
            continue
        draw, length = np.random.default_rng(position), lengths[number]
        ids, logprobs = draw.integers(0, 128_000, length, np.int32), -draw.random(length, np.float32)
        if not (
            np.array_equal(sample.token_ids[PROMPT_TOKENS:], ids)
            and np.array_equal(filled_array(sample.rollout_logprobs)[sample.trained], logprobs)
            and np.array_equal(filled_array(sample.old_logprobs)[sample.trained], logprobs + np.float32(1e-3))
        ):
            raise Disagreement(f"{sample.name} came to its rank with other tokens or log-probs than were sampled")


def filled_array(values: np.ndarray | None) -> np.ndarray:
    """An array that the round has filled."""
    assert values is not None
    return values


def play_old_way(responses: int, tokens: int) -> Round:
    """The way of before: all ranks gather all responses, as lists of Python numbers, and build samples of all."""
    lengths = lengths_of(responses, tokens)
    prompts = [Prompt(str(i), "", "", "", tuple(range(PROMPT_TOKENS))) for i in range(responses // GROUP)]
    own = {
        group.position: [(rollout.token_ids.tolist(), rollout.rollout_logprobs.tolist()) for rollout in group.rollouts]
        for group in sample_groups(prompts, lengths)
    }
    dist.barrier()
    base, wall, cpu = resident_bytes(), time.perf_counter(), time.process_time()
    gathered: dict[int, Any] = {}
    for of_rank in gather_objects(own):
        gathered |= of_rank
    samples = [
        (
            [*prompts[position].token_ids, *ids],
            [0] * PROMPT_TOKENS + [1] * len(ids),
            torch.tensor([0.0] * PROMPT_TOKENS + logprobs, dtype=torch.float32),
        )
        for position in range(len(prompts))
        for ids, logprobs in gathered[position]
    ]
    seconds = time.perf_counter() - wall, time.process_time() - cpu
    share = int(lengths.sum()) * BYTES_OF_TOKEN // dist.get_world_size()
    return Round(len(samples), int(lengths.sum()), share, peak_bytes(), base, *seconds, {})


def old_way_bytes(measured: Round, tokens: int) -> float:
    """Memory of a rank in the way of before, from a smaller round: all that it gathers grows with the tokens of all ranks."""
    return measured.base_bytes + (measured.peak_bytes - measured.base_bytes) * tokens / measured.tokens


def resident_bytes() -> int:
    """Of this process, now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def forget_peak() -> None:
    """Let `peak_bytes` begin anew."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """The most resident memory of this process since `forget_peak`."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def be_rank(rank: int, world_size: int, folder: Path, settings: argparse.Namespace) -> None:
    """Play all sizes, and write what was measured."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), world_size), rank=rank, world_size=world_size)
    found: dict[str, list[Round]] = {"new": [], "old": []}
    sizes = [settings.responses // part // GROUP * GROUP for part in (4, 2, 1)]
    works: list[tuple[str, Callable[[], Round]]] = [
        ("new", partial(play, size, settings.tokens, settings.minibatches, settings.epochs)) for size in sizes
    ]
    old_size = max(GROUP * world_size, settings.responses // OLD_PART // GROUP * GROUP)
    works.append(("old", partial(play_old_way, old_size, settings.tokens)))
    for name, work in works:
        forget_peak()
        found[name].append(work())
        dist.barrier()
    (folder / f"rank_{rank}").write_bytes(pickle.dumps(found))
    dist.destroy_process_group()


def play_on(world_size: int, settings: argparse.Namespace) -> dict[str, list[list[Round]]]:
    """[size][rank] rounds on so many ranks, each in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.data_plane", *sys.argv[1:], "--folder", folder, "--of", str(world_size)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2", "MALLOC_TRIM_THRESHOLD_": "0"}
        ranks = [subprocess.Popen([*command, "--rank", str(rank)], env=environment) for rank in range(world_size)]
        codes = [process.wait() for process in ranks]
        if any(codes):
            raise Disagreement(f"a rank of {world_size} failed; its error is above")
        found = [pickle.loads((Path(folder) / f"rank_{rank}").read_bytes()) for rank in range(world_size)]
    return {name: [list(of_size) for of_size in zip(*(of_rank[name] for of_rank in found), strict=True)] for name in ("new", "old")}


def judge(world_size: int, found: dict[str, list[list[Round]]]) -> list[str]:
    """Print the table of one number of ranks; what is above the bar."""
    header = ["responses", "tokens", "own share", "bar", "peak, the fullest rank", "seconds", "CPU seconds, all ranks"]
    rows, problems = [], []
    for ranks in found["new"]:
        fullest = max(ranks, key=lambda measured: measured.peak_bytes - TIMES_SHARE * measured.share_bytes)
        bar = TIMES_SHARE * fullest.share_bytes + BESIDE_SHARE
        rows.append(_row(fullest, f"{bar / 1e9:.3f} GB", ranks))
        if fullest.peak_bytes > bar:
            problems.append(f"{world_size} ranks, {fullest.responses} responses: {fullest.peak_bytes:,} bytes, above {bar:,}")
        if len({json.dumps(measured.figures) for measured in ranks}) > 1:
            problems.append(f"{world_size} ranks, {fullest.responses} responses: the ranks do not report the same")
    whole, old = found["new"][-1], found["old"][0]
    fullest_old = max(old, key=lambda measured: measured.peak_bytes)
    rows.append(_row(fullest_old, "as before", old))
    at_whole = old_way_bytes(fullest_old, whole[0].tokens)
    rows.append([str(whole[0].responses), f"{whole[0].tokens:,}", "", "as before, calculated", f"{at_whole / 1e9:.3f} GB", "", ""])
    print(f"\n{world_size} ranks")
    print_table(header, rows)
    small, large = (sum(m.cpu_seconds for m in ranks) / ranks[0].tokens for ranks in (found["new"][0], whole))
    print(f"CPU time of a token, whole size over a quarter: {large / small:.2f}")
    if large > LINEAR * small:
        problems.append(f"{world_size} ranks: a token takes {large / small:.2f} times as long at the whole size as at a quarter")
    return problems


def _row(measured: Round, bar: str, ranks: list[Round]) -> list[str]:
    seconds, cpu = max(m.wall_seconds for m in ranks), math.fsum(m.cpu_seconds for m in ranks)
    share, peak = (f"{number / 1e9:.3f} GB" for number in (measured.share_bytes, measured.peak_bytes))
    return [str(measured.responses), f"{measured.tokens:,}", share, bar, peak, f"{seconds:.1f}", f"{cpu:.1f}"]


def benchmark(settings: argparse.Namespace) -> None:
    """Play and judge all numbers of ranks."""
    results, problems = {}, []
    for world_size in settings.ranks:
        found = play_on(world_size, settings)
        problems += judge(world_size, found)
        results[str(world_size)] = {name: [[asdict(m) for m in ranks] for ranks in sizes] for name, sizes in found.items()}
    if settings.out is not None:
        write_results(settings.out, settings, {"data_plane": results}, describe_machine("cpu"))
    if problems:
        raise Disagreement("; ".join(problems))


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Memory and time of a round's data on many ranks.")
    parser.add_argument("--ranks", type=positive, nargs="+", default=[8, 16], help="numbers of ranks")
    parser.add_argument("--responses", type=positive, default=8192, help=f"of a round; a multiple of {4 * GROUP}")
    parser.add_argument("--tokens", type=positive, default=8192, help="of a response, in the mean")
    parser.add_argument("--minibatches", type=positive, default=16, help="of a round")
    parser.add_argument("--epochs", type=positive, default=1, help="inner epochs; in each but the first, samples move again")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="also write all results there")
    for name in ("--rank", "--of"):
        parser.add_argument(name, type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    given = parse_arguments()
    if given.rank is not None:
        be_rank(given.rank, given.of, given.folder, given)
    else:
        sys.exit(run(benchmark, given))
