"""The checks of a device find a library that computes something else. On the CPU they run our own layers."""

from __future__ import annotations

import pytest
import torch

from megatron_r1.mcore import device_checks
from megatron_r1.mcore.device_checks import TorchLayers
from megatron_r1.mcore.host import activate
from megatron_r1.runtime.device import CPU

activate("cpu")


def test_every_check_passes_on_the_cpu_and_names_what_ran():
    found = {check.name: check.run() for check in device_checks.device_checks("cpu")}
    assert found.pop("Layers") == "torch's" and found.pop("Collectives") == "tensors and objects over gloo"
    assert set(found) == {"Norm and linear", "Grouped product", "Packed attention 192/128"}
    assert all("forward and backward, in float32" in finding for finding in found.values())
    assert found["Packed attention 192/128"].startswith("torch's ")  # and its kernel
    assert not torch.distributed.is_initialized()


class IgnoresGain(TorchLayers):
    def norm_linear(self, gain, weight):
        return super().norm_linear(torch.ones_like(gain), weight)


class IgnoresCounts(TorchLayers):
    def grouped_product(self, weights, counts):
        return super().grouped_product(weights, [16, 16, 16, 16])


class IgnoresBounds(TorchLayers):
    def packed_attention(self, cu_seqlens, longest):
        return super().packed_attention(cu_seqlens[[0, -1]], int(cu_seqlens[-1]))


class LosesGradient(TorchLayers):
    def grouped_product(self, weights, counts):
        run, parameters = super().grouped_product(weights, counts)
        return lambda x: run(x.detach()) + 0 * x.sum(), parameters


@pytest.mark.parametrize(
    ("check", "layers", "says"),
    [
        (device_checks.check_norm_linear, IgnoresGain(), "the output is off"),
        (device_checks.check_grouped_product, IgnoresCounts(), "the output is off"),
        (device_checks.check_grouped_product, LosesGradient(), "the gradient 0 is off"),
        (device_checks.check_packed_attention, IgnoresBounds(), "the output is off"),
    ],
)
def test_an_operation_that_computes_something_else_is_found(check, layers, says):
    with pytest.raises(RuntimeError, match=says):
        check(layers, CPU)


def test_collectives_that_change_what_they_carry_are_found(monkeypatch):
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: tensor.add_(1))
    with pytest.raises(RuntimeError, match="a sum over the ranks is wrong on cpu"):
        device_checks.check_collectives(CPU)
    monkeypatch.undo()
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", lambda box, src: box.clear())
    with pytest.raises(RuntimeError, match="an object does not come out of a broadcast"):
        device_checks.check_collectives(CPU)
    assert not torch.distributed.is_initialized()


def test_without_a_gpu_the_checks_of_one_fail_one_by_one():
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    for check in device_checks.device_checks("cuda"):
        with pytest.raises(Exception, match="runtime.device is 'cuda' but"):
            check.run()
