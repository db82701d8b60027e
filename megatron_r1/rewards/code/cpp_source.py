"""C++ answers to tests of functions: the source to compile, and each test's arguments as the compiled program reads them.

Arguments are passed by position, those by keyword in the order of the test: C++ has no names, and tests keep the order of a
signature. Values are None, bool, int, float, str and lists. Tuples are passed as lists, list_node and tree_node as lists of
their values. Only arguments go in; the result is compared outside, by the rules for Python, but C++ returns tuples as lists.
"""

from __future__ import annotations

import ast
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

from megatron_r1.rewards.code.asserts import LEETCODE_BUILDERS
from megatron_r1.rewards.code.cases import CallTest, CheckTest, Suite

_COMMENT = re.compile(r"//[^\n]*|/\*.*?(?:\*/|\Z)", re.DOTALL)  # linear: an open comment takes the rest
_NODES = {
    "ListNode": """struct ListNode {
    int val;
    ListNode *next;
    ListNode() : val(0), next(nullptr) {}
    ListNode(int x) : val(x), next(nullptr) {}
    ListNode(int x, ListNode *next) : val(x), next(next) {}
};
""",
    "TreeNode": """struct TreeNode {
    int val;
    TreeNode *left, *right;
    TreeNode() : val(0), left(nullptr), right(nullptr) {}
    TreeNode(int x) : val(x), left(nullptr), right(nullptr) {}
    TreeNode(int x, TreeNode *left, TreeNode *right) : val(x), left(left), right(right) {}
};
""",
}
# An answer may hold a main of its own, and what it defines by #define reaches to the end: `#define int long long` is common.
_BEFORE, _AFTER = (
    '#define main r1_main_of_answer\n#line 1 "main.cpp"\n',
    "\n#undef main\n#undef int\nint main() {{ r1_harness::call(&{function}); }}\n",
)


class NotForCppError(ValueError):
    """These tests can test Python programs only."""


def cpp_source(program: str, suite: Suite) -> str:
    """The program with all that is needed to call its function, or method of class Solution, that the tests name.

    Raises:
        NotForCppError: the tests call more than one function, or have Python that must run before the call.
    """
    names = {function_name(test) for test in suite.tests}
    if len(names) != 1:
        raise NotForCppError(f"the tests call {len(names)} functions")
    if any(isinstance(test, CallTest) and test.setup.strip() for test in suite.tests):
        raise NotForCppError("the tests have set-up code in Python")
    code = _COMMENT.sub(" ", program)
    nodes = "".join(text for name, text in _NODES.items() if not _defines(code, name))
    function = f"Solution::{names.pop()}" if _defines(code, "Solution") else names.pop()
    return f"{_harness()}{nodes}{_BEFORE}{program}{_AFTER.format(function=function)}"


def arguments_of(test: CallTest) -> bytes:
    """What the compiled program reads from standard input for one test.

    Raises:
        NotForCppError: an argument is no literal, or of a kind that C++ cannot take, e.g. a dict.
    """
    if test.arguments is not None:
        return encoded_arguments(test.arguments)
    call = ast.parse(test.expression, mode="eval").body
    values = [*call.args, *(keyword.value for keyword in call.keywords)]
    return _as_json([_literal(value) for value in values])


def encoded_arguments(arguments: Any) -> bytes:
    """The same for positional and named arguments that `values.encode_value` has encoded."""
    positional, named = arguments
    try:
        return _as_json([_decoded(value) for value in (*positional, *(value for _, value in named["dict"]))])
    except RecursionError as error:
        raise NotForCppError("an argument is nested too deep") from error


def _as_json(values: list[Any]) -> bytes:
    try:
        return json.dumps([_checked(value) for value in values], ensure_ascii=False).encode(errors="replace")
    except RecursionError as error:
        raise NotForCppError("an argument is nested too deep") from error


def _checked(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_checked(item) for item in value]
    if value is not None and not isinstance(value, (bool, int, float, str)):
        raise NotForCppError(f"an argument is a {type(value).__name__}")
    return value


def _literal(value: ast.expr) -> Any:
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id in LEETCODE_BUILDERS:
        (value,) = value.args
    if isinstance(value, (ast.List, ast.Tuple)):  # of lists and trees, too
        return [_literal(item) for item in value.elts]
    try:
        return ast.literal_eval(value)
    except ValueError as error:
        raise NotForCppError(f"an argument is an expression of Python: {ast.unparse(value)[:80]}") from error


def _decoded(encoded: Any) -> Any:
    if isinstance(encoded, list):
        return [_decoded(item) for item in encoded]
    if not isinstance(encoded, dict):
        return encoded
    ((kind, content),) = encoded.items()
    if kind == "int":
        return int(content, 16)
    if kind == "tuple":
        return _decoded(content)
    raise NotForCppError(f"an argument is a {kind}")


def function_name(test: CallTest | CheckTest) -> str:
    """The name of the function that an expression of `asserts` or `forms.find_function` calls or denotes.

    Raises:
        NotForCppError: it is no name.
    """
    function = ast.parse(test.function if isinstance(test, CheckTest) else test.expression, mode="eval").body
    if isinstance(test, CallTest) and test.arguments is None:
        function = function.func
    if isinstance(function, ast.IfExp):
        function = function.body
    if isinstance(function, ast.Name):
        return function.id
    if isinstance(function, ast.Attribute):
        return function.attr
    raise NotForCppError(f"the tests call {ast.unparse(function)[:80]}")


def _defines(code: str, name: str) -> bool:
    return re.search(rf"\b(?:struct|class)\s+{name}\s*(?:final\s*)?[:{{]", code) is not None


@cache
def _harness() -> str:
    return Path(__file__).with_name("cpp_harness.hpp").read_text(encoding="utf-8")
