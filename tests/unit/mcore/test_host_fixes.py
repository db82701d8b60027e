"""Every change to Megatron-Core does what it is for."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import logging
from collections.abc import Callable
from importlib.machinery import SourceFileLoader
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_r1.mcore import host
from megatron_r1.mcore.host_fixes import FIXES, HostFix, _region_alone
from tests.one_rank import one_rank_world

host.activate("cpu")

pytestmark = pytest.mark.slow
ONE_RANK = SimpleNamespace(size=lambda: 1, rank=lambda: 0)


def check_jit_fuser_off(module: ModuleType) -> None:
    def f() -> None:
        pass

    assert module.jit_fuser(f) is f


def check_rng_state(module: ModuleType) -> None:
    state = module._get_cuda_rng_state()
    first = torch.rand(3)
    module._set_cuda_rng_state(state)
    assert torch.equal(torch.rand(3), first)


def check_rng_fork(module: ModuleType) -> None:
    tracker = module.CudaRNGStatesTracker()
    tracker.add("a", 5)
    outside = torch.get_rng_state()
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append
    logging.getLogger(module.__name__).addHandler(handler)
    with tracker.fork("a"):
        first = torch.rand(3)
    with tracker.fork("a"):
        second = torch.rand(3)
    logging.getLogger(module.__name__).removeHandler(handler)
    assert not records
    assert torch.equal(torch.get_rng_state(), outside)
    assert torch.equal(torch.cat([first, second]), torch.rand(6, generator=torch.Generator().manual_seed(5)))


def check_no_fp8_state(module: ModuleType) -> None:
    from megatron_r1.mcore import parallel

    one_rank_world()
    parallel.build_process_groups(parallel.Layout(), seed=1)
    x = torch.randn(4, requires_grad=True)
    recompute = module.CheckpointWithoutOutput(fp8=False)
    hidden = recompute.checkpoint(lambda v: v.sin(), x)
    output = hidden * 2.0
    recompute.discard_output_and_register_recompute(output)
    output.sum().backward()
    torch.testing.assert_close(x.grad, 2 * x.detach().cos())


def check_no_te_gemm(module: ModuleType) -> None:
    x, weight = torch.randn(2, 3, 4), torch.randn(5, 4, requires_grad=True)
    scores = module.router_gating_linear(x, weight, None, torch.float32)
    torch.testing.assert_close(scores, x @ weight.T)
    scores.sum().backward()
    torch.testing.assert_close(weight.grad, x.sum((0, 1)).expand(5, 4))


def check_replicated_down_projection(module: ModuleType) -> None:
    from megatron_r1.mcore.layers import ReplicatedLinear

    assert module.TELinear is ReplicatedLinear


def check_uneven_gather(module: ModuleType) -> None:
    x = torch.randn(3, 2)
    assert module._gather_along_first_dim(x, ONE_RANK, [3]) is x  # two ranks: tests/distributed/test_uneven.py


def check_uneven_reduce_scatter(module: ModuleType) -> None:
    x = torch.randn(3, 2)
    assert module._reduce_scatter_along_first_dim(x, ONE_RANK, [3]) is x


def check_shards(module: ModuleType) -> None:
    """In place a group of one calls nothing; what gloo's own cannot be replaced by is called as ever."""
    one_rank_world()
    group, buffer, other, called = torch.distributed.group.WORLD, torch.arange(4.0), torch.empty(4), []
    fix = next(fix for fix in FIXES if fix.name == "shards")
    fake = SimpleNamespace(dist_all_gather_func=lambda *tensors, group, **_: called.append((tensors, group)))
    fake.dist_reduce_scatter_func = fake.dist_all_gather_func
    fix.apply(fake)
    for collective in (fake.dist_all_gather_func, fake.dist_reduce_scatter_func):
        assert collective(buffer, buffer[:4], group=group, async_op=False) is None and not called
        other.zero_()
        collective(other, buffer, group=group)
        assert torch.equal(other, torch.arange(4.0)) and not called
        collective(other, buffer, group=group, async_op=True)
        collective(other, buffer, op=torch.distributed.ReduceOp.MAX, group=group)
        assert [(tensors[0] is other, of) for tensors, of in called] == [(True, group)] * 2
        called.clear()
    with torch.distributed._coalescing_manager(group, async_ops=True) as manager:  # that has nothing to do
        module.dist_all_gather_func(buffer, buffer, group=group, async_op=True)
    manager.wait()


def check_linear_alone(module: ModuleType) -> None:
    """Bit by bit the stock function and its gradients."""
    ours = module.linear_with_grad_accumulation_and_async_allreduce
    stock = inspect.unwrap(ours)
    assert stock is not ours
    for dtype, with_bias in ((torch.float32, False), (torch.bfloat16, False), (torch.float32, True)):
        made = []
        x, weight, bias, upstream = (torch.randn(shape, dtype=dtype) for shape in ((5, 3, 16), (24, 16), (24,), (5, 3, 24)))
        for linear in (stock, ours):
            leaves = [tensor.clone().requires_grad_() for tensor in (x, weight, *([bias] if with_bias else []))]
            output = linear(*leaves, *([] if with_bias else [None]), False, False, False, tp_group=ONE_RANK)
            output.backward(upstream)
            made.append([output, *(leaf.grad for leaf in leaves if leaf.ndim > 1)])
        assert all(map(torch.equal, *made)), (dtype, with_bias)
    kept: list[torch.Tensor] = []  # what only the stock function can do: put the weight's gradient off
    later = ours(x, weight.requires_grad_(), None, False, False, False, kept, 0, tp_group=ONE_RANK)
    with pytest.raises(RuntimeError):  # without Apex it then fails
        later.backward(upstream)
    assert torch.equal(kept[0], upstream)


def check_region_alone(module: ModuleType) -> None:
    x, asked = torch.randn(3, requires_grad=True), []
    two_ranks = SimpleNamespace(size=lambda: 2)
    for name in ("copy_to_tensor_model_parallel_region", "reduce_from_tensor_model_parallel_region"):
        fake = SimpleNamespace(**{name: lambda input_, group: asked.append(group)})
        _region_alone(name)(fake)
        getattr(fake, name)(x, two_ranks)
        assert getattr(module, name)(x, ONE_RANK) is x and asked.pop() is two_ranks


def check_first_gradient(module: ModuleType) -> None:
    """What an earlier step left is never added to, also where a parameter has no gradient in this one."""
    stock = {name: [] for name in ("zero_grad_buffer", "finish_grad_sync")}

    class Wrapper:
        def __init__(self, overlap: bool) -> None:
            self.ddp_config = SimpleNamespace(overlap_grad_reduce=overlap)
            self.params_with_grad = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
            for param in self.params_with_grad:
                param.main_grad = torch.full((2,), 9.0)
            self.bucket_groups, self.expert_parallel_bucket_groups = [SimpleNamespace(reset=lambda: None)], []

        def zero_grad_buffer(self) -> None:
            stock["zero_grad_buffer"].append(self)

        def finish_grad_sync(self, force_all_reduce: bool | None = False) -> None:
            stock["finish_grad_sync"].append([param.main_grad.tolist() for param in self.params_with_grad])

        def _make_backward_post_hook(self, param: torch.nn.Parameter) -> Callable[..., None]:
            def hook(*_: object) -> None:
                param.main_grad.add_(param.grad)
                param.grad = None

            return hook

    next(fix for fix in FIXES if fix.name == "first gradient").apply(SimpleNamespace(DistributedDataParallel=Wrapper))
    wrapped = Wrapper(overlap=False)
    hooks = [wrapped._make_backward_post_hook(param) for param in wrapped.params_with_grad]
    wrapped.zero_grad_buffer()
    for _ in range(2):  # micro-batches
        wrapped.params_with_grad[0].grad = torch.tensor([1.0, 2.0])
        hooks[0]()
        assert wrapped.params_with_grad[0].grad is None
    wrapped.finish_grad_sync()
    assert stock == {"zero_grad_buffer": [], "finish_grad_sync": [[[2.0, 4.0], [0.0, 0.0]]]}
    overlapping = Wrapper(overlap=True)
    overlapping.zero_grad_buffer()
    assert stock["zero_grad_buffer"] == [overlapping] and not overlapping._unwritten


def check_swiglu(module: ModuleType) -> None:
    """Bit by bit the stock forward, which any other activation takes."""
    x, upstream = torch.randn(3, 2, 8), torch.randn(3, 2, 6)
    settings = dict.fromkeys(("use_te_activation_func", "bias_activation_fusion", "add_bias_linear"), False)
    settings |= {"gated_linear_unit": True, "glu_linear_offset": 0.0}
    for clamp in (None, 0.5):
        config = SimpleNamespace(**settings, activation_func=torch.nn.functional.silu, activation_func_clamp_value=clamp)
        weights = torch.randn(10, 8), torch.randn(6, 5)
        made = []
        for forward in (stock_of("swiglu", module), module.MLP.forward):
            leaves = [tensor.clone().requires_grad_() for tensor in (x, *weights)]
            fc1, fc2 = (lambda y, weight=weight: (torch.nn.functional.linear(y, weight), None) for weight in leaves[1:])
            mlp = SimpleNamespace(config=config, linear_fc1=fc1, linear_fc2=fc2, activation_func=config.activation_func)
            output, bias = forward(mlp, leaves[0])
            made.append([output, *torch.autograd.grad(output, leaves, upstream)])
            assert bias is None
        assert all(map(torch.equal, *made)), clamp


def stock_of(name: str, module: ModuleType) -> Callable[..., Any]:
    """What a fix replaced, from its source."""
    fix = next(fix for fix in FIXES if fix.name == name)
    owner, method = fix.target.split(".")
    spec = importlib.util.find_spec(module.__name__)
    stock = importlib.util.module_from_spec(spec)
    SourceFileLoader(module.__name__, module.__file__).exec_module(stock)
    return getattr(getattr(stock, owner), method)


def check_weights_in_place(module: ModuleType) -> None:
    copied = []

    class Optimizer:
        def __init__(self) -> None:
            self.model_fp32_groups, self.shard_fp32_groups = [["weight"]], [["shard"]]

        def _copy_main_params_to_model_params(self) -> None:
            copied.append((self.model_fp32_groups, self.shard_fp32_groups))

    next(fix for fix in FIXES if fix.name == "weights in place").apply(SimpleNamespace(DistributedOptimizer=Optimizer))
    optimizer = Optimizer()
    optimizer._copy_main_params_to_model_params()
    assert copied == [([], [])] and (optimizer.model_fp32_groups, optimizer.shard_fp32_groups) == ([["weight"]], [["shard"]])


def check_rope_of_rows(module: ModuleType) -> None:
    """Bit by bit the stock formula and its gradient."""
    stock_formula = inspect.unwrap(module._apply_rotary_pos_emb_bshd)
    assert stock_formula is not module._apply_rotary_pos_emb_bshd
    for width, latent, interleaved, dtype in (
        (8, True, False, torch.float32), (8, False, False, torch.float32), (12, False, False, torch.float32),
        (8, True, False, torch.bfloat16), (12, False, True, torch.float32), (8, False, False, torch.bfloat16),
    ):  # fmt: skip
        freqs = torch.randn(5, 1, 1, 8)
        x, upstream = (torch.randn(5, 2, 3, width, dtype=dtype) for _ in range(2))
        stock, ours = (x.clone().requires_grad_() for _ in range(2))
        for formula, t in ((stock_formula, stock), (module._apply_rotary_pos_emb_bshd, ours)):
            t.rotated = formula(t, freqs, rotary_interleaved=interleaved, multi_latent_attention=latent, mscale=1.5)
            t.rotated.backward(upstream)
        assert torch.equal(ours.rotated, stock.rotated), (width, latent, interleaved)
        assert torch.equal(ours.grad, stock.grad), (width, latent, interleaved)


def check_packed_rope(module: ModuleType) -> None:
    """Bit by bit the stock formula of one sequence after the other, and its gradient."""
    lengths = [5, 1, 7]
    bounds = torch.tensor([0, 5, 6, 13], dtype=torch.int32)
    for width, latent, interleaved, dtype in (
        (8, True, False, torch.float32), (8, False, False, torch.float32), (12, False, False, torch.float32),
        (8, True, False, torch.bfloat16), (12, False, True, torch.float32),
    ):  # fmt: skip
        freqs = torch.randn(max(lengths), 1, 1, 8)
        x, upstream = (torch.randn(sum(lengths), 3, width, dtype=dtype) for _ in range(2))
        stock, ours = (x.clone().requires_grad_() for _ in range(2))
        formula = inspect.unwrap(module._apply_rotary_pos_emb_bshd)
        one_by_one = [
            formula(part.unsqueeze(1), freqs[: len(part)], interleaved, latent, 1.5).squeeze(1) for part in stock.split(lengths)
        ]
        packed = module._apply_rotary_pos_emb_thd(ours, bounds, freqs, interleaved, latent, 1.5, ONE_RANK)
        assert torch.equal(packed, torch.cat(one_by_one)), (width, latent, interleaved)
        packed.backward(upstream)
        torch.cat(one_by_one).backward(upstream)
        assert torch.equal(ours.grad, stock.grad), (width, latent, interleaved)


CHECKS: dict[str, Callable[[ModuleType], None]] = {
    "linear alone": check_linear_alone,
    "copy alone": check_region_alone,
    "sum alone": check_region_alone,
    "first gradient": check_first_gradient,
    "swiglu": check_swiglu,
    "weights in place": check_weights_in_place,
    "jit fuser off": check_jit_fuser_off,
    "rng state": check_rng_state,
    "rng fork": check_rng_fork,
    "no fp8 state": check_no_fp8_state,
    "no te gemm": check_no_te_gemm,
    "replicated down-projection": check_replicated_down_projection,
    "uneven gather": check_uneven_gather,
    "uneven reduce-scatter": check_uneven_reduce_scatter,
    "shards": check_shards,
    "rope of rows": check_rope_of_rows,
    "packed rope": check_packed_rope,
}


@pytest.mark.parametrize("fix", FIXES, ids=lambda fix: fix.name)
def test_fix(fix: HostFix) -> None:
    CHECKS[fix.name](importlib.import_module(fix.module))
