"""`benchmarks/layouts.py`: what it compares and how it judges; that layouts agree, `tests/distributed/test_layouts.py` looks at."""

from __future__ import annotations

import math

import torch

from benchmarks.layouts import AXES, WAYS, Way, difference


def test_every_kind_of_parallelism_is_in_the_table_with_context_parallelism() -> None:
    beside_cp = {axis for way in WAYS if "cp" in way.sizes for axis in way.sizes}
    assert beside_cp == set(AXES)
    assert {way.recompute for way in WAYS if "cp" in way.sizes} == {"none", "full", "selective"}
    assert {way.mtp for way in WAYS if "cp" in way.sizes} == {True, False}
    assert len({way.name for way in WAYS}) == len(WAYS) and {way.ranks for way in WAYS} == {1, 2, 4, 8}
    assert Way({"pp": 2, "vpp": 2, "cp": 2}, mtp=False).name == "pp2 vpp2 cp2, without MTP"


def test_the_largest_difference_is_told() -> None:
    def found(**other: object) -> dict[str, object]:
        gradient, outputs = torch.tensor([3.0, 4.0]), torch.tensor([-1.0, -2.0])
        return {"loss": 0.5, "grad_norm": 5.0, "bias": torch.ones(2), "gradient": gradient, "outputs": outputs} | other

    assert difference(found(), found())[0] == 0
    assert difference(found(loss=0.5 + 2**-10), found()) == (2**-10, "loss")
    assert difference(found(grad_norm=5.5), found()) == (0.1, "grad_norm")
    assert difference(found(gradient=torch.tensor([3.0, 4.0 + 5 * 2**-6])), found()) == (2**-6, "gradient")
    assert difference(found(outputs=torch.tensor([-1.0, -2.25])), found()) == (0.25, "outputs")
    assert difference(found(bias=torch.tensor([1.0, 1.001])), found()) == (math.inf, "router biases")
    assert difference(found(loss=math.nan), found()) == (math.inf, "loss")
    assert difference({"loss": 0.5}, found())[0] == math.inf
