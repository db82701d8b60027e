"""What `chat`, `generate` and `serve` talk to: the weights that a run or a folder holds, and how they are asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_r1.config.keys import is_within
from megatron_r1.config.load import load_config
from megatron_r1.config.schema import Config
from megatron_r1.conversion.megatron_folder import POLICY
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.data.tokenizer_folder import VOCABULARY
from megatron_r1.errors import CheckpointError, ConfigError
from megatron_r1.model.architecture import Architecture
from megatron_r1.pipeline.artifact import MANIFEST, Artifact
from megatron_r1.pipeline.builders.engines import engine_dtype
from megatron_r1.pipeline.builders.models import build_architecture, build_tokenizer
from megatron_r1.rollout.cache_size import choose_cache
from megatron_r1.runtime.checkpoints import COMPLETE, complete_checkpoints, step_of
from megatron_r1.runtime.device import Device, resolve_device
from megatron_r1.runtime.memory import free_memory, memory_nodes
from megatron_r1.runtime.run_folder import CHECKPOINTS
from megatron_r1.weights.generation import read_generation
from megatron_r1.weights.hf import CONFIG

SETTINGS = ("data", "runtime", "rollout")  #: sections that these commands read
#: Tokens of a conversation if nothing else is asked for: what a KV cache has room for beside any model.
MOST_CONTEXT = {"cpu": 8192, "cuda": 32768}
_OPTIONS = {"data.max_prompt_tokens": "--context", "rollout.max_response_tokens": "--max-tokens"}
_EXPORTED, _RUN_CONFIG = "hf", "config.yaml"
_MOST_CACHE = 4 << 30  # bytes of a worker beside the room for one context: others use this machine, too


@dataclass(frozen=True)
class TalkModel:
    """A language model and how it was trained to be asked."""

    folder: Path  #: a checkpoint, or a Hugging Face folder
    run: Path | None  #: the run folder that it is of
    config: Config  #: data as the run had it; an engine for this machine
    arch: Architecture
    tokenizer: Tokenizer
    device: Device
    context: int  #: most tokens of a prompt and its response together
    most_tokens: int  #: of a response: as in the run, at most half of the context

    @property
    def is_checkpoint(self) -> bool:
        """Whether the weights are in Megatron's format."""
        return (self.folder / POLICY).is_dir()


def find_model(
    place: Path, step: int | None, overrides: Sequence[str], context: int | None = None, sequences: int = 1
) -> TalkModel:
    """The model of a run folder (its newest checkpoint, else its exported model), of a checkpoint or of a Hugging Face folder.

    The run's settings say how it is asked (`data`), in which number format it computes and how it samples. Of a folder without
    them the tokenizer's own chat template is taken if there is one, and what generation_config.json says of sampling.

    Args:
        step: of the run's checkpoint; None: the newest.
        overrides: settings of `SETTINGS` as key.sub=value.
        context: most tokens of prompt and response; None: the model's positions, at most `MOST_CONTEXT`.
        sequences: about how many are sampled at a time.

    Raises:
        ConfigError: a reward model, a setting of another section, a context that the model does not have.
        CheckpointError: no model there, or not of that step.
        DataError: no tokenizer.
    """
    _check_overrides(overrides)
    folder, run = _find_weights(place, step)
    before = _read_settings(folder, run)
    device = resolve_device(_asked_device(overrides))
    defaults = _talk_settings(folder, before, device)
    config = load_config(None, overrides, defaults)
    arch = build_architecture(config.model)
    tokenizer = build_tokenizer(config.data, config.model, arch)
    if before is None:
        said = read_generation(folder, arch.vocab_size).settings
        defaults |= _sampling_of(said) | {"data.template": "r1_zero" if tokenizer.chat_template is None else "tokenizer"}
        config = load_config(None, overrides, defaults)
    limit = arch.max_position_embeddings
    if context is not None and not 2 <= context <= limit:
        raise ConfigError(f"--context {context} is not from 2 to the model's {limit} positions")
    tokens = context or min(limit, MOST_CONTEXT[device.kind])
    changes: dict[str, Any] = {"data.max_prompt_tokens": tokens - 1, "rollout.max_response_tokens": 1}
    if config.rollout.kv_cache_bytes is None and device.kind == "cpu":
        changes["rollout.kv_cache_bytes"] = choose_cache(
            arch,
            engine_dtype(config),
            max_model_len=tokens,
            max_num_seqs=min(sequences, config.rollout.max_num_seqs),
            workers=config.rollout.tensor_parallel_size,
            free_bytes=free_memory() // max(config.rollout.tensor_parallel_size, memory_nodes()),
            share=config.rollout.gpu_memory_utilization,
            most_bytes=_MOST_CACHE,
        ).bytes
    most = tokens // 2 if before is None else min(before.rollout.max_response_tokens, tokens // 2)
    config = load_config(None, (), config.model_dump() | changes)
    return TalkModel(folder, run, config, arch, tokenizer, device, tokens, most)


def _check_overrides(overrides: Sequence[str]) -> None:
    for text in overrides:
        key = text.partition("=")[0]
        if key in _OPTIONS:
            raise ConfigError(f"'{key}' is {_OPTIONS[key]} of this command")
        if "=" in text and not is_within(key, SETTINGS):
            raise ConfigError(f"'{key}' has no effect here: this command reads the sections {', '.join(SETTINGS)}")


def _asked_device(overrides: Sequence[str]) -> Any:
    return load_config(None, [text for text in overrides if text.startswith("runtime.")]).runtime.device


def _find_weights(place: Path, step: int | None) -> tuple[Path, Path | None]:
    """The folder of the weights, and the run that it is of."""
    if not place.is_dir():
        raise CheckpointError(f"{place}: no such folder; give a run folder or a folder with a model")
    found = complete_checkpoints(place / CHECKPOINTS)
    if step is not None:
        chosen = [checkpoint for checkpoint in found if step_of(checkpoint) == step]
        if not chosen:
            there = ", ".join(str(step_of(checkpoint)) for checkpoint in found) or "none"
            raise CheckpointError(f"{place} has no complete checkpoint of step {step}; there are: {there}")
        return chosen[0], place
    if found:
        return found[-1], place
    if (place / POLICY).is_dir():
        if not (place / COMPLETE).is_file():
            raise CheckpointError(f"{place} is not complete: it has no file {COMPLETE}, so its writing was interrupted")
        return place, place.parent.parent if place.parent.name == CHECKPOINTS else None
    if (place / CONFIG).is_file():
        return place, None
    if (place / _EXPORTED / CONFIG).is_file():
        return place / _EXPORTED, place
    inside = sorted(path.parent.name for name in (CHECKPOINTS, _EXPORTED) for path in place.glob(f"*/{name}"))
    hint = f"; it holds runs: give {place / inside[-1]}" if inside else ""
    raise CheckpointError(f"{place} holds no model: neither a complete checkpoint nor {CONFIG} with weights{hint}")


def _read_settings(folder: Path, run: Path | None) -> Config | None:
    """The settings with which the weights were trained; None if nobody knows them."""
    if run is not None and (run / _RUN_CONFIG).is_file():
        return load_config(run / _RUN_CONFIG)
    return Artifact(folder).made_with()[1] if (folder / MANIFEST).is_file() else None


def _talk_settings(folder: Path, before: Config | None, device: Device) -> dict[str, Any]:
    """An engine for itself alone, on this machine, that samples as the run did."""
    settings: dict[str, Any] = {
        "model.weights": str(folder.absolute()), "runtime.device": device.kind,
        "runtime.dtype": "bf16" if device.kind == "cuda" else "fp32", "rollout.gpu_memory_utilization": 0.85,
    }  # fmt: skip
    if before is None:
        return settings
    settings |= {f"data.{name}": value for name, value in before.data.model_dump().items()}
    if (folder / VOCABULARY).is_file():
        settings["data.tokenizer"] = None  # that of the run may have moved; this is a copy of it
    settings |= {"runtime.dtype": before.runtime.dtype, "rollout.temperature": before.rollout.temperature}
    return settings | {"rollout.top_p": before.rollout.top_p, "rollout.stop": before.rollout.stop}


def _sampling_of(said: Any) -> dict[str, Any]:
    """Temperature and top-p of a published generation_config.json."""
    found = {f"rollout.{name}": said.get(name) for name in ("temperature", "top_p")}
    return {key: float(value) for key, value in found.items() if isinstance(value, (int, float)) and 0 < value}
