"""Takes asserts apart, so that the expected value stays outside the sandbox in which the program runs.

`assert f(args) == value`, `assert f(args)`, `assert not f(args)` and LeetCode's `assert is_same_list(f(args), list_node([...]))`
(and trees) become `CallTest`s if the value is a literal and the arguments name nothing that the test code defines (MBPP's may name
what the program defines). All other statements of a check stay together as one `CheckTest`.
"""

from __future__ import annotations

import ast
import builtins
import copy
from typing import Any

from megatron_r1.rewards.code.cases import CallTest, CheckTest, TestsError
from megatron_r1.rewards.code.compare import BinaryTree, LinkedList

LEETCODE_BUILDERS = {"list_node": LinkedList, "tree_node": BinaryTree}  #: function of the tests -> the value that it builds
_LEETCODE_COMPARISONS = {"is_same_list", "is_same_tree"}
_BUILTINS = {name for name in dir(builtins) if name.islower() and not name.startswith("_")}
_CHECK_IMPORTS = "import collections, copy, itertools, math, random, re, string, sys\nfrom typing import *\n"


def tests_of_leetcode(source: str) -> tuple[CallTest | CheckTest, ...]:
    """`def check(candidate)` and then a call `check(Solution().method)`, which names the function."""
    tree = _parse(source)
    calls = [node.value for node in tree.body if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)]
    calls = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "check" and len(call.args) == 1]
    if len(calls) != 1:
        raise TestsError("functional tests do not end with one call of check")
    tree.body = [node for node in tree.body if not (isinstance(node, ast.Expr) and node.value is calls[0])]
    return _tests_of_check(tree, ast.unparse(calls[0].args[0]), (), "", set(LEETCODE_BUILDERS))


def tests_of_check(source: str, entry_point: str, prelude: str) -> tuple[CallTest | CheckTest, ...]:
    """`def check(candidate)`, called with the function `entry_point`, whose name the check may use too."""
    if not entry_point.isidentifier():
        raise TestsError(f"entry_point {entry_point!r} is not a name")
    return _tests_of_check(_parse(source), entry_point, (entry_point,), prelude, set())


def tests_of_asserts(asserts: list[str], setup: str) -> tuple[CallTest | CheckTest, ...]:
    """One test for each assert. The setup may build arguments with the program's own classes, so it runs after it."""
    _parse(setup)
    tests: list[CallTest | CheckTest] = []
    for text in asserts:
        for statement in _parse(text).body:
            name = _called_name(statement)
            test = _call_test(statement, name, name, None, setup)
            if test is None:
                tests.append(CheckTest(ast.unparse(statement), _CHECK_IMPORTS + setup, (name,), name))
            else:
                tests.append(test)
    return tuple(tests)


def _tests_of_check(
    tree: ast.Module, function: str, names: tuple[str, ...], prelude: str, known: set[str]
) -> tuple[CallTest | CheckTest, ...]:
    checks = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "check"]
    if len(checks) != 1 or len(checks[0].args.args) != 1:
        raise TestsError("the tests have no function check(candidate)")
    check, candidate = checks[0], checks[0].args.args[0].arg
    tests: list[CallTest | CheckTest] = []
    rest: list[ast.stmt] = []
    for statement in check.body:
        if isinstance(statement, ast.Assert) and isinstance(statement.test, ast.Constant) and statement.test.value:
            continue  # `assert True` tests nothing
        test = _call_test(statement, candidate, function, known, "")
        rest.append(statement) if test is None else tests.append(test)
    if any(isinstance(node, ast.Assert) for statement in rest for node in ast.walk(statement)):
        check.body = [_InPlace(candidate).visit(statement) for statement in rest]
        source = f"{ast.unparse(tree)}\ncheck({candidate})"
        tests.append(CheckTest(source, _CHECK_IMPORTS + prelude, (candidate, *names), function))
    return tuple(tests)


class _InPlace(ast.NodeTransformer):
    """A call of the candidate as a statement of its own may change its arguments (`sandbox.remote`), no other may."""

    def __init__(self, candidate: str):
        self._candidate = candidate

    def visit_Expr(self, node: ast.Expr) -> ast.Expr:
        call = node.value
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == self._candidate:
            call.func = ast.Attribute(call.func, "in_place", ast.Load())
        return node


def _call_test(statement: ast.stmt, candidate: str, function: str, known: set[str] | None, setup: str) -> CallTest | None:
    """The statement as a test with its expected value aside, or None if it has another shape.

    Args:
        known: names that arguments may use in the program's namespace, beside Python's own; None: any.
    """
    if not isinstance(statement, ast.Assert):
        return None
    test = statement.test
    if isinstance(test, ast.Compare) and len(test.ops) == 1 and isinstance(test.ops[0], (ast.Eq, ast.Is)):
        return _with_expected(test.left, test.comparators[0], candidate, function, known, setup)
    is_comparison = isinstance(test, ast.Call) and isinstance(test.func, ast.Name) and test.func.id in _LEETCODE_COMPARISONS
    if is_comparison and known and known & set(LEETCODE_BUILDERS) and len(test.args) == 2:
        return _with_expected(*test.args, candidate, function, known, setup)
    truth = not (isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not))
    expression = _expression(test if truth else test.operand, candidate, function, known)
    return None if expression is None else CallTest(expression, truth, setup, truth_only=True)


def _with_expected(call: ast.expr, value: ast.expr, candidate: str, function: str, known: set[str], setup: str) -> CallTest | None:
    expression = _expression(call, candidate, function, known)
    try:
        return None if expression is None else CallTest(expression, _expected(value), setup)
    except ValueError:
        return None


def _expected(value: ast.expr) -> Any:
    """A literal, or LeetCode's list or tree of literals. Raises ValueError."""
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id in LEETCODE_BUILDERS:
        if len(value.args) != 1 or value.keywords:
            raise ValueError("one list of values")
        values = ast.literal_eval(value.args[0])
        while values and values[-1] is None:
            values = values[:-1]
        return LEETCODE_BUILDERS[value.func.id](values or [])
    return ast.literal_eval(value)


def _expression(call: ast.expr, candidate: str, function: str, known: set[str] | None) -> str | None:
    """The call as text in the program's namespace, or None if it is no plain call of the candidate."""
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.func.id != candidate:
        return None
    arguments = [*call.args, *(keyword.value for keyword in call.keywords)]
    names = {node.id for argument in arguments for node in ast.walk(argument) if isinstance(node, ast.Name)}
    if candidate in names or (known is not None and not names <= known | _BUILTINS):
        return None
    renamed = copy.copy(call)
    renamed.func = ast.parse(function, mode="eval").body
    return ast.unparse(renamed)


def _called_name(statement: ast.stmt) -> str:
    """The function that an MBPP assert tests: the first one that it calls and that is not built into Python, else the first."""
    calls = [node.func.id for node in ast.walk(statement) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    # A program may define its own `sum`, and arguments may be of its own classes: `assert sum(Pair(1), Pair(2)) == 3`.
    names = [name for name in calls if name not in _BUILTINS and not name[0].isupper()] or calls
    if not names:
        raise TestsError("an assert calls no function of the program")
    return names[0]


def _parse(source: str) -> ast.Module:
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise TestsError(f"the tests are not Python: {type(error).__name__}") from error
