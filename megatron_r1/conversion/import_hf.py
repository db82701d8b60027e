"""A Hugging Face folder into a Megatron checkpoint that any layout loads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megatron_r1.config.model import ParallelConfig
from megatron_r1.conversion.dtypes import import_dtype
from megatron_r1.conversion.megatron_folder import POLICY, copy_companions
from megatron_r1.conversion.parts import cut, own_share, part_bytes, write_parts
from megatron_r1.conversion.torch_dist import Chunk, DataFile, write_metadata
from megatron_r1.conversion.work_folder import WorkFolder, naming_problems
from megatron_r1.errors import ConversionError
from megatron_r1.mcore.ask_ranks import shards_of_layout
from megatron_r1.mcore.layout import Layout, smallest_layout
from megatron_r1.mcore.pieces import Piece, Shards
from megatron_r1.model.architecture import Architecture
from megatron_r1.model.hf_config import read_hf_config
from megatron_r1.model.rows import Split
from megatron_r1.runtime.checkpoints import COMPLETE, STATE, manifest_entry, seal
from megatron_r1.runtime.distributed import failing_together, is_rank_zero, on_rank_zero, world_size
from megatron_r1.runtime.files import write_atomically
from megatron_r1.runtime.progress import Progress
from megatron_r1.weights.fp8 import prepare_decoder
from megatron_r1.weights.fused_tensors import fuse
from megatron_r1.weights.hf import CONFIG, HfFolder
from megatron_r1.weights.mapping import Entry, hf_shapes, model_entries, repeated_names

_STRIPE = 1 << 22  # elements compared at a time


class EntryToStore(NamedTuple):
    """One entry of the mapping table, its dtype, and the boxes in which it is stored."""

    entry: Entry
    dtype: torch.dtype
    pieces: list[Piece]

    @property
    def nbytes(self) -> int:
        """Of the Megatron tensor."""
        return torch.Size(self.entry.full_shape).numel() * self.dtype.itemsize


def import_folder(hf: Path, out: Path, sizes: ParallelConfig, dtype: torch.dtype | None, max_file_bytes: int) -> None:
    """Write `out` as a checkpoint folder: weights, config.json and tokenizer, hashed and sealed. All ranks call this.

    Raises:
        CheckpointError: a missing or broken folder or file on either side.
        ConversionError: tensors that are missing, unknown, of another shape, not finite, or copies that differ; `out` exists.
        ConfigError: a layout that does not fit the model.
    """
    with failing_together():
        source = HfFolder(hf)
        arch = source.architecture()
    layout, shards = on_rank_zero(lambda: _plan(source, arch, sizes))
    with failing_together():
        items = [EntryToStore(entry, import_dtype(entry, source, dtype), []) for entry in model_entries(arch)]
    for piece in shards.pieces:
        items[piece.entry].pieces.append(piece)
    nbytes = [item.nbytes for item in items]
    limit = part_bytes(sum(nbytes), max_file_bytes)
    parts = cut(nbytes, limit)
    identity = {
        "from": str(hf.resolve()), "layout": sizes.model_dump(), "dtype": str(dtype), "part bytes": limit,
        "files": {file: (hf / file).stat().st_size for file in sorted(set(source.files.values()))},
    }  # fmt: skip
    work = WorkFolder(out, identity, lambda folder: (folder / COMPLETE).is_file())
    left = [i for i in range(len(parts)) if work.note(_part_name(i)) is None]
    with naming_problems(out):
        on_rank_zero(lambda: work.require_space(sum(nbytes[i] for part in left for i in parts[part])))
        on_rank_zero(lambda: (work.folder / POLICY).mkdir(exist_ok=True))
        with failing_together():
            _write_parts(source, work, {part: [items[i] for i in parts[part]] for part in own_share(left)})
        on_rank_zero(lambda: _finish_import(source, work, len(parts), {"import": identity, "world_size": layout.world_size}))


def _plan(source: HfFolder, arch: Architecture, sizes: ParallelConfig) -> tuple[Layout, Shards]:
    """Look at all headers of the folder, and ask Megatron-Core who stores what."""
    shapes = hf_shapes(arch)
    source.check_names(shapes, repeated_names(arch))
    source.check_shapes({name: shape for name, shape in shapes.items() if name in source.files})
    layout = smallest_layout(sizes, arch)
    return layout, shards_of_layout(arch, layout)


def _part_name(part: int) -> str:
    return f"__{part}_0.distcp"


def _write_parts(source: HfFolder, work: WorkFolder, parts: dict[int, list[EntryToStore]]) -> None:
    if source.holds_fp8:
        prepare_decoder()  # before threads wait for the first tensor
    total = sum(item.nbytes for items in parts.values() for item in items)
    share = f" (rank 0 of {world_size()})" if world_size() > 1 else ""
    with Progress(total, f"import{share}", enabled=is_rank_zero(), unit="B") as progress:

        def fill(file: DataFile, item: EntryToStore, tensors: list[torch.Tensor]) -> None:
            for piece in item.pieces:
                box = _take_box(item.entry, tensors, piece.area(len(item.entry.full_shape)))
                if box.numel():  # a rank may hold nothing but padding of the vocabulary
                    file.add(piece.key, piece.global_shape, piece.offset, box.reshape(piece.shape))
            progress.advance(item.nbytes)

        write_parts(
            parts,
            read=partial(_read_entry, source),
            open_file=lambda part: DataFile(work.folder / POLICY / _part_name(part)),
            fill=fill,
            close=partial(_close_part, work),
        )


def _close_part(work: WorkFolder, file: DataFile) -> None:
    """Put a file on disk, then note that it is there."""
    file.close()
    chunks = [(c.key, str(c.dtype).removeprefix("torch."), *c[2:]) for c in file.chunks]
    work.add_note(file.path.name, {"bytes": file.bytes, "xxh128": file.checksum(), "chunks": chunks})


def _read_entry(source: HfFolder, item: EntryToStore) -> list[torch.Tensor]:
    """The tensors of an entry; its copies are held against it."""
    tensors = [source.read(name, dtype=item.dtype) for name in item.entry.hf]
    for copy in (name for name in item.entry.repeats if name in source.files):
        step = max(1, _STRIPE // tensors[0].shape[1])
        for start in range(0, len(tensors[0]), step):
            rows = slice(start, min(start + step, len(tensors[0])))
            if not torch.equal(source.read(copy, rows, dtype=item.dtype), tensors[0][rows]):
                raise ConversionError(
                    f"tensor {copy} in {source.folder / source.files[copy]} differs from {item.entry.name}, which it should repeat"
                )
    return tensors


def _take_box(entry: Entry, tensors: Sequence[torch.Tensor], area: tuple[slice, ...]) -> torch.Tensor:
    """A box of the fused tensor; stacked tensors are not copied for a box that lies in one of them."""
    if entry.split is Split.GLU:
        first = 0
        for tensor in tensors:
            if first <= area[0].start and area[0].stop <= first + len(tensor):
                return tensor[slice(area[0].start - first, area[0].stop - first), *area[1:]]
            first += len(tensor)
    return fuse(entry, tensors)[area]


def _finish_import(source: HfFolder, work: WorkFolder, num_parts: int, state: dict[str, Any]) -> None:
    """Put the parts together, add what stands beside the weights, and seal."""
    notes = {_part_name(part): work.note(_part_name(part)) for part in range(num_parts)}
    chunks = [Chunk(key, getattr(torch, dtype), *map(_untuple, rest)) for n in notes.values() for key, dtype, *rest in n["chunks"]]
    policy = work.folder / POLICY
    write_metadata(policy, chunks)
    copy_companions(source.folder, work.folder)
    config = config_as_stored(source)
    if config != source.config:
        write_atomically(work.folder / CONFIG, json.dumps(config, indent=2) + "\n")
    write_atomically(work.folder / STATE, json.dumps(state, indent=1))
    hashed = {f"{POLICY}/{name}": {"bytes": note["bytes"], "xxh128": note["xxh128"]} for name, note in notes.items()}
    for path in sorted(path for path in work.folder.rglob("*") if path.is_file()):
        name = str(path.relative_to(work.folder))
        if name not in hashed:
            hashed[name] = manifest_entry(path)
    work.finish(partial(_seal, hashed))


def config_as_stored(source: HfFolder) -> dict[str, Any]:
    """The folder's config.json, its fields as its tensors say where these have less of the model."""
    said, arch = read_hf_config(source.config), source.architecture()
    if said == arch:
        return source.config
    changed = {name: value for name, value in arch.model_dump().items() if value != getattr(said, name)}
    spellings = {key for key, name in arch.HF_SPELLINGS.items() if name in changed}
    return {key: value for key, value in source.config.items() if key not in spellings} | changed


def _untuple(value: Any) -> Any:
    """JSON has lists where there were tuples."""
    return tuple(value) if isinstance(value, list) else value


def _seal(hashed: dict[str, dict[str, Any]], folder: Path, final: Path) -> None:
    seal(folder, final, {"files": hashed})
