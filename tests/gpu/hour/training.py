"""Parts 2 and 3: tiny models learn, agree with transformers, and train alike on CPU and CUDA."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.gpu.hour.ground import Ground

FAMILIES = ("deepseek_v3", "qwen2")
#: largest difference between CPU and CUDA, as a share: of the loss, of a parameter's gradient, of the weights' change
TOLERANCE = {"fp32": (1e-5, 1e-3, 1e-2), "bf16": (2e-2, 0.2, None)}


def learn(ground: Ground) -> None:
    """Part 2."""
    with opened(ground.kind) as session:
        for family in FAMILIES:
            first, last, off = learn_and_compare(session, family, Path(ground.folder, family), updates=ground.pick(20, 6))
            ground.check(f"{family}: the loss falls", last < ground.pick(0.8, 0.97) * first, f"{first:.3f} to {last:.3f}")
            ground.check(f"{family}: log-probabilities are those of transformers", off < 1e-3, f"{off:.1e}")


def learn_and_compare(session: Any, family: str, folder: Path, updates: int) -> tuple[float, float, float]:
    """Train on one batch, export, and load with transformers.

    Returns:
        First and last loss, and the largest difference of log-probabilities.
    """
    from transformers import AutoModelForCausalLM

    from megatron_r1.data.tally.tokenizer import train_tally_tokenizer
    from megatron_r1.pipeline.builders.export import export_policy
    from megatron_r1.training.pretrain import loss_over

    policy, (ids, samples) = build(session, family), batch()
    loss_fn = loss_over(sum(len(row) - 1 for row in ids))
    losses = [policy.train_step(samples, loss_fn).loss for _ in range(updates)]
    export_policy(policy, train_tally_tokenizer(), folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = torch.tensor(ids)
    with torch.no_grad():
        expected = model(tokens).logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    return losses[0], losses[-1], (torch.stack(policy.logprobs(samples)) - expected).abs().max().item()


def compare_devices(ground: Ground) -> None:
    """Part 3: this device against the CPU."""
    # One process has one device. On the CPU alone a second run stands for it.
    other = None if ground.is_small else ground.start("tests.gpu.hour.training:trace_on_cpu")
    own = {dtype: path for dtype, path in _traces(ground, "own")}
    if other is None:
        theirs = {dtype: path for dtype, path in _traces(ground, "cpu")}
    else:
        ground.check("the CPU's side ends", other.wait(80) == 0)
        theirs = {dtype: Path(ground.folder, f"cpu_{dtype}.npz") for dtype in TOLERANCE}
    for dtype, (of_loss, of_gradient, of_change) in TOLERANCE.items():
        mine, cpu = np.load(own[dtype]), np.load(theirs[dtype])
        ground.check(f"{dtype}: names are equal", mine.files == cpu.files)
        start = [name for name in cpu.files if name.startswith("start/")]
        ground.check(f"{dtype}: initial weights are equal to the bit", all(np.array_equal(mine[n], cpu[n]) for n in start))
        off = float(np.max(np.abs(mine["losses"] / cpu["losses"] - 1)))
        ground.check(f"{dtype}: losses of three updates", off <= of_loss, f"off by {off:.1e}")
        worst = max((_off(mine[n], cpu[n]), n) for n in cpu.files if n.startswith("gradient/"))
        ground.check(
            f"{dtype}: each parameter's first gradient", worst[0] <= of_gradient, f"off by {worst[0]:.1e} in {worst[1][9:]}"
        )
        if of_change is not None:
            change = {name: (mine[f"end/{name[6:]}"] - mine[name], cpu[f"end/{name[6:]}"] - cpu[name]) for name in start}
            worst = max((_off(*pair), name) for name, pair in change.items())
            ground.check(f"{dtype}: what three updates change", worst[0] <= of_change, f"off by {worst[0]:.1e} in {worst[1][6:]}")


def trace_on_cpu(ground: Ground) -> None:
    """The CPU's side of part 3, in a process of its own."""
    for _ in _traces(Ground(**(vars(ground) | {"kind": "cpu"})), "cpu"):
        pass


def _traces(ground: Ground, name: str) -> Iterator[tuple[str, Path]]:
    """Three updates in each format: initial weights, losses, first gradients, final weights."""
    with opened(ground.kind) as session:
        for dtype in TOLERANCE:
            path = Path(ground.folder, f"{name}_{dtype}.npz")
            np.savez(path, **_trace(session, dtype, ground))
            yield dtype, path


def _trace(session: Any, dtype: str, ground: Ground) -> dict[str, np.ndarray]:
    from megatron_r1.training.pretrain import loss_over

    policy, (ids, samples) = build(session, "deepseek_v3", dtype), batch()
    loss_fn = loss_over(sum(len(row) - 1 for row in ids))
    found = {f"start/{name}": weight.float().cpu().numpy().copy() for name, weight in policy.weights()}
    biases = [buffer for module in policy.modules for name, buffer in module.named_buffers() if name.endswith("expert_bias")]
    losses = []
    for update in range(3):
        losses.append(policy.train_step(samples, loss_fn).loss)
        if update == 0:
            gradients = [
                (name, p.main_grad) for module in policy.modules for name, p in module.named_parameters() if p.requires_grad
            ]
            found |= {f"gradient/{name}": gradient.float().cpu().numpy().copy() for name, gradient in gradients}
    found |= {f"end/{name}": weight.float().cpu().numpy().copy() for name, weight in policy.weights()}
    ground.check(f"{dtype}: biases of experts are float32 after three updates", all(b.dtype == torch.float32 for b in biases))
    return found | {"losses": np.array(losses)}


@contextmanager
def opened(kind: str) -> Iterator[Any]:
    """A session on the device."""
    from megatron_r1.config.runtime import RuntimeConfig
    from megatron_r1.pipeline.session import open_session

    with open_session(RuntimeConfig(device=kind)) as session:
        yield session


def build(session: Any, family: str, dtype: str = "fp32") -> Any:
    """A tiny policy of the family with fresh weights, the same at every start."""
    from megatron_r1.config.optimizer import MoeTrainingConfig, OptimizerConfig
    from megatron_r1.config.runtime import RuntimeConfig
    from megatron_r1.config.schema import Config
    from megatron_r1.model.families.qwen2 import Qwen2
    from megatron_r1.pipeline.builders.models import build_architecture, build_policy

    config = Config(runtime=RuntimeConfig(device=session.device.kind, dtype=dtype))
    arch = build_architecture(config.model)
    if family == "qwen2":
        arch = Qwen2(
            vocab_size=arch.vocab_size, hidden_size=64, num_hidden_layers=2, intermediate_size=128, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=arch.max_position_embeddings, init_std=0.08,
        )  # fmt: skip
    return build_policy(
        config, session, arch, optimizer=OptimizerConfig(lr=1e-3), moe=MoeTrainingConfig(), total_updates=20,
        micro_batch_tokens=1024, packed=True,
    )  # fmt: skip


def batch() -> tuple[list[list[int]], list[Any]]:
    """Eight sequences of 24 tokens: the tokens, and samples that train on all of them."""
    from megatron_r1.types import TrainingSample

    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 448, (24,), generator=generator).tolist() for _ in range(8)]
    return ids, [TrainingSample(row, [1] * 23) for row in ids]


def _off(found: np.ndarray, expected: np.ndarray) -> float:
    """The difference as a share of the expected size; gradients and changes of nothing are equal if both are."""
    size = float(np.linalg.norm(expected))
    return float(np.linalg.norm(found - expected)) / size if size else float(np.abs(found).max(initial=0.0))
