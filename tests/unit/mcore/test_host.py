"""Megatron-Core without CUDA: every rule and every fix does what it is for, and a changed Megatron-Core is refused by name."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_r1.mcore import host
from megatron_r1.mcore.active import have_transformer_engine, require_active
from megatron_r1.mcore.host_fixes import FIXES
from megatron_r1.mcore.host_rewrite import EXPECTED_HITS, RULES, count_hits, rewrite
from tests.patience import patient

host.activate("cpu")

pytestmark = pytest.mark.slow
PACKAGE = host._package_folder()


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
