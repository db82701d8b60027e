"""One optimizer step: MegatronPolicy against transformers' DeepseekV3ForCausalLM with torch's AdamW.

Both start from the same weights and see the same tokens, with the same clipping and the same AdamW settings, in fp32. Before
anything is timed, loss and gradient norm of the first step must agree. The batch is sequences of different lengths as in GRPO,
which ours packs end to end and the peer pads to the longest. Equal rows, as in pretraining, are `pretrain_step`'s.

    python -m benchmarks.train_step --out train_step.json
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.measure import (
    Comparison,
    check_agreement,
    compare,
    describe_machine,
    parser_of,
    positive,
    print_table,
    run,
    write_results,
)
from benchmarks.peer import OPTIMIZER, Step, describe_peer, load_peer, peer_step
from megatron_r1.config.model import ModelConfig
from megatron_r1.config.optimizer import MoeTrainingConfig
from megatron_r1.config.runtime import RuntimeConfig
from megatron_r1.config.schema import Config
from megatron_r1.model.architecture import Architecture
from megatron_r1.pipeline.builders.models import build_architecture, build_policy
from megatron_r1.pipeline.session import Session, open_session
from megatron_r1.training.pretrain import loss_over
from megatron_r1.types import TrainingSample

if TYPE_CHECKING:
    from megatron_r1.mcore.policy import MegatronPolicy

SHORTEST, LONGEST = 20, 50  #: targets of a packed sequence, 35 on average


@dataclass(frozen=True)
class Batch:
    """The same targets twice: as transformers takes them, and as a list of sequences."""

    token_ids: torch.Tensor  #: [B, T] int64, right-padded
    labels: torch.Tensor  #: [B, T] int64, -100 on padding
    attention_mask: torch.Tensor  #: [B, T] int64
    samples: list[TrainingSample]

    @property
    def num_targets(self) -> int:
        """Trained tokens."""
        return sum(sample.num_trained for sample in self.samples)


def make_batch(arch: Architecture, lengths: list[int], seed: int) -> Batch:
    """Random tokens: one sequence of `length` targets for every length."""
    generator = torch.Generator().manual_seed(seed)
    sequences = [torch.randint(0, arch.vocab_size, (length + 1,), generator=generator) for length in lengths]
    pad = torch.nn.utils.rnn.pad_sequence
    mask = pad([torch.ones(length, dtype=torch.int64) for length in lengths], batch_first=True)
    return Batch(
        pad([ids[:-1] for ids in sequences], batch_first=True),
        pad([ids[1:] for ids in sequences], batch_first=True, padding_value=-100),
        mask,
        [TrainingSample(ids.tolist(), [1] * (len(ids) - 1)) for ids in sequences],
    )


def our_step(policy: MegatronPolicy, batch: Batch) -> Step:
    """One update of the policy; returns loss and gradient norm."""
    loss_fn = loss_over(batch.num_targets)

    def step() -> tuple[float, float]:
        stats = policy.train_step(batch.samples, loss_fn)
        return stats.loss, stats.grad_norm

    return step


def scaled_config(hidden: int, device: str, seed: int) -> Config:
    """The tiny preset with every width in proportion to `hidden`; the latent ranks of attention stay."""
    overrides = {
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "moe_intermediate_size": hidden // 2,
        "num_attention_heads": hidden // 32,
    }
    return Config(seed=seed, model=ModelConfig(preset="tiny", overrides=overrides), runtime=RuntimeConfig(device=device))


def measure(session: Session, hidden: int, arguments: argparse.Namespace) -> tuple[Comparison, dict[str, Any]]:
    """Build both sides, check that they agree, and time them."""
    config = scaled_config(hidden, arguments.device, arguments.seed)
    arch = build_architecture(config.model)
    generator = torch.Generator().manual_seed(arguments.seed)
    lengths = torch.randint(SHORTEST, LONGEST + 1, (arguments.sequences,), generator=generator).tolist()
    batch = make_batch(arch, lengths, arguments.seed)
    policy = build_policy(
        config,
        session,
        arch,
        optimizer=OPTIMIZER,
        moe=MoeTrainingConfig(),
        total_updates=1,
        micro_batch_tokens=batch.num_targets,  # one forward pass, as the peer's
        packed=True,
    )
    device = session.device.torch_device
    model = load_peer(policy, device, arguments.experts)
    inputs = {"input_ids": batch.token_ids.to(device), "attention_mask": batch.attention_mask.to(device)}
    ours, peer = our_step(policy, batch), peer_step(model, inputs, batch.labels.to(device))
    name = f"hidden {hidden}, packed: {len(lengths)} sequences of {SHORTEST} to {LONGEST} tokens"
    check_agreement(name, ours(), peer())

    def timed(step: Step) -> Callable[[], int]:
        def work() -> int:
            step()
            session.device.synchronize()
            return batch.num_targets

        return work

    comparison = compare(name, timed(ours), timed(peer), arguments.repeats)
    return comparison, {
        "trained_tokens": batch.num_targets,
        "peer_positions": batch.token_ids.numel(),
        "transformers": describe_peer(model),
    }


def benchmark(arguments: argparse.Namespace) -> None:
    """Measure every size and workload, print a table, write the JSON file."""
    runtime = RuntimeConfig(device=arguments.device, threads=1)
    with open_session(runtime) as session:
        measured = [measure(session, hidden, arguments) for hidden in arguments.hidden]
        machine = describe_machine(arguments.device)
    rows = [
        [
            c.workload,
            f"{c.ours.per_second:,.0f}",
            f"{c.peer.per_second:,.0f}",
            f"{c.speed_ratio:.2f}",
            f"{c.cpu_ratio:.2f}",
        ]
        for c, _ in measured
    ]
    print_table(["workload", "ours, tokens/s", "transformers, tokens/s", "ours / transformers", "the same by CPU time"], rows)
    if arguments.out is not None:
        results = [{**asdict(c), "speed_ratio": c.speed_ratio, "cpu_ratio": c.cpu_ratio, **details} for c, details in measured]
        write_results(arguments.out, arguments, {"train_step": results}, machine)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = parser_of("One optimizer step of MegatronPolicy against transformers + AdamW, same weights and tokens.", repeats=7)
    parser.add_argument(
        "--hidden", type=positive, nargs="+", default=[128, 512], help="hidden sizes, multiples of 32; 128 is the tiny preset"
    )
    parser.add_argument("--sequences", type=positive, default=256, help="in the batch")
    parser.add_argument("--experts", choices=("eager", "grouped_mm"), help="transformers' experts; default: what it chooses")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(run(benchmark, parse_arguments()))
