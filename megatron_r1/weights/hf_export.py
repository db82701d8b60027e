"""Hugging Face model folders, written as published ones are: tensor by tensor, and whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from megatron_r1.data.tokenizer_folder import TOKENIZER_FILES
from megatron_r1.errors import ConversionError
from megatron_r1.model.architecture import Architecture
from megatron_r1.weights.fp8 import is_fp8_weight, scale_name, scale_shape
from megatron_r1.weights.generation import GENERATION_CONFIG, Generation
from megatron_r1.weights.hf import CONFIG, FP8_CONFIG, INDEX
from megatron_r1.weights.mapping import ROUTER_BIAS, hf_shapes
from megatron_r1.weights.safetensors_file import HfTensor, SafetensorsWriter, plan_files

MAX_SHARD_BYTES = 5_000_000_000


def hf_tensors(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> list[HfTensor]:
    """The tensors of a folder as published models have them: router biases in float32, everything else in `dtype`.

    With dtype float8_e4m3fn the projections are FP8, each followed by its scales, and the rest is bfloat16.
    """
    tensors = []
    for name, shape in shapes.items():
        if name.endswith(ROUTER_BIAS):
            tensors.append(HfTensor(name, shape, torch.float32))
        elif dtype is not torch.float8_e4m3fn:
            tensors.append(HfTensor(name, shape, dtype))
        elif is_fp8_weight(name):
            tensors += [HfTensor(name, shape, dtype), HfTensor(scale_name(name), scale_shape(shape), torch.float32)]
        else:
            tensors.append(HfTensor(name, shape, torch.bfloat16))
    return tensors


def write_index(folder: Path, files: dict[str, list[HfTensor]]) -> None:
    """Write the index of files as `plan_files` plans them."""
    total = sum(tensor.nbytes for tensors in files.values() for tensor in tensors)
    weight_map = {tensor.name: file for file, tensors in files.items() for tensor in tensors}
    _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def write_configs(
    folder: Path,
    arch: Architecture,
    dtype: torch.dtype,
    *,
    bos_token_id: int,
    eos_token_id: int,
    tokenizer: Path | None = None,
    generation: Generation | None = None,
) -> None:
    """Write config.json and generation_config.json, and copy the tokenizer files of folder `tokenizer`."""
    generation = generation or Generation()
    is_fp8 = dtype is torch.float8_e4m3fn
    name = "bfloat16" if is_fp8 else str(dtype).removeprefix("torch.")
    config = arch.to_hf_config(bos_token_id, eos_token_id, name) | {"eos_token_id": generation.ends(eos_token_id)}
    if is_fp8:
        config["quantization_config"] = {"activation_scheme": "dynamic", **FP8_CONFIG}
    _write_json(folder / CONFIG, config)
    _write_json(folder / GENERATION_CONFIG, generation.to_json(bos_token_id, eos_token_id))
    if tokenizer is not None:
        for name in TOKENIZER_FILES:
            if (tokenizer / name).is_file():
                shutil.copyfile(tokenizer / name, folder / name)


def export_hf(
    weights: Iterable[tuple[str, torch.Tensor]],
    arch: Architecture,
    folder: Path,
    *,
    bos_token_id: int,
    eos_token_id: int,
    tokenizer: Path | None = None,
    generation: Generation | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a folder that transformers, vLLM and `HfFolder` load; it appears under its name only when complete.

    Writes where it is called: in a job of many ranks, through `consume_on_rank_zero`. Holds one tensor at a time. An existing
    folder of that name is replaced.

    Args:
        weights: (Hugging Face name, full tensor), each tensor of the model once, router biases in float32, all others in the
            dtype of the first.
        arch: the model's shape.
        folder: the folder to write.
        bos_token_id: for config.json and generation_config.json.
        eos_token_id: likewise.
        tokenizer: folder whose tokenizer files are copied.
        generation: what the folder that the model came from says of generation, which is kept.
        max_shard_bytes: a new file is begun before this size would be passed.

    Raises:
        ConversionError: the weights are not exactly the model's, each once and with its shape and dtype.
        CheckpointError: the disk is full, or a file cannot be written.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        dtype = _write_tensors(weights, hf_shapes(arch), partial, max_shard_bytes)
        ids = {"bos_token_id": bos_token_id, "eos_token_id": eos_token_id}
        write_configs(partial, arch, dtype, **ids, tokenizer=tokenizer, generation=generation)
        _replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_tensors(
    weights: Iterable[tuple[str, torch.Tensor]], shapes: dict[str, tuple[int, ...]], folder: Path, max_shard_bytes: int
) -> torch.dtype:
    """Write the tensors and their index; return the dtype of the model. One file is open at a time if the tensors come in the order
    of `shapes`."""
    remaining = dict(shapes)
    files: dict[str, list[HfTensor]] = {}
    file_of: dict[str, str] = {}
    writers: dict[str, SafetensorsWriter] = {}
    try:
        for name, tensor in weights:
            if remaining.pop(name, None) != tuple(tensor.shape):
                raise ConversionError(
                    f"tensor {name} with shape {list(tensor.shape)} is unknown, twice there or should be {shapes.get(name)}"
                )
            if not files:
                dtype = tensor.dtype
                files = plan_files(hf_tensors(shapes, dtype), max_shard_bytes)
                file_of = {planned.name: file for file, tensors in files.items() for planned in tensors}
            file = file_of[name]
            if file not in writers:
                writers[file] = SafetensorsWriter(folder / file, files[file])
            writers[file].write(name, tensor)
            del tensor  # before the next one is made
            if not writers[file].missing:
                writers.pop(file).close()
    finally:
        for writer in writers.values():
            writer.discard()
    if remaining:
        raise ConversionError(f"the weights lack {len(remaining)} tensors, the first is {next(iter(remaining))}")
    write_index(folder, files)
    return dtype


def _replace(new: Path, folder: Path) -> None:
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
