"""Hugging Face model folders, read piece by piece. Safetensors only, never pickle; `hf_export` writes them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import torch

from megatron_r1.errors import CheckpointError, ConversionError
from megatron_r1.model.architecture import Architecture
from megatron_r1.model.hf_config import read_hf_config
from megatron_r1.weights.finite import is_finite
from megatron_r1.weights.fp8 import BLOCK, SCALE_SUFFIX, dequantize_into, may_hold_nan, scale_name, scale_shape
from megatron_r1.weights.safetensors_file import DTYPES, SafetensorsFile, StoredTensor

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
#: What config.json says of block-scaled FP8; other values of these keys are refused.
FP8_CONFIG = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [BLOCK, BLOCK]}

_DERIVED = ".rotary_emb.inv_freq"  #: frequencies that older versions of transformers stored; they follow from config.json
_NAMED = 5  # tensors named in one message
_STRIPE_BYTES = 1 << 23  # read, converted and checked at a time, so that it stays in the cache


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
        check_quantization(folder / CONFIG, self.config.get("quantization_config"))
        self._open: dict[str, SafetensorsFile] = {}
        self._file_of = self._find_files()  # with scales
        self._names_in: dict[str, list[str]] = {}
        for name, file in self._file_of.items():
            self._names_in.setdefault(file, []).append(name)
        #: Tensor name -> file name, without scales and without what follows from config.json.
        self.files = {name: file for name, file in self._file_of.items() if not name.endswith((SCALE_SUFFIX, _DERIVED))}
        scales = [name for name in self._file_of if name.endswith(SCALE_SUFFIX)]
        self.holds_fp8 = bool(scales)  #: weights with scales
        for name in scales:
            if name.removesuffix(SCALE_SUFFIX) not in self.files:
                raise CheckpointError(f"{folder / self._file_of[name]} has scales {name} without their weight")

    def architecture(self) -> Architecture:
        """Shape of the model whose tensors are here. Raises CheckpointError for one that this project does not have."""
        try:
            return read_hf_config(self.config).as_stored(self.files)
        except ValueError as error:
            raise CheckpointError(f"{self.folder / CONFIG}: {error}") from error

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the file's header."""
        return self._find(name)[1].shape

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor as it is stored: float8_e4m3fn if `read` dequantises it."""
        return DTYPES[self._find(name)[1].dtype]

    def nbytes(self, name: str) -> int:
        """Bytes of a tensor on disk, those of its scales included."""
        scales = self._find_scales(name)
        return self._find(name)[1].nbytes + (scales[1].nbytes if scales else 0)

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
        shape = stored.shape
        is_fp8 = DTYPES[stored.dtype] is torch.float8_e4m3fn
        result_dtype = dtype or (torch.bfloat16 if is_fp8 else DTYPES[stored.dtype])
        picked = [range(size)[part] for size, part in zip(shape, (rows, columns), strict=False)]
        out = torch.empty([*map(len, picked), *shape[2:]], dtype=result_dtype)
        if out.numel():
            picked_rows = picked[0] if shape else range(1)
            picked_columns = picked[1] if len(shape) == 2 else range(math.prod(shape[1:]))
            self._read_matrix(name, picked_rows, picked_columns, out.view(len(picked_rows), -1))
        return out

    def check_names(self, wanted: Iterable[str], optional: Collection[str] = ()) -> None:
        """Raises ConversionError if the folder's tensors, without scales, are not `wanted`, those in `optional` or not."""
        wanted = set(wanted)
        missing = sorted(wanted - self.files.keys() - set(optional))
        extra = sorted(self.files.keys() - wanted - set(optional))
        for what, names in (("lacks", missing), ("has unknown", extra)):
            if names:
                more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
                raise ConversionError(f"model folder {self.folder} {what} tensors: {', '.join(names[:_NAMED])}{more}")

    def check_kinds(self, shapes: dict[str, tuple[int, ...]], optional: Collection[str]) -> None:
        """Look at all names, and at the header of the first tensor of every kind, whatever its layer and expert.

        It costs the opening of a few files, on every rank. Raises as `check_names` and `check_shapes`.
        """
        self.check_names(shapes, optional)
        kinds: dict[str, str] = {}
        for name in (name for name in shapes if name in self.files):
            kinds.setdefault(re.sub(r"\.\d+\.", ".N.", name), name)
        self.check_shapes({name: shapes[name] for name in kinds.values()})

    def check_shapes(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Look at the header of every tensor of `shapes`; no weights are read.

        Raises:
            ConversionError: no such tensor, another shape, no floating-point numbers, FP8 without fitting scales or scales
                without FP8.
            CheckpointError: a file that is broken or does not fit the index.
        """
        for name, shape in shapes.items():
            file, stored = self._find(name)
            self._find_scales(name)
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
        """Where a tensor is, known to be floating-point."""
        if name not in self.files:
            raise ConversionError(f"model folder {self.folder} has no tensor {name}")
        file = self._open_file(self.files[name])
        stored = file.tensors[name]
        if stored.dtype not in DTYPES:
            raise ConversionError(f"tensor {name} in {file.path} is {stored.dtype}; weights are one of {', '.join(DTYPES)}")
        return file, stored

    def _find_scales(self, name: str) -> tuple[SafetensorsFile, StoredTensor] | None:
        """Where the scales of a tensor are, known to fit it; None for one that is not FP8."""
        file, stored = self._find(name)
        scales, is_fp8 = scale_name(name), DTYPES[stored.dtype] is torch.float8_e4m3fn
        if is_fp8 != (scales in self._file_of):
            what = f"without {scales}" if is_fp8 else f"but has {scales}, as FP8 weights do"
            raise ConversionError(f"tensor {name} in {file.path} is {stored.dtype} {what}")
        if not is_fp8:
            return None
        file = self._open_file(self._file_of[scales])
        found, shape = file.tensors[scales], scale_shape(stored.shape)
        if len(shape) != 2 or found.shape != shape or found.dtype != "F32":
            raise ConversionError(
                f"tensor {scales} in {file.path} is {found.dtype} {list(found.shape)}, expected F32 {list(shape)}: "
                f"one scale for each block of {BLOCK} x {BLOCK}"
            )
        return file, found

    def _read_scales(self, name: str, rows: range, columns: range) -> torch.Tensor | None:
        """The scales of the blocks that these rows and columns touch; None for a tensor that is not FP8."""
        found = self._find_scales(name)
        if found is None:
            return None
        file, stored = found
        scales = torch.empty(stored.shape, dtype=torch.float32)
        file.read_into(scales, stored.offset)
        _check_finite(scale_name(name), file.path, scales)
        return scales[_blocks(rows), _blocks(columns)]

    def _read_matrix(self, name: str, rows: range, columns: range, out: torch.Tensor) -> None:
        """Rows and columns of a tensor into `out`, stripe by stripe."""
        file, stored = self._find(name)
        scales = self._read_scales(name, rows, columns)
        dtype, width = DTYPES[stored.dtype], math.prod(stored.shape[1:])
        row_bytes = width * dtype.itemsize
        step = max(1, _STRIPE_BYTES // row_bytes)
        as_stored = dtype is out.dtype and len(columns) == width
        buffer = out if as_stored else torch.empty(min(step, len(rows)), width, dtype=dtype)
        for start in range(0, len(rows), step):
            target = out[start : start + step]
            stripe = target if as_stored else buffer[: len(target)]
            first = rows[start]
            file.read_into(stripe, stored.offset + first * row_bytes)
            piece = stripe[:, columns.start : columns.stop]
            if scales is not None:
                touched = _blocks(range(first % BLOCK, first % BLOCK + len(target)))
                part = scales[first // BLOCK - rows.start // BLOCK :][touched]
                dequantize_into(target, piece, part, first % BLOCK, columns.start % BLOCK)
                if may_hold_nan(piece, part, out.dtype):
                    _check_finite(name, file.path, target)
                continue
            if not as_stored:
                target.copy_(piece)
            _check_finite(name, file.path, target)


def _blocks(part: range) -> slice:
    """The blocks that rows or columns touch."""
    return slice(part.start // BLOCK, -(-part.stop // BLOCK))


def _check_finite(name: str, path: Path, values: torch.Tensor) -> None:
    if not is_finite(values):
        raise ConversionError(f"tensor {name} in {path} holds NaN or infinite values, as {values.dtype}")


def check_quantization(path: Path, quantization: Any) -> None:
    """Raises CheckpointError for a `quantization_config` of the config.json `path` that is none and not block-scaled FP8."""
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
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    except RecursionError:
        raise CheckpointError(f"{path} is not valid JSON: it is nested too deeply") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} does not hold a JSON object")
    return content
