"""A model in Megatron's format: a converted folder, a checkpoint of a run, or a run, whose newest complete checkpoint counts."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_r1.conversion.torch_dist import StoredTensors
from megatron_r1.data.tokenizer_folder import TOKENIZER_FILES
from megatron_r1.errors import CheckpointError, ConversionError
from megatron_r1.mcore.ask_ranks import shards_of_layout
from megatron_r1.mcore.layout import Layout
from megatron_r1.mcore.pieces import Piece
from megatron_r1.model.architecture import Architecture
from megatron_r1.model.hf_config import read_hf_config
from megatron_r1.model.rows import Split
from megatron_r1.runtime.checkpoints import COMPLETE, complete_checkpoints
from megatron_r1.runtime.distributed import failing_together, on_rank_zero
from megatron_r1.weights.finite import is_finite
from megatron_r1.weights.generation import GENERATION_CONFIG
from megatron_r1.weights.hf import CONFIG
from megatron_r1.weights.local_weights import name_some
from megatron_r1.weights.mapping import checkpoint_names, model_entries

POLICY = "policy"  #: the weights, below a checkpoint
_COMPANIONS = {CONFIG, GENERATION_CONFIG, *TOKENIZER_FILES}
_RELATIVE_IMPORT = re.compile(r"^\s*from\s+\.(\w+)\s+import", re.MULTILINE)
_OPTIMIZER = ("optimizer.", "chained_")  # of a run's checkpoint, beside the weights
AVERAGE = "ema."  #: before the names of the weights: their average, of a run with pretrain.ema_decay


def holds_megatron(folder: Path) -> bool:
    """Whether a folder is, or holds, a model in Megatron's format, complete or not."""
    return (folder / POLICY).is_dir() or (folder / "checkpoints").is_dir()


def find_megatron_folder(folder: Path) -> Path:
    """The complete folder with `policy/` that `folder` is or holds.

    Raises:
        CheckpointError: there is none.
    """
    runs = [*complete_checkpoints(folder / "checkpoints"), *complete_checkpoints(folder)]
    found = runs[-1] if runs else folder
    if not (found / POLICY).is_dir():
        raise CheckpointError(f"{folder} holds no Megatron checkpoint: neither a folder {POLICY} nor checkpoints of a run")
    if not (found / COMPLETE).is_file():
        raise CheckpointError(f"{found} is not complete: it has no file {COMPLETE}, so its writing was interrupted")
    if not (found / CONFIG).is_file():
        raise CheckpointError(f"{found} has no {CONFIG}: put the model's there")
    return found


def copy_companions(source: Path, target: Path) -> None:
    """Copy what belongs to a model beside its weights: configs, tokenizer, licence, and its own code if its configs name some.

    Nothing else is copied: a folder of weights may hold anything, and the rest of a download.
    """
    companions = _COMPANIONS | _own_code(source)
    for path in sorted(source.iterdir()):
        if path.is_file() and (path.name in companions or path.suffix == ".tiktoken" or path.name.startswith("LICENSE")):
            shutil.copyfile(path, target / path.name)


def _own_code(folder: Path) -> set[str]:
    """The Python files that `auto_map` of the configs names ("modeling_x.Model"), and those that they import from beside them."""
    waiting = []
    for name in (CONFIG, "tokenizer_config.json"):
        try:
            named = json.loads((folder / name).read_text(encoding="utf-8")).get("auto_map") or {}
        except (OSError, ValueError, AttributeError, RecursionError):
            continue  # who reads these files says what is wrong with them
        texts = (text for value in named.values() for text in (value if isinstance(value, list) else [value]))
        waiting += [text.partition(".")[0] for text in texts if isinstance(text, str)]
    found: set[str] = set()
    while waiting:
        path = folder / f"{waiting.pop()}.py"
        if path.name not in found and path.parent == folder and path.is_file():
            found.add(path.name)
            waiting += _RELATIVE_IMPORT.findall(path.read_text(encoding="utf-8", errors="replace"))
    return found


class MegatronFolder:
    """The weights of a model in Megatron's format, read entry by entry of the mapping table.

    Args:
        folder: see `find_megatron_folder`.
        pieces: every stored box of the model, in any layout; the names of the stored tensors come from them.
        of_average: read the average of the weights; those that are not averaged, being untrained, and router biases are the last.

    Raises:
        CheckpointError: no complete checkpoint, or one without an average.
        ConversionError: the checkpoint has tensors that the model has not, or the other way round, or other shapes.
    """

    def __init__(self, folder: Path, arch: Architecture, pieces: Sequence[Piece], *, of_average: bool = False) -> None:
        self.folder = folder
        self.entries = model_entries(arch)
        self._stored = StoredTensors(folder / POLICY)
        #: per entry: name of the tensor that holds it, and where on that tensor's first axes
        self._places: list[tuple[str, tuple[int, ...]]] = [("", ())] * len(self.entries)
        shapes, padded = {}, set()
        for piece in pieces:
            lead = len(piece.global_shape) - len(self.entries[piece.entry].full_shape)
            self._places[piece.entry] = (piece.key, piece.offset[:lead])
            shapes[piece.key] = piece.global_shape
            if self.entries[piece.entry].split is Split.VOCAB:
                padded.add(piece.key)
        averaged = {name for name in self._stored.names() if name.startswith(AVERAGE)}
        if of_average and not averaged:
            raise CheckpointError(f"{folder / POLICY} holds no average of the weights: only runs with pretrain.ema_decay have one")
        self._averaged = averaged if of_average else set()
        stored = {name for name in self._stored.names() if not name.startswith((*_OPTIMIZER, AVERAGE))}
        self._named_otherwise = checkpoint_names(stored, arch)
        stored = (stored - set(self._named_otherwise.values())) | self._named_otherwise.keys()
        problems = [f"it lacks {key}" for key in sorted(shapes.keys() - stored)]
        problems += [f"it has {key}, which the model has not" for key in sorted(stored - shapes.keys())]
        problems += [
            f"{key} has shape {list(shape)}, expected {list(shapes[key])}"
            for key, shape in ((key, self._stored.shape(self._stored_name(key))) for key in sorted(shapes.keys() & stored))
            if not _fits_padded(shape, shapes[key], may_be_longer=key in padded)
        ]
        if problems:
            raise ConversionError(f"{folder / POLICY} does not hold the model of its {CONFIG}: {name_some(problems)}")

    def dtype(self, entry: int) -> torch.dtype:
        """Dtype in which an entry is stored."""
        return self._stored.dtype(self._stored_name(self._places[entry][0]))

    def _stored_name(self, key: str) -> str:
        """What the folder calls a tensor: a checkpoint of Transformer Engine's layers may have other names than ours."""
        return self._named_otherwise.get(key, key)

    def read(self, entry: int) -> torch.Tensor:
        """The whole Megatron tensor of an entry.

        Raises:
            CheckpointError: a file is missing or broken.
            ConversionError: a value that is NaN or infinite.
        """
        key, lead = self._places[entry]
        name = self._stored_name(key)
        tensor = self._stored.read(AVERAGE + name if AVERAGE + name in self._averaged else name, lead)
        if self.entries[entry].split is Split.VOCAB:
            tensor = tensor[: self.entries[entry].full_shape[0]]
        if not is_finite(tensor):
            raise ConversionError(f"tensor {key} in {self.folder / POLICY} holds NaN or infinite values")
        return tensor


def _fits_padded(shape: tuple[int, ...], wanted: tuple[int, ...], may_be_longer: bool) -> bool:
    """A run pads the vocabulary until its tensor-parallel ranks divide it."""
    return shape[1:] == wanted[1:] and (shape[0] >= wanted[0] if may_be_longer else shape[0] == wanted[0])


def open_megatron(folder: Path, *, of_average: bool = False) -> tuple[MegatronFolder, Architecture]:
    """Open a folder that is, or holds, a model in Megatron's format. All ranks call this. Weights are found by Megatron's names.

    Args:
        of_average: see `MegatronFolder`.

    Raises:
        CheckpointError: no complete checkpoint, one without the average that is asked for, or of an architecture that this project
            does not have.
        ConversionError: the checkpoint does not hold the model of its config.json.
    """
    found = on_rank_zero(lambda: find_megatron_folder(folder))
    arch = on_rank_zero(lambda: megatron_architecture(found))
    pieces = on_rank_zero(lambda: shards_of_layout(arch, Layout()).pieces)
    with failing_together():
        return MegatronFolder(found, arch, pieces, of_average=of_average), arch


def megatron_architecture(folder: Path) -> Architecture:
    """Shape of the model of a folder with `config.json`. Raises CheckpointError."""
    path = folder / CONFIG
    try:
        return read_hf_config(json.loads(path.read_text()))
    except RecursionError:
        raise CheckpointError(f"{path} cannot be used: it is nested too deeply") from None
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be used: {error}") from error
