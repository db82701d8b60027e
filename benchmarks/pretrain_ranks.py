"""What `pretrain_step` does on each rank: both sides of every case, in turn, and training from a large blend."""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from torch.nn.parallel import DistributedDataParallel

from benchmarks.measure import compare, describe_machine
from benchmarks.peer import OPTIMIZER, Step, check_agreement, describe_peer, load_peer, peer_step
from benchmarks.token_blend import write_source
from megatron_r1.config.data import BlendSource, DataConfig
from megatron_r1.config.model import ModelConfig
from megatron_r1.config.optimizer import MoeTrainingConfig
from megatron_r1.config.runtime import RuntimeConfig
from megatron_r1.config.schema import Config
from megatron_r1.data.tally.tokenizer import train_generated_tokenizer
from megatron_r1.mcore.policy import MegatronPolicy
from megatron_r1.pipeline.builders.models import build_architecture, build_policy
from megatron_r1.pipeline.builders.pretrain_rows import BlendOpener, ahead_of_training
from megatron_r1.pipeline.session import Session
from megatron_r1.runtime.distributed import is_rank_zero, on_rank_zero
from megatron_r1.training.pretrain import loss_over, own_rows
from megatron_r1.types import MicroBatch

TOLERANCES = {"fp32": {"loss": 1e-4, "grad_norm": 1e-3}, "bf16": {"loss": 0.02, "grad_norm": 0.05}}
_BLEND = {"large": 0.7, "small": 0.3}  # weights of the sources


def shape_config(shape: str, hidden: int, dtype: Literal["fp32", "bf16"], device: str, seed: int) -> Config:
    """A small model of either shape.

    Args:
        shape: `v3`: the tiny preset with every width in proportion to `hidden`, but for attention's latent ranks. `qwen`: a dense
            Qwen3 of 4 layers with the proportions of the published one of 0.6B, and heads of 32.
    """
    overrides: dict[str, Any] = {"hidden_size": hidden, "num_attention_heads": hidden // 32}
    if shape == "v3":
        overrides |= {"intermediate_size": 2 * hidden, "moe_intermediate_size": hidden // 2}
    else:
        overrides |= {"intermediate_size": 3 * hidden, "num_key_value_heads": hidden // 64}
    model = ModelConfig(preset={"v3": "tiny", "qwen": "tiny_qwen3"}[shape], overrides=overrides)
    return Config(seed=seed, model=model, runtime=RuntimeConfig(device=device, dtype=dtype, threads=1))


def random_rows(vocab_size: int, rows: int, tokens: int, seed: int) -> MicroBatch:
    """A micro-batch without padding."""
    stream = torch.randint(0, vocab_size, (rows, tokens + 1), generator=torch.Generator().manual_seed(seed))
    positions = torch.arange(tokens).repeat(rows, 1)
    return MicroBatch(stream[:, :-1].contiguous(), stream[:, 1:].contiguous(), torch.ones(rows, tokens), positions)


def our_step(policy: MegatronPolicy, rows: MicroBatch) -> Step:
    """One update on the rows of all ranks, of which these are this rank's."""
    loss_fn = loss_over(rows.num_tokens * policy.layout.dp)

    def step() -> tuple[float, float]:
        stats = policy.train_on_micro_batches([rows], loss_fn)
        return stats.loss, stats.grad_norm

    return step


def over_ranks(step: Step, ranks: int) -> Step:
    """A step whose loss is the mean over ranks, for the comparison alone: training needs it on no rank."""

    def average() -> tuple[float, float]:
        loss, norm = step()
        total = torch.tensor(loss, dtype=torch.float64)
        torch.distributed.all_reduce(total)
        return total.item() / ranks, norm

    return average


def measure_case(session: Session, shape: str, hidden: int, dtype: Literal["fp32", "bf16"], arguments: argparse.Namespace) -> dict:
    """Build both sides, check that they agree, and time them. Collective; the times are rank 0's."""
    ranks, device = session.launch.world_size, session.device.torch_device
    config = shape_config(shape, hidden, dtype, arguments.device, arguments.seed)
    policy = build_for_rows(config, session, arguments)
    model = load_peer(policy, device)
    chosen = describe_peer(model)
    rows = random_rows(policy.arch.vocab_size, arguments.rows, arguments.tokens, arguments.seed + session.launch.rank)
    inputs, labels = {"input_ids": rows.token_ids.to(device)}, rows.labels.to(device)
    in_bf16 = dtype == "bf16"
    if in_bf16 and arguments.peer_bf16 == "weights":
        model.to(torch.bfloat16)
    if ranks > 1:
        model = DistributedDataParallel(model, gradient_as_bucket_view=True, broadcast_buffers=False)
    ours = our_step(policy, rows)
    peer = peer_step(model, inputs, labels, autocast=in_bf16 and arguments.peer_bf16 == "autocast")
    name = f"{shape}, hidden {hidden}, {dtype}, {ranks} process{'es' * (ranks > 1)}"
    check_agreement(name, ours(), over_ranks(peer, ranks)(), **TOLERANCES[dtype])

    def timed(step: Step) -> Callable[[], int]:
        def work() -> int:
            step()
            session.device.synchronize()
            return rows.num_tokens * ranks

        return work

    found = compare(name, timed(ours), timed(peer), arguments.repeats)
    ratios = {"speed_ratio": found.speed_ratio, "cpu_ratio": found.cpu_ratio}
    parameters = sum(parameter.numel() for parameter in model.parameters())
    case = {"shape": shape, "hidden": hidden, "dtype": dtype, "processes": ranks, "parameters": parameters, "transformers": chosen}
    return {**case, **asdict(found), **ratios}


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
    config = config.model_copy(update={"data": data, "run_dir": str(folder / "run")})
    batch = arguments.rows * ranks
    began = time.perf_counter()
    opener = BlendOpener(config, tokenizer)
    rows = opener.training(arguments.tokens, batch * (arguments.steps + 1), mask_documents=False, seed=arguments.seed)
    opened = time.perf_counter() - began
    policy = build_for_rows(config, session, arguments)
    loss_fn = loss_over(batch * arguments.tokens)
    starts = range(0, batch * (arguments.steps + 1), batch)
    updates = [own_rows(range(start, start + batch), arguments.rows, session.launch.rank, ranks) for start in starts]
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


def measure_all(session: Session, arguments: argparse.Namespace, folder: Path) -> None:
    """Every case on this number of ranks; rank 0 writes them to `arguments.worker`. Collective."""
    result: dict[str, Any] = {"cases": [], "waiting": [], "machine": describe_machine(arguments.device)}
    for shape in arguments.shapes:
        for hidden in arguments.sizes:
            for dtype in arguments.dtypes:
                result["cases"].append(measure_case(session, shape, hidden, dtype, arguments))
                gc.collect()  # the models refer to themselves
    if arguments.gigabytes:
        result["waiting"].append(measure_waiting(session, arguments, folder))
    if is_rank_zero():
        arguments.worker.write_text(json.dumps(result), encoding="utf-8")
