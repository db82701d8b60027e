"""Which model takes what of a GPU of 80 GB with the files of this folder, by the project's own formulas: prints README's table.

    python examples/one_node/memory.py

Of a device: the trainer's state and what a forward pass keeps, in updates; what stays of the trainer and the engine's share, while
responses are sampled. Not counted: CUDA, NCCL and what a kernel takes while it runs (`MARGIN`). Norms and biases are counted as if
tensor-parallel ranks shared them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_r1.config.load import load_config
from megatron_r1.mcore.activation_bytes import activation_bytes
from megatron_r1.mcore.layout import resolve_layout
from megatron_r1.mcore.state_bytes import StateBytes, optimizer_bytes
from megatron_r1.model.presets import resolve_architecture
from megatron_r1.model.size import count_parameters

FOLDER = Path(__file__).parent
DEVICE = 80 * 2**30  #: bytes of a GPU
MARGIN = 6 * 10**9  #: of it for the driver, NCCL and kernels
ENGINES = "rollout.engines_per_node=8"  #: one a GPU


@dataclass(frozen=True)
class Job:
    """A model on so many GPUs of one node."""

    model: str  #: as published; gsm8k.yaml takes its chat model, math.yaml its base model
    preset: str
    gpus: int
    overrides: tuple[str, ...] = ()

    def settings(self) -> list[str]:
        """Everything behind `--config FILE` but the folder of the weights."""
        return [f"model.preset={self.preset}", *self.overrides]


@dataclass(frozen=True)
class Need:
    """Bytes of the GPU that needs most, and of the node's memory."""

    update: int
    sample: int
    host: int

    @property
    def fits(self) -> bool:
        """Whether a GPU of 80 GB has so much."""
        return max(self.update, self.sample) <= DEVICE - MARGIN


_TWO = (ENGINES, "parallel.tp=2")
JOBS = [
    Job("Qwen2.5-0.5B", "qwen2.5_0.5b", 1),
    Job("Qwen2.5-0.5B", "qwen2.5_0.5b", 8, (ENGINES,)),
    Job("Qwen2.5-1.5B", "qwen2.5_1.5b", 1),
    Job("Qwen2.5-1.5B", "qwen2.5_1.5b", 8, (ENGINES,)),
    Job("Qwen2.5-7B", "qwen2.5_7b", 1),
    Job("Qwen2.5-7B", "qwen2.5_7b", 8, _TWO),
    Job("Qwen3-0.6B", "qwen3_0.6b", 1),
    Job("Qwen3-0.6B", "qwen3_0.6b", 8, (ENGINES,)),
    Job("Qwen3-1.7B", "qwen3_1.7b", 1),
    Job("Qwen3-1.7B", "qwen3_1.7b", 8, (ENGINES,)),
    Job("Qwen3-4B", "qwen3_4b", 1),
    Job("Qwen3-4B", "qwen3_4b", 8, (ENGINES,)),
    Job("Qwen3-8B", "qwen3_8b", 1),
    Job("Qwen3-8B", "qwen3_8b", 8, _TWO),
]


def need(job: Job, name: str) -> Need:
    """What `name`.yaml takes with a job's overrides.

    The host holds, of every rank, what `runtime.offload` moves there, and a checkpoint while it is written: optimizer, weights and
    reference once more.
    """
    config = load_config(FOLDER / f"{name}.yaml", job.settings())
    arch = resolve_architecture(config.model.preset, config.model.overrides)
    layout = resolve_layout(config.parallel, arch, job.gpus, mtp=False, packed=True)
    mine = -(-count_parameters(arch) // layout.tp)  # parameters of a rank
    state = StateBytes.of(mine, data_parallel=layout.dp, bf16=True, has_reference=config.grpo.has_reference)
    passed = activation_bytes(arch, layout, recompute=config.runtime.recompute, tokens=config.grpo.micro_batch_tokens, stage=0)
    in_update = state.weights + state.gradients + state.optimizer
    left = (
        state.weights
        + state.gradients
        + state.optimizer
        + state.reference
        - state.moved({"optimizer", "gradients", "reference"} & set(config.runtime.offload))
    )
    written = optimizer_bytes(mine, data_parallel=layout.dp) + state.weights + state.reference
    return Need(
        update=in_update + passed.all,
        sample=left + int(config.rollout.gpu_memory_utilization * DEVICE),
        host=job.gpus * (state.optimizer + state.reference + written),
    )


def table() -> str:
    """README's table."""
    rows = [
        "| model | GPUs | overrides | updates, GB a GPU | sampling, GB a GPU | host, GB | fits 80 GB |",
        "|---|---|---|---|---|---|---|",
    ]
    for job in JOBS:
        most = max((need(job, name) for name in ("gsm8k", "math")), key=lambda one: one.update)
        overrides = " ".join(f"`{setting}`" for setting in job.settings())
        numbers = " | ".join(f"{value / 1e9:.0f}" for value in (most.update, most.sample, most.host))
        rows.append(f"| {job.model} | {job.gpus} | {overrides} | {numbers} | {'yes' if most.fits else 'no'} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())
