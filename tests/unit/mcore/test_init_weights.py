"""Every rank starts from its part of the same model, and Megatron-Core is told what is a part and what a copy."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from megatron_r1.mcore import host
from megatron_r1.model.architecture import Architecture
from tests.random_weights import full_architecture, qwen2_architecture

host.activate("cpu")

from megatron.core.tensor_parallel.layers import param_is_not_tensor_parallel_duplicate

from megatron_r1.mcore.init_weights import global_name
from megatron_r1.weights.local_weights import entries_by_name, split_axis
from tests.fake_ranks import built_ranks
from tests.te_stand_in import transformer_engine_layers

LAYERS = {"cpu": nullcontext, "te": transformer_engine_layers}


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize(
    ("arch", "sizes"),
    [(full_architecture(), {"tp": 2}), (full_architecture(), {"tp": 2, "ep": 2, "etp": 2}), (qwen2_architecture(), {"tp": 2})],
    ids=["v3", "v3-etp2", "qwen2"],
)
def test_ranks_hold_parts_of_one_model_and_each_element_is_counted_once(arch: Architecture, sizes: dict, layers: str) -> None:
    entries, index = entries_by_name(arch)
    for _, (module,), _ in built_ranks(arch, 1):
        whole = {index[global_name(module, name)]: p.detach() for name, p in module.named_parameters()}
    held: dict[int, list[tuple[int, torch.Tensor]]] = {}
    counted = dict.fromkeys(whole, 0)
    with LAYERS[layers]():
        for _, (module,), groups in built_ranks(arch, 4 if "ep" in sizes else 2, **sizes):
            for name, parameter in module.named_parameters():
                i = index[global_name(module, name)]
                group = groups.tp if entries[i].expert is None else groups.etp
                if groups.dp_cp.rank() if entries[i].expert is None else groups.expert_dp.rank():
                    continue  # a copy of another data-parallel rank's
                held.setdefault(i, []).append((group.rank(), parameter.detach().clone()))
                counted[i] += parameter.numel() * param_is_not_tensor_parallel_duplicate(parameter, group)
                assert getattr(parameter, "tensor_model_parallel", False) == (split_axis(entries[i]) is not None), name
                assert getattr(parameter, "partition_dim", -1) == (-1 if split_axis(entries[i]) is None else split_axis(entries[i]))
    assert counted == {i: tensor.numel() for i, tensor in whole.items()}, "in the norm of the gradient"
    for i, parts in held.items():
        axis, tensors = split_axis(entries[i]), [tensor for _, tensor in sorted(parts, key=lambda part: part[0])]
        name, full = entries[i].name, whole[i]
        if axis is None:
            assert len(tensors) == 2 and all(torch.equal(tensor, full) for tensor in tensors), name
        elif len(entries[i].hf) == 2:  # gate and up, each split
            gates, ups = zip(*(tensor.chunk(2) for tensor in tensors), strict=True)
            assert torch.equal(torch.cat([*gates, *ups]), full), name
        else:
            assert torch.equal(torch.cat(tensors, axis), full), name
