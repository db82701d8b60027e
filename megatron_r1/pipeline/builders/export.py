"""A trained model on its way out: a Hugging Face folder, or config and tokenizer beside Megatron's weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.runtime.files import write_atomically
from megatron_r1.weights.generation import GENERATION_CONFIG
from megatron_r1.weights.hf import CONFIG
from megatron_r1.weights.hf_export import export_hf
from megatron_r1.weights.rank_zero import consume_on_rank_zero

if TYPE_CHECKING:
    from megatron_r1.mcore.megatron_model import MegatronModel


def export_policy(policy: MegatronModel, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the policy's weights and its tokenizer as a Hugging Face folder, collectively."""
    tokenizer_folder = folder.with_name(f".{folder.name}.tokenizer")

    def write(weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        tokenizer.save(tokenizer_folder)
        export_hf(
            weights,
            policy.arch,
            folder,
            bos_token_id=config_bos_id(tokenizer),
            eos_token_id=tokenizer.eos_id,
            tokenizer=tokenizer_folder,
            generation=policy.generation,
        )
        shutil.rmtree(tokenizer_folder)

    consume_on_rank_zero(policy.weights(), write)


def describe_policy(policy: MegatronModel, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the configs and the tokenizer into a folder of Megatron weights, so that it can be exported by itself."""
    dtype = str(policy.modules[0].config.params_dtype).removeprefix("torch.")
    ids = config_bos_id(tokenizer), tokenizer.eos_id
    config = policy.arch.to_hf_config(*ids, dtype) | {"eos_token_id": policy.generation.ends(tokenizer.eos_id)}
    for name, content in ((CONFIG, config), (GENERATION_CONFIG, policy.generation.to_json(*ids))):
        write_atomically(folder / name, json.dumps(content, indent=2) + "\n")
    tokenizer.save(folder)


def config_bos_id(tokenizer: Tokenizer) -> int:
    # config.json wants a number; a vocabulary without beginning-of-sequence never produces it.
    return tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
