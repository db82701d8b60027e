"""A SentencePiece model as its file has it: what is read of it, and what is refused."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from google.protobuf.message import DecodeError
from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from megatron_r1.errors import DataError, one_line

#: the types of pieces in sentencepiece_model.proto
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
UNIGRAM, BPE, WORD, CHAR = 1, 2, 3, 4
SPACE = "\u2581"  #: what a piece holds for a space
_LFS = b"version https://git-lfs"


@dataclass(frozen=True)
class PieceModel:
    """The content of a .model file."""

    content: bytes

    def __reduce__(self) -> tuple[type[PieceModel], tuple[bytes]]:
        return PieceModel, (self.content,)

    @cached_property
    def proto(self) -> Any:
        """The parsed file.

        Raises:
            DataError: no model of SentencePiece, not the whole of one, or of a kind that is not read.
        """
        if not self.content:
            raise DataError("is not a SentencePiece model: it is empty")
        if self.content.startswith(_LFS):
            raise DataError("holds the address of a file in Git LFS, not the file: fetch it with git lfs pull")
        try:
            proto = ModelProto.FromString(self.content)
            self.processor  # noqa: B018  # what the library itself checks
        except (DecodeError, RuntimeError) as error:
            reason = one_line(error).removeprefix("INTERNAL: ")
            raise DataError(f"is not a SentencePiece model, or not the whole of one ({reason})") from None
        if not (proto.HasField("trainer_spec") and proto.HasField("normalizer_spec")):
            raise DataError("is not the whole of a SentencePiece model: what stands after the pieces is missing")
        if reason := _not_read(proto):
            raise DataError(f"is a SentencePiece model {reason}, which this project does not read")
        return proto

    @cached_property
    def processor(self) -> SentencePieceProcessor:
        """The library's own encoder. Raises RuntimeError if the library refuses the file."""
        return SentencePieceProcessor(model_proto=self.content)

    def variant(self, *, keeps_characters: bool = False) -> SentencePieceProcessor:
        """An encoder for text that goes on: no space is put before it, and none is removed.

        Args:
            keeps_characters: whether the text is already normalised.
        """
        proto = ModelProto()
        proto.CopyFrom(self.proto)
        proto.normalizer_spec.add_dummy_prefix = proto.normalizer_spec.remove_extra_whitespaces = False
        if keeps_characters:
            proto.normalizer_spec.precompiled_charsmap = b""
        return SentencePieceProcessor(model_proto=proto.SerializeToString())

    def control(self) -> tuple[str | None, str | None, str | None]:
        """Its pieces for beginning of sequence, end of sequence and padding; None for one that it has not."""
        ids = (self.processor.bos_id(), self.processor.eos_id(), self.processor.pad_id())
        bos, eos, pad = (self.proto.pieces[id].piece if id >= 0 else None for id in ids)
        return bos, eos, pad


def _not_read(proto: Any) -> str | None:
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    if trainer.model_type == WORD:
        return "of whole words (model_type=word)"
    if trainer.treat_whitespace_as_suffix:
        return "that puts spaces after words (treat_whitespace_as_suffix)"
    if not normalizer.escape_whitespaces:
        return "that does not escape spaces (escape_whitespaces=false)"
    if proto.denormalizer_spec.precompiled_charsmap:
        return "that changes characters in decoding (denormalizer_spec)"
    return None
