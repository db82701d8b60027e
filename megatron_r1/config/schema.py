"""Every setting, typed and documented. One tree serves all commands; each command reads the sections it needs.

Unknown keys are fatal (see `load.py`). Where the papers do not state a value, the description says "not stated".
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from megatron_r1.config.cluster import HeartbeatConfig
from megatron_r1.config.curation import CurationConfig
from megatron_r1.config.evaluation import BenchmarksConfig
from megatron_r1.config.recipe import RecipeConfig
from megatron_r1.config.section import Section


class ModelConfig(Section):
    """Which architecture, and where its weights come from."""

    preset: str = Field("tiny", description="tiny, tiny_qwen2, small, 16b or 671b; ignored when `weights` names a folder")
    overrides: dict[str, Any] = Field({}, description="fields of the Hugging Face config.json that replace the preset's")
    weights: str | None = Field(None, description="Hugging Face folder, converted folder, checkpoint or run to start from")


class ParallelConfig(Section):
    """How the model is laid out over ranks. Data parallelism is what is left of the world size."""

    tp: int = Field(1, gt=0, description="tensor parallel")
    pp: int = Field(1, gt=0, description="pipeline parallel")
    vpp: int = Field(1, gt=0, description="virtual pipeline stages per rank (interleaved schedule)")
    ep: int = Field(1, gt=0, description="expert parallel")
    etp: int | None = Field(None, description="tensor parallel inside experts; default: tp without ep, else 1")
    cp: int = Field(1, gt=0, description="context parallel")
    sequence_parallel: bool | None = Field(None, description="default: on when tp > 1")


class RuntimeConfig(Section):
    """Device and numerics."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["fp32", "bf16"] = "fp32"
    threads: int = Field(1, gt=0, description="OpenMP threads per process on CPU")
    recompute: Literal["none", "full", "selective"] = Field("none", description="activation recomputation")
    recompute_modules: list[str] = Field(["layernorm", "mla_up_proj"], description="for selective (V3 section 3.2.3)")
    collective_timeout_seconds: float = Field(
        7200.0, gt=0, description="a rank waits so long for the others; above what any one of them does alone, as sampling"
    )
    heartbeat: HeartbeatConfig = HeartbeatConfig()


class OptimizerConfig(Section):
    """AdamW (V3 section 4.2: betas 0.9/0.95, weight decay 0.1, clip 1.0); for RL these are not stated."""

    lr: float = Field(gt=0)
    min_lr_ratio: float = Field(1.0, ge=0, le=1, description="final lr over lr")
    warmup_steps: int = Field(0, ge=0, description="policy updates of linear warm-up")
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_grad: float = Field(1.0, ge=0, description="global gradient norm; 0: off")


class MoeTrainingConfig(Section):
    """How the router and the multi-token-prediction head are trained."""

    bias_update_rate: float = Field(0.0, ge=0, description="gamma of auxiliary-loss-free balancing (V3: 0.001, then 0)")
    aux_loss_coeff: float = Field(0.0, ge=0, description="alpha of the sequence-wise balance loss (V3: 1e-4)")
    mtp_loss_scale: float = Field(
        0.0, ge=0, description="lambda of multi-token prediction (V3: 0.3, then 0.1); 0: the head is not trained"
    )


class DataConfig(Section):
    """Where prompts and documents come from."""

    source: str = Field(
        "tally",
        description="'tally' (generated arithmetic), 'tally_chat' (the same with small talk) or a path to a .jsonl / .json file of "
        "problems or documents",
    )
    question_field: str = "question"
    answer_field: str = "answer"
    text_field: str = Field("text", description="of the records of a .jsonl or .json file that is pretrained on")
    answer_format: Literal["plain", "gsm8k"] = Field("plain", description="gsm8k: the answer is what follows '####'")
    tokenizer: str | None = Field(None, description="folder with tokenizer.json; default: model.weights")
    template: Literal["r1_zero", "r1_chat", "r1_chat_think", "tokenizer"] = Field(
        "r1_zero",
        description="r1_chat: DeepSeek-R1's; r1_chat_think: its later revision, whose prompts end in <think>; tokenizer: the "
        "tokenizer's own chat_template",
    )
    general_source: str | None = Field(
        None,
        description="general prompts for RL over all scenarios: 'tally_chat' or a .jsonl / .json file of problems of kind general",
    )
    general_share: float = Field(
        0.5, ge=0, le=1, description="of the prompts, while general ones come (not stated; see grpo.general_updates)"
    )
    max_prompt_tokens: int = Field(1024, gt=0, description="longer prompts are refused by name, not cut")
    heldout_fraction: float = Field(0.1, gt=0, lt=1, description="share of problems kept for evaluation, by a hash of the problem")


class PretrainConfig(Section):
    """Next-token pretraining."""

    steps: int = Field(1000, gt=0)
    sequence_length: int = Field(64, gt=1)
    global_batch_size: int = Field(16, gt=0, description="sequences per update")
    micro_batch_size: int = Field(16, gt=0, description="sequences per forward pass")
    mask_documents: bool = Field(False, description="attention stays inside a document (V3 pretraining packs without it)")
    checkpoint_interval: int = Field(
        100, gt=0, description="steps between checkpoints, in place of checkpoint.interval: these steps are short"
    )
    gate_accuracy: float = Field(
        0.0, ge=0, le=1, description="greedy accuracy with a forced <think> that the base must reach; 0: no gate"
    )
    gate_problems: int = Field(128, gt=0)
    gate_extra_steps: int = Field(0, ge=0, description="continue at the final lr, this many steps at a time, while the gate fails")
    gate_max_extra: int = Field(0, ge=0, description="give up after this many extra rounds")
    optimizer: OptimizerConfig = OptimizerConfig(lr=2.2e-4)
    moe: MoeTrainingConfig = MoeTrainingConfig(bias_update_rate=0.001, aux_loss_coeff=1e-4, mtp_loss_scale=0.3)


class SftSource(Section):
    """Conversations to learn from. On the command line a path alone will do."""

    path: str = Field(description=".jsonl, .jsonl.gz, .json or .parquet file, a folder of these, or one made by save_to_disk")
    weight: float | None = Field(
        None, gt=0, description="share of an epoch relative to the others'; null for all: each sample once"
    )
    format: Literal["auto", "messages", "sharegpt", "pair", "alpaca", "preference"] = Field(
        "auto", description="of the records, see data/chat/conversations.py; auto: told by their fields"
    )
    split: str = Field("train", description="of a folder that holds several")


class SftConfig(Section):
    """Supervised fine-tuning on conversations (R1: 2 epochs, batch 64, lr 5e-6, cosine to a tenth, 32,768 tokens)."""

    sources: list[SftSource] = Field([], description="paths, or {path, weight, format, split} each; empty: data.source")
    epochs: int = Field(2, gt=0, description="an epoch has as many samples as all sources together")
    batch_size: int = Field(64, gt=0, description="samples per update")
    micro_batch_tokens: int = Field(4096, gt=0, description="packed tokens per forward pass")
    max_tokens: int | None = Field(None, gt=0, description="longest sample; default: micro_batch_tokens")
    overlong: Literal["error", "drop", "truncate"] = Field(
        "error", description="what becomes of longer samples (not stated); dropped and truncated ones are counted"
    )
    invalid: Literal["error", "skip"] = Field(
        "error", description="what becomes of conversations with a blank message or an unknown role; skipped ones are counted"
    )
    prompt_field: str = "prompt"
    response_field: str = "response"
    workers: int = Field(
        0, ge=0, description="processes that tokenise, before the first step, while all ranks but one wait; 0: that rank itself"
    )
    validation: SftSource | None = Field(None, description="path, or {path, format, split}, to validate with")
    validation_fraction: float = Field(
        0.0, ge=0, lt=1, description="share of the sources that is validated with instead, by a hash of the first question"
    )
    validation_interval: int = Field(
        0, ge=0, description="updates between validations; 0: only before the first and after the last"
    )
    validation_samples: int = Field(512, gt=0, description="at most this many, chosen by the seed")
    optimizer: OptimizerConfig = OptimizerConfig(lr=5e-6, min_lr_ratio=0.1, schedule="cosine")
    moe: MoeTrainingConfig = MoeTrainingConfig()

    @field_validator("sources", "validation", mode="before")
    @classmethod
    def _accept_paths(cls, value: Any) -> Any:
        if isinstance(value, list):
            return [{"path": entry} if isinstance(entry, str) else entry for entry in value]
        return {"path": value} if isinstance(value, str) else value


class RewardModelConfig(Section):
    """Reward models (v2 section 3.1: batch 256, lr 6e-6, 1 epoch, 8,192 tokens; what else the optimizer does is not stated)."""

    kind: Literal["helpful", "safety"] = Field(
        "helpful",
        description="helpful: pairs of responses, of which the final summary alone is scored; safety: responses labelled safe or "
        "not, scored as a whole",
    )
    epochs: int = Field(1, gt=0)
    batch_size: int = Field(256, gt=0, description="pairs, or labelled responses, per update")
    max_tokens: int = Field(8192, gt=0, description="of a response with its prompt in training; scoring has no such limit")
    micro_batch_tokens: int = Field(16384, gt=0, description="packed tokens per forward pass; a pair stays together")
    validate_interval: int = Field(
        0, ge=0, description="updates between measurements on the part that data.heldout_fraction keeps; 0: only at the end"
    )
    optimizer: OptimizerConfig = OptimizerConfig(lr=6e-6, weight_decay=0.0)
    moe: MoeTrainingConfig = MoeTrainingConfig()


class GrpoConfig(Section):
    """GRPO. Defaults are R1-Zero's (arXiv 2501.12948v2 section 2.1): lr 3e-6, KL 0.001, G 16, 8,192 outputs in 16 minibatches."""

    rollouts: int = Field(650, gt=0, description="rollout rounds; one round is prompts_per_rollout x group_size outputs")
    prompts_per_rollout: int = Field(512, gt=0)
    group_size: int = Field(16, gt=1)
    minibatch_size: int = Field(512, gt=0, description="outputs per policy update")
    micro_batch_tokens: int = Field(32768, gt=0, description="packed tokens per forward pass")
    clip_eps: float = Field(0.2, gt=0, description="not stated for R1-Zero; 10 for R1's first RL stage")
    kl_coef: float = Field(0.001, ge=0)
    normalization: Literal["sequence", "token"] = Field(
        "sequence",
        description="sequence: mean over a response's tokens, then over responses (DeepSeekMath eq 3); token: mean over all tokens",
    )
    advantage_std: Literal["population", "sample"] = Field("population", description="not stated")
    reference_update_interval: int = Field(400, ge=0, description="policy updates between reference refreshes; 0: never")
    optimizer: OptimizerConfig = OptimizerConfig(lr=3e-6, weight_decay=0.0)
    moe: MoeTrainingConfig = MoeTrainingConfig()
    freeze_router: bool = Field(False, description="router weights get no gradient")
    general_updates: int = Field(
        400, ge=0, description="the last policy updates, in which general prompts and preference rewards come (v2 section 3.2.2)"
    )
    shuffle_rewards: bool = Field(
        False, description="control experiment: rewards are permuted over the batch, nothing can be learned"
    )


class RolloutConfig(Section):
    """The vLLM engines and what is asked of them."""

    placement: Literal["single", "colocated", "disaggregated"] = Field(
        "single",
        description="single: one engine beside rank 0; colocated: engines_per_node beside the ranks of every node; disaggregated: "
        "those of `megatron-r1 serve-rollouts` on other nodes, weights over the network",
    )
    engines_per_node: int = Field(1, gt=0, description="colocated; on GPUs each takes its share of tensor_parallel_size")
    servers: str | None = Field(None, description="folder in which serve-rollouts announces its engines; for disaggregated")
    tensor_parallel_size: int = Field(1, gt=0, description="devices of one engine, on all its nodes together")
    nodes_per_engine: int = Field(
        1, gt=0, description="nodes that one engine spans, each with the same share of its devices; colocated or disaggregated"
    )
    max_response_tokens: int = Field(32768, gt=0)
    temperature: float = Field(1.0, gt=0)
    top_p: float = Field(1.0, gt=0, le=1)
    kv_cache_bytes: int | None = Field(None, description="KV cache size; default: vLLM's share of the device")
    gpu_memory_utilization: float = Field(0.5, gt=0, le=1)
    max_num_seqs: int = Field(256, gt=0)
    transfer: Literal["auto", "shm", "nccl"] = Field(
        "auto",
        description="how weights travel: shm: through the memory of the node, to other nodes over TCP; nccl: between GPUs, for "
        "disaggregated engines alone, since NCCL takes no two processes on one GPU; auto: nccl where that is possible",
    )
    verify_weights: bool = Field(True, description="compare a checksum of every tensor after every update")
    max_logprob_diff_mean: float = Field(1e-4, gt=0, description="trainer against engine, on-policy; above it the run stops")
    max_logprob_diff_max: float = Field(1e-2, gt=0)
    start_timeout_seconds: float = 600.0
    step_timeout_seconds: float = 3600.0
    stall_seconds: float = Field(
        300.0,
        gt=0,
        description="an engine that gives no sign for so long, sampling or taking weights, is replaced as a dead one is",
    )
    restarts: int = Field(
        3, ge=0, description="in a row, after which a lost engine ends the run; only its unfinished groups are sampled anew"
    )


class JudgeConfig(Section):
    """A served model that grades answers (v2 Listing 4), behind an OpenAI-compatible endpoint such as `vllm serve`."""

    url: str | None = Field(None, description="base URL, e.g. http://localhost:8000/v1; needed where a judge is used")
    model: str | None = Field(None, description="name that the endpoint serves it under; needed where a judge is used")
    temperature: float = Field(0.0, ge=0, description="not stated; at 0, two of the four pairwise votes repeat the other two")
    max_tokens: int = Field(4096, gt=0, description="of the judge's answer; one cut at the limit gives no verdict")
    seed: int = Field(0, description="sent with every request; pairwise votes also draw their order from it")
    json_schema: bool = Field(
        False,
        description="have the endpoint constrain its answer to the JSON of a verdict; not for models that reason in the answer",
    )
    timeout_seconds: float = Field(120.0, gt=0, description="for one request")
    retries: int = Field(4, ge=0, description="further requests after one that failed or gave no valid verdict")
    concurrency: int = Field(16, gt=0, description="requests at a time")
    cache: str | None = Field(None, description="file that keeps verdicts over runs; null: none are kept")
    api_key_file: str | None = Field(None, description="file with the endpoint's key; null: none is sent")


class MathRewardConfig(Section):
    """What counts as the same answer where mathematics leaves it open; the recipe says only that the answer must be correct."""

    percent: Literal["unit", "hundredth", "either"] = Field("unit", description="50% is 50 (as in GSM8K), 0.5, or either")
    units: Literal["optional", "required", "ignored"] = Field(
        "optional", description="optional: may be missing on one side, but two different ones disagree"
    )
    rounding: int = Field(
        0, ge=0, description="digits from which a rounded decimal agrees with a reference like 1/3 or pi; 0: never"
    )
    list_order: Literal["any", "same"] = Field("any", description="of bare lists; sets never have one")
    several_answers: Literal["agree", "last"] = Field(
        "agree", description="several boxes: each must be correct, or the last counts"
    )


class CodeRewardConfig(Section):
    """How programs are run against their tests."""

    isolation: Literal["bubblewrap", "none_i_accept_untrusted_code_on_this_machine"] = Field(
        "bubblewrap",
        description="without namespaces programs are refused, unless the other value says in so many words to run them",
    )
    language: Literal["python", "cpp"] = Field("python", description="of a block of code without a tag")
    python: str = Field("", description="interpreter for programs; empty: the trainer's own")
    packages: list[str] = Field([], description="folders of packages that programs may import")
    cpu_seconds: float = Field(5.0, gt=0, description="of one test")
    wall_seconds: float = Field(15.0, gt=0, description="of one test")
    memory_mb: int = Field(512, gt=0, description="of one test")
    program_seconds: float = Field(60.0, gt=0, description="of all tests of a program; later ones are not run, and it fails")
    float_tolerance: float | None = Field(None, description="within which numbers agree; null: exactly")
    stop_at_first_failure: bool = Field(False, description="do not run the tests after it; the score is the same")


class RewardConfig(Section):
    """reasoning prompts: accuracy + format + language (v2 eq 4, 7); general ones: model + format + language (v2 eq 8, 10)."""

    accuracy_weight: float = 1.0
    format_weight: float = 1.0
    language_weight: float = Field(0.0, description='0: not measured; R1\'s RL stages: 1, "directly adding it"')
    model_weight: float = Field(1.0, description="of the model's reward on general prompts")
    model: Literal["none", "judge", "reward_models"] = Field(
        "none", description="what scores general prompts; judge: see reward.judge; reward_models: the two below"
    )
    helpful_model: str | None = Field(None, description="folder of the reward model for helpfulness, which reads the final summary")
    safety_model: str | None = Field(None, description="folder of the reward model for safety, which reads the whole response")
    answer_location: Literal["answer_tag", "boxed", "hash"] = Field(
        "answer_tag", description="the only place where an answer counts; hash: after ####"
    )
    length_penalty_weight: float = Field(0.0, ge=0, description="0: off; times 0 to -1 over the last cache tokens before the limit")
    length_penalty_max_tokens: int = Field(32768, gt=0, description="length from which the whole penalty applies")
    length_penalty_cache_tokens: int = Field(4096, gt=0, description="tokens before that over which it grows")
    repetition_penalty_weight: float = Field(0.0, ge=0, description="0: off; times minus the share of n-grams that are repeated")
    repetition_ngram: int = Field(20, gt=0, description="tokens of such an n-gram")
    unscored_value: float = Field(
        0.0, description="counts as the score where a grader failed (error, timeout, unscorable); such cases are logged apart"
    )
    workers: int = Field(2, gt=0, description="scoring processes, beside rank 0")
    time_limit_seconds: float = Field(20.0, gt=0, description="for one response by one scorer; then its worker is killed")
    code_time_limit_seconds: float = Field(300.0, gt=0, description="the same for all tests of one program")
    worker_memory_bytes: int = Field(4 << 30, gt=0, description="address space of a scoring process, and of each of its children")
    worker_recycle_bytes: int = Field(1 << 30, gt=0, description="resident memory above which a scoring process is replaced")
    math: MathRewardConfig = MathRewardConfig()
    code: CodeRewardConfig = CodeRewardConfig()
    judge: JudgeConfig = JudgeConfig()


class EvaluateConfig(Section):
    """Held-out evaluation, and in `benchmarks` that on published ones."""

    interval: int = Field(0, ge=0, description="rollouts between evaluations during training; 0: only at the end")
    problems: int = Field(64, gt=0)
    samples: int = Field(8, gt=0, description="k: samples per problem for pass@1 and pass@k")
    temperature: float = Field(1.0, gt=0)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int = 99
    benchmarks: BenchmarksConfig = BenchmarksConfig()


class CheckpointConfig(Section):
    """What is kept of a run."""

    interval: int = Field(10, gt=0, description="steps between checkpoints")
    keep: int = Field(2, gt=0, description="newest complete checkpoints kept")
    asynchronous: bool = Field(True, description="a forked process writes them while training goes on")


class Config(Section):
    """The whole tree."""

    run_dir: str = Field("runs/default", description="folder of this run; started again, it resumes")
    seed: int = 0
    model: ModelConfig = ModelConfig()
    parallel: ParallelConfig = ParallelConfig()
    runtime: RuntimeConfig = RuntimeConfig()
    data: DataConfig = DataConfig()
    pretrain: PretrainConfig = PretrainConfig()
    sft: SftConfig = SftConfig()
    reward_model: RewardModelConfig = RewardModelConfig()
    grpo: GrpoConfig = GrpoConfig()
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    curation: CurationConfig = CurationConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    recipe: RecipeConfig = RecipeConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
