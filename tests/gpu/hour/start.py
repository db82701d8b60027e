"""Part 1: layers, collectives and random generators, each on its own."""

from __future__ import annotations

from tests.gpu.hour.ground import Ground


def run(ground: Ground) -> None:
    """The doctor's checks of this device, and Megatron-Core's generators."""
    import torch

    from megatron_r1.mcore.device_checks import device_checks

    for check in device_checks(ground.kind):
        try:
            ground.check(check.name, True, check.run())
        except Exception as error:  # noqa: BLE001 - a check may raise anything, and the next one is to run all the same
            ground.check(check.name, False, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    tracker = CudaRNGStatesTracker()
    tracker.add("experts", 5)
    torch.manual_seed(1)
    outside = torch.rand(3, device=ground.device)
    torch.manual_seed(1)
    with tracker.fork("experts"):
        inside = torch.rand(3, device=ground.device)
    ground.check("a forked generator leaves the outer one alone", torch.equal(torch.rand(3, device=ground.device), outside))
    ground.check("a forked generator has a state of its own", not torch.equal(inside, outside))
