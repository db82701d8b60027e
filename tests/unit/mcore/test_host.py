"""Megatron-Core without CUDA: every rule and every fix does what it is for, and a changed Megatron-Core is refused by name."""

from __future__ import annotations

import ast
import importlib
import inspect
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from megatron_r1.mcore import host
from megatron_r1.mcore.active import have_transformer_engine, require_active
from megatron_r1.mcore.host_fixes import FIXES, HostFix
from megatron_r1.mcore.host_rewrite import EXPECTED_HITS, RULES, count_hits, rewrite
from tests.one_rank import one_rank_world
from tests.patience import patient

host.activate("cpu")

pytestmark = pytest.mark.slow
PACKAGE = host._package_folder()
ONE_RANK = SimpleNamespace(size=lambda: 1, rank=lambda: 0)


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter, because activation is once per process."""
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], check=False, capture_output=True, text=True, timeout=patient(120)
    )


# --- activation


def test_refuses_megatron_core_that_was_imported_unhooked() -> None:
    done = run_python("import megatron.core\nfrom megatron_r1.mcore import host\nhost.activate('cpu')")
    assert done.returncode == 1
    assert "RuntimeError: megatron.core was imported before mcore.host.activate('cpu'); call activate first" in done.stderr


def test_sibling_modules_say_what_to_call() -> None:
    done = run_python("import megatron_r1.mcore.parallel")
    assert "RuntimeError: call megatron_r1.mcore.host.activate('cpu' or 'cuda') before" in done.stderr


def test_activation_is_idempotent_and_for_one_device() -> None:
    host.activate("cpu")
    assert require_active() == "cpu"
    with pytest.raises(RuntimeError, match="already prepared for cpu"):
        host.activate("cuda")


def test_torch_itself_is_untouched() -> None:
    code = """
import torch
names = ("is_available", "current_device", "Stream", "get_rng_state", "manual_seed", "FloatTensor")
before = {n: getattr(torch.cuda, n) for n in names} | {"tensor": torch.Tensor.cuda, "compile": torch.compile, "empty": torch.empty}
from megatron_r1.mcore import host
host.activate("cpu")
from megatron_r1.mcore import provider
after = {n: getattr(torch.cuda, n) for n in names} | {"tensor": torch.Tensor.cuda, "compile": torch.compile, "empty": torch.empty}
assert before == after
print("same")
"""
    assert run_python(code).stdout == "same\n"


def test_with_cuda_only_the_gaps_of_a_missing_transformer_engine_are_filled() -> None:
    if have_transformer_engine():
        pytest.skip("Transformer Engine is installed")
    code = """
from megatron_r1.mcore import host
host.activate("cuda")
import megatron.core.tensor_parallel.random as random
import megatron.core.transformer.multi_latent_attention as mla
from megatron_r1.mcore.host_rewrite import NAMESPACE
from megatron_r1.mcore.layers import ReplicatedLinear
assert not hasattr(random, NAMESPACE)
assert random._get_cuda_rng_state.__module__ == random.__name__
assert random.FP8GlobalStateManager.is_fp8_enabled() is False
assert mla.TELinear is ReplicatedLinear
print("ok")
"""
    done = run_python(code)
    assert done.stdout == "ok\n", done.stderr


# --- pins


def test_what_is_rewritten_is_kept_beside_its_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "some.py"
    loader, rewritten = host._Loader("megatron.core.some", str(path), [], retarget=True), []
    monkeypatch.setattr(host, "rewrite", lambda source, name: rewritten.append(source) or rewrite(source, name))
    monkeypatch.setattr(sys, "dont_write_bytecode", False)

    def run() -> object:
        names: dict[str, object] = {}
        exec(loader.get_code("megatron.core.some"), names)  # noqa: S102
        return names["device"]

    def kept() -> list[Path]:
        return list(tmp_path.glob("__pycache__/some.*r1cpu*.pyc"))

    path.write_text("device = 'cuda'")
    assert [run(), run()] == ["cpu", "cpu"] and len(rewritten) == len(kept()) == 1
    assert path.read_text() == "device = 'cuda'" and not list(tmp_path.glob("__pycache__/some.cpython-*[0-9].pyc")), "Python's own"
    path.write_text("device = 'cuda:'")  # maybe within the same second
    assert [run(), run()] == ["cpu:", "cpu:"] and len(rewritten) == 2
    whole = kept()[0].read_bytes()
    for damaged in (b"", whole[:4], whole[:-3], whole[:16] + b"\xff" * 9, whole[:12] + b"N"):  # the last one is no code
        kept()[0].write_bytes(damaged)
        assert run() == "cpu:" and kept()[0].read_bytes() == whole
    monkeypatch.setattr(host, "_rules_hash", lambda: "0123456789abcdef")
    assert run() == "cpu:" and len(kept()) == 2, "other rules"
    with monkeypatch.context() as patch:
        flags = {name: getattr(sys.flags, name) for name in dir(sys.flags) if not name.startswith("_")}
        patch.setattr(sys, "flags", SimpleNamespace(**flags | {"optimize": 1}))
        assert run() == "cpu:" and len(kept()) == 3, "without assertions"
    shutil.rmtree(tmp_path / "__pycache__")
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    assert run() == "cpu:" and not (tmp_path / "__pycache__").exists()
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    (tmp_path / "__pycache__").write_text("in the way")
    assert run() == "cpu:", "where nothing can be kept it works, too"


def test_pins_are_those_of_the_installed_package() -> None:
    assert host.fingerprint(PACKAGE) == host.FINGERPRINT
    assert dict(count_hits(PACKAGE)) == EXPECTED_HITS
    assert {fix.name: host.target_hash(PACKAGE, fix) for fix in FIXES} == {fix.name: fix.sha256 for fix in FIXES}


def test_another_version_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"megatron-core 0\.17\.0 is installed, mcore/host\.py is written for 0\.16\.1"):
        host.check_source(PACKAGE, "0.17.0")


def test_changed_source_is_refused_by_name(tmp_path: Path) -> None:
    copy = tmp_path / "core"
    shutil.copytree(PACKAGE, copy, ignore=lambda folder, names: [n for n in names if n == "__pycache__"])
    mappings = copy / "tensor_parallel" / "mappings.py"
    changed = mappings.read_text().replace("# Bypass the function if we are using only 1 GPU.", "# Changed.")
    mappings.write_text(changed + "\nDEVICE = 'cuda'\n")
    (copy / "jit.py").unlink()
    with pytest.raises(RuntimeError) as refused:
        host.check_source(copy, host.VERSION)
    message = str(refused.value)
    assert "rule 'cuda' hits 99 times, not 98" in message
    assert "fix 'uneven gather': megatron.core.tensor_parallel.mappings._gather_along_first_dim changed" in message
    assert "fix 'jit fuser off'" in message
    assert "fix 'rng state'" not in message


# --- rules

REWRITES = {
    "torch.cuda": ("torch.cuda.current_device()", "_r1_host_cuda.current_device()"),
    "x.cuda()": ("x.cuda(non_blocking=True)", "_r1_to_device(x, non_blocking=True)"),
    "x.is_cuda": ("x.is_cuda", "x.is_cpu"),
    "'cuda'": ("f(device='cuda', other=f'cuda:{i}')", "f(device='cpu', other=f'cpu:{i}')"),
    "'torch.cuda.Tensor'": ("['torch.cuda.HalfTensor']", "['torch.HalfTensor']"),
    "pin_memory": ("f(pin_memory=True)", "f(pin_memory=False)"),
}


@pytest.mark.parametrize("rule", RULES)
def test_rule(rule: str) -> None:
    source, expected = REWRITES[rule]
    tree, hits = rewrite(source.encode(), "module.py")
    assert ast.unparse(tree) == expected
    assert hits[rule] >= 1
    assert set(hits) == {rule}


def test_rules_leave_other_names_alone() -> None:
    source = "model.cuda_graph(x, 'cudagraph', pin_memory=flag, device=torch.device('cpu'))"
    tree, hits = rewrite(source.encode(), "module.py")
    assert ast.unparse(tree) == source
    assert not hits


# --- fixes


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


def check_reduction_alone(module: ModuleType) -> None:
    """In place a group of one calls nothing; else the collective is called as ever."""
    one_rank_world()
    group, buffer, other, called = torch.distributed.group.WORLD, torch.arange(4.0), torch.empty(4), []
    fix = next(fix for fix in FIXES if fix.name == "reduction alone")
    fake = SimpleNamespace(dist_all_gather_func=lambda *tensors, group, **_: called.append((tensors, group)))
    fake.dist_reduce_scatter_func = fake.dist_all_gather_func
    fix.apply(fake)
    two_ranks = SimpleNamespace(size=lambda: 2)
    for collective in (fake.dist_all_gather_func, fake.dist_reduce_scatter_func):
        assert collective(buffer, buffer[:4], group=group, async_op=False) is None and not called
        collective(other, buffer, group=group, async_op=True)
        collective(buffer, buffer[:2], group=two_ranks)
        assert [(tensors[0] is other, of) for tensors, of in called] == [(True, group), (False, two_ranks)]
        called.clear()
    with torch.distributed._coalescing_manager(group, async_ops=True) as manager:  # that has nothing to do
        module.dist_all_gather_func(buffer, buffer, group=group, async_op=True)
    manager.wait()
    module.dist_all_gather_func(other, buffer, group=group)
    assert torch.equal(other, torch.arange(4.0)) and torch.equal(buffer, other)


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


def check_packed_roll(module: ModuleType) -> None:
    tokens = torch.arange(1, 9).view(1, -1)
    packing = SimpleNamespace(cu_seqlens_q=torch.tensor([0, 3, 4, 7], dtype=torch.int32))
    rolled, total = module.roll_tensor(tokens, shifts=-1, dims=-1, cp_group=ONE_RANK, packed_seq_params=packing)
    assert rolled.tolist() == [[2, 3, 0, 0, 6, 7, 0, 8]]
    assert total == 26
    assert tokens.tolist() == [list(range(1, 9))]


CHECKS: dict[str, Callable[[ModuleType], None]] = {
    "jit fuser off": check_jit_fuser_off,
    "rng state": check_rng_state,
    "rng fork": check_rng_fork,
    "no fp8 state": check_no_fp8_state,
    "no te gemm": check_no_te_gemm,
    "replicated down-projection": check_replicated_down_projection,
    "uneven gather": check_uneven_gather,
    "uneven reduce-scatter": check_uneven_reduce_scatter,
    "reduction alone": check_reduction_alone,
    "rope of rows": check_rope_of_rows,
    "packed rope": check_packed_rope,
    "packed roll": check_packed_roll,
}


@pytest.mark.parametrize("fix", FIXES, ids=lambda fix: fix.name)
def test_fix(fix: HostFix) -> None:
    CHECKS[fix.name](importlib.import_module(fix.module))
