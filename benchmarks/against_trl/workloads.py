"""What is compared: models, rounds, bars, and the settings of both sides.

Every workload is written twice, for `megatron-r1 grpo` and for TRL's GRPOConfig, by the two functions below it: a reader who knows
either side finds all its settings here.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_r1.config.data import DataConfig
from megatron_r1.model.architecture import Architecture
from megatron_r1.model.families.llama import Llama
from megatron_r1.model.families.qwen2 import Qwen2
from megatron_r1.model.presets import resolve_architecture

KL_COEF, CLIP_EPS, LEARNING_RATE = 1e-3, 0.2, 1e-6
ADAM = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8}
CLIP_GRAD = 1.0
MOST_ROUNDS = 1000  #: what both are told to train; the benchmark ends them before


@dataclass(frozen=True)
class Workload:
    """One model and one round. Responses have `tokens` tokens, or mixed lengths up to that."""

    name: str
    what: str  #: in words
    arch: Architecture
    prompts: int  #: different ones, of a round
    group_size: int
    minibatch: int  #: responses of one update
    tokens: int  #: most tokens of a response
    mixed: bool  #: whether responses end by themselves, with the same probability at every token
    bar: float  #: least ratio of samples per second
    micro_batch_tokens: int  #: of our forward passes; with long responses about a group, as many as TRL's batch of 8
    trl_batches: tuple[int, ...]  #: sequences of TRL's forward passes, of which it takes the faster on the machine
    terms: tuple[int, int] | None  #: fewest and most numbers in a prompt's sum; None: the quickstart's prompts

    @property
    def responses(self) -> int:
        """Of one round."""
        return self.prompts * self.group_size

    @property
    def updates(self) -> int:
        """Of one round."""
        return self.responses // self.minibatch

    @property
    def mean_length(self) -> float | None:
        """Expected tokens of a response if there were no limit; None: fixed lengths. With it, one in twenty is cut."""
        return self.tokens / 3 if self.mixed else None


_SMOLLM2 = Llama(
    vocab_size=49152, hidden_size=576, num_hidden_layers=30, intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3,
    max_position_embeddings=8192, rope_theta=100000.0, rms_norm_eps=1e-5, tie_word_embeddings=True, init_std=0.02,
)  # fmt: skip
_QWEN2 = Qwen2(
    vocab_size=32768, hidden_size=512, num_hidden_layers=8, intermediate_size=2816, num_attention_heads=8, num_key_value_heads=2,
    max_position_embeddings=4096, rope_theta=1000000.0, rms_norm_eps=1e-6, tie_word_embeddings=True, init_std=0.02,
)  # fmt: skip

WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("tiny", "the quickstart's DeepSeek-V3, hidden size 128", resolve_architecture("tiny"),
                 16, 16, 128, 32, False, 1.0, 8192, (128, 32), None),
        Workload("smollm2", "SmolLM2-135M's shape, hidden size 576", _SMOLLM2, 8, 8, 64, 32, False, 1.3, 4096, (32, 8), (40, 60)),
        Workload("mixed", "SmolLM2-135M's shape, hidden size 576", _SMOLLM2, 4, 8, 32, 256, True, 2.0, 1024, (32, 8), (40, 60)),
        Workload("qwen2", "a Qwen2 of 8 layers, hidden size 512", _QWEN2, 4, 8, 32, 512, True, 2.0, 2048, (32, 8), (40, 60)),
    )
}  # fmt: skip


def sums(count: int, terms: tuple[int, int], seed: int) -> list[dict[str, str]]:
    """`count` problems with fewest to most `terms` numbers each: "Total 7+5-2?" and "10"."""
    rng = random.Random(f"sums/{seed}")
    problems = []
    for _ in range(count):
        numbers = [rng.randrange(1, 10) * rng.choice((1, -1)) for _ in range(rng.randint(*terms))]
        written = "".join(f"{number:+d}" for number in numbers).removeprefix("+")
        problems.append({"question": f"Total {written}?", "answer": str(sum(numbers))})
    return problems


def our_config(
    workload: Workload, *, run_dir: Path, model: Path, data: DataConfig, threads: int | None, seed: int
) -> dict[str, Any]:
    """The config of `megatron-r1 grpo`; what is not named has its default. `threads` None: those that the project chooses."""
    return {
        "run_dir": str(run_dir),
        "seed": seed,
        "model": {"weights": str(model)},
        "runtime": {"device": "cpu", "dtype": "fp32", **({} if threads is None else {"threads": threads})},
        "data": {name: getattr(data, name) for name in ("source", "template", "max_prompt_tokens")},
        "grpo": {
            "rollouts": MOST_ROUNDS,
            "prompts_per_rollout": workload.prompts,
            "group_size": workload.group_size,
            "minibatch_size": workload.minibatch,
            "micro_batch_tokens": workload.micro_batch_tokens,
            "share_prompts": "always",  # dense models do by default
            "clip_eps": CLIP_EPS,
            "kl_coef": KL_COEF,
            "advantage_std": "sample",
            "reference_update_interval": 0,
            "optimizer": {"lr": LEARNING_RATE, "weight_decay": 0.0, "clip_grad": CLIP_GRAD, **ADAM},
        },
        "rollout": {"max_response_tokens": workload.tokens, "kv_cache_bytes": kv_cache_bytes(workload, data.max_prompt_tokens)},
        "reward": {
            "format_weight": 0.0,
            "custom": [{"name": "checksum", "function": "benchmarks.against_trl.reward:score"}],
            "domains": {"math": "checksum"},
        },
        "evaluate": {"interval": 0, "problems": 0},
        "checkpoint": {"interval": MOST_ROUNDS},
    }


def kv_cache_bytes(workload: Workload, max_prompt_tokens: int) -> int:
    """The engine's cache: a whole round at its longest in float32, and a tenth more; at least the quickstart's."""
    config = workload.arch.to_hf_config(0, 1, "float32")
    if config["model_type"] == "deepseek_v3":
        per_layer = config["kv_lora_rank"] + config["qk_rope_head_dim"]
    else:
        head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        per_layer = 2 * config["num_key_value_heads"] * head
    tokens = workload.responses * (max_prompt_tokens + workload.tokens)
    return max(64 << 20, int(1.1 * 4 * per_layer * config["num_hidden_layers"] * tokens))


def trl_settings(workload: Workload, *, output: Path, batch: int, seed: int) -> dict[str, Any]:
    """TRL's GRPOConfig; what is not named has its default, which for attention, experts and Adam is transformers' fastest choice.

    `batch` sequences to a forward pass; float32 on both sides; no gradient checkpointing, which would compute every forward pass
    twice; one batch of prompts for all updates of a round; the loss and the advantages of DeepSeekMath, as ours.
    """
    return {
        "output_dir": str(output),
        "use_cpu": True,
        "bf16": False,
        "model_init_kwargs": {"dtype": "float32"},
        "gradient_checkpointing": False,
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": workload.minibatch // batch,
        "steps_per_generation": workload.responses // batch,
        "num_iterations": 1,
        "num_generations": workload.group_size,
        "max_completion_length": workload.tokens,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "use_vllm": False,
        "beta": KL_COEF,
        "epsilon": CLIP_EPS,
        "loss_type": "grpo",
        "scale_rewards": "group",
        "router_aux_loss_coef": 0.0,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "adam_beta1": ADAM["beta1"],
        "adam_beta2": ADAM["beta2"],
        "adam_epsilon": ADAM["eps"],
        "max_grad_norm": CLIP_GRAD,
        "max_steps": MOST_ROUNDS * workload.updates,
        "shuffle_dataset": False,
        "dataloader_num_workers": 0,
        "logging_steps": workload.updates,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "seed": seed,
    }
