"""Every small model under every layout, in one set of processes for each number of ranks; the results are kept."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from tests.random_weights import full_architecture, further_families, llama_architecture, qwen2_architecture, write_random_model
from tests.ranks import run_ranks

MODELS = {
    "v3": full_architecture(mtp=1),
    "v3-depth2": full_architecture(mtp=2),
    "qwen2": qwen2_architecture(tied=False),
    "qwen2-tied": qwen2_architecture(tied=True),
    "llama": llama_architecture(),
    **further_families(),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_EVERY = [{"tp": 2}, {"pp": 2}]
_DENSE_4 = [{"tp": 2, "pp": 2, "vpp": 2}]
#: number of ranks -> model -> layouts
LAYOUTS: dict[int, dict[str, list[dict[str, int]]]] = {
    1: {name: [{}] for name in MODELS},
    2: {name: _EVERY + ([{"ep": 2}] if arch.experts else []) for name, arch in MODELS.items()},
    4: {
        "v3": [{"tp": 2, "ep": 2, "etp": 2}, {"tp": 2, "pp": 2, "vpp": 2, "ep": 2}],
        **{name: _DENSE_4 for name in MODELS if not name.startswith("v3")},
    },
}  # fmt: skip


def write_models(folder: Path, dtype: str) -> None:
    """All models as folders of their names."""
    for name, arch in MODELS.items():
        write_random_model(folder / name, arch, dtype=DTYPES[dtype])


@cache
def run_layouts(world_size: int) -> tuple[dict[str, list[str]], dict[str, torch.Tensor]]:
    """Problems of every round trip, and the logits [1 + depth, b, t, vocabulary] of every fp32 case, by `case_name`."""
    with TemporaryDirectory() as temporary:
        for dtype in DTYPES:
            write_models(Path(temporary, dtype), dtype)
        cases = [
            (f"{temporary}/{dtype}/{name}", dtype, sizes)
            for dtype in DTYPES for name, layouts in LAYOUTS[world_size].items() for sizes in layouts
        ]  # fmt: skip
        results = f"{temporary}/results.pt"
        script = Path(__file__).parent / "distributed/weights_layouts.py"
        run_ranks(script, world_size, f"{temporary}/rendezvous", json.dumps(cases), results, timeout=400)
        return torch.load(results)


def case_name(model: str, dtype: str, sizes: dict[str, int]) -> str:
    """How results name a case."""
    return f"{model} {dtype} {sizes}"
