"""The source rules under which megatron.core is compiled on a machine without CUDA.

No torch global is touched, so vLLM and transformers in the same process see an unchanged torch, and nothing is paid per
operation. `EXPECTED_HITS` pins how often each rule applies in the whole of Megatron-Core 0.16.1.
"""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

NAMESPACE, TO_DEVICE = "_r1_host_cuda", "_r1_to_device"

RULES: dict[str, str] = {
    "torch.cuda": "torch.cuda -> host_cuda, the stand-in for the namespace",
    "x.cuda()": "x.cuda(...) -> host_cuda.to_device(x, ...)",
    "x.is_cuda": "x.is_cuda -> x.is_cpu: 'is it on the training device'",
    "'cuda'": "device strings 'cuda' and 'cuda:' -> 'cpu' and 'cpu:'",
    "'torch.cuda.Tensor'": "tensor type strings 'torch.cuda.FloatTensor' -> 'torch.FloatTensor'",
    "pin_memory": "pin_memory=True -> False: pinning needs a CUDA driver",
}

EXPECTED_HITS: dict[str, int] = {
    "torch.cuda": 450,
    "x.cuda()": 21,
    "x.is_cuda": 24,
    "'cuda'": 98,
    "'torch.cuda.Tensor'": 9,
    "pin_memory": 8,
}


class Retarget(ast.NodeTransformer):
    """Apply `RULES` to one module; `hits` counts what was changed."""

    def __init__(self) -> None:
        self.hits: Counter[str] = Counter()

    def visit_Call(self, node: ast.Call) -> ast.AST:
        """x.cuda() and pin_memory=True."""
        method = node.func
        if isinstance(method, ast.Attribute) and method.attr == "cuda" and not _is_torch(method.value):
            self.hits["x.cuda()"] += 1
            node = ast.copy_location(ast.Call(ast.Name(TO_DEVICE, ast.Load()), [method.value, *node.args], node.keywords), node)
        self.generic_visit(node)
        for keyword in node.keywords:
            if keyword.arg == "pin_memory" and isinstance(keyword.value, ast.Constant) and keyword.value.value is True:
                self.hits["pin_memory"] += 1
                keyword.value = ast.copy_location(ast.Constant(False), keyword.value)
        return node

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        """torch.cuda and x.is_cuda."""
        self.generic_visit(node)
        if node.attr == "cuda" and _is_torch(node.value):
            self.hits["torch.cuda"] += 1
            return ast.copy_location(ast.Name(NAMESPACE, ast.Load()), node)
        if node.attr == "is_cuda":
            self.hits["x.is_cuda"] += 1
            node.attr = "is_cpu"
        return node

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        """Device and tensor type strings."""
        if node.value in ("cuda", "cuda:"):
            self.hits["'cuda'"] += 1
            return ast.copy_location(ast.Constant(node.value.replace("cuda", "cpu")), node)
        if isinstance(node.value, str) and node.value.startswith("torch.cuda.") and node.value.endswith("Tensor"):
            self.hits["'torch.cuda.Tensor'"] += 1
            return ast.copy_location(ast.Constant(node.value.replace(".cuda", "")), node)
        return node


def rewrite(source: bytes, path: str) -> tuple[ast.Module, Counter[str]]:
    """The retargeted syntax tree of one module and how often each rule applied."""
    retarget = Retarget()
    tree = ast.fix_missing_locations(retarget.visit(ast.parse(source, path)))
    return tree, retarget.hits


def count_hits(package: Path) -> Counter[str]:
    """Hits of every rule over all modules under `package`, imported or not."""
    total: Counter[str] = Counter()
    for path in sorted(package.rglob("*.py")):
        total += rewrite(path.read_bytes(), str(path))[1]
    return total


def _is_torch(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id == "torch"
