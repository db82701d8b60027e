"""Hugging Face model folders: written whole or not at all, read tensor by tensor. Safetensors only, never pickle."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megatron_r1.errors import CheckpointError, ConversionError
from megatron_r1.model.architecture import Architecture
from megatron_r1.model.hf_config import read_hf_config
from megatron_r1.weights.mapping import hf_shapes

CONFIG, GENERATION_CONFIG, INDEX, SINGLE = (
    "config.json",
    "generation_config.json",
    "model.safetensors.index.json",
    "model.safetensors",
)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


class HfFolder:
    """A model folder opened for reading.

    Raises:
        CheckpointError: no such folder, no config.json or safetensors in it, a file that is missing or broken.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not folder.is_dir():
            raise CheckpointError(f"model folder {folder} does not exist")
        self.config: dict[str, Any] = _read_json(folder / CONFIG)
        self.files = self._find_files()
        self._open: dict[str, Any] = {}

    def architecture(self) -> Architecture:
        """Shape of the model. Raises CheckpointError where it is not one that this project has."""
        try:
            return read_hf_config(self.config)
        except ValueError as error:
            raise CheckpointError(f"{self.folder / CONFIG}: {error}") from error

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the file's header."""
        return tuple(self._slice(name).get_shape())

    def read(self, name: str, rows: slice = slice(None), columns: slice = slice(None)) -> torch.Tensor:
        """A tensor, or some rows and columns of it, without reading the rest of it from disk."""
        part = self._slice(name)
        try:
            return part[rows, columns] if len(part.get_shape()) > 1 else part[rows]
        except SafetensorError as error:
            raise CheckpointError(f"tensor {name} in {self.folder / self.files[name]} cannot be read: {error}") from error

    def check_names(self, wanted: Iterable[str]) -> None:
        """Raises ConversionError where the folder's tensors are not exactly `wanted`."""
        wanted = set(wanted)
        missing, extra = sorted(wanted - self.files.keys()), sorted(self.files.keys() - wanted)
        for what, names in (("lacks", missing), ("has unknown", extra)):
            if names:
                more = f" and {len(names) - 5} more" if len(names) > 5 else ""
                raise ConversionError(f"model folder {self.folder} {what} tensors: {', '.join(names[:5])}{more}")

    def _find_files(self) -> dict[str, str]:
        """Tensor name -> file name."""
        if (self.folder / INDEX).is_file():
            files = _read_json(self.folder / INDEX).get("weight_map")
            if not isinstance(files, dict):
                raise CheckpointError(f"{self.folder / INDEX} has no weight_map")
            for name in sorted(set(files.values())):
                if not (self.folder / name).is_file():
                    raise CheckpointError(f"{self.folder / INDEX} names {name}, which is missing")
            return files
        if not (self.folder / SINGLE).is_file():
            raise CheckpointError(f"model folder {self.folder} has neither {INDEX} nor {SINGLE}")
        return dict.fromkeys(_open_file(self.folder / SINGLE).keys(), SINGLE)

    def _slice(self, name: str) -> Any:
        if name not in self.files:
            raise ConversionError(f"model folder {self.folder} has no tensor {name}")
        path = self.folder / self.files[name]
        if path.name not in self._open:
            self._open[path.name] = _open_file(path)
        try:
            return self._open[path.name].get_slice(name)
        except SafetensorError as error:
            raise CheckpointError(f"{path} does not hold tensor {name}, which the index says it does") from error


def export_hf(
    weights: Iterable[tuple[str, torch.Tensor]],
    arch: Architecture,
    folder: Path,
    *,
    bos_token_id: int,
    eos_token_id: int,
    tokenizer: Path | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write a folder that transformers, vLLM and `HfFolder` load; it appears under its name only when complete.

    Writes where it is called: in a job of many ranks, through `feed_rank_zero`. An existing folder of that name is replaced.

    Args:
        weights: (Hugging Face name, full tensor), each tensor of the model once.
        arch: the model's shape.
        folder: where to.
        bos_token_id: for config.json and generation_config.json.
        eos_token_id: likewise.
        tokenizer: folder whose tokenizer files are copied.
        max_shard_bytes: a new file is begun before this size would be passed.

    Raises:
        ConversionError: the weights are not exactly the model's, each once and with its shape.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        dtype = _write_shards(weights, hf_shapes(arch), partial, max_shard_bytes)
        ids = {"bos_token_id": bos_token_id, "eos_token_id": eos_token_id}
        _write_json(partial / CONFIG, arch.to_hf_config(bos_token_id, eos_token_id, dtype))
        _write_json(partial / GENERATION_CONFIG, {"_from_model_config": True, **ids})
        for name in TOKENIZER_FILES if tokenizer else ():
            if (tokenizer / name).is_file():
                shutil.copyfile(tokenizer / name, partial / name)
        _replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _replace(new: Path, folder: Path) -> None:
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _write_shards(
    weights: Iterable[tuple[str, torch.Tensor]], shapes: dict[str, tuple[int, ...]], folder: Path, max_shard_bytes: int
) -> str:
    """Write the tensors and their index; return the dtype of the model."""
    shards: list[list[str]] = []
    shard: dict[str, torch.Tensor] = {}
    size = total = 0
    dtype = "float32"

    def flush() -> None:
        save_file(shard, folder / f"{len(shards)}.safetensors", metadata={"format": "pt"})
        shards.append(list(shard))
        shard.clear()

    remaining = dict(shapes)
    for name, tensor in weights:
        if remaining.pop(name, None) != tuple(tensor.shape):
            raise ConversionError(
                f"tensor {name} with shape {list(tensor.shape)} is unknown, twice there or should be {shapes.get(name)}"
            )
        if shard and size + tensor.nbytes > max_shard_bytes:
            flush()
            size = 0
        shard[name] = tensor.detach().cpu().clone()
        size, total = size + tensor.nbytes, total + tensor.nbytes
        if name == next(iter(shapes)):
            dtype = str(tensor.dtype).removeprefix("torch.")
    if remaining:
        raise ConversionError(f"the weights lack {len(remaining)} tensors, the first is {next(iter(remaining))}")
    flush()
    files = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"{i}.safetensors").rename(folder / file)
        files.update(dict.fromkeys(names, file))
    _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": files})
    return dtype


def _open_file(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} does not hold a JSON object")
    return content


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
