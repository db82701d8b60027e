"""Log-probs and their gradient from hidden states, with tiles of logits beside plain torch, which keeps logits whole.

    python -m benchmarks.logprob --out logprob.json

Each run of a side is a process of its own that makes the same hidden states and weights from the seed, takes one small step, and
then one that is measured: -log p of every token, and the gradients of hidden states and weight for a gradient of each token's that
is known, as that of a stage's loss is. `naive` is `log_softmax` of `hidden @ weight.T`; `fused` is `mcore.fused_head` as updates
use it on a CPU; with --recomputed it also runs as where the loss's slope is not known before the backward pass.

Of each hidden size, `naive` runs at the sizes whose memory fits into what is free, by `naive_bytes`; at larger ones, `fused` runs
alone. Memory is the most that a process held in the step beyond what it held before, gradients included.

Exit code 1: the sides differ by more than `TOLERANCE`; or at the largest size of a hidden size at which both ran, `fused` took more
than `MEMORY` of the memory or `TIME` of the time of `naive`. The bars are for a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.data_plane import forget_peak, peak_bytes, resident_bytes
from benchmarks.measure import Disagreement, describe_machine, parser_of, positive, print_table, run, write_results
from megatron_r1.mcore.fused_head import Head, token_losses
from megatron_r1.runtime.launch import child_environment
from megatron_r1.runtime.memory import free_memory

MEMORY, TIME = 1 / 8, 1.1  #: the bars: of naive's
TOLERANCE = {"fp32": 5e-6, "bf16": 2e-2}  #: the norm of the difference over that of naive's; logits are rounded otherwise
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FREE = 0.9  #: of the free memory, what naive may take
_COMPARED = 2**22  # numbers of a gradient that are compared at a time


@dataclass(frozen=True)
class Step:
    """What one process measured."""

    side: str
    tokens: int
    hidden: int
    beyond_bytes: int  #: the most that it held in the step, beyond what it held before
    peak_bytes: int  #: the most that it held at all
    wall_seconds: float
    cpu_seconds: float
    guessed: bool | None  #: whether the slope was right


def naive_bytes(tokens: int, hidden: int, vocabulary: int, width: int) -> int:
    """What naive holds at its fullest moment: float32 log-probs, their gradient and that of logits; inputs and their gradients."""
    return 4 * 3 * tokens * vocabulary + 2 * width * hidden * (tokens + vocabulary)


def draw(tokens: int, settings: argparse.Namespace) -> tuple[torch.Tensor, ...]:
    """Hidden states [tokens, hidden], weight [vocabulary, hidden], labels [tokens] and the gradient [tokens] of each loss."""
    generator = torch.Generator().manual_seed(settings.seed)
    dtype, size = DTYPES[settings.dtype], settings.hidden[0]
    hidden = torch.empty((tokens, size), dtype=dtype).normal_(generator=generator)
    weight = torch.empty((settings.vocabulary, size), dtype=dtype).normal_(std=2 * size**-0.5, generator=generator)
    labels = torch.randint(settings.vocabulary, (tokens,), generator=generator)
    return hidden.requires_grad_(), weight.requires_grad_(), labels, torch.randn(tokens, generator=generator) / tokens


def losses_of(side: str, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, slopes: torch.Tensor, head: Head):
    """-log p [tokens], with gradient."""
    if side == "naive":
        logprobs = (hidden @ weight.t()).float().log_softmax(-1)
        return -logprobs.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    head.slope = None if side == "recomputed" else lambda rows, _: slopes[rows]
    return token_losses(hidden, weight, labels, head)[0]


def be_side(settings: argparse.Namespace) -> None:
    """One process: measure a step, write numbers to compare into the folder, print the measurement."""
    torch.set_num_threads(settings.threads)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    side, tokens = settings.side, settings.tokens[0]

    def step(*drawn: torch.Tensor) -> Head:
        head = Head(temperature=1.0, group=dist.group.WORLD, vocabulary=settings.vocabulary)
        losses = losses_of(side, *drawn, head)
        losses.backward(drawn[3])
        np.save(settings.folder / f"{side}_losses.npy", losses.detach().numpy())
        return head

    hidden, weight, labels, slopes = draw(tokens, settings)
    few = slice(0, 4)
    step(hidden[few].detach().requires_grad_(), weight[:256].detach().requires_grad_(), labels[few] % 256, slopes[few])
    before = resident_bytes()
    forget_peak()
    wall, cpu = time.perf_counter(), time.process_time()
    head = step(hidden, weight, labels, slopes)
    seconds = time.perf_counter() - wall, time.process_time() - cpu
    peak = peak_bytes()
    assert hidden.grad is not None and weight.grad is not None
    np.save(settings.folder / f"{side}_hidden.npy", hidden.grad.float().numpy())
    np.save(settings.folder / f"{side}_weight.npy", weight.grad.float().numpy())
    print(json.dumps(asdict(Step(side, tokens, settings.hidden[0], peak - before, peak, *seconds, head.guessed))))


def measure_side(side: str, tokens: int, hidden: int, settings: argparse.Namespace, folder: Path) -> Step:
    """Start a process and wait for it."""
    command = [sys.executable, "-m", "benchmarks.logprob", "--side", side, "--folder", str(folder)]
    for name, value in (("tokens", tokens), ("hidden", hidden), ("vocabulary", settings.vocabulary), ("seed", settings.seed)):
        command += [f"--{name}", str(value)]
    command += ["--dtype", settings.dtype, "--threads", str(settings.threads)]
    finished = subprocess.run(command, env=child_environment(), capture_output=True, text=True, check=False)
    if finished.returncode:
        raise Disagreement(
            f"{side} at {tokens} tokens and hidden size {hidden} ended with {finished.returncode}: {finished.stderr[-500:]}"
        )
    return Step(**json.loads(finished.stdout.splitlines()[-1]))


def differences(sides: list[str], folder: Path) -> Iterator[tuple[str, str, float]]:
    """Each side but the first, and the norm of the difference of its numbers to the first's, over the norm of these."""
    for file in ("losses", "hidden", "weight"):
        want = np.load(folder / f"{sides[0]}_{file}.npy", mmap_mode="r").reshape(-1)
        for side in sides[1:]:
            found = np.load(folder / f"{side}_{file}.npy", mmap_mode="r").reshape(-1)
            off = whole = 0.0
            for start in range(0, len(want), _COMPARED):
                part = want[start : start + _COMPARED].astype(np.float64)
                off += np.square(found[start : start + _COMPARED] - part).sum()
                whole += np.square(part).sum()
            yield side, file, float(np.sqrt(off / whole))


@dataclass
class Case:
    """One size: every repetition of every side that ran."""

    tokens: int
    hidden: int
    steps: dict[str, list[Step]]
    difference: float | None  #: the largest, to naive

    def memory(self, side: str) -> float:
        """Of naive's, the median of neighbours."""
        return median(a.beyond_bytes / b.beyond_bytes for a, b in zip(self.steps[side], self.steps["naive"], strict=True))

    def time(self, side: str) -> float:
        """Of naive's, likewise."""
        return median(a.wall_seconds / b.wall_seconds for a, b in zip(self.steps[side], self.steps["naive"], strict=True))


def measure_case(tokens: int, hidden: int, settings: argparse.Namespace) -> Case:
    """Run all sides of a size in turn. Raises Disagreement."""
    need = naive_bytes(tokens, hidden, settings.vocabulary, DTYPES[settings.dtype].itemsize)
    fits = need <= FREE * free_memory()
    sides = (["naive"] if fits else []) + ["fused"] + (["recomputed"] if settings.recomputed else [])
    if not fits:
        print(
            f"{tokens} tokens of hidden size {hidden}: naive needs {need / 1e9:.1f} GB, {free_memory() / 1e9:.1f} GB are free",
            flush=True,
        )
    case = Case(tokens, hidden, {side: [] for side in sides}, None)
    with tempfile.TemporaryDirectory() as folder:
        for repetition in range(settings.repeats if fits else 1):
            for side in sides if repetition % 2 == 0 else reversed(sides):
                case.steps[side].append(measure_side(side, tokens, hidden, settings, Path(folder)))
        for side, what, difference in differences(sides, Path(folder)) if fits else ():
            case.difference = max(case.difference or 0.0, difference)
            if not difference <= TOLERANCE[settings.dtype]:
                raise Disagreement(f"{side} at {tokens} tokens and hidden size {hidden}: {what} differ by {difference:.1e}")
    if not all(step.guessed for step in case.steps["fused"]):
        raise Disagreement(f"fused at {tokens} tokens: the slope was not taken as it was given")
    return case


def row_of(case: Case, side: str) -> list[str]:
    """Of the table."""
    steps = case.steps[side]
    ratios = [f"{case.memory(side):.3f}", f"{case.time(side):.2f}"] if "naive" in case.steps else ["", ""]
    middle = [
        median(getattr(step, name) for step in steps) for name in ("beyond_bytes", "peak_bytes", "wall_seconds", "cpu_seconds")
    ]
    memory = [f"{number / 1e9:.2f} GB" for number in middle[:2]]
    return [side, f"{case.tokens:,}", f"{case.hidden:,}", *memory, *(f"{number:.1f}" for number in middle[2:]), *ratios]


def benchmark(settings: argparse.Namespace) -> None:
    """Measure, print and judge all sizes."""
    machine = describe_machine("cpu") | {"threads": settings.threads}
    cases = [measure_case(tokens, hidden, settings) for hidden in settings.hidden for tokens in sorted(settings.tokens)]
    header = [
        "side",
        "tokens",
        "hidden",
        "memory of the step",
        "of the process",
        "seconds",
        "CPU seconds",
        "memory / naive",
        "time / naive",
    ]
    print_table(header, [row_of(case, side) for case in cases for side in case.steps])
    known = [case.difference for case in cases if case.difference is not None]
    if known:
        print(f"largest difference of losses and gradients to naive, in norm: {max(known):.1e}")
    if settings.out is not None:
        write_results(settings.out, settings, {"logprob": [asdict(case) for case in cases]}, machine)
    problems = problems_of(cases)
    if problems:
        raise Disagreement("; ".join(problems))


def problems_of(cases: list[Case]) -> list[str]:
    """What is above the bars, at the largest size of each hidden size at which both sides ran."""
    problems = []
    for hidden in dict.fromkeys(case.hidden for case in cases):
        both = [case for case in cases if case.hidden == hidden and "naive" in case.steps]
        if not both:
            problems.append(f"hidden size {hidden}: naive fits at no size")
            continue
        largest = max(both, key=lambda case: case.tokens)
        for what, ratio, bar in (("memory", largest.memory("fused"), MEMORY), ("time", largest.time("fused"), TIME)):
            if not ratio <= bar:
                problems.append(f"hidden size {hidden}, {largest.tokens} tokens: {ratio:.3f} of naive's {what}, above {bar}")
    return problems


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = parser_of("Log-probs by tiles of logits beside plain torch.", repeats=3, devices=False)
    parser.add_argument("--tokens", type=positive, nargs="+", default=[2048, 4096, 8192, 12288, 32768], help="in a step")
    parser.add_argument("--hidden", type=positive, nargs="+", default=[512, 2048], help="sizes of hidden states")
    parser.add_argument("--vocabulary", type=positive, default=129_280, help="rows of the weight")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp32", help="of hidden states and weight")
    parser.add_argument("--threads", type=positive, default=2, help="OpenMP threads of a process")
    parser.add_argument("--recomputed", action="store_true", help="also run it where the slope is not known")
    parser.add_argument("--side", choices=("naive", "fused", "recomputed"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    given = parse_arguments()
    sys.exit(be_side(given) if given.side is not None else run(benchmark, given))
