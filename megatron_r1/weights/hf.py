"""Hugging Face model folders: written whole or not at all, read piece by piece. Safetensors only, never pickle."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from megatron_r1.errors import CheckpointError, ConversionError
from megatron_r1.model.architecture import Architecture
from megatron_r1.model.hf_config import read_hf_config
from megatron_r1.weights.fp8 import BLOCK, SCALE_SUFFIX, dequantize_into, is_fp8_weight, scale_name, scale_shape
from megatron_r1.weights.mapping import hf_shapes
from megatron_r1.weights.safetensors_file import (
    DTYPES,
    HfTensor,
    SafetensorsFile,
    SafetensorsWriter,
    StoredTensor,
    plan_files,
)

CONFIG, GENERATION_CONFIG, INDEX, SINGLE = (
    "config.json",
    "generation_config.json",
    "model.safetensors.index.json",
    "model.safetensors",
)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
MAX_SHARD_BYTES = 5_000_000_000
#: What config.json says of block-scaled FP8; other values of these keys are refused.
FP8_CONFIG = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [BLOCK, BLOCK]}

_NAMED = 5  # tensors named in one message
_STRIPE_BYTES = 1 << 20  # read, converted and checked at a time, so that it stays in the cache


class HfFolder:
    """A model folder opened for reading. FP8 weights are dequantised; their scales are not tensors of their own.

    Nothing is mapped into memory: a read takes the memory of its result, and a stripe of 1 MiB or one row more.

    Raises:
        CheckpointError: no such folder, no config.json or safetensors in it, a file that is missing or broken, an index that
            does not fit its files, a quantisation that this project does not read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not folder.is_dir():
            raise CheckpointError(f"model folder {folder} does not exist")
        self.config: dict[str, Any] = _read_json(folder / CONFIG)
        _check_quantization(folder / CONFIG, self.config.get("quantization_config"))
        self._open: dict[str, SafetensorsFile] = {}
        self._file_of = self._find_files()  # with scales
        self._names_in: dict[str, list[str]] = {}
        for name, file in self._file_of.items():
            self._names_in.setdefault(file, []).append(name)
        #: Tensor name -> file name, without scales.
        self.files = {name: file for name, file in self._file_of.items() if not name.endswith(SCALE_SUFFIX)}
        for name in self._file_of.keys() - self.files.keys():
            if name.removesuffix(SCALE_SUFFIX) not in self.files:
                raise CheckpointError(f"{folder / self._file_of[name]} has scales {name} without their weight")

    def architecture(self) -> Architecture:
        """Shape of the model. Raises CheckpointError where it is not one that this project has."""
        try:
            return read_hf_config(self.config)
        except ValueError as error:
            raise CheckpointError(f"{self.folder / CONFIG}: {error}") from error

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the file's header."""
        return self._find(name)[1].shape

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor as it is stored: float8_e4m3fn where `read` dequantises."""
        return DTYPES[self._find(name)[1].dtype]

    def nbytes(self, name: str) -> int:
        """Bytes of a tensor on disk, those of its scales included."""
        names = [name, scale_name(name)] if self.dtype(name) is torch.float8_e4m3fn else [name]
        return sum(self._find(part)[1].nbytes for part in names)

    def read(
        self, name: str, rows: slice = slice(None), columns: slice = slice(None), dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """A tensor, or some rows and columns of it; only the rows are read from disk. FP8 weights are dequantised.

        Args:
            name: of the tensor.
            rows: of axis 0, without a step.
            columns: of axis 1, without a step; ignored for vectors.
            dtype: of the result; None: as stored, and bfloat16 for FP8.

        Raises:
            ConversionError: no such tensor; a value that is NaN or infinite; scales that do not fit.
            CheckpointError: a file that is broken or does not fit the index.
        """
        stored = self._find(name)[1]
        is_fp8 = DTYPES[stored.dtype] is torch.float8_e4m3fn
        shape = stored.shape
        picked = [range(size)[part] for size, part in zip(shape, (rows, columns), strict=False)]
        result_dtype = dtype or (torch.bfloat16 if is_fp8 else DTYPES[stored.dtype])
        out = torch.empty([*map(len, picked), *shape[2:]], dtype=result_dtype)
        if out.numel():
            picked_rows = picked[0] if shape else range(1)
            picked_columns = picked[1] if len(shape) == 2 else range(math.prod(shape[1:]))
            scales = self._read_scales(name, picked_rows, picked_columns) if is_fp8 else None
            self._read_matrix(name, picked_rows, picked_columns, scales, out.view(len(picked_rows), -1))
        return out

    def check_names(self, wanted: Iterable[str]) -> None:
        """Raises ConversionError where the folder's tensors, without scales, are not exactly `wanted`."""
        wanted = set(wanted)
        missing, extra = sorted(wanted - self.files.keys()), sorted(self.files.keys() - wanted)
        for what, names in (("lacks", missing), ("has unknown", extra)):
            if names:
                more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
                raise ConversionError(f"model folder {self.folder} {what} tensors: {', '.join(names[:_NAMED])}{more}")

    def check_shapes(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Look at the header of every tensor of `shapes`; no weights are read.

        Raises:
            ConversionError: no such tensor, another shape, no floating-point numbers, FP8 without fitting scales or scales
                without FP8.
            CheckpointError: a file that is broken or does not fit the index.
        """
        for name, shape in shapes.items():
            file, stored = self._find(name)
            if stored.shape != tuple(shape):
                raise ConversionError(
                    f"tensor {name} in {file.path} has shape {list(stored.shape)}, expected {list(shape)}: "
                    f"{CONFIG} or the file is wrong"
                )

    def _find_files(self) -> dict[str, str]:
        """Tensor name -> file name, with scales."""
        index = self.folder / INDEX
        if not index.is_file():
            if not (self.folder / SINGLE).is_file():
                pickles = sorted(path.name for path in self.folder.glob("pytorch_model*.bin"))
                why = f"; {pickles[0]} is a pickle, which is never loaded: convert it to safetensors" if pickles else ""
                raise CheckpointError(f"model folder {self.folder} has neither {INDEX} nor {SINGLE}{why}")
            self._open[SINGLE] = SafetensorsFile(self.folder / SINGLE)
            return dict.fromkeys(self._open[SINGLE].tensors, SINGLE)
        files = _read_json(index).get("weight_map")
        if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
            raise CheckpointError(f"{index} has no weight_map of tensor names to file names")
        for name in sorted(set(files.values())):
            if Path(name).name != name:
                raise CheckpointError(f"{index} names {name}, which is not a file of this folder")
            if not (self.folder / name).is_file():
                raise CheckpointError(f"{index} names {name}, which is missing")
        return files

    def _open_file(self, file: str) -> SafetensorsFile:
        """A file of the index, which holds what the index says and nothing else."""
        if file not in self._open:
            opened = SafetensorsFile(self.folder / file)
            for name in opened.tensors:
                if self._file_of.get(name) != file:
                    place = f"places in {self._file_of[name]}" if name in self._file_of else "does not know"
                    raise CheckpointError(f"{opened.path} holds tensor {name}, which {INDEX} {place}")
            for name in self._names_in[file]:
                if name not in opened.tensors:
                    raise CheckpointError(f"{opened.path} does not hold tensor {name}, which {INDEX} says it does")
            self._open[file] = opened
        return self._open[file]

    def _find(self, name: str) -> tuple[SafetensorsFile, StoredTensor]:
        """Where a tensor is, known to be floating-point and to have scales exactly where it is FP8."""
        if name not in self.files:
            raise ConversionError(f"model folder {self.folder} has no tensor {name}")
        file = self._open_file(self.files[name])
        stored = file.tensors[name]
        if stored.dtype not in DTYPES:
            raise ConversionError(f"tensor {name} in {file.path} is {stored.dtype}; weights are one of {', '.join(DTYPES)}")
        is_fp8, has_scales = DTYPES[stored.dtype] is torch.float8_e4m3fn, scale_name(name) in self._file_of
        if is_fp8 and not has_scales:
            raise ConversionError(f"tensor {name} in {file.path} is FP8 without {scale_name(name)}")
        if has_scales and not is_fp8:
            raise ConversionError(f"tensor {name} in {file.path} is {stored.dtype}, but {scale_name(name)} says FP8")
        return file, stored

    def _read_scales(self, name: str, rows: range, columns: range) -> torch.Tensor:
        """The scales of the blocks that these rows and columns touch."""
        stored = self._find(name)[1]
        scales = self._open_file(self._file_of[scale_name(name)])
        found = scales.tensors[scale_name(name)]
        wanted = scale_shape(stored.shape)
        if len(wanted) != 2 or found.shape != wanted or found.dtype != "F32":
            raise ConversionError(
                f"tensor {scale_name(name)} in {scales.path} is {found.dtype} {list(found.shape)}, expected F32 {list(wanted)}"
            )
        whole = torch.empty(wanted, dtype=torch.float32)
        scales.read_into(whole, found.offset)
        _check_finite(scale_name(name), scales.path, whole)
        return whole[_blocks(rows), _blocks(columns)]

    def _read_matrix(self, name: str, rows: range, columns: range, scales: torch.Tensor | None, out: torch.Tensor) -> None:
        """Rows and columns of a tensor into `out`, stripe by stripe."""
        file, stored = self._find(name)
        dtype = DTYPES[stored.dtype]
        num_rows = stored.shape[0] if stored.shape else 1
        width, row_bytes = math.prod(stored.shape[1:]), stored.nbytes // num_rows
        step = max(1, _STRIPE_BYTES // row_bytes)
        as_stored = dtype is out.dtype and len(columns) == width
        buffer = None if as_stored else torch.empty(min(step, len(rows)), width, dtype=dtype)
        for start in range(0, len(rows), step):
            target = out[start : start + step]
            stripe = target if as_stored else buffer[: len(target)]
            first = rows[start]
            file.read_into(stripe, stored.offset + first * row_bytes)
            piece = stripe[:, columns.start : columns.stop]
            if scales is not None:
                top = first // BLOCK - rows.start // BLOCK
                part = scales[top : top + -(-(first % BLOCK + len(target)) // BLOCK)]
                dequantize_into(target, piece, part, first % BLOCK, columns.start % BLOCK)
            elif not as_stored:
                target.copy_(piece)
            _check_finite(name, file.path, target)


def hf_tensors(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> list[HfTensor]:
    """The tensors of a folder as published models have them: router biases in float32, everything else in `dtype`.

    With dtype float8_e4m3fn the projections are FP8, each followed by its scales, and the rest is bfloat16.
    """
    tensors = []
    for name, shape in shapes.items():
        if name.endswith(".e_score_correction_bias"):
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
) -> None:
    """Write config.json and generation_config.json, and copy the tokenizer files of folder `tokenizer`."""
    ids = {"bos_token_id": bos_token_id, "eos_token_id": eos_token_id}
    is_fp8 = dtype is torch.float8_e4m3fn
    name = "bfloat16" if is_fp8 else str(dtype).removeprefix("torch.")
    config = arch.to_hf_config(bos_token_id, eos_token_id, name)
    if is_fp8:
        config["quantization_config"] = {"activation_scheme": "dynamic", **FP8_CONFIG}
    _write_json(folder / CONFIG, config)
    _write_json(folder / GENERATION_CONFIG, {"_from_model_config": True, **ids})
    for name in TOKENIZER_FILES if tokenizer else ():
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
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a folder that transformers, vLLM and `HfFolder` load; it appears under its name only when complete.

    Writes where it is called: in a job of many ranks, through `feed_rank_zero`. Holds one tensor at a time. An existing folder
    of that name is replaced.

    Args:
        weights: (Hugging Face name, full tensor), each tensor of the model once, router biases in float32, all others in the
            dtype of the first.
        arch: the model's shape.
        folder: where to.
        bos_token_id: for config.json and generation_config.json.
        eos_token_id: likewise.
        tokenizer: folder whose tokenizer files are copied.
        max_shard_bytes: a new file is begun before this size would be passed.

    Raises:
        ConversionError: the weights are not exactly the model's, each once and with its shape and dtype.
        CheckpointError: the disk is full, or a file cannot be written.
    """
    weights = iter(weights)
    first = next(weights, None)
    if first is None:
        raise ConversionError("there are no weights to export")
    dtype = first[1].dtype
    files = plan_files(hf_tensors(hf_shapes(arch), dtype), max_shard_bytes)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _write_files(chain([first], weights), files, partial)
        write_index(partial, files)
        write_configs(partial, arch, dtype, bos_token_id=bos_token_id, eos_token_id=eos_token_id, tokenizer=tokenizer)
        _replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_files(weights: Iterable[tuple[str, torch.Tensor]], files: dict[str, list[HfTensor]], folder: Path) -> None:
    """Write all files; one is open at a time where the weights come in the order of the plan."""
    file_of = {tensor.name: file for file, tensors in files.items() for tensor in tensors}
    shapes = {tensor.name: tensor.shape for tensors in files.values() for tensor in tensors}
    remaining = dict.fromkeys(file_of)
    writers: dict[str, SafetensorsWriter] = {}
    try:
        for name, tensor in weights:
            if name not in remaining or shapes[name] != tuple(tensor.shape):
                raise ConversionError(
                    f"tensor {name} with shape {list(tensor.shape)} is unknown, twice there or should be {shapes.get(name)}"
                )
            del remaining[name]
            file = file_of[name]
            if file not in writers:
                writers[file] = SafetensorsWriter(folder / file, files[file])
            writers[file].write(name, tensor)
            if not writers[file].missing:
                writers.pop(file).close()
    finally:
        for writer in writers.values():
            writer.discard()
    if remaining:
        raise ConversionError(f"the weights lack {len(remaining)} tensors, the first is {next(iter(remaining))}")


def _replace(new: Path, folder: Path) -> None:
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _blocks(part: range) -> slice:
    """The blocks that rows or columns touch."""
    return slice(part.start // BLOCK, -(-part.stop // BLOCK))


def _check_finite(name: str, path: Path, values: torch.Tensor) -> None:
    low, high = torch.aminmax(values)  # NaN wins over every number
    if not (torch.isfinite(low) and torch.isfinite(high)):
        raise ConversionError(f"tensor {name} in {path} holds NaN or infinite values, as {values.dtype}")


def _check_quantization(path: Path, quantization: Any) -> None:
    if quantization is None:
        return
    if not isinstance(quantization, dict) or quantization.get("quant_method") != FP8_CONFIG["quant_method"]:
        raise CheckpointError(f"{path}: quantization_config is not block-scaled FP8; give the model's unquantised folder")
    for key, want in FP8_CONFIG.items():
        if quantization.get(key, want) != want:
            raise CheckpointError(f"{path}: quantization_config.{key} is {quantization[key]!r}, only {want!r} is read")


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
