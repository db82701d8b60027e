"""Our side: `megatron-r1 grpo --config FILE` as a user starts it, but every round waits for its turn.

    python -m benchmarks.against_trl.ours COMMANDS REPORTS CONFIG CHECK

COMMANDS and REPORTS are the file descriptors of `gate.Gate`. After the first round, which samples with the weights that both sides
begin with, the file CHECK holds its tokens, log-probs, advantages and minibatches, for the other side to compute the same of them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.against_trl.gate import Gate
from megatron_r1.cli import main
from megatron_r1.config.load import load_config
from megatron_r1.errors import StopRequested
from megatron_r1.runtime.run import Run
from megatron_r1.training.samples import plan_epochs
from megatron_r1.types import RolloutGroup, TrainingSample, filled


def take_turns(gate: Gate, check: Path, minibatch_size: int, seed: int) -> None:
    """Let the rounds of every `Run` of this process wait at the gate, and its first round leave the file `check`."""
    steps, save_rollouts = Run.steps, Run.save_rollouts
    lengths: list[int] = []

    def gated_steps(self: Run, total: int, description: str, *, end: int | None = None) -> Iterator[int]:
        for step in steps(self, total, description, end=end):
            report = {"lengths": list(lengths)}
            lengths.clear()
            if gate.wait(report) == "end":
                raise StopRequested("the benchmark is done")
            yield step

    def counted_rollouts(self: Run, step: int, groups: list[RolloutGroup], samples: Sequence[TrainingSample] = ()) -> None:
        save_rollouts(self, step, groups, samples)
        lengths.extend(len(rollout.token_ids) for group in groups for rollout in group.rollouts)
        if step == 1:
            (minibatches,) = plan_epochs(len(lengths), minibatch_size, f"{seed}/{step}", 1)
            check.write_text(json.dumps({"samples": list(_samples(groups)), "minibatches": minibatches}))

    Run.steps, Run.save_rollouts = gated_steps, counted_rollouts


def _samples(groups: list[RolloutGroup]) -> Iterator[dict[str, object]]:
    for group in groups:
        for rollout, advantage in zip(group.rollouts, filled(group.advantages_G).tolist(), strict=True):
            yield {
                "prompt": list(group.prompt.token_ids),
                "response": rollout.token_ids.tolist(),
                "logprobs": rollout.rollout_logprobs.tolist(),
                "advantage": advantage,
            }


if __name__ == "__main__":
    commands, reports, config_file, check_file = sys.argv[1:]
    config = load_config(Path(config_file), [])
    take_turns(Gate(int(commands), int(reports)), Path(check_file), config.grpo.minibatch_size, config.seed)
    sys.exit(main(["grpo", "--config", config_file]))
