"""How large a model is, from its shape alone."""

from __future__ import annotations

import math

from megatron_r1.model.architecture import Architecture


def count_parameters(arch: Architecture) -> int:
    """Every weight of the model once: those of its family's rows, an expert's times the number of experts.

    A layer of multi-token prediction counts; copies of embedding and head that a folder repeats do not.
    """
    total = 0
    for block in arch.blocks():
        for row in block.rows:
            times = arch.experts.count if row.is_expert and arch.experts is not None else 1
            total += times * sum(math.prod(shape) for shape in row.shapes)
    return total
