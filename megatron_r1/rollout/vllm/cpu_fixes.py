"""All changes to vLLM that a machine without CUDA needs, as one list, for one pinned version."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import vllm
from vllm.model_executor.layers import utils as linear_utils
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from megatron_r1.errors import DeviceError
from megatron_r1.rollout.vllm import cpu_latent, cpu_sampler
from megatron_r1.rollout.vllm.packed_linear import choose_linear

VLLM_VERSION = "0.32.0"


@dataclass(frozen=True)
class Fix:
    """One change to vLLM, applied in the engine process before a model is built."""

    name: str
    reason: str
    apply: Callable[[], None]


def check_version() -> None:
    """Raises DeviceError if the installed vLLM is not the one for which the fixes and the reader of held weights were written."""
    installed = vllm.__version__.partition("+")[0]
    if installed != VLLM_VERSION:
        raise DeviceError(
            f"vllm {installed} is installed but megatron_r1 was written for {VLLM_VERSION}: "
            "install the version of the constraints file, or check rollout/vllm/ against the new one"
        )


def apply_fixes() -> None:
    """Apply every fix once per process."""
    for fix in FIXES:
        if fix.name not in _APPLIED:
            fix.apply()
            _APPLIED.add(fix.name)


def _keep_linear_weights() -> None:
    def use_plain_weight(layer: torch.nn.Module, remove_weight: bool) -> None:
        layer.cpu_linear = choose_linear(layer.weight) or torch.nn.functional.linear

    linear_utils.dispatch_cpu_unquantized_gemm = use_plain_weight


def _take_back_draws() -> None:
    sample, bookkeep = GPUModelRunner._sample, GPUModelRunner._bookkeeping_sync

    def sample_and_take_back(self: GPUModelRunner, *args: Any, **kwargs: Any) -> Any:
        output = sample(self, *args, **kwargs)
        batch = self.input_batch
        for index in self.discard_request_mask.np[: batch.num_reqs].nonzero()[0].tolist():
            if index in batch.generators:
                cpu_sampler.draws.take_back(batch.generators[index])
        return output

    def bookkeep_without_generators(self: GPUModelRunner, *args: Any, **kwargs: Any) -> Any:
        generators, self.input_batch.generators = self.input_batch.generators, {}
        try:
            return bookkeep(self, *args, **kwargs)
        finally:
            self.input_batch.generators = generators

    GPUModelRunner._sample, GPUModelRunner._bookkeeping_sync = sample_and_take_back, bookkeep_without_generators


def _draw_ahead() -> None:
    def forward(self: TopKTopPSampler, *args: Any, **kwargs: Any) -> Any:
        assert not self.use_fp64_gumbel, "not among the engine's settings, and it draws otherwise"
        return cpu_sampler.draw_tokens(self, *args, **kwargs)

    TopKTopPSampler.forward_cpu = forward


def _rotate_in_place_of_copies() -> None:
    own = RotaryEmbedding.forward_static

    def forward(*args: Any, **kwargs: Any) -> Any:
        rotated = cpu_latent.rotate(*args, **kwargs)
        return own(*args, **kwargs) if rotated is None else rotated

    RotaryEmbedding.forward_static = staticmethod(forward)


def _share_prompts() -> None:
    own = GPUModelRunner._model_forward

    def forward(self: GPUModelRunner, input_ids: Any, positions: Any, *args: Any, **kwargs: Any) -> Any:
        return cpu_latent.run_model(partial(own, self), input_ids, positions, *args, **kwargs)

    GPUModelRunner._model_forward = forward


_APPLIED: set[str] = set()

FIXES = (
    Fix(
        "keep linear weights",
        "vLLM packs linear weights into opaque oneDNN handles and deletes them, so that nobody can check what it computes with; "
        "large ones are packed beside the plain weight and can be read back",
        _keep_linear_weights,
    ),
    Fix(
        "take back draws",
        "a seeded request whose prompt is computed in several steps draws in each of them; vLLM takes the draws back by the "
        "offset of the generator, which those of a CPU do not have: RuntimeError",
        _take_back_draws,
    ),
    Fix(
        "draw ahead",
        "vLLM asks torch for the draw of each token of each sequence",
        _draw_ahead,
    ),
    Fix("rotate without copies", "vLLM copies rotated queries and keys twice more than it needs to", _rotate_in_place_of_copies),
    Fix("share prompts", "vLLM computes the prompt of a group once for each of its responses", _share_prompts),
)
