"""Our side of `pretrain_step`, on each of its ranks: the step, and training from a large blend."""

from __future__ import annotations

import argparse
import gc
import time
from pathlib import Path
from typing import Any, Literal

from benchmarks.measure import describe_machine
from benchmarks.peer import OPTIMIZER, Step
from benchmarks.pretrain_rows import random_rows, shape_config
from benchmarks.side_ranks import Answer, serve, timed_steps
from benchmarks.token_blend import write_source
from megatron_r1.config.data import BlendSource, DataConfig
from megatron_r1.config.optimizer import MoeTrainingConfig
from megatron_r1.config.pretrain import PretrainConfig
from megatron_r1.config.schema import Config
from megatron_r1.data.tally.tokenizer import train_generated_tokenizer
from megatron_r1.mcore.policy import MegatronPolicy
from megatron_r1.pipeline.builders.models import build_architecture, build_policy
from megatron_r1.pipeline.builders.pretrain_rows import PretrainData, ahead_of_training
from megatron_r1.pipeline.session import Session
from megatron_r1.runtime.distributed import on_rank_zero
from megatron_r1.training.pretrain import loss_over, own_rows
from megatron_r1.training.pretrain_plan import PretrainPlan
from megatron_r1.types import MicroBatch
from megatron_r1.weights.hf_export import export_hf
from megatron_r1.weights.rank_zero import consume_on_rank_zero

_BLEND = {"large": 0.7, "small": 0.3}  # weights of the sources


def our_step(policy: MegatronPolicy, rows: MicroBatch) -> Step:
    """One update on the rows of all ranks, of which these are this rank's."""
    loss_fn = loss_over(rows.num_tokens * policy.layout.dp)

    def step() -> tuple[float, float]:
        stats = policy.train_on_micro_batches([rows], loss_fn)
        return stats.loss, stats.grad_norm

    return step


def build_for_rows(config: Config, session: Session, arguments: argparse.Namespace) -> MegatronPolicy:
    """The policy as pretraining builds it, for micro-batches of one rank's rows."""
    return build_policy(
        config,
        session,
        build_architecture(config.model),
        optimizer=OPTIMIZER,
        moe=MoeTrainingConfig(),
        total_updates=1,
        micro_batch_tokens=arguments.rows * arguments.tokens,
        packed=False,
    )


def measure_waiting(session: Session, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train the smallest model, whose steps are the shortest, from a blend as the stage does, and time how long it waits for rows.

    The first update, before which nothing was read ahead, is left out.

    Args:
        folder: where the blend is, or will be; all ranks see it.
    """
    shape, hidden, ranks = arguments.shapes[0], min(arguments.sizes), session.launch.world_size
    config = shape_config(shape, hidden, arguments.dtypes[0], arguments.device, arguments.seed)
    tokenizer = train_generated_tokenizer("tally", build_architecture(config.model).vocab_size, "r1_zero", 0.1)
    tokens = int(arguments.gigabytes * 1e9 / 2 / len(_BLEND))  # 2 bytes a token, as many of each source

    def write() -> int:
        ids = {"vocab_size": tokenizer.vocab_size, "eos_id": tokenizer.eos_id}
        return sum(write_source(folder / name, tokens, **ids, seed=number) for number, name in enumerate(_BLEND))

    written = on_rank_zero(write)
    blend = [BlendSource(path=str(folder / name), weight=weight) for name, weight in _BLEND.items()]
    data = DataConfig(blend=blend, split=[1, 0], index_cache=str(folder / f"index-{ranks}"))
    batch = arguments.rows * ranks
    stage = PretrainConfig(
        steps=arguments.steps + 1,
        sequence_length=arguments.tokens,
        global_batch_size=batch,
        micro_batch_size=arguments.rows,
        mask_documents=False,
        gate_accuracy=0,
    )
    config = config.model_copy(update={"data": data, "pretrain": stage, "run_dir": str(folder / "run")})
    plan = PretrainPlan(stage)
    began = time.perf_counter()
    rows, _ = PretrainData(config, tokenizer, plan).of_phase(plan.phases[0])
    opened = time.perf_counter() - began
    policy = build_for_rows(config, session, arguments)
    loss_fn = loss_over(batch * arguments.tokens)
    numbers_of = [plan.update(number).rows for number in range(1, arguments.steps + 2)]
    updates = [own_rows(numbers, arguments.rows, session.launch.rank, ranks) for numbers in numbers_of]
    waits, steps = [], []
    with ahead_of_training(rows, updates, config.data.read_ahead) as ahead:
        for update in updates:
            start = time.perf_counter()
            micro_batches = [ahead.micro_batch(numbers) for numbers in update]
            there = time.perf_counter()
            policy.train_on_micro_batches(micro_batches, loss_fn)
            waits.append(there - start)
            steps.append(time.perf_counter() - start)
    case = {"shape": shape, "hidden": hidden, "dtype": arguments.dtypes[0], "processes": ranks}
    sizes = {"blend_bytes": 2 * written, "open_seconds": opened, "first_wait_seconds": waits[0]}
    share = sum(waits[1:]) / sum(steps[1:])
    return {**case, **sizes, "wait_seconds": waits[1:], "step_seconds": steps[1:], "wait_share": share}


class OurRank:
    """What the orders to a rank of ours do."""

    def __init__(self, session: Session, arguments: argparse.Namespace) -> None:
        self._session, self._arguments = session, arguments
        self._step: Step | None = None

    def build(self, shape: str, hidden: int, dtype: Literal["fp32", "bf16"], folder: str) -> Answer:
        """Make the policy, write its weights to a folder, and make the first step. Collective."""
        self._step = None
        gc.collect()  # models refer to themselves
        arguments, session = self._arguments, self._session
        policy = build_for_rows(shape_config(shape, hidden, dtype, arguments.device, arguments.seed), session, arguments)
        consume_on_rank_zero(
            policy.weights(), lambda weights: export_hf(weights, policy.arch, Path(folder), bos_token_id=0, eos_token_id=1)
        )
        rows = random_rows(policy.arch.vocab_size, arguments.rows, arguments.tokens, arguments.seed + session.launch.rank)
        self._step = our_step(policy, rows)
        return {"first": self._step()}

    def steps(self, count: int) -> Answer:
        """See `timed_steps`."""
        assert self._step is not None
        return timed_steps(self._step, self._session.device.synchronize)(count)

    def waiting(self, folder: str) -> Answer:
        """See `measure_waiting`."""
        self._step = None
        gc.collect()
        return measure_waiting(self._session, self._arguments, Path(folder))


def serve_ours(session: Session, arguments: argparse.Namespace) -> None:
    """One rank, until there are no more orders."""
    rank = OurRank(session, arguments)
    handlers = {"build": rank.build, "steps": rank.steps, "waiting": rank.waiting}
    serve({**handlers, "machine": lambda: describe_machine(arguments.device)})
