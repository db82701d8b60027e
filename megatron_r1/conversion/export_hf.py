"""A Megatron checkpoint of any layout into a Hugging Face folder, as published ones are."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_r1.conversion.megatron_folder import MegatronFolder, copy_companions, open_megatron
from megatron_r1.conversion.parts import own_share, part_bytes, write_parts
from megatron_r1.conversion.work_folder import WorkFolder, naming_problems
from megatron_r1.errors import ConversionError
from megatron_r1.model.architecture import Architecture
from megatron_r1.model.registry import families
from megatron_r1.runtime.checkpoints import COMPLETE, verify_checkpoint
from megatron_r1.runtime.distributed import failing_together, is_rank_zero, on_rank_zero, world_size
from megatron_r1.runtime.files import write_atomically
from megatron_r1.runtime.progress import Progress
from megatron_r1.weights.fp8 import is_fp8_weight, quantize, scale_name, scale_shape
from megatron_r1.weights.fused_tensors import unfuse
from megatron_r1.weights.generation import GENERATION_CONFIG
from megatron_r1.weights.hf import CONFIG, FP8_CONFIG
from megatron_r1.weights.hf_export import write_index
from megatron_r1.weights.mapping import ROUTER_BIAS
from megatron_r1.weights.safetensors_file import HfTensor, SafetensorsWriter, plan_files

FP8 = torch.float8_e4m3fn


def export_folder(megatron: Path, out: Path, dtype: torch.dtype | None, max_file_bytes: int, *, of_average: bool = False) -> None:
    """Write `out`: safetensors, index, config.json and what else stands beside the weights. All ranks call this.

    Args:
        of_average: write the average of the weights that a run with `pretrain.ema_decay` keeps.

    Raises:
        CheckpointError: no complete checkpoint, a missing or broken file, a full disk.
        ConversionError: the checkpoint does not hold its model, a value is not finite, FP8 for a model that has none; `out` exists.
    """
    source, arch = open_megatron(megatron, of_average=of_average)
    verify_checkpoint(source.folder)
    if dtype is FP8 and not arch.HAS_FP8:
        have = ", ".join(f"{name}'s" for name, family in families().items() if family.architecture.HAS_FP8)
        raise ConversionError(f"--dtype fp8: block-scaled FP8 is {have}, {arch.model_type} has bf16 and fp32")
    tensors, entry_of = _plan_tensors(source, dtype)
    total = sum(tensor.nbytes for tensor in tensors)
    limit = part_bytes(total, max_file_bytes)
    files = plan_files(tensors, limit)
    identity = {
        "from": str(source.folder.resolve()), "checkpoint": (source.folder / COMPLETE).read_text(), "dtype": str(dtype),
        "part bytes": limit, **({"weights": "average"} if of_average else {}),
    }  # fmt: skip
    work = WorkFolder(out, identity, lambda folder: True)
    left = [file for file in files if work.note(file) is None]
    with naming_problems(out):
        on_rank_zero(lambda: work.require_space(sum(tensor.nbytes for file in left for tensor in files[file])))
        with failing_together():
            _write_own_files(source, work, {file: files[file] for file in own_share(left)}, entry_of)
        on_rank_zero(lambda: _finish_export(source.folder, arch, work, files, tensors))


def _plan_tensors(source: MegatronFolder, dtype: torch.dtype | None) -> tuple[list[HfTensor], dict[str, int]]:
    """Every tensor of the folder in order, and the entry that each comes from."""
    tensors, entry_of = [], {}
    for i, entry in enumerate(source.entries):
        shapes = [*zip(entry.hf, entry.shapes, strict=True), *((copy, entry.shapes[0]) for copy in entry.copies)]
        for name, shape in shapes:
            if name.endswith(ROUTER_BIAS):
                made = [HfTensor(name, shape, torch.float32)]
            elif dtype is FP8 and is_fp8_weight(name):
                made = [HfTensor(name, shape, FP8), HfTensor(scale_name(name), scale_shape(shape), torch.float32)]
            else:
                made = [HfTensor(name, shape, torch.bfloat16 if dtype is FP8 else dtype or source.dtype(i))]
            tensors += made
            entry_of.update(dict.fromkeys((tensor.name for tensor in made), i))
    return tensors, entry_of


def _write_own_files(source: MegatronFolder, work: WorkFolder, files: dict[str, list[HfTensor]], entry_of: dict[str, int]) -> None:
    total = sum(tensor.nbytes for tensors in files.values() for tensor in tensors)
    share = f" (rank 0 of {world_size()})" if world_size() > 1 else ""
    wanted = {file: {tensor.name: tensor for tensor in tensors} for file, tensors in files.items()}
    # An entry whose tensors lie in two files is read for each.
    parts = {file: [(file, i) for i in sorted({entry_of[name] for name in names})] for file, names in wanted.items()}
    with Progress(total, f"export{share}", enabled=is_rank_zero(), unit="B") as progress:

        def fill(writer: SafetensorsWriter, item: tuple[str, int], tensor: torch.Tensor) -> None:
            file, i = item
            for name, value in _values(source, i, tensor, wanted[file]):
                writer.write(name, value)
                progress.advance(wanted[file][name].nbytes)

        def close(writer: SafetensorsWriter) -> None:
            writer.close()
            work.add_note(writer.path.name, {"bytes": writer.nbytes})

        write_parts(
            parts,
            read=lambda item: source.read(item[1]),
            open_file=lambda file: SafetensorsWriter(work.folder / file, files[file]),
            fill=fill,
            close=close,
        )


def _values(
    source: MegatronFolder, i: int, tensor: torch.Tensor, wanted: dict[str, HfTensor]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The Hugging Face tensors of an entry that belong into one file. Quantised weights may lie apart from their scales."""
    entry = source.entries[i]
    parts = unfuse(entry, tensor)
    for name, part in [*zip(entry.hf, parts, strict=True), *((copy, parts[0]) for copy in entry.copies)]:
        is_fp8 = name in wanted and wanted[name].dtype is FP8
        if is_fp8 or scale_name(name) in wanted:
            codes, scales = quantize(part)
            yield from ((n, v) for n, v in ((name, codes), (scale_name(name), scales)) if n in wanted)
        elif name in wanted:
            yield name, part.to(wanted[name].dtype)


def _finish_export(
    source: Path, arch: Architecture, work: WorkFolder, files: dict[str, list[HfTensor]], tensors: list[HfTensor]
) -> None:
    write_index(work.folder, files)
    copy_companions(source, work.folder)
    dtype = FP8 if any(tensor.dtype is FP8 for tensor in tensors) else tensors[0].dtype
    config = json.loads((source / CONFIG).read_text())
    write_atomically(work.folder / CONFIG, json.dumps(_config_of(config, arch, dtype), indent=2) + "\n")
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id") if key in config}
    if not (work.folder / GENERATION_CONFIG).exists():
        generation = {"_from_model_config": True, **ids}
        write_atomically(work.folder / GENERATION_CONFIG, json.dumps(generation, indent=2) + "\n")
    work.finish()


def _config_of(config: dict[str, Any], arch: Architecture, dtype: torch.dtype) -> dict[str, Any]:
    """The model's config.json, all its fields kept, for tensors of another dtype."""
    name = "bfloat16" if dtype is FP8 else str(dtype).removeprefix("torch.")
    quantization = {"activation_scheme": "dynamic", **FP8_CONFIG}
    config = {key: value for key, value in config.items() if key != "quantization_config"} | {"torch_dtype": name}
    if "dtype" in config:  # transformers 5 writes this key
        config["dtype"] = name
    return config | ({"quantization_config": quantization} if dtype is FP8 else {})
