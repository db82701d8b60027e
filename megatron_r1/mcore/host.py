"""Megatron-Core on a machine without CUDA or without Transformer Engine.

`activate` is called once per process before megatron.core is imported. With CUDA and Transformer Engine it changes nothing.
Otherwise an import hook compiles megatron.core (and nothing else) under the rules of `host_rewrite.py` and applies the fixes
of `host_fixes.py`. Both are pinned to one Megatron-Core version and to the source they were written against.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import marshal
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import CodeType, ModuleType

from megatron_r1.mcore import active, host_cuda, host_rewrite
from megatron_r1.mcore.active import Device, have_transformer_engine
from megatron_r1.mcore.host_fixes import FIXES, HostFix
from megatron_r1.mcore.host_rewrite import EXPECTED_HITS, NAMESPACE, TO_DEVICE, count_hits, rewrite

VERSION = "0.16.1"
#: sha256 over all .py files of megatron/core in 0.16.1; equal: the slower named checks need not run
FINGERPRINT = "e279d43b15d3f2a8799089621c72d673d0eb4e0b649dcb04e08c625f5274c6c1"


def activate(device: Device) -> None:
    """Prepare megatron.core for `device`; again with the same device does nothing.

    Raises:
        RuntimeError: megatron.core was imported before, another device is active, or Megatron-Core is not what the rules and
            fixes were written for (the message names what changed).
    """
    prepared = active.prepared_device()
    if prepared == device:
        return
    if prepared is not None:
        raise RuntimeError(f"megatron.core is already prepared for {prepared}; one process serves one device")
    imported = sorted(name for name in sys.modules if _is_megatron_core(name))
    if imported:
        raise RuntimeError(f"{imported[0]} was imported before mcore.host.activate({device!r}); call activate first")
    fixes = [fix for fix in FIXES if _applies(fix, device)]
    if fixes:
        check_source(_package_folder(), importlib.metadata.version("megatron-core"))
        sys.meta_path.insert(0, _Finder(fixes, retarget=device == "cpu"))
    active.mark_prepared(device)


def check_source(package: Path, version: str) -> None:
    """Hold the pins against the installed megatron/core folder.

    Raises:
        RuntimeError: the version, the number of hits of a rule, or the source behind a fix differ; the message names each.
    """
    if version != VERSION:
        raise RuntimeError(f"megatron-core {version} is installed, mcore/host.py is written for {VERSION}: install that version")
    if fingerprint(package) == FINGERPRINT:
        return
    hits = count_hits(package)
    changed = [f"rule {rule} hits {hits[rule]} times, not {n}" for rule, n in EXPECTED_HITS.items() if hits[rule] != n]
    changed += [f"fix '{fix.name}': {fix.module}.{fix.target} changed" for fix in FIXES if target_hash(package, fix) != fix.sha256]
    if changed:
        raise RuntimeError(f"megatron-core {version} differs from the one mcore/host.py is written for: {'; '.join(changed)}")


def fingerprint(package: Path) -> str:
    """sha256 over the sources under `package` in path order."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def target_hash(package: Path, fix: HostFix) -> str | None:
    """sha256 of the source that `fix` replaces; None when it is gone."""
    path = package.joinpath(*fix.module.split(".")[2:]).with_suffix(".py")
    if not path.is_file():
        return None
    source = path.read_text()
    node: ast.AST | None = ast.parse(source)
    for name in fix.target.split("."):
        node = next((child for child in getattr(node, "body", []) if getattr(child, "name", None) == name), None)
    segment = ast.get_source_segment(source, node) if node is not None else None
    return hashlib.sha256(segment.encode()).hexdigest() if segment is not None else None


def _is_megatron_core(name: str) -> bool:
    return name == "megatron.core" or name.startswith("megatron.core.")


def _applies(fix: HostFix, device: Device) -> bool:
    return device == "cpu" or (fix.needed == "without_te" and not have_transformer_engine())


def _package_folder() -> Path:
    spec = importlib.util.find_spec("megatron")
    folders = [Path(root) / "core" for root in (spec.submodule_search_locations or [])] if spec else []
    found = [folder for folder in folders if folder.is_dir()]
    if not found:
        raise RuntimeError("megatron-core is not installed")
    return found[0]


class _Loader(importlib.machinery.SourceFileLoader):
    """Compiles one module of megatron.core under the rules, then applies its fixes."""

    def __init__(self, name: str, path: str, fixes: Sequence[HostFix], retarget: bool) -> None:
        super().__init__(name, path)
        self.fixes, self.retarget = fixes, retarget

    def get_code(self, fullname: str) -> CodeType | None:
        """The module under the rules, from Python's cache beside it: to rewrite all of them takes every process two seconds."""
        if not self.retarget:
            return super().get_code(fullname)
        path = self.get_filename(fullname)
        source = self.get_data(path)
        head = importlib.util.MAGIC_NUMBER + importlib.util.source_hash(source)
        cache = importlib.util.cache_from_source(path, optimization=_cache_tag())
        with suppress(OSError, EOFError, ValueError, TypeError):  # not there, or damaged
            cached = self.get_data(cache)
            if cached.startswith(head):
                code = marshal.loads(cached[len(head) :])
                if isinstance(code, CodeType):
                    return code
        tree, _ = rewrite(source, path)
        code = compile(tree, path, "exec", dont_inherit=True)
        if not sys.dont_write_bytecode:
            self.set_data(cache, head + marshal.dumps(code))  # at once or not at all, and not where nobody may write
        return code

    def exec_module(self, module: ModuleType) -> None:
        if self.retarget:
            setattr(module, NAMESPACE, host_cuda)
            setattr(module, TO_DEVICE, host_cuda.to_device)
        super().exec_module(module)
        for fix in self.fixes:
            fix.apply(module)


def _cache_tag() -> str:
    """Names the rules, and how far Python optimises: with `-O` it compiles no assertions."""
    return f"r1cpu{sys.flags.optimize}{_rules_hash()}"


@functools.cache
def _rules_hash() -> str:
    return hashlib.sha256(Path(host_rewrite.__file__).read_bytes()).hexdigest()[:16]


class _Finder(importlib.abc.MetaPathFinder):
    """Hands modules of megatron.core to `_Loader`."""

    def __init__(self, fixes: Sequence[HostFix], retarget: bool) -> None:
        self.fixes, self.retarget = fixes, retarget

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None):
        if not _is_megatron_core(fullname):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is not None and type(spec.loader) is importlib.machinery.SourceFileLoader:
            fixes = [fix for fix in self.fixes if fix.module == fullname]
            spec.loader = _Loader(spec.loader.name, spec.loader.path, fixes, self.retarget)
        return spec
