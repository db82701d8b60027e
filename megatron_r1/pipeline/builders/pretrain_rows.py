"""From a config to the rows that pretraining trains on and validates with.

`mcore.blend_rows` is imported inside functions: on a machine without CUDA, Megatron-Core must be loaded through `mcore.host`, which
`open_session` prepares.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_r1.config.data import BlendSource, DataConfig
from megatron_r1.config.schema import Config
from megatron_r1.data.blend import BlendedRows
from megatron_r1.data.documents import DocumentStream, load_documents
from megatron_r1.data.fill_in_middle import FillInMiddle
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


@dataclass(frozen=True)
class _Source:
    """A source whose files were looked at."""

    source: BlendSource
    file: TokenFile
    identity: str


class BlendOpener:
    """The sources of `data.blend`, or of a phase that has others: looked at once, opened as often as rows of them are needed.

    All ranks make one and call its methods together; rank 0 looks and builds, the others wait for it.

    Raises:
        DataError: a file that is missing, cut off, damaged or of another tokenizer.
    """

    def __init__(self, config: Config, tokenizer: Tokenizer, sources: Sequence[BlendSource] | None = None) -> None:
        self._config, self._tokenizer = config, tokenizer
        self.cache = Path(config.data.index_cache or Path(config.run_dir) / "index")
        sources = config.data.blend if sources is None else sources
        with failing_together():
            files = [open_token_file(source.path) for source in sources]
        identities: list[str] = []
        with failing_together(is_long=True):
            if is_rank_zero():
                identities = [self._look_at(file) for file in files]
        identities = broadcast_object(identities)
        self._sources = [_Source(*looked_at) for looked_at in zip(sources, files, identities, strict=True)]

    def _look_at(self, file: TokenFile) -> str:
        note = file.check(self._tokenizer, give_sign)
        if note is not None:
            print(note, file=sys.stderr, flush=True)
        return file.identify(give_sign)

    def training(self, sequence_length: int, rows: int, *, mask_documents: bool, seed: int, first_row: int = 0) -> BlendedRows:
        """Rows to train on.

        Args:
            sequence_length: tokens of a row.
            rows: that are needed.
            mask_documents: see `BlendedRows`.
            seed: of the order.
            first_row: the number in the blend of the first.

        Raises:
            DataError: a source that has not enough tokens for one row.
            ConfigError: the index cannot be written.
        """
        blend = self._open(self._parts(sequence_length, of_validation=False), sequence_length, first_row + rows, seed)
        return self._rows(blend, mask_documents, first_row)

    def validation(self, sequence_length: int, rows: int, *, mask_documents: bool, seed: int) -> dict[str, ValidationRows]:
        """Short name of each source -> rows of its part for validation: at most so many, and each once. See `training`."""
        found = {}
        for name, weighted in zip(self._short_names(), self._parts(sequence_length, of_validation=True), strict=True):
            held = min(rows, (weighted.part.tokens - 1) // sequence_length)
            blend = self._open([weighted], sequence_length, held, seed)
            found[name] = ValidationRows(self._rows(blend, mask_documents, 0), held, sequence_length)
        return found

    def _short_names(self) -> list[str]:
        """The last names of their paths; with the place in the blend where two are alike."""
        names = [Path(looked_at.source.path).name for looked_at in self._sources]
        return [name if names.count(name) == 1 else f"{number}_{name}" for number, name in enumerate(names)]

    def index_bytes(self, sequence_length: int, rows: int) -> int:
        """Size on disk of the index of so many rows to train on."""
        from megatron_r1.mcore.blend_rows import blend_index_bytes

        return blend_index_bytes(self._parts(sequence_length, of_validation=False), sequence_length, rows)

    def _parts(self, sequence_length: int, *, of_validation: bool) -> list[WeightedPart]:
        from megatron_r1.mcore.blend_rows import WeightedPart
        from megatron_r1.mcore.source_rows import SourcePart

        parts = []
        for looked_at in self._sources:
            count = looked_at.file.documents
            trained, validated = self._config.data.split
            bound = round(trained / (trained + validated) * count)
            part = SourcePart(looked_at.file, looked_at.identity, range(bound, count) if of_validation else range(bound))
            if part.tokens <= sequence_length:
                raise DataError(
                    f"data.split={self._config.data.split} leaves {len(part.documents)} documents of {part.tokens} tokens of "
                    f"{looked_at.source.path} {'to validate with' if of_validation else 'to train on'}: a row is {sequence_length} "
                    "tokens and one more"
                )
            parts.append(WeightedPart(looked_at.source.path, part, looked_at.source.weight))
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

    def _rows(self, blend: BlendRows, mask_documents: bool, first_row: int) -> BlendedRows:
        return BlendedRows(
            blend,
            eos_id=self._tokenizer.eos_id,
            vocab_size=self._tokenizer.vocab_size,
            mask_documents=mask_documents,
            first_row=first_row,
        )


class PretrainData:
    """What every phase of a run trains on and validates with: rows of `data.blend`, else of `data.source`. Ranks make one together.

    Phases with rows of the same length go on in the same order. Raises DataError and ConfigError, see `BlendOpener`.
    """

    def __init__(self, config: Config, tokenizer: Tokenizer, plan: PretrainPlan) -> None:
        self._config, self._tokenizer, self._plan = config, tokenizer, plan
        self._fill_in_middle = FillInMiddle(tokenizer, config.pretrain.fill_in_middle_rate, config.seed)
        if config.data.blend:
            self._opener = BlendOpener(config, tokenizer)
            self._blends = {phase.number: self._open(phase) for phase in plan.phases}
        else:
            self._source = load_documents(config.data)

    def _open(self, phase: Phase) -> tuple[BlendedRows, dict[str, ValidationRows]]:
        stage, seed = self._config.pretrain, self._config.seed
        length, mask = phase.sequence_length, stage.mask_documents
        alike = [other for other in self._plan.phases if other.sequence_length == length]
        counts = [count_rows(stage, self._plan, other) for other in alike]
        first = sum(counts[: alike.index(phase)])
        training = self._opener.training(length, sum(counts) - first, mask_documents=mask, seed=seed, first_row=first)
        if not stage.validation.interval:
            return training, {}
        most = stage.validation.batches * stage.global_batch_size
        return training, self._opener.validation(length, most, mask_documents=mask, seed=seed)

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
        lengths = {phase.sequence_length for phase in self._plan.phases}
        counts = {length: 0 for length in sorted(lengths)}
        for phase in self._plan.phases:
            counts[phase.sequence_length] += count_rows(self._config.pretrain, self._plan, phase)
        size = sum(self._opener.index_bytes(length, rows) for length, rows in counts.items())
        rows = ", ".join(f"{rows:,} rows of {length:,} tokens" for length, rows in counts.items())
        return f"{self._opener.cache}: {rows}, {size / 1e6:,.1f} MB of indices"


@contextmanager
def ahead_of_training(rows: PretrainRows, plan: Iterable[Update], updates: int) -> Iterator[PretrainRows]:
    """The rows, for the block: those of a blend read by a thread, so many updates ahead, unless that is 0.

    Documents that are made on demand are not read ahead: what they save must be where training is.

    Args:
        plan: this rank's part of every update to come.
    """
    if not updates or not isinstance(rows, BlendedRows):
        yield rows
        return
    with RowsAhead(rows, plan, updates) as ahead:
        yield ahead


def blend_indices(data: DataConfig) -> dict[str, str]:
    """Setting -> path of what an artifact notes of `data.blend`: its .idx files, of which hashes can be made in time."""
    return {f"data.blend.{number}.idx": f"{source.path}.idx" for number, source in enumerate(data.blend)}
