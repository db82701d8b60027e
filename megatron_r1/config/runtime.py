"""Settings of the processes of a run: the sections `runtime` and `checkpoint`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from megatron_r1.config.section import MAY_CHANGE, Section


class HeartbeatConfig(Section):
    """How ranks notice that one of them hangs.

    Each rank writes a sign of life into <run_dir>/health, and watches that of the next rank.
    """

    interval_seconds: float = Field(
        5.0, gt=0, description="Seconds between two signs of life of a rank.", json_schema_extra=MAY_CHANGE
    )
    lost_seconds: float = Field(
        120.0,
        gt=0,
        description="Seconds without a sign of life after which a rank is lost: all ranks write their stacks and leave.",
        json_schema_extra=MAY_CHANGE,
    )
    stall_seconds: float = Field(
        10800.0,
        gt=0,
        description="Seconds after which a rank that lives but begins nothing new is lost, too. An engine's signs of life count as "
        "something new.",
        json_schema_extra=MAY_CHANGE,
    )


class RuntimeConfig(Section):
    """Device and numerics."""

    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto",
        description="Where tensors live and are computed. auto: CUDA if torch finds a CUDA device, else the CPU.",
        json_schema_extra=MAY_CHANGE,
    )
    dtype: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="Number format of weights and activations, in the trainer and in the rollout engine. bf16 keeps the "
        "optimizer's master weights and the sums of gradients in fp32. On a CPU with instructions for it, bf16 is faster. Trainer "
        "and engine then differ by more: see rollout.max_logprob_diff_mean and max_logprob_diff_quantile.",
    )
    threads: int | None = Field(
        None,
        gt=0,
        description="OpenMP threads of each process on the CPU, of the trainer and of an engine, which take turns. null: "
        "OMP_NUM_THREADS if it is set, else the node's usable cores over its processes; a line at the start says how many. Sums "
        "round otherwise with another number.",
        json_schema_extra=MAY_CHANGE,
    )
    recompute: Literal["none", "full", "selective"] = Field(
        "none",
        description="Activations that the backward pass computes again instead of keeping them. full: those of every layer; "
        "selective: those of runtime.recompute_modules.",
        json_schema_extra=MAY_CHANGE,
    )
    recompute_modules: list[str] = Field(
        ["layernorm", "mla_up_proj"],
        description="Megatron-Core's names of the modules to recompute with runtime.recompute=selective. The default is what "
        "DeepSeek-V3 recomputes (V3 section 3.2.3).",
        json_schema_extra=MAY_CHANGE,
    )
    whole_logits_mb: int = Field(
        256,
        ge=0,
        description="Megabytes of a micro-batch's logits on a rank above which they are not kept: log-probs and their gradient are "
        "computed by tiles of some rows. Up to it logits are whole, which is faster where they are few. Sums round otherwise on "
        "the other side of it. With megatron.cross_entropy_loss_fusion logits are always whole.",
        json_schema_extra=MAY_CHANGE,
    )
    offload: list[Literal["optimizer", "gradients", "reference", "reward_models"]] = Field(
        ["reference", "reward_models"],
        description="What leaves the device for the host (pinned, beside a GPU). optimizer: Adam's moments and the master weights "
        "of bf16, from the last update before an engine samples to the first after it; gradients: their sums, which are dropped "
        "meanwhile; reference: the reference policy, but while it is evaluated; reward_models: those of "
        "reward.model=reward_models, but for the one that scores. P parameters of a rank in bf16 free 12P / dp, 4P, 2P, and 2P a "
        "model. Ours.",
        json_schema_extra=MAY_CHANGE,
    )
    collective_timeout_seconds: float = Field(
        7200.0,
        gt=0,
        description="Seconds that a rank waits for the others in a collective operation, of any group. Set it above the longest "
        "time that one rank works alone. Sampling does not count: meanwhile the others wait as long as signs of life come within "
        "this time.",
        json_schema_extra=MAY_CHANGE,
    )
    large_without_transformer_engine: bool = Field(
        False,
        description="Whether a model of 15 billion parameters or more may be trained on CUDA without Transformer Engine: right, "
        "but slow, since attention has no flash kernel there and experts are computed one after the other.",
        json_schema_extra=MAY_CHANGE,
    )
    skip_nonfinite_updates: int = Field(
        0,
        ge=0,
        description="Updates that a run may leave out because their loss or gradient is NaN or infinite. Each is reported with its "
        "samples and counted (updates/skipped); the next one ends the run. 0: the first one does. Weights stay as they were.",
        json_schema_extra=MAY_CHANGE,
    )
    plan: Literal["enforce", "warn", "off"] = Field(
        "enforce",
        description="What `--dry-run`, and so the start of a Slurm job, makes of a stage that devices or nodes have no memory for, "
        "by `megatron-r1 plan`. enforce: one line and exit code 2; warn: the line alone; off: memory is not looked at. Ours.",
        json_schema_extra=MAY_CHANGE,
    )

    @field_validator("plan", mode="before")
    @classmethod
    def _read_off(cls, value: Any) -> Any:
        return "off" if value is False else value  # YAML reads the bare word as a truth value

    file_locks: bool = Field(
        True,
        description="Whether a run folder, and files that grow, are locked while a process writes them. Set it to false on a file "
        "system without locks, where nothing then keeps a second process from damaging them.",
        json_schema_extra=MAY_CHANGE,
    )
    heartbeat: HeartbeatConfig = HeartbeatConfig()


class CheckpointConfig(Section):
    """What is kept of a run."""

    interval: int = Field(
        10,
        gt=0,
        description="Steps between two checkpoints. A step is one round of rollouts in grpo, and one update in the other stages.",
        json_schema_extra=MAY_CHANGE,
    )
    keep: int = Field(2, gt=0, description="Number of complete checkpoints to keep: the newest ones.", json_schema_extra=MAY_CHANGE)
    asynchronous: bool = Field(
        True,
        description="Whether a forked process writes a checkpoint while training goes on. false: training waits for the disk.",
        json_schema_extra=MAY_CHANGE,
    )
    rollouts_plain_mb: int = Field(
        64,
        ge=0,
        description="Megabytes of a step's responses above which their file in rollouts/ is compressed by zstd (.jsonl.zst).",
        json_schema_extra=MAY_CHANGE,
    )
    rollouts_most_mb: int = Field(
        0,
        ge=0,
        description="Most megabytes of rollouts/: beyond it the files of the oldest steps are removed, the latest step's never. 0: "
        "no limit.",
        json_schema_extra=MAY_CHANGE,
    )
    rollouts_tokens_mb: int = Field(
        16,
        ge=0,
        description="Most megabytes of token ids and log-probs, engine's and trainer's, in a step's file of rollouts/ before it is "
        "compressed: 32/3 bytes a token. If not all responses fit, the best, worst, longest, random ones and those with the "
        "largest difference have them. 0: none.",
        json_schema_extra=MAY_CHANGE,
    )
