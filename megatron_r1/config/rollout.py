"""Settings of the rollout engines: the section `rollout`. "R1 v2" is DeepSeek-R1 (arXiv 2501.12948v2)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megatron_r1.config.section import MAY_CHANGE, Section


class RolloutConfig(Section):
    """The vLLM engines and what is asked of them."""

    placement: Literal["single", "colocated", "disaggregated"] = Field(
        "single",
        description="Where engines run. single: one engine beside rank 0; colocated: rollout.engines_per_node engines beside the "
        "ranks of every node; disaggregated: the engines of `megatron-r1 serve-rollouts` on other nodes, weights over the "
        "network.",
        json_schema_extra=MAY_CHANGE,
    )
    engines_per_node: int = Field(
        1,
        gt=0,
        description="Engines on every node with rollout.placement=colocated. On GPUs each takes its share of "
        "rollout.tensor_parallel_size.",
        json_schema_extra=MAY_CHANGE,
    )
    servers: str | None = Field(
        None,
        description="Folder in which `megatron-r1 serve-rollouts` announces its engines. Needed with "
        "rollout.placement=disaggregated.",
        json_schema_extra=MAY_CHANGE,
    )
    tensor_parallel_size: int = Field(
        1, gt=0, description="Devices of one engine, on all its nodes together.", json_schema_extra=MAY_CHANGE
    )
    nodes_per_engine: int = Field(
        1,
        gt=0,
        description="Nodes that one engine spans, each with the same share of its devices. More than 1 needs "
        "rollout.placement=colocated or disaggregated.",
        json_schema_extra=MAY_CHANGE,
    )
    max_response_tokens: int = Field(
        32768,
        gt=0,
        description="Most tokens of a response; a longer one is cut and scores as a wrong answer. R1 v2 section 2.1 states "
        "32,768, and 65,536 from update 8,200 on, see grpo.length_schedule.",
    )
    temperature: float = Field(
        1.0,
        gt=0,
        description="Sampling temperature of rollouts, for engine and trainer alike. R1 v2 states 1 (section 2.1), and 0.7 for "
        "the second RL stage (section 3.2.2).",
    )
    top_p: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Probability mass that tokens are sampled from. Training takes 1 only. The paper does not state it.",
    )
    stop: list[Annotated[str, Field(min_length=1)]] = Field(
        [],
        description="Texts that end a response, which is then finished: its tokens up to the one that completes such a text stay, "
        "are trained on and are scored. In evaluations, too. Every end of sequence that the model names ends a response in any "
        "case.",
    )
    kv_cache_bytes: int | None = Field(
        None,
        gt=0,
        description="Size of an engine's KV cache in bytes. null: on a GPU what rollout.gpu_memory_utilization leaves beside the "
        "weights; on a CPU, beside the ranks, room for rollout.max_num_seqs sequences of the longest kind, and at most "
        "rollout.gpu_memory_utilization of the node's free memory, which the node's engines share.",
        json_schema_extra=MAY_CHANGE,
    )
    gpu_memory_utilization: float = Field(
        0.5,
        gt=0,
        le=1,
        description="Share of a device's memory that an engine may take for weights, activations and KV cache. On a CPU see "
        "rollout.kv_cache_bytes.",
        json_schema_extra=MAY_CHANGE,
    )
    sleep: bool = Field(
        False,
        description="Whether an engine beside the trainer gives back its device memory, weights and KV cache, from the end of "
        "sampling to the next transfer of weights (vLLM's sleep mode, level 2). It needs a CUDA device, and means nothing for "
        "rollout.placement=disaggregated, whose engines have their memory to themselves. runtime.offload is the trainer's side. "
        "Ours.",
        json_schema_extra=MAY_CHANGE,
    )
    dispatch: Literal["queue", "fixed"] = Field(
        "queue",
        description="How several engines share the prompts of a batch. queue: one that is done takes more; when a prompt "
        "is sampled then depends on the clock, and with it the last bits of its log-probabilities. fixed: each the same prompts in "
        "every run, which repeats to the bit and waits for the slowest. Ours.",
        json_schema_extra=MAY_CHANGE,
    )
    max_num_seqs: int = Field(
        256, gt=0, description="Most sequences that an engine computes at the same time.", json_schema_extra=MAY_CHANGE
    )
    transfer: Literal["auto", "shm", "nccl"] = Field(
        "auto",
        description="How weights travel to an engine. shm: through the memory of the node, and to other nodes over TCP; nccl: "
        "between GPUs, only with rollout.placement=disaggregated, since NCCL takes no two processes on one GPU; auto: nccl if it "
        "is possible.",
        json_schema_extra=MAY_CHANGE,
    )
    bucket_mb: int | None = Field(
        None,
        gt=0,
        description="Mebibytes of weights that go to an engine in one call, which must end within rollout.stall_seconds. null: a "
        "1,024th of the model's weights, at least 32 and at most 1,024. Who feeds an engine's workers has two such buckets.",
        json_schema_extra=MAY_CHANGE,
    )
    verify_weights: bool = Field(
        True,
        description="Whether a checksum of every shard in the engine is compared with the trainer's in each update of weights. "
        "Whether every shard came is looked at in any case.",
        json_schema_extra=MAY_CHANGE,
    )
    max_logprob_diff_mean: float = Field(
        1e-4,
        gt=0,
        description="Largest mean difference in nats between the log-probabilities that trainer and engine give to sampled "
        "tokens; above it the run stops. bf16 needs about 0.05. Ours.",
        json_schema_extra=MAY_CHANGE,
    )
    logprob_diff_quantile: float = Field(
        0.9999,
        gt=0,
        le=1,
        description="Share of the sampled tokens whose difference between trainer and engine is bounded by "
        "rollout.max_logprob_diff_quantile. In a mixture of experts a single token may differ by nats if a router chooses two "
        "experts nearly alike. 1: the largest difference. Ours.",
        json_schema_extra=MAY_CHANGE,
    )
    max_logprob_diff_quantile: float | None = Field(
        None,
        gt=0,
        description="Largest difference in nats between trainer and engine at rollout.logprob_diff_quantile; above it the run "
        "stops. bf16 needs about 2. null: rollout.max_logprob_diff_max. Ours.",
        json_schema_extra=MAY_CHANGE,
    )
    max_logprob_diff_max: float = Field(
        1e-2,
        gt=0,
        description="Difference in nats between trainer and engine above which a sampled token is counted "
        "(logprob_diff/beyond). It stops a run only in the place of rollout.max_logprob_diff_quantile. Ours.",
        json_schema_extra=MAY_CHANGE,
    )
    start_timeout_seconds: float | None = Field(
        None,
        description="Seconds in which an engine must start, and in which the engines of rollout.servers must be announced. null: "
        "600 s, and for an engine 5 s more for each further worker, 30 s for each further node, and 10 s for each GB of a worker's "
        "weights.",
        json_schema_extra=MAY_CHANGE,
    )
    step_timeout_seconds: float | None = Field(
        None,
        description="Seconds that one call of an engine may take, such as the sampling of a whole round. null: as long as it gives "
        "signs of life (rollout.stall_seconds).",
        json_schema_extra=MAY_CHANGE,
    )
    stall_seconds: float = Field(
        300.0,
        gt=0,
        description="Seconds without a sign of life, in sampling or in taking one bucket of weights, after which an engine is "
        "replaced as a dead one. In sampling it lives if tokens were computed.",
        json_schema_extra=MAY_CHANGE,
    )
    restarts: int = Field(
        3,
        ge=0,
        description="Replacements of lost engines within one round of sampling or one transfer of weights, after which the next "
        "loss ends the run. A new engine samples only the groups that were unfinished.",
        json_schema_extra=MAY_CHANGE,
    )

    @property
    def engines_sleep(self) -> bool:
        """Whether engines are beside the trainer and give their memory back."""
        return self.sleep and self.placement != "disaggregated"
