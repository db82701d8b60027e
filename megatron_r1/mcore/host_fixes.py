"""Every change made to Megatron-Core 0.16.1 beyond the source rules of `host_rewrite.py`, in one list.

A fix is applied to its module right after that module was executed, so later `from module import name` sees the fixed name.
`sha256` pins the source of what is replaced: when it changes, `host.py` refuses to start and names the fix.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any, Literal

import torch
import torch.distributed as dist

from megatron_r1.mcore.elementwise import swiglu
from megatron_r1.mcore.gloo_shards import all_gather, reduce_scatter
from megatron_r1.mcore.packing import packed_positions
from megatron_r1.mcore.rotate import rotate_packed, rotate_rows


@dataclass(frozen=True)
class HostFix:
    """One replacement inside megatron.core."""

    name: str
    module: str  #: the module that is changed
    target: str  #: qualified name inside the module whose source is pinned
    sha256: str  #: of the target's source in 0.16.1
    needed: Literal["without_cuda", "without_te"]  #: the machines on which it is applied
    reason: str
    apply: Callable[[ModuleType], None]


def _disable_jit_fuser(module: ModuleType) -> None:
    module.disable_jit_fuser()


def _use_default_generator(module: ModuleType) -> None:
    def get_state(device: object = None, clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(new_state: torch.Tensor, device: object = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    module._get_cuda_rng_state, module._set_cuda_rng_state = get_state, set_state


def _fork_default_generator(module: ModuleType) -> None:
    @contextlib.contextmanager
    def fork(self: Any, name: str = module._MODEL_PARALLEL_RNG_TRACKER_NAME) -> Iterator[None]:
        outside = torch.get_rng_state()
        torch.set_rng_state(self.states_[name])
        try:
            yield
        finally:
            self.states_[name] = torch.get_rng_state()
            torch.set_rng_state(outside)

    module.CudaRNGStatesTracker.fork = fork


def _no_fp8_state(module: ModuleType) -> None:
    module.FP8GlobalStateManager = SimpleNamespace(is_fp8_enabled=lambda: False, get_fp8_recipe=lambda: None)
    module.activation_recompute_forward = lambda **_: contextlib.nullcontext()
    module.fp8_autocast = lambda **_: contextlib.nullcontext()


def _no_te_gemm(module: ModuleType) -> None:
    module.te_general_gemm = None


def _replicated_down_projection(module: ModuleType) -> None:
    from megatron_r1.mcore.layers import ReplicatedLinear

    module.TELinear = ReplicatedLinear


def _uneven_gather(module: ModuleType) -> None:
    even_gather = module._gather_along_first_dim

    def gather(input_: torch.Tensor, group: Any, output_split_sizes: Any = None, use_global_buffer: bool = False) -> torch.Tensor:
        if output_split_sizes is None or group.size() == 1:
            return even_gather(input_, group, None, use_global_buffer)
        sizes = [int(size) for size in output_split_sizes]
        output = input_.new_empty(sum(sizes), *input_.shape[1:])
        copies = input_.repeat(len(sizes), *[1] * (input_.dim() - 1))
        dist.all_to_all_single(output, copies, sizes, [input_.shape[0]] * len(sizes), group=group)
        return output

    module._gather_along_first_dim = gather


def _uneven_reduce_scatter(module: ModuleType) -> None:
    even_reduce_scatter = module._reduce_scatter_along_first_dim

    def reduce_scatter(
        input_: torch.Tensor, group: Any, input_split_sizes: Any = None, use_global_buffer: bool = False
    ) -> torch.Tensor:
        if input_split_sizes is None or group.size() == 1:
            return even_reduce_scatter(input_, group, None, use_global_buffer)
        sizes = [int(size) for size in input_split_sizes]
        own = sizes[group.rank()]
        parts = input_.new_empty(own * len(sizes), *input_.shape[1:])
        dist.all_to_all_single(parts, input_.contiguous(), [own] * len(sizes), sizes, group=group)
        return parts.view(len(sizes), own, *input_.shape[1:]).sum(0)

    module._reduce_scatter_along_first_dim = reduce_scatter


def _rope_of_rows(module: ModuleType) -> None:
    by_formula = module._apply_rotary_pos_emb_bshd

    @functools.wraps(by_formula)
    def apply_rows(
        t: torch.Tensor, freqs: torch.Tensor, rotary_interleaved: bool = False, multi_latent_attention: bool = False,
        mscale: float = 1.0,
    ) -> torch.Tensor:  # fmt: skip
        if rotary_interleaved:
            return by_formula(t, freqs, rotary_interleaved, multi_latent_attention, mscale)
        return rotate_rows(t, freqs, pairs=multi_latent_attention, scale=mscale)

    module._apply_rotary_pos_emb_bshd = apply_rows


def _shards_without_copies(module: ModuleType) -> None:
    def replaced(collective: Callable[..., Any], own: Callable[..., None]) -> Callable[..., Any]:
        @functools.wraps(collective)
        def call(output: torch.Tensor, input_: torch.Tensor, *settings: Any, group: Any, **more: Any) -> Any:
            if group.size() == 1 and output.data_ptr() == input_.data_ptr():
                return None
            if settings or more.get("async_op") or more.get("op", dist.ReduceOp.SUM) != dist.ReduceOp.SUM:
                return collective(output, input_, *settings, group=group, **more)
            return own(output, input_, group)

        return call

    module.dist_all_gather_func = replaced(module.dist_all_gather_func, all_gather)
    module.dist_reduce_scatter_func = replaced(module.dist_reduce_scatter_func, reduce_scatter)


def _linear_alone(module: ModuleType) -> None:
    by_function = module.linear_with_grad_accumulation_and_async_allreduce

    @functools.wraps(by_function)
    def linear(
        input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, gradient_accumulation_fusion: bool,
        allreduce_dgrad: bool, sequence_parallel: bool, grad_output_buffer: list[torch.Tensor] | None = None, *settings: Any,
        **more: Any,
    ) -> torch.Tensor:  # fmt: skip
        if gradient_accumulation_fusion or allreduce_dgrad or sequence_parallel or grad_output_buffer is not None:
            return by_function(
                input, weight, bias, gradient_accumulation_fusion, allreduce_dgrad, sequence_parallel, grad_output_buffer,
                *settings, **more,
            )  # fmt: skip
        return torch.nn.functional.linear(input, weight, bias)

    module.linear_with_grad_accumulation_and_async_allreduce = linear


def _region_alone(name: str) -> Callable[[ModuleType], None]:
    def fix(module: ModuleType) -> None:
        region = getattr(module, name)

        @functools.wraps(region)
        def enter(input_: torch.Tensor, group: Any = None) -> torch.Tensor:
            if group is not None and group.size() == 1:
                return input_
            return region(input_, group)

        setattr(module, name, enter)

    return fix


def _copy_first_gradient(module: ModuleType) -> None:
    wrapper = module.DistributedDataParallel
    stock_zero, stock_finish, stock_hook = wrapper.zero_grad_buffer, wrapper.finish_grad_sync, wrapper._make_backward_post_hook
    wrapper._unwritten = frozenset()  # parameters whose place in the buffer holds the gradient of an earlier step

    def zero_grad_buffer(self: Any) -> None:
        if self.ddp_config.overlap_grad_reduce:  # reduces what is there when other gradients are
            return stock_zero(self)
        for param in self.params_with_grad:
            param.grad_added_to_main_grad = False
        for bucket_group in self.bucket_groups + self.expert_parallel_bucket_groups:
            bucket_group.reset()
        self._unwritten = set(self.params_with_grad)
        return None

    def make_hook(self: Any, param: torch.nn.Parameter) -> Callable[..., None]:
        add = stock_hook(self, param)

        def hook(*unused: Any) -> None:
            if param in self._unwritten and param.grad is not None:
                self._unwritten.discard(param)
                param.main_grad.copy_(param.grad)
                param.grad = None
            else:
                add(*unused)

        return hook

    def finish_grad_sync(self: Any, force_all_reduce: bool | None = False) -> None:
        for param in self._unwritten:
            param.main_grad.zero_()
        self._unwritten = frozenset()
        stock_finish(self, force_all_reduce=force_all_reduce)

    wrapper.zero_grad_buffer, wrapper.finish_grad_sync, wrapper._make_backward_post_hook = (
        zero_grad_buffer,
        finish_grad_sync,
        make_hook,
    )


def _swiglu_in_few_passes(module: ModuleType) -> None:
    stock_forward = module.MLP.forward

    def forward(
        self: Any, hidden_states: torch.Tensor, per_token_scale: torch.Tensor | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        config = self.config
        is_plain = config.activation_func is torch.nn.functional.silu and config.gated_linear_unit
        is_fused = config.use_te_activation_func or config.bias_activation_fusion
        is_changed = config.activation_func_clamp_value is not None or config.glu_linear_offset
        if per_token_scale is not None or not is_plain or is_fused or is_changed or config.add_bias_linear:
            return stock_forward(self, hidden_states, per_token_scale, **kwargs)
        intermediate, _ = self.linear_fc1(hidden_states)
        return self.linear_fc2(swiglu(intermediate))

    module.MLP.forward = forward


def _keep_weights_in_place(module: ModuleType) -> None:
    stock_copy = module.DistributedOptimizer._copy_main_params_to_model_params

    def copy(self: Any) -> None:
        # In float32 Adam updates the weights themselves.
        kept = self.model_fp32_groups, self.shard_fp32_groups
        self.model_fp32_groups = self.shard_fp32_groups = []
        try:
            stock_copy(self)
        finally:
            self.model_fp32_groups, self.shard_fp32_groups = kept

    module.DistributedOptimizer._copy_main_params_to_model_params = copy


def _rope_by_position(module: ModuleType) -> None:
    by_formula = module._apply_rotary_pos_emb_bshd

    def apply_thd(
        t: torch.Tensor, cu_seqlens: torch.Tensor, freqs: torch.Tensor, rotary_interleaved: bool = False,
        multi_latent_attention: bool = False, mscale: float = 1.0, cp_group: Any = None,
    ) -> torch.Tensor:  # fmt: skip
        if not rotary_interleaved:
            return rotate_packed(
                t, cu_seqlens, freqs, pairs=multi_latent_attention, scale=mscale, cp_size=cp_group.size(), cp_rank=cp_group.rank()
            )
        positions = packed_positions(cu_seqlens, t.shape[0], cp_group.size(), cp_group.rank())
        return by_formula(t.unsqueeze(1), freqs[positions], rotary_interleaved, multi_latent_attention, mscale).squeeze(1)

    module._apply_rotary_pos_emb_thd = apply_thd


FIXES: tuple[HostFix, ...] = (
    HostFix(
        "jit fuser off", "megatron.core.jit", "enable_jit_fuser",
        "f50d820098b21568ac02b2dcfaed8724e0813f50f34ce947c132e7f3f7e17d31", "without_cuda",
        "torch.compile of small functions needs a C++ compiler at run time and costs more than it saves on CPU",
        _disable_jit_fuser,
    ),
    HostFix(
        "rng state", "megatron.core.tensor_parallel.random", "_set_cuda_rng_state",
        "dea947ca0b7dc92be0bb70f6161b4d04bdcac7e3223e3be967bd05a40898d0de", "without_cuda",
        "the state functions reach into torch's CUDA generators; the default generator takes their place",
        _use_default_generator,
    ),
    HostFix(
        "rng fork", "megatron.core.tensor_parallel.random", "CudaRNGStatesTracker.fork",
        "92b05af7dcf35f4593ccea14ca3845e8185cda822e2e71287c0b1014da5ecaf8", "without_cuda",
        "the stock tracker warns whenever the CPU generator moves inside a fork, which here is the generator that is forked",
        _fork_default_generator,
    ),
    HostFix(
        "no fp8 state", "megatron.core.tensor_parallel.random", "CheckpointWithoutOutputFunction",
        "4702b39ed5379fdc5f53e1e7d9e31787ba8ec1821c091ed9bb4f7d02ebe10f63", "without_te",
        "selective recomputation asks FP8GlobalStateManager, a NameError without Transformer Engine",
        _no_fp8_state,
    ),
    HostFix(
        "no te gemm", "megatron.core.transformer.moe.moe_utils", "RouterGatingLinearFunction",
        "32a20173b5a18ed8099d13227b8348b1188d93f29912cb3f426b1ad1ded6e953", "without_te",
        "the router asks te_general_gemm, a NameError without Transformer Engine",
        _no_te_gemm,
    ),
    HostFix(
        "replicated down-projection", "megatron.core.transformer.multi_latent_attention", "MLASelfAttention.__init__",
        "62c9ac1258c6900764fef12fd464c1fab443d7df6c429ea6773ca302a4cd6453", "without_te",
        "MLA accepts only TELinear as a TP-replicated down-projection (a MagicMock here, which isinstance rejects); the stock "
        "column-parallel one loses the tensor-parallel sum of the decoupled key's gradient",
        _replicated_down_projection,
    ),
    HostFix(
        "uneven gather", "megatron.core.tensor_parallel.mappings", "_gather_along_first_dim",
        "abaaf454b5e0914995deade91cf37ccc5d2178d8f7debdaa73ce925a5d4c82b6", "without_cuda",
        "gloo's all_gather needs equal sizes; MoE dispatch under expert tensor parallelism is uneven",
        _uneven_gather,
    ),
    HostFix(
        "uneven reduce-scatter", "megatron.core.tensor_parallel.mappings", "_reduce_scatter_along_first_dim",
        "09ac896729369d2d24a34ad36cdbb1d8841d21c21a9547a9536ce48d29d1a52f", "without_cuda",
        "gloo's reduce_scatter needs equal sizes",
        _uneven_reduce_scatter,
    ),
    HostFix(
        "shards", "megatron.core.distributed.param_and_grad_buffer", "_ParamAndGradBucketGroup.start_grad_sync",
        "66adbe07814a48817cb5c37fa098cd61b89e6dfa3e285492222610b2167df1dc", "without_cuda",
        "torch's ways over gloo copy all gradients and all weights several times, in a group of one onto themselves",
        _shards_without_copies,
    ),
    HostFix(
        "linear alone", "megatron.core.tensor_parallel.layers", "linear_with_grad_accumulation_and_async_allreduce",
        "212ab88edb75308d6842b393eff03220ce8a19b0b6612c72ef0361bf9fc51531", "without_cuda",
        "an autograd function in Python around one product; torch's own gives the same numbers",
        _linear_alone,
    ),
    HostFix(
        "copy alone", "megatron.core.tensor_parallel.mappings", "copy_to_tensor_model_parallel_region",
        "9182b1eb4adf705e91af90a2207f8804abc59e603baeb93fedc10ec518384862", "without_cuda",
        "an autograd function in Python that in a group of one does nothing, in front of every product",
        _region_alone("copy_to_tensor_model_parallel_region"),
    ),
    HostFix(
        "sum alone", "megatron.core.tensor_parallel.mappings", "reduce_from_tensor_model_parallel_region",
        "7be87b901bc3a4ff5d5cae419e1fc846164867ab543a86b07de14c2479b6d84e", "without_cuda",
        "the same, behind every other product",
        _region_alone("reduce_from_tensor_model_parallel_region"),
    ),
    HostFix(
        "first gradient", "megatron.core.distributed.distributed_data_parallel", "DistributedDataParallel._make_backward_post_hook",
        "c2b021b1e8181f4a377d927e7dbd9e551584cc26fd60c7626079acd336d0e224", "without_cuda",
        "gradients are added to zeros, which are written first: two more passes over them",
        _copy_first_gradient,
    ),
    HostFix(
        "swiglu", "megatron.core.transformer.mlp", "MLP.forward",
        "914db4cfc0ddb5c6e8b1fd3fc6ec503c27ce9a94eeda7b592a27e989ca2691ce", "without_cuda",
        "autograd's SwiGLU adds an offset of zero and puts two gradients together by a copy",
        _swiglu_in_few_passes,
    ),
    HostFix(
        "weights in place", "megatron.core.optimizer.distrib_optimizer", "DistributedOptimizer._copy_main_params_to_model_params",
        "6bab730deb4b776ef27e86b00365ffbebe836f4988cb3f3170e574e84debea1d", "without_cuda",
        "copies float32 weights onto themselves, one by one",
        _keep_weights_in_place,
    ),
    HostFix(
        "rope of rows", "megatron.core.models.common.embeddings.rope_utils", "_apply_rotary_pos_emb_bshd",
        "0ef4824d5242495481112ebfd89cbc91d5d022fceb5ea0ca62937e5d9b212b9e", "without_cuda",
        "its formula goes through the numbers of each head nine times, and back as often",
        _rope_of_rows,
    ),
    HostFix(
        "packed rope", "megatron.core.models.common.embeddings.rope_utils", "_apply_rotary_pos_emb_thd",
        "43ef0a5f0572526dcb377ace35c83229002f24be7a3535907ea6dd4c62667b25", "without_cuda",
        "a Python loop over sequences, twice per layer",
        _rope_by_position,
    ),
)  # fmt: skip
