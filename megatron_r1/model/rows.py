"""What one kind of weight is called in Megatron-Core and in Hugging Face, its shape and how Megatron splits it, as plain data.

A family lists its rows, `weights/mapping.py` makes the table of a whole model of them. The functions below are the rows that
several families share.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Split(Enum):
    """How tensor parallelism cuts a Megatron tensor."""

    REPLICATED = "every rank has it whole"
    COLUMN = "axis 0"
    ROW = "axis 1"
    GLU = "axis 0 of two stacked matrices: a rank has a piece of the gate over the same piece of the up projection"
    QKV = "axis 0 of query, key and value, interleaved by query group: a rank has whole groups"
    VOCAB = "axis 0, padded with rows that Hugging Face does not have"


@dataclass(frozen=True)
class Row:
    """One kind of tensor. In the names `{e}` stands for the number of an expert."""

    megatron: tuple[str, ...]  #: spellings of the same tensor; Transformer Engine fuses norms and groups experts
    hf: tuple[str, ...]  #: one name; or gate and up; or query, key and value
    shapes: tuple[tuple[int, ...], ...]  #: of each Hugging Face tensor
    split: Split = Split.REPLICATED
    query_groups: int = 1  #: of Split.QKV
    copies: tuple[str, ...] = ()  #: full Hugging Face names under which a written folder repeats the values; one read may
    surplus: tuple[str, ...] = ()  #: full names under which a folder may repeat them that is read; never written

    @property
    def is_expert(self) -> bool:
        """Split over expert parallelism and expert-tensor parallelism."""
        return "{e}" in self.hf[0]


@dataclass(frozen=True)
class Block:
    """Rows that lie in one place of the model: the prefix of their names on either side."""

    megatron: str
    hf: str
    rows: tuple[Row, ...]


def norm_row(name: str, size: int, *fused: str, hf: str | None = None) -> Row:
    """A norm that Transformer Engine may fuse into a linear layer, which gives it one of the names `fused`."""
    return Row((name, *fused), (hf or name,), ((size,),))


def swiglu_rows(hidden: int, width: int, megatron: str = "mlp.", hf: str = "mlp.") -> tuple[Row, ...]:
    """Gate, up and down projection of a feed-forward of this width."""
    return (
        Row((f"{megatron}linear_fc1.weight",), (f"{hf}gate_proj.weight", f"{hf}up_proj.weight"), ((width, hidden),) * 2, Split.GLU),
        Row((f"{megatron}linear_fc2.weight",), (f"{hf}down_proj.weight",), ((hidden, width),), Split.ROW),
    )


def expert_rows(hidden: int, width: int) -> tuple[Row, ...]:
    """Gate, up and down projection of every routed expert."""
    return (
        Row(("mlp.experts.local_experts.{e}.linear_fc1.weight", "mlp.experts.linear_fc1.weight{e}"),
            ("mlp.experts.{e}.gate_proj.weight", "mlp.experts.{e}.up_proj.weight"), ((width, hidden),) * 2, Split.GLU),
        Row(("mlp.experts.local_experts.{e}.linear_fc2.weight", "mlp.experts.linear_fc2.weight{e}"),
            ("mlp.experts.{e}.down_proj.weight",), ((hidden, width),), Split.ROW),
    )  # fmt: skip
