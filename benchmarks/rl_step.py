"""A whole GRPO round of this project and of TRL's GRPOTrainer, side by side.

Both start from one Hugging Face folder, see the same prompts token for token, and make the same round: as many prompts, responses
of each, updates and optimizer settings, the same lengths, the same reward, in float32 with as many threads. A round is everything
from the first token sampled to weights that the next round can sample with, metrics and logs included. Ours is `megatron-r1 grpo`
with a normal config and vLLM; TRL's is GRPOTrainer with transformers' generate, in an environment of its own that this command
makes. The two take turns, round by round, each waiting while the other computes, and who begins alternates.

Before anything is timed, TRL computes the log-probs, losses and gradient norms of our first round with its own functions: they must
be ours. Every timed round must have responses of the length that was asked for; mixed lengths are drawn by the model itself, whose
end of sequence has the same probability at every token, so that both sides have the same distribution and neither is told a length.

TRL's settings are `against_trl.workloads.trl_settings`: one generation for all updates of a round; the log-probs of the old policy
only where a round has several updates, as TRL decides by itself; no gradient checkpointing, no bf16, no data loader processes;
transformers' own choice of attention, experts and fused AdamW; the faster of two batch sizes, tried on our first round (--trl-batch
takes another, --trl-continuous-batching transformers' other way to generate). TRL is not measured with vLLM: it takes 0.22 to 0.31
of the package vllm, which is for CUDA, and was not tried with a build for CPU.

    python -m benchmarks.rl_step --threads 1 default --out rl_step.json

The command ends with 0 only if the bar of every workload that was measured holds.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import mean, median
from typing import Any

import yaml

from benchmarks.against_trl import environment
from benchmarks.against_trl.folder import link_given_folder, make_random_folder
from benchmarks.against_trl.sides import RunningSide, Turn
from benchmarks.against_trl.workloads import WORKLOADS, Workload, our_config, sums, trl_settings
from benchmarks.measure import (
    Comparison,
    Disagreement,
    Side,
    describe_machine,
    parser_of,
    positive,
    print_table,
    run,
    write_results,
)
from megatron_r1.config.data import DataConfig
from megatron_r1.data.problems import load_problems
from megatron_r1.data.prompts import PromptStream, PromptWriter
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.errors import ConfigError
from megatron_r1.types import Prompt

LARGEST_LOGPROB_DIFFERENCE, MEAN_LOGPROB_DIFFERENCE = 1e-2, 1e-4  # the largest: two experts may be chosen nearly alike
GRADIENT_TOLERANCE, LOSS_TOLERANCE = 1e-3, 1e-4  # relative; absolute
DEFAULT = "default"  #: number of threads: what each side chooses
OURS = ("rollout", "reward", "logprob", "train", "sync")  #: timers of metrics.jsonl
PARTS = ("rollout", "reward", "logprob", "update", "sync", "rest")


@dataclass
class Result:
    """One workload with one number of threads. Entry i of every list belongs to round i."""

    workload: str
    threads: str
    bar: float
    comparison: Comparison
    agreement: dict[str, Any]
    trl: dict[str, Any]  #: its versions, threads and choices
    tokens: dict[str, list[int]] = field(default_factory=lambda: {"ours": [], "trl": []})
    parts: dict[str, list[dict[str, float]]] = field(default_factory=lambda: {"ours": [], "trl": []})  #: seconds
    peak_bytes: dict[str, int] = field(default_factory=lambda: {"ours": 0, "trl": 0})

    @property
    def token_ratio(self) -> float:
        """Our tokens per second over TRL's, the median of the ratios of neighbours in time."""
        sides = zip(
            self.tokens["ours"],
            self.comparison.ours.wall_seconds,
            self.tokens["trl"],
            self.comparison.peer.wall_seconds,
            strict=True,
        )
        return median((a / s) / (b / t) for a, s, b, t in sides)

    @property
    def holds(self) -> bool:
        """Whether the bar does."""
        return self.comparison.speed_ratio >= self.bar

    def add(self, side: str, turn: Turn, parts: dict[str, float], responses: int) -> None:
        """Keep one round of a side, "ours" or "trl"."""
        timed = self.comparison.ours if side == "ours" else self.comparison.peer
        timed.amounts.append(responses)
        timed.wall_seconds.append(turn.wall_seconds)
        timed.own_cpu_seconds.append(turn.cpu_seconds)
        self.tokens[side].append(sum(turn.report["lengths"]))
        self.parts[side].append(parts)
        self.peak_bytes[side] = max(self.peak_bytes[side], turn.peak_bytes)


def measure(workload: Workload, threads: str, arguments: argparse.Namespace, python: Path, work: Path) -> Result:
    """Start both sides on one workload, check that they agree, and time their rounds in turn."""
    number = None if threads == DEFAULT else int(threads)
    model, prompts, data = prepare(workload, arguments, work)
    longest = max(len(prompt.token_ids) for prompt in prompts)
    data = data.model_copy(update={"max_prompt_tokens": longest})
    settings = {"run_dir": work / "run", "model": model, "data": data}
    config = our_config(workload, **settings, threads=number, seed=arguments.seed)
    spec = {
        "model": str(model),
        "check": str(work / "check.json"),
        "threads": number,
        "updates_per_round": workload.updates,
        "versions": environment.versions(),
        "prompts": [{"text": prompt.text, "token_ids": prompt.token_ids} for prompt in prompts],
        "settings": [
            trl_settings(workload, output=work / "trl", batch=batch, seed=arguments.seed)
            | ({"use_transformers_continuous_batching": True} if arguments.trl_continuous_batching else {})
            for batch in workload.trl_batches
        ],
    }
    (work / "config.yaml").write_text(yaml.safe_dump(config))
    (work / "spec.json").write_text(json.dumps(spec))
    few = {} if number is None else {"OMP_NUM_THREADS": str(number)}
    offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with ExitStack() as stack:
        ours = stack.enter_context(
            RunningSide(
                "this project",
                [sys.executable, "-m", "benchmarks.against_trl.ours"],
                [str(work / "config.yaml"), str(work / "check.json")],
                few,
                work / "ours.log",
            )
        )
        ours.started()
        first = ours.turn()
        _say(workload, threads, f"first round of ours, not timed: {first.wall_seconds:.1f} s")
        peer = stack.enter_context(
            RunningSide(
                "TRL",
                [str(python), "-m", "benchmarks.against_trl.trl_side"],
                [str(work / "spec.json")],
                few | offline,
                work / "trl.log",
            )
        )
        described = peer.started().report
        agreement = peer.turn("check").report | {"ours": _metrics(work)[-1]}
        result = Result(workload.name, threads, workload.bar, Comparison(workload.name, Side(), Side()), agreement, described)
        check_agreement(agreement)
        _say(
            workload,
            threads,
            f"log-probs agree to {agreement['largest_difference']:.1e}, gradients are the same; TRL's fastest batch: "
            f"{agreement['batch']} of {', '.join(agreement['batch_seconds'])}",
        )
        peer.turn("train")
        warm = peer.turn()
        _say(workload, threads, f"first round of TRL, not timed: {warm.wall_seconds:.1f} s")
        for repetition in range(arguments.repeats):
            for side in ("ours", "trl") if repetition % 2 == 0 else ("trl", "ours"):
                turn = (ours if side == "ours" else peer).turn()
                check_lengths(workload, side, turn.report["lengths"])
                parts = our_parts(_metrics(work)[-1], turn) if side == "ours" else trl_parts(turn)
                result.add(side, turn, parts, workload.responses)
            a, b = result.comparison.ours.wall_seconds[-1], result.comparison.peer.wall_seconds[-1]
            _say(workload, threads, f"round {repetition + 1} of {arguments.repeats}: ours {a:.1f} s, TRL {b:.1f} s")
    return result


def prepare(workload: Workload, arguments: argparse.Namespace, work: Path) -> tuple[Path, list[Prompt], DataConfig]:
    """The folder that both start from, the prompts of all rounds in their order, and where we take them from."""
    count = workload.prompts * (arguments.repeats + 3)
    source = "tally"
    if workload.terms is not None:
        problems = work / "sums.jsonl"
        problems.write_text("".join(f"{json.dumps(p)}\n" for p in sums(count, workload.terms, arguments.seed)))
        source = str(problems)
    chats = arguments.model is not None and Tokenizer.load(arguments.model).chat_template is not None
    data = DataConfig(source=source, template="tokenizer" if chats else "r1_zero", max_prompt_tokens=1 << 20)

    def prompts_of(folder: Path) -> list[Prompt]:
        writer = PromptWriter(data, Tokenizer.load(folder))
        return PromptStream(load_problems(data), writer, arguments.seed).next(count)

    if arguments.model is None:
        folder = make_random_folder(work / "model", workload, arguments.seed)
        return folder, prompts_of(folder), data
    prompts = prompts_of(arguments.model)
    first = [prompt.token_ids for prompt in prompts[: workload.prompts]]
    return link_given_folder(work / "model", arguments.model, first, mixed=workload.mixed), prompts, data


def check_agreement(found: dict[str, Any]) -> None:
    """Raises Disagreement if TRL computes something else of our first round than we did.

    Args:
        found: what TRL's side reports, and in "ours" our metrics of that round.
    """
    for kind, most in (("largest", LARGEST_LOGPROB_DIFFERENCE), ("mean", MEAN_LOGPROB_DIFFERENCE)):
        if not found[f"{kind}_difference"] <= most:
            raise Disagreement(f"our log-probs differ from TRL's by {found[f'{kind}_difference']:.2e} ({kind} of a round)")
    loss, norm = mean(found["losses"]), mean(found["grad_norms"])
    if not abs(loss - found["ours"]["loss"]) <= LOSS_TOLERANCE:
        raise Disagreement(f"our loss of the first round is {found['ours']['loss']:.6f}, TRL's {loss:.6f}")
    if not abs(norm / found["ours"]["grad_norm"] - 1) <= GRADIENT_TOLERANCE:
        raise Disagreement(f"our gradient norm of the first round is {found['ours']['grad_norm']:.6f}, TRL's {norm:.6f}")


def check_lengths(workload: Workload, side: str, lengths: list[int]) -> None:
    """Raises Disagreement if a round has not the responses that were asked for."""
    wrong = [length for length in lengths if length > workload.tokens or not workload.mixed and length < workload.tokens]
    if len(lengths) != workload.responses or wrong:
        raise Disagreement(
            f"a round of {side} has {len(lengths)} responses of {min(lengths)} to {max(lengths)} tokens; asked for were "
            f"{workload.responses} of {'up to ' if workload.mixed else ''}{workload.tokens}"
        )


def our_parts(metrics: dict[str, float], turn: Turn) -> dict[str, float]:
    """Seconds of `PARTS` from the line of metrics.jsonl."""
    named = {name: metrics.get(f"seconds/{name}", 0.0) for name in OURS}
    named["update"] = named.pop("train")
    return named | {"rest": turn.wall_seconds - sum(named.values())}


def trl_parts(turn: Turn) -> dict[str, float]:
    """Seconds of `PARTS`: what was taken around TRL's methods; its update is what is left. It has no weights to send."""
    named = {name: turn.report["seconds"].get(name, 0.0) for name in ("rollout", "reward", "logprob")}
    return named | {"update": turn.wall_seconds - sum(named.values()), "sync": 0.0, "rest": 0.0}


def _metrics(work: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (work / "run/metrics.jsonl").read_text().splitlines()]


def _say(workload: Workload, threads: str, text: str) -> None:
    print(f"{workload.name}, threads {threads}: {text}", flush=True)


def print_results(results: list[Result]) -> None:
    """Two tables: rounds, and their parts."""
    print_table(
        ["workload", "threads", "ours, samples/s", "TRL", "ratio", "bar", "by tokens", "by CPU time", "ours, peak GB", "TRL"],
        [
            [
                r.workload,
                r.threads,
                f"{r.comparison.ours.per_second:.2f}",
                f"{r.comparison.peer.per_second:.2f}",
                f"{r.comparison.speed_ratio:.2f}",
                f"{r.bar:.1f}{'' if r.holds else ' MISSED'}",
                f"{r.token_ratio:.2f}",
                f"{r.comparison.cpu_ratio:.2f}",
                f"{r.peak_bytes['ours'] / 1e9:.1f}",
                f"{r.peak_bytes['trl'] / 1e9:.1f}",
            ]
            for r in results
        ],
    )
    print_table(
        ["seconds of a round", "threads", "tokens", "whole", *PARTS],
        [
            [
                f"{r.workload}, {'ours' if side == 'ours' else 'TRL'}",
                r.threads,
                f"{median(r.tokens[side]):,.0f}",
                f"{timed.median_seconds:.2f}",
                *(f"{median(parts[name] for parts in r.parts[side]):.2f}" for name in PARTS),
            ]
            for r in results
            for side, timed in (("ours", r.comparison.ours), ("trl", r.comparison.peer))
        ],
    )


def benchmark(arguments: argparse.Namespace) -> None:
    """Measure the chosen workloads, print two tables, write the JSON file.

    Raises:
        Disagreement: the sides do not do the same work, or a bar does not hold.
    """
    if arguments.model is not None and not (arguments.model / "config.json").is_file():
        raise ConfigError(f"--model {arguments.model} is no Hugging Face folder: it has no config.json")
    arguments.model = arguments.model and arguments.model.resolve()
    python = environment.make_environment(arguments.environment.absolute(), arguments.torch_index)
    results = []
    for name in arguments.workloads:
        workload = WORKLOADS[name]
        if arguments.trl_batch is not None:
            workload = replace(workload, trl_batches=(arguments.trl_batch,))
        if any(workload.minibatch % batch for batch in workload.trl_batches):
            raise ConfigError(f"--trl-batch {arguments.trl_batch} does not divide {name}'s minibatch of {workload.minibatch}")
        for threads in arguments.threads:
            with tempfile.TemporaryDirectory(prefix="megatron_r1-benchmark-", dir=arguments.dir) as work:
                results.append(measure(workload, threads, arguments, python, Path(work)))
    print_results(results)
    if arguments.out is not None:
        content = {
            "rl_step": [
                asdict(r) | {"speed_ratio": r.comparison.speed_ratio, "token_ratio": r.token_ratio, "holds": r.holds}
                for r in results
            ]
        }
        write_results(arguments.out, arguments, content, describe_machine("cpu"))
    missed = [f"{r.workload} ({r.comparison.speed_ratio:.2f} of {r.bar:.1f}, threads {r.threads})" for r in results if not r.holds]
    if missed:
        raise Disagreement(f"below the bar: {', '.join(missed)}")


def threads(text: str) -> str:
    """For argparse: "default", or a number above 0."""
    if text == DEFAULT or text.isdecimal() and int(text):
        return text
    raise argparse.ArgumentTypeError(f"{text!r} is neither {DEFAULT} nor a number above 0")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = parser_of("A whole GRPO round of this project and of TRL's GRPOTrainer, in turn, on CPU.", repeats=5, devices=False)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS), help="what is compared")
    parser.add_argument(
        "--threads", nargs="+", type=threads, default=["1", DEFAULT], help="OpenMP threads of both; default: what each chooses"
    )
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="a Hugging Face folder in place of random weights")
    parser.add_argument("--environment", type=Path, metavar="FOLDER", default=environment.default_folder(), help="of TRL")
    parser.add_argument("--torch-index", metavar="URL", help="where pip finds torch for TRL's environment, as in make quickstart")
    parser.add_argument("--dir", type=Path, metavar="FOLDER", help="for weights and run folders, which are removed at the end")
    parser.add_argument(
        "--trl-batch", type=positive, metavar="N", help="sequences of TRL's forward passes; by default the faster of two"
    )
    parser.add_argument(
        "--trl-continuous-batching", action="store_true", help="TRL generates with transformers' continuous batching"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that sides and weights do not stay behind
    sys.exit(run(benchmark, parse_arguments()))
