"""Steps of the demonstration: token files from a folder of texts, then runs of both models. And what their shapes cost."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from examples.pretrain_demo.prepare_text import PACKAGES, find_sources
from examples.step_runner import run_steps
from megatron_r1.config.load import load_config
from megatron_r1.config.schema import Config
from megatron_r1.model.architecture import Architecture
from megatron_r1.model.flops import forward_flops, rows_of, update_flops
from megatron_r1.model.presets import resolve_architecture

HERE = Path(__file__).resolve().parent
MODELS = {"v3": "V3", "dense": "dense"}  #: name of the YAML -> in tables and curves
TOKENS_OF = "tokens of "
SEARCH_SEED = 100
SEARCH_SHARE = 1 / 2  #: of the first phase's tokens, in a search for learning rates


def plan_data(out: Path, text: Path | None) -> dict[str, list[str]]:
    """Name of each step that makes token files -> its command. Raises DataError if there are no texts in the folder."""
    data = out / "data"
    prepare = [sys.executable, str(HERE / "prepare_text.py"), "--out", str(data)]
    steps = {"text": [*prepare, *(["--text", str(text)] if text else [])]}
    for name in find_sources(text) if text else PACKAGES:
        steps[TOKENS_OF + name] = [
            sys.executable, "-m", "megatron_r1.cli", "preprocess", "--input", str(data / f"documents/{name}.jsonl"),
            "--output-prefix", str(data / name), "--tokenizer", str(data / "tokenizer"), "--append-eod", "--workers", "2",
        ]  # fmt: skip
    return steps


def make_data(steps: Mapping[str, list[str]], out: Path) -> int:
    """Run what `plan_data` planned and is not there yet; returns an exit code."""
    there = {TOKENS_OF + name for name in sources_of(steps) if token_file(out / "data", name).with_suffix(".idx").exists()}
    return run_steps({name: command for name, command in steps.items() if name not in there}, out)


def sources_of(steps: Mapping[str, list[str]]) -> list[str]:
    """Names of the texts, from the steps that make token files of them."""
    return [name.removeprefix(TOKENS_OF) for name in steps if name.startswith(TOKENS_OF)]


def tokens_of(data: Path, sources: Sequence[str]) -> dict[str, int]:
    """Tokens of each source, of which its weight in the blend is made: all of them are used up together."""
    notes = {name: json.loads(token_file(data, name).with_suffix(".json").read_text(encoding="utf-8")) for name in sources}
    return {name: note["tokens"] for name, note in notes.items()}


def token_file(data: Path, source: str) -> Path:
    """What `megatron-r1 preprocess` names a source's files, without their endings."""
    return data / f"{source}_text_document"


def run_command(data: Path, tokens: Mapping[str, int], folder: Path, model: str, seed: int, overrides: Sequence[str]) -> list[str]:
    """The pretraining of one model.

    Args:
        data: folder of the token files.
        tokens: see `tokens_of`.
        folder: of the run.
        overrides: settings, as `key.sub=value`.
    """
    blend = ",".join(f"{{path: {json.dumps(str(token_file(data, name)))}, weight: {count}}}" for name, count in tokens.items())
    return [
        sys.executable, "-m", "megatron_r1.cli", "pretrain", "--config", str(HERE / f"{model}.yaml"), f"seed={seed}",
        f"run_dir={folder}", f"data.tokenizer={data / 'tokenizer'}", f"data.blend=[{blend}]",
        f"data.index_cache={folder / 'index'}", *overrides,
    ]  # fmt: skip


def plan_runs(
    out: Path, tokens: Mapping[str, int], seeds: Sequence[int], rates: Mapping[str, float], overrides: Sequence[str]
) -> dict[str, list[str]]:
    """Name of each run -> its command; V3's first, which take longest, since two run side by side.

    Args:
        rates: model -> its highest learning rate.
        overrides: settings of all runs, as `key.sub=value`.
    """
    return {
        f"{model} {seed}": run_command(
            out / "data", tokens, run_folder(out, model, seed), model, seed, with_rate(model, rates[model], overrides)
        )
        for model in MODELS
        for seed in seeds
    }


def run_folder(out: Path, model: str, seed: int) -> Path:
    """Of one run."""
    return out / f"{model}_{seed}"


def plan_search(out: Path, tokens: Mapping[str, int], rates: Sequence[float], overrides: Sequence[str]) -> dict[str, list[str]]:
    """Name of each run of the search for learning rates -> its command: short runs with a seed of their own."""
    return {
        f"search {model} {rate:g}": run_command(
            out / "data", tokens, search_folder(out, model, rate), model, SEARCH_SEED,
            with_rate(model, rate, overrides, share=SEARCH_SHARE),
        )
        for model in MODELS
        for rate in rates
    }  # fmt: skip


def search_folder(out: Path, model: str, rate: float) -> Path:
    """Of one run of the search for learning rates."""
    return out / f"search/{model}_{rate:g}"


def with_rate(model: str, rate: float, overrides: Sequence[str], share: float | None = None) -> list[str]:
    """More overrides: all learning rates times one factor.

    Args:
        rate: the highest learning rate.
        share: the first phase alone, all its numbers of tokens times this. None: all phases, whole.
    """
    settings = load_config(HERE / f"{model}.yaml", overrides).pretrain
    factor = rate / settings.optimizer.lr

    def scale(value: Any, name: str = "") -> Any:
        if isinstance(value, dict):
            return {key: scale(part, key) for key, part in value.items() if part is not None}
        if isinstance(value, list):
            return [scale(part) for part in value]
        if name == "tokens" and share is not None:
            return round(value * share)
        return value * factor if name == "lr" else value

    phases = [scale(phase.model_dump(mode="json")) for phase in settings.phases[: 1 if share is not None else None]]
    return [*overrides, f"pretrain.phases={json.dumps(phases)}", f"pretrain.optimizer.lr={rate:g}"]


def shapes(rates: Mapping[str, float], overrides: Sequence[str] = ()) -> dict[str, tuple[Config, Architecture]]:
    """Settings and shape of each model, by the name of its YAML. Raises ConfigError.

    Args:
        rates: model -> its highest learning rate; that of the YAML for one without.
    """
    configs = {
        model: load_config(HERE / f"{model}.yaml", with_rate(model, rates[model], overrides) if model in rates else overrides)
        for model in MODELS
    }
    return {model: (config, resolve_architecture(config.model.preset, config.model.overrides)) for model, config in configs.items()}


def flops_per_token(arch: Architecture, length: int) -> tuple[float, float]:
    """FLOPs of a token in a sequence of so many: of a forward pass, and of training, multi-token prediction included."""
    work = rows_of(1, length)
    return forward_flops(arch, work) / length, update_flops(arch, work, mtp=arch.mtp_depth > 0) / length
