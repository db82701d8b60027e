"""When graphs of layers are captured, for which micro-batches, and that generators are saved alike with and without them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_r1.errors import ConfigError
from megatron_r1.mcore import host

host.activate("cpu")

from megatron.core.num_microbatches_calculator import get_num_microbatches, unset_num_microbatches_calculator
from megatron.core.tensor_parallel import random as megatron_random
from megatron.core.transformer import cuda_graphs

from megatron_r1.mcore import layer_graphs, parallel
from megatron_r1.mcore.layer_graphs import LayerGraphs

MICRO_BATCH: Any = SimpleNamespace(token_ids=torch.zeros(2, 64))


class Helper:
    """What `LayerGraphs` takes of Megatron-Core's: it says what is done with it, and makes one graph for each micro-batch."""

    def __init__(self, done: list, model: list, config: Any, seq_length: int, micro_batch_size: int, optimizers: list) -> None:
        done.append(("made", len(model), seq_length, micro_batch_size, len(optimizers)))
        self.done, self.callables_per_chunk = done, [chunk.layers for chunk in model]

    def create_cudagraphs(self) -> None:
        self.done.append(("captured", get_num_microbatches()))
        for layers in self.callables_per_chunk:
            for layer in layers:
                layer.cuda_graphs = ["graph"] * get_num_microbatches()

    def cuda_graph_set_manual_hooks(self) -> None:
        self.done.append("hooks by hand")

    def delete_cuda_graphs(self) -> None:
        self.done.append("deleted")


def graphs_of(
    monkeypatch: pytest.MonkeyPatch, *, pp: int, overlap: bool, impl: str = "transformer_engine"
) -> tuple[LayerGraphs, list, Any]:
    done: list = []
    monkeypatch.setattr(layer_graphs, "TECudaGraphHelper", lambda *given: Helper(done, *given))
    config = SimpleNamespace(cuda_graph_impl=impl, cuda_graph_warmup_steps=3, pipeline_model_parallel_size=pp)
    chunk = SimpleNamespace(
        config=config, ddp_config=SimpleNamespace(overlap_param_gather=overlap), layers=[SimpleNamespace(cuda_graphs=[])],
        disable_forward_pre_hook=lambda param_sync: done.append(("hooks off", param_sync)),
        enable_forward_pre_hook=lambda: done.append("hooks on"),
    )  # fmt: skip
    late: Any = SimpleNamespace(gather=lambda: done.append("gathered"))
    chunks: Any = [chunk]
    return LayerGraphs(chunks, SimpleNamespace(), late), done, chunk


def test_they_are_captured_after_three_updates_and_again_when_a_pipeline_has_other_micro_batches(monkeypatch) -> None:
    graphs, done, chunk = graphs_of(monkeypatch, pp=4, overlap=True)
    for count in (8, 8, 8):
        graphs.before_passes([MICRO_BATCH] * count)
        with graphs.aside():
            pass
    assert not done, "the first updates run without"
    graphs.before_passes([MICRO_BATCH] * 8)
    once = [("made", 1, 64, 2, 1), "gathered", ("hooks off", False), ("captured", 8), "hooks on", "hooks by hand"]
    assert done == once
    graphs.before_passes([MICRO_BATCH] * 8)
    assert done == once
    graphs.before_passes([MICRO_BATCH] * 16)
    assert done[6:] == ["deleted", *once[:3], ("captured", 16), *once[4:]]
    with pytest.raises(ValueError, match="inside"), graphs.aside():
        assert not chunk.layers[0].cuda_graphs, "an evaluation has another schedule"
        raise ValueError("inside")
    assert len(chunk.layers[0].cuda_graphs) == 16
    unset_num_microbatches_calculator()


def test_without_a_pipeline_one_graph_does_for_any_number_of_micro_batches(monkeypatch) -> None:
    graphs, done, _ = graphs_of(monkeypatch, pp=1, overlap=False)
    for count in (4, 4, 4, 4, 9):
        graphs.before_passes([MICRO_BATCH] * count)
    assert done == [("made", 1, 64, 2, 1), "gathered", ("captured", 1)]
    unset_num_microbatches_calculator()
    for impl in ("none", "local"):
        graphs, done, _ = graphs_of(monkeypatch, pp=1, overlap=False, impl=impl)
        for _ in range(9):
            graphs.before_passes([MICRO_BATCH])
        assert not done


def test_what_the_helper_asks_for_is_one_line(monkeypatch) -> None:
    graphs, _, _ = graphs_of(monkeypatch, pp=1, overlap=False)
    monkeypatch.setattr(layer_graphs, "TECudaGraphHelper", cuda_graphs.TECudaGraphHelper)
    with pytest.raises(
        ConfigError, match="^megatron.cuda_graph_impl=transformer_engine does not fit: CUDA Graphs are not supported"
    ):
        for _ in range(4):
            graphs.before_passes([MICRO_BATCH])
    unset_num_microbatches_calculator()


def test_generators_are_saved_as_bytes_whichever_kind_they_are_of(monkeypatch) -> None:
    tracker = megatron_random.CudaRNGStatesTracker()
    monkeypatch.setattr(megatron_random, "_CUDA_RNG_STATE_TRACKER", tracker)
    monkeypatch.setattr(megatron_random, "_CUDA_RNG_STATE_TRACKER_INITIALIZED", True)
    saved = torch.Generator().manual_seed(5).get_state()
    tracker.set_states({"model-parallel-rng": saved.clone()})
    plain = parallel.generator_states()
    assert torch.equal(plain["model-parallel-rng"], saved)
    generator = torch.Generator().manual_seed(9)
    tracker.set_states({"model-parallel-rng": generator})
    parallel.set_generator_states(plain)
    assert tracker.get_states()["model-parallel-rng"] is generator, "graphs hold the generator itself"
    assert torch.equal(generator.get_state(), saved) and torch.equal(parallel.generator_states()["model-parallel-rng"], saved)
