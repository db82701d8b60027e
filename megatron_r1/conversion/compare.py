"""Whether a Hugging Face folder and a Megatron checkpoint hold the same numbers, tensor by tensor and bit by bit.

Equal means: as one direction of the conversion would write the other side. Tensors of one dtype have the same bits. Of two
dtypes, casting one gives the other (import or export with `--dtype`). An FP8 weight, dequantised, is Megatron's tensor (imported),
or Megatron's tensor, quantised, is the FP8 weight (exported with `--dtype fp8`). No tolerance is needed.
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path

import torch

from megatron_r1.conversion.megatron_folder import MegatronFolder, open_megatron
from megatron_r1.conversion.parts import own_share, read_ahead
from megatron_r1.errors import ConversionError
from megatron_r1.runtime.distributed import failing_together, gather_objects, is_rank_zero, on_rank_zero, world_size
from megatron_r1.runtime.progress import Progress
from megatron_r1.weights.fp8 import dequantize, quantize
from megatron_r1.weights.fused_tensors import unfuse
from megatron_r1.weights.hf import HfFolder
from megatron_r1.weights.mapping import hf_shapes, repeated_names

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def compare_folders(hf: Path, megatron: Path, *, of_average: bool = False) -> str:
    """Compare every tensor, copies included; with `of_average` those of Megatron's average. All ranks call this.

    Returns:
        How many tensors are equal, on one line.

    Raises:
        CheckpointError: a missing or broken folder or file.
        ConversionError: the folders hold other tensors; a tensor differs: the message names the first.
    """
    with failing_together():
        source = HfFolder(hf)
    stored, arch = open_megatron(megatron, of_average=of_average)
    shapes = hf_shapes(arch)

    def check() -> None:
        if source.architecture() != arch:
            raise ConversionError(f"config.json in {hf} and in {stored.folder} describe different models")
        source.check_names(shapes, repeated_names(arch))
        source.check_shapes({name: shape for name, shape in shapes.items() if name in source.files})

    on_rank_zero(check)
    with failing_together():
        counts, differing = _compare_share(source, stored)
    found = sorted(name for of_rank in gather_objects(differing) for name in of_rank)
    total: Counter[str] = sum(gather_objects(counts), Counter())
    summary = ", ".join(f"{count} {how}" for how, count in sorted(total.items(), key=lambda item: -item[1]))
    if found:
        _, name, place = found[0]
        raise ConversionError(
            f"{len(found)} of {len(shapes)} tensors differ between {hf} and {stored.folder}: "
            f"the first is {name} {place} ({summary})"
        )
    return f"{total.total()} tensors are equal ({summary})"


def _compare_share(source: HfFolder, stored: MegatronFolder) -> tuple[Counter[str], list[tuple[int, str, str]]]:
    entries = own_share(range(len(stored.entries)))
    counts: Counter[str] = Counter()
    differing = []
    sizes = {i: sum(source.nbytes(name) for name in stored.entries[i].hf) for i in entries}
    share = f" (rank 0 of {world_size()})" if world_size() > 1 else ""
    with Progress(sum(sizes.values()), f"verify{share}", enabled=is_rank_zero(), unit="B") as progress:
        for i, tensor in read_ahead(stored.read, entries):
            entry = stored.entries[i]
            parts = unfuse(entry, tensor)
            copies = [(copy, parts[0]) for copy in entry.repeats if copy in source.files]
            for name, part in [*zip(entry.hf, parts, strict=True), *copies]:
                how = _how_equal(source, name, part)
                if how is None:
                    differing.append((i, name, f"in {source.folder / source.files[name]}"))
                else:
                    counts[how] += 1
            progress.advance(sizes[i])
    return counts, differing


def _how_equal(source: HfFolder, name: str, part: torch.Tensor) -> str | None:
    """In which way a tensor is equal to Megatron's; None if it is not."""
    dtype, read = source.dtype(name), partial(source.read, name)
    if dtype is torch.float8_e4m3fn:
        if _same_bits(read(dtype=part.dtype), part):
            return "after dequantising"
        codes, scales = quantize(part)
        return "after quantising" if _same_bits(read(dtype=torch.float32), dequantize(codes, scales, torch.float32)) else None
    if dtype is part.dtype:
        return "bit for bit" if _same_bits(read(), part) else None
    same = _same_bits(read(dtype=part.dtype), part) or _same_bits(read(), part.to(dtype))
    return "after a cast" if same else None


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    integers = _INTEGERS[a.element_size()]
    return torch.equal(a.contiguous().view(integers), b.contiguous().view(integers))
