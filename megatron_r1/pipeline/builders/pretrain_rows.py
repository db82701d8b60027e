"""From a config to the rows that pretraining trains on and validates with.

`mcore.blend_rows` is imported inside functions: on a machine without CUDA, Megatron-Core must be loaded through `mcore.host`, which
`open_session` prepares.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_r1.config.data import BlendSource
from megatron_r1.config.schema import Config
from megatron_r1.data.blend import BlendedRows
from megatron_r1.data.documents import DocumentStream, load_documents
from megatron_r1.data.fill_in_middle import FillInMiddle, count_chosen
from megatron_r1.data.prefetch import RowsAhead, Update
from megatron_r1.data.token_files import TokenFile, open_token_file
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.errors import DataError
from megatron_r1.runtime.distributed import broadcast_object, failing_together, is_rank_zero
from megatron_r1.runtime.waiting import give_sign
from megatron_r1.training.pretrain import count_rows
from megatron_r1.training.pretrain_plan import Phase, PretrainPlan
from megatron_r1.training.protocols import PretrainRows
from megatron_r1.training.validation import ValidationRows

if TYPE_CHECKING:
    from megatron_r1.mcore.blend_rows import BlendRows, WeightedPart
    from megatron_r1.mcore.source_rows import Filling


@dataclass(frozen=True)
class _Source:
    """A pair of files that was looked at."""

    file: TokenFile
    identity: str
    filling: Filling | None  #: of the documents to train on


class BlendOpener:
    """The sources of all blends of a run: looked at once, opened as often as rows of them are needed.

    All ranks make one and call its methods together; rank 0 looks and builds, the others wait for it.

    Args:
        paths: of the sources, without ending.

    Raises:
        DataError: a file that is missing, cut off, damaged or of another tokenizer; one of sentences, for fill in the middle.
        ConfigError: fill in the middle with a tokenizer without its tokens.
    """

    def __init__(self, config: Config, tokenizer: Tokenizer, paths: Sequence[str]) -> None:
        self._config, self._tokenizer = config, tokenizer
        self.cache = Path(config.data.index_cache or Path(config.run_dir) / "index")
        with failing_together():
            files = [open_token_file(path) for path in paths]
        found: list[tuple[str, Filling | None]] = []
        with failing_together(is_long=True):
            if is_rank_zero():
                found = [self._look_at(file) for file in files]
        found = broadcast_object(found)
        self._sources = {path: _Source(file, *of_file) for path, file, of_file in zip(paths, files, found, strict=True)}

    def _look_at(self, file: TokenFile) -> tuple[str, Filling | None]:
        note = file.check(self._tokenizer, give_sign)
        if note is not None:
            print(note, file=sys.stderr, flush=True)
        identity = file.identify(give_sign)
        return identity, self._fill(file, identity) if self._config.pretrain.fill_in_middle_rate else None

    def _fill(self, file: TokenFile, identity: str) -> Filling:
        from megatron_r1.mcore.source_rows import Filling

        rate, tokenizer = self._config.pretrain.fill_in_middle_rate, self._tokenizer
        if file.documents != file.written_documents:
            raise DataError(
                f"{file.prefix}: has {file.documents} sequences of {file.written_documents} documents, and "
                f"pretrain.fill_in_middle_rate={rate} is for whole documents: preprocess them without --split-sentences"
            )
        fill, starts = FillInMiddle(tokenizer, rate, self._config.seed, identity), tuple(tokenizer.start_ids)
        chosen = count_chosen(fill, file.lengths, self._trained_on(file), len(starts), give_sign)
        return Filling(fill, starts, tokenizer.eos_id, chosen)

    def same(self, one: Sequence[BlendSource], other: Sequence[BlendSource]) -> bool:
        """Whether two blends have the same content and weights, wherever they stand."""
        return self._content(one) == self._content(other)

    def _content(self, blend: Sequence[BlendSource]) -> list[tuple[str, float]]:
        total = sum(source.weight for source in blend)
        return [(self._sources[source.path].identity, source.weight / total) for source in blend]

    def check(self, blend: Sequence[BlendSource], sequence_length: int) -> None:
        """Raises DataError if a source of a blend has not enough tokens for a row to train on, or to validate with."""
        for of_validation in (False, True) if self._config.pretrain.validation.interval else (False,):
            self._parts(blend, sequence_length, of_validation=of_validation)

    def training(
        self, blend: Sequence[BlendSource], sequence_length: int, rows: int, seed: int, taken: Mapping[str, int]
    ) -> BlendRows:
        """Rows to train on.

        Args:
            sequence_length: tokens of a row.
            rows: that are needed.
            seed: of the order.
            taken: `SourceRows.order` -> rows of it that other blends have taken already.

        Raises:
            DataError: a source that has not enough tokens for one row.
            ConfigError: the index cannot be written.
        """
        from megatron_r1.mcore.source_rows import order_of

        parts = self._parts(blend, sequence_length, of_validation=False)
        begun = [replace(each, first_row=taken.get(order_of(each.part, sequence_length, seed), 0)) for each in parts]
        return self._open(begun, sequence_length, rows, seed)

    def validation(
        self, blend: Sequence[BlendSource], sequence_length: int, rows: int, *, mask_documents: bool, seed: int
    ) -> dict[str, ValidationRows]:
        """Short name of each source -> rows of its part for validation: at most so many, and each once. See `training`.

        There is no fill in the middle: the losses of runs with and without it are of the same rows.
        """
        found = {}
        for name, weighted in zip(_short_names(blend), self._parts(blend, sequence_length, of_validation=True), strict=True):
            held = min(rows, (weighted.part.tokens - 1) // sequence_length)
            opened = self._open([weighted], sequence_length, held, seed)
            found[name] = ValidationRows(self.blended(opened, mask_documents=mask_documents), held, sequence_length)
        return found

    def blended(
        self,
        rows: BlendRows,
        *,
        mask_documents: bool,
        first_row: int = 0,
        order: str | None = None,
        shorter: Collection[str] = (),
    ) -> BlendedRows:
        """The rows as the trainer asks for them; see `BlendedRows` for the arguments."""
        eos, size = self._tokenizer.eos_id, self._tokenizer.vocab_size
        return BlendedRows(
            rows,
            eos_id=eos,
            vocab_size=size,
            mask_documents=mask_documents,
            first_row=first_row,
            order=order,
            shorter=shorter,
        )

    def _trained_on(self, file: TokenFile) -> range:
        return split_documents(file, self._config.data.split)[0]

    def _parts(self, blend: Sequence[BlendSource], sequence_length: int, *, of_validation: bool) -> list[WeightedPart]:
        from megatron_r1.mcore.blend_rows import WeightedPart
        from megatron_r1.mcore.source_rows import SourcePart

        parts = []
        for source in blend:
            found = self._sources[source.path]
            documents = split_documents(found.file, self._config.data.split)[of_validation]
            part = SourcePart(found.file, found.identity, documents, None if of_validation else found.filling)
            require_row(source.path, len(documents), part.tokens, sequence_length, self._config.data.split, of_validation)
            parts.append(WeightedPart(source.path, part, source.weight))
        return parts

    def _open(self, parts: Sequence[WeightedPart], sequence_length: int, rows: int, seed: int) -> BlendRows:
        from megatron_r1.mcore.blend_rows import BlendRows

        blend = BlendRows(parts, sequence_length, seed, rows, self.cache)
        with failing_together(is_long=True):
            if is_rank_zero():
                blend.build()
        with failing_together():
            blend.open()
        return blend


def split_documents(file: TokenFile, split: Sequence[float]) -> tuple[range, range]:
    """The documents of a source to train on, and to validate with. Args: `split`: data.split."""
    trained, validated = split
    border = round(trained / (trained + validated) * file.documents)
    return range(border), range(border, file.documents)


def require_row(path: str, documents: int, tokens: int, length: int, split: Sequence[float], of_validation: bool) -> None:
    """Raises DataError if a part of a source has not enough tokens for one row of `length`."""
    if tokens <= length:
        raise DataError(
            f"data.split={list(split)} leaves {documents} documents of {tokens} tokens of {path} "
            f"{'to validate with' if of_validation else 'to train on'}: a row is {length} tokens and one more"
        )


def _short_names(blend: Sequence[BlendSource]) -> list[str]:
    """The last names of the sources' paths; with the place in the blend where two are alike."""
    names = [Path(source.path).name for source in blend]
    return [name if names.count(name) == 1 else f"{number}_{name}" for number, name in enumerate(names)]


@dataclass(frozen=True)
class _Stretch:
    """Phases with rows of one length from one blend, between which no phase has rows of this length from another."""

    blend: list[BlendSource]
    phases: list[Phase]


class PretrainData:
    """What every phase of a run trains on and validates with: rows of `data.blend` or its own blend, else of `data.source`.

    Ranks make one together. Phases with rows of the same length go on in the same order; in another blend each source goes on
    where the phases before left it. Raises DataError and ConfigError, see `BlendOpener`.
    """

    def __init__(self, config: Config, tokenizer: Tokenizer, plan: PretrainPlan) -> None:
        self._config, self._tokenizer, self._plan = config, tokenizer, plan
        self._fill_in_middle = FillInMiddle(tokenizer, config.pretrain.fill_in_middle_rate, config.seed)
        if config.data.blend:
            self._open_blends()
        else:
            self._source = load_documents(config.data)

    def _open_blends(self) -> None:
        config, stage = self._config, self._config.pretrain
        blends = [phase.settings.blend or config.data.blend for phase in self._plan.phases]
        self._opener = BlendOpener(config, self._tokenizer, list(dict.fromkeys(s.path for blend in blends for s in blend)))
        self._stretches: list[tuple[_Stretch, BlendRows]] = []
        taken: dict[str, int] = {}
        for phase, blend in zip(self._plan.phases, blends, strict=True):  # before an index is made
            self._opener.check(blend, phase.sequence_length)
        for stretch in self._find_stretches(blends):
            count, length = sum(map(self._count, stretch.phases)), stretch.phases[0].sequence_length
            opened = self._opener.training(stretch.blend, length, count, config.seed, taken)
            taken |= opened.ends()
            self._stretches.append((stretch, opened))
        # Those of the first stretch, of the first two, ..., of all. A run to which phases were added began with one of them.
        prints = [opened.fingerprint for _, opened in self._stretches]
        orders = [order_of_run(prints[:count]) for count in range(1, len(prints) + 1)]
        begins = [stretch.phases[0].number for stretch, _ in self._stretches]
        self._blends: dict[int, tuple[BlendedRows, dict[str, ValidationRows]]] = {}
        mask, most = stage.mask_documents, stage.validation.batches * stage.global_batch_size
        for stretch, opened in self._stretches:
            held_out, first, length = {}, 0, opened.sequence_length
            if stage.validation.interval:
                held_out = self._opener.validation(stretch.blend, length, most, mask_documents=mask, seed=config.seed)
            for phase in stretch.phases:
                trained = sum(begin < phase.number for begin in begins)
                shorter = orders[max(trained - 1, 0) : -1]
                rows = self._opener.blended(opened, mask_documents=mask, first_row=first, order=orders[-1], shorter=shorter)
                self._blends[phase.number] = rows, held_out
                first += self._count(phase)

    def _find_stretches(self, blends: Sequence[list[BlendSource]]) -> list[_Stretch]:
        found: list[_Stretch] = []
        last: dict[int, _Stretch] = {}  # length of a row -> the one that goes on
        for phase, blend in zip(self._plan.phases, blends, strict=True):
            stretch = last.get(phase.sequence_length)
            if stretch is None or not self._opener.same(stretch.blend, blend):
                stretch = last[phase.sequence_length] = _Stretch(blend, [])
                found.append(stretch)
            stretch.phases.append(phase)
        return found

    def _count(self, phase: Phase) -> int:
        return count_rows(self._config.pretrain, self._plan, phase)

    def of_phase(self, phase: Phase, *, reads: bool = True) -> tuple[PretrainRows, dict[str, ValidationRows]]:
        """The rows to train on, and short name of each source -> rows to validate with.

        Args:
            reads: whether this rank needs tokens, see `BlendedRows`.
        """
        config, mask = self._config, self._config.pretrain.mask_documents
        if not config.data.blend:
            length, first = phase.sequence_length, phase.first_token
            return DocumentStream(self._source, self._tokenizer, config.seed, mask, length, first, self._fill_in_middle), {}
        training, validation = self._blends[phase.number]
        for rows in (training, *(source.rows for source in validation.values())):
            if isinstance(rows, BlendedRows):
                rows.reads = reads
        return training, validation

    def describe_index(self) -> str:
        """Where the index of a blend is, and how large."""
        from megatron_r1.mcore.blend_rows import blend_index_bytes

        counts: dict[int, int] = {}
        for phase in self._plan.phases:
            counts[phase.sequence_length] = counts.get(phase.sequence_length, 0) + self._count(phase)
        size = blend_index_bytes([opened for _, opened in self._stretches])
        rows = ", ".join(f"{rows:,} rows of {length:,} tokens" for length, rows in sorted(counts.items()))
        return f"{self._opener.cache}: {rows}, {size / 1e6:,.1f} MB of indices"


def order_of_run(fingerprints: Sequence[str]) -> str:
    """What the rows of all phases follow from: of a run with one blend the blend's own fingerprint."""
    different = list(dict.fromkeys(fingerprints))
    return different[0] if len(different) == 1 else hashlib.sha256(" ".join(different).encode()).hexdigest()[:32]


@contextmanager
def ahead_of_training(rows: PretrainRows, plan: Iterable[Update], updates: int) -> Iterator[PretrainRows]:
    """The rows, for the block: read by a thread, so many updates ahead, unless that is 0.

    Args:
        plan: this rank's part of every update to come.
    """
    if not updates:
        yield rows
        return
    with RowsAhead(rows, plan, updates) as ahead:
        yield ahead


def blend_indices(config: Config) -> dict[str, str]:
    """Setting -> path of what an artifact notes of all blends: their .idx files, of which hashes can be made in time."""
    blends = {"data.blend": config.data.blend}
    blends |= {f"pretrain.phases.{number}.blend": phase.blend for number, phase in enumerate(config.pretrain.phases)}
    return {f"{key}.{i}.idx": f"{source.path}.idx" for key, blend in blends.items() for i, source in enumerate(blend)}
