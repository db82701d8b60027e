"""The folder that both sides start from: random weights whose responses have the lengths asked for, or a model that is given."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from benchmarks.against_trl.workloads import Workload
from megatron_r1.data.tally.tokenizer import train_tally_tokenizer
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.data.tokenizer_folder import SETTINGS, VOCABULARY
from megatron_r1.errors import ConfigError
from megatron_r1.model.architecture import Architecture
from megatron_r1.weights.generation import GENERATION_CONFIG
from megatron_r1.weights.hf import CONFIG, HfFolder
from megatron_r1.weights.hf_export import export_hf
from megatron_r1.weights.mapping import ROUTER_BIAS, hf_shapes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NEVER = 1e-13  #: probability of an end that does not come in a response of fixed length
_TALLY_TOKENS = 448  #: of the quickstart's tokenizer
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_INTO_RESIDUAL = ("o_proj.weight", "down_proj.weight")


def make_random_folder(folder: Path, workload: Workload, seed: int) -> Path:
    """Random weights with a tokenizer of the quickstart's kind, in which the end of sequence has the same probability everywhere.

    The first number of the residual stream is set by the embedding to the same for every token and written by no layer; the logit
    of the end of sequence reads it alone. So responses end with a probability of 1 / `workload.mean_length` at every token, or
    never: no run of either side has to be told the lengths.
    """
    tokenizer_folder = folder.with_name(f"{folder.name}.tokenizer")
    tokenizer = save_filled_tokenizer(tokenizer_folder, workload.arch.vocab_size)
    weights = _random_weights(workload.arch, tokenizer.eos_id, seed)
    probability = NEVER if workload.mean_length is None else 1 / workload.mean_length

    def write() -> None:
        export_hf(
            weights.items(),
            workload.arch,
            folder,
            bos_token_id=tokenizer.bos_id,
            eos_token_id=tokenizer.eos_id,
            tokenizer=tokenizer_folder,
        )

    write()
    head = weights[_EMBEDDING if workload.arch.tie_word_embeddings else _HEAD]
    head[tokenizer.eos_id, 0] = _end_weight(folder, tokenizer.eos_id, probability, seed)
    write()
    return folder


def save_filled_tokenizer(folder: Path, vocab_size: int) -> Tokenizer:
    """The quickstart's tokenizer, and words that no text has for the ids up to `vocab_size`: every sampled id can be decoded."""
    tally = train_tally_tokenizer(min(vocab_size, _TALLY_TOKENS))
    tally.save(folder)
    state = json.loads((folder / VOCABULARY).read_text(encoding="utf-8"))
    for number in range(tally.vocab_size, vocab_size):
        state["model"]["vocab"][f"word{number}"] = number
    (folder / VOCABULARY).write_text(json.dumps(state, ensure_ascii=False), encoding="utf-8")
    return Tokenizer.load(folder)


def _random_weights(arch: Architecture, eos_id: int, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    std, weights = arch.init_std, {}
    for name, shape in hf_shapes(arch).items():
        if "norm" in name:
            weights[name] = torch.ones(shape)
        elif name.endswith(ROUTER_BIAS):
            weights[name] = torch.zeros(shape)
        else:
            weights[name] = torch.randn(shape, generator=generator) * std
        if name.endswith(_INTO_RESIDUAL):
            weights[name][0] = 0.0
    # Most of the residual's length, so that the norms leave it nearly the same at every position.
    weights[_EMBEDDING][:, 0] = 2 * std * arch.hidden_size**0.5
    if _HEAD in weights:
        weights[_HEAD][:, 0] = 0.0
    weights[_HEAD if _HEAD in weights else _EMBEDDING][eos_id] = 0.0
    return weights


def _end_weight(folder: Path, eos_id: int, probability: float, seed: int) -> float:
    """The weight of the residual's first number with which the end has this mean probability, found by bisection."""
    model = _load(folder)
    generator = torch.Generator().manual_seed(seed)
    token_ids = torch.randint(eos_id + 1, model.config.vocab_size, (8, 64), generator=generator)
    with torch.no_grad():
        output = model(token_ids, output_hidden_states=True)
        first = output.hidden_states[-1][..., 0].double()  # after the last norm
        logits = output.logits.double()
        logits[..., eos_id] = -math.inf
        others = logits.logsumexp(-1)
    low, high = -1e4, 1e4
    for _ in range(100):
        middle = (low + high) / 2
        mean = torch.sigmoid(middle * first - others).mean().item()
        low, high = (middle, high) if mean < probability else (low, middle)
    return low


def _load(folder: Path) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def link_given_folder(folder: Path, given: Path, prompts: Iterable[tuple[int, ...]], *, mixed: bool) -> Path:
    """The given model by links. For responses of fixed length its end of sequence is the special token that it expects least.

    Raises:
        ConfigError: `given` is no Hugging Face folder, or has no special token for that.
    """
    HfFolder(given)  # what it refuses, the run would refuse
    folder.mkdir()
    for path in given.iterdir():
        if path.is_file():
            (folder / path.name).symlink_to(path.resolve())
    if mixed:
        return folder
    tokenizer = Tokenizer.load(given)
    used = {tokenizer.eos_id, tokenizer.pad_id, tokenizer.bos_id, *(i for prompt in prompts for i in prompt)}
    state = json.loads((given / VOCABULARY).read_text())
    free = {token["id"]: token["content"] for token in state["added_tokens"] if token["special"] and token["id"] not in used}
    if not free:
        raise ConfigError(f"--model {given}: its tokenizer has no unused special token, which responses of fixed length need")
    model = _load(given)
    with torch.no_grad():
        logprobs = torch.cat([model(torch.tensor([prompt])).logits[0].log_softmax(-1) for prompt in prompts])
    end = min(free, key=lambda token: logprobs[:, token].max().item())
    for name, key, value in (
        (CONFIG, "eos_token_id", end),
        (GENERATION_CONFIG, "eos_token_id", end),
        (SETTINGS, "eos_token", free[end]),
    ):
        content = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_text(json.dumps(content | {key: value}))
    return folder
