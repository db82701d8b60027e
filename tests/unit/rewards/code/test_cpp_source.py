"""C++ answers to tests of functions, compiled with the harness and called in the sandbox."""

from __future__ import annotations

import json

import pytest

from megatron_r1.rewards.code import cpp_source as code_cpp
from megatron_r1.rewards.code.cpp_source import NotForCppError, arguments_of, cpp_source
from megatron_r1.rewards.code.forms import read_tests
from megatron_r1.rewards.code.scorer import CodeScorer
from megatron_r1.rewards.protocol import Verdict
from megatron_r1.rewards.sandbox.probe import probe_sandbox
from megatron_r1.rewards.sandbox.supervisor import SandboxSettings
from tests.patience import patient

pytestmark = pytest.mark.slow
PROBE = probe_sandbox(SandboxSettings())
needs_compiler = pytest.mark.skipif(not (PROBE.available and PROBE.compiler), reason=PROBE.reason or "there is no g++")

TWO_SUM = (
    "candidate(nums = [2,7,11,15], target = 9) == [0,1]",
    "candidate(nums = [3,2,4], target = 6) == [1,2]",
    "candidate(nums = [-3,4,3,90], target = 0) == [0,2]",
)


LEAN_HEADERS = ("charconv", "cmath", "cstdio", "cstring", "map", "string", "tuple", "vector")  #: what the harness itself needs


@pytest.fixture
def lean_harness(monkeypatch) -> None:
    """Without the other headers of LeetCode, which take more time than all the rest of a compilation."""
    harness = code_cpp._harness()
    lean = harness.replace("#include <bits/stdc++.h>", "\n".join(f"#include <{name}>" for name in LEAN_HEADERS))
    assert lean != harness
    monkeypatch.setattr(code_cpp, "_harness", lambda: lean)


def leetcode(name: str, *asserts: str) -> dict[str, str]:
    """Tests in LeetCode's form."""
    lines = "\n".join(f"    assert {text}" for text in asserts)
    return {"functional": f"def check(candidate):\n{lines}\n\ncheck(Solution().{name})"}


def verdict_on(code: str, tests: object) -> Verdict:
    return CodeScorer(wall_seconds=patient(60), cpu_seconds=1).score(f"<think>hm</think>\n```cpp\n{code}\n```\nDone.", tests)


WITHOUT_INCLUDES = """
class Solution {
public:
    vector<int> twoSum(vector<int>& nums, int target) {
        unordered_map<int, int> seen;
        for (int i = 0; i < (int)nums.size(); ++i) {
            auto found = seen.find(target - nums[i]);
            if (found != seen.end()) return {found->second, i};
            seen[nums[i]] = i;
        }
        return {};
    }
};"""
SOLUTIONS = {
    "the same element twice": (
        """
#include <vector>
class Solution {
public:
    std::vector<int> twoSum(std::vector<int> nums, int target) const {
        for (int i = 0; i < nums.size(); ++i)
            for (int j = 0; j < nums.size(); ++j)
                if (nums[i] + nums[j] == target) return {i, j};
        return {};
    }
};""",
        leetcode("twoSum", *TWO_SUM),
        ["accepted", "wrong", "accepted"],
    ),
    "linked lists, with a node class and a main of its own": (
        """
#include <iostream>
/* class Solution { of old }; */
struct ListNode { int val; ListNode *next; ListNode(int x) : val(x), next(NULL) {} };
class Solution {
public:
    ListNode* addTwoNumbers(ListNode* l1, ListNode* l2) {
        ListNode head(0), *last = &head;
        for (int carry = 0; l1 || l2 || carry; carry /= 10) {
            if (l1) { carry += l1->val; l1 = l1->next; }
            if (l2) { carry += l2->val; l2 = l2->next; }
            last = last->next = new ListNode(carry % 10);
        }
        return head.next;
    }
};
int main() { std::cout << Solution().addTwoNumbers(nullptr, nullptr); }""",
        leetcode(
            "addTwoNumbers",
            "is_same_list(candidate(l1=list_node([2,4,3]), l2=list_node([5,6,4])), list_node([7,0,8]))",
            "is_same_list(candidate(l1=list_node([]), l2=list_node([])), list_node([]))",
            "is_same_list(candidate(l1=list_node([9,9]), l2=list_node([1])), list_node([0,0,1]))",
            "is_same_list(candidate(l1=list_node([9,9]), l2=list_node([1])), list_node([0,0]))",
        ),
        ["accepted", "accepted", "accepted", "wrong"],
    ),
    "trees, with an int that is none": (
        """
#define int long long
class Solution {
public:
    TreeNode* trim(TreeNode* root, int low, int high) {
        if (!root) return root;
        if (root->val < low) return trim(root->right, low, high);
        if (root->val > high) return trim(root->left, low, high);
        root->left = trim(root->left, low, high);
        root->right = trim(root->right, low, high);
        return root;
    }
};
signed main() {}""",
        leetcode(
            "trim",
            "is_same_tree(candidate(root=tree_node([3,0,4,None,2,None,None,1]), low=1, high=3), tree_node([3,2,None,1]))",
            "is_same_tree(candidate(root=tree_node([1,0,2]), low=4294967297, high=4294967298), tree_node([]))",
            "is_same_tree(candidate(root=tree_node([1,0,2]), low=1, high=2), tree_node([1,2]))",
        ),
        ["accepted", "accepted", "wrong"],
    ),
    "every type there and back": (
        r"""
struct Solution {
    static vector<string> show(bool flag, const int small, long long big, double real, char letter, const string& text,
                               vector<vector<char>>& board, vector<bool> bits, unsigned natural, vector<ListNode*> lists) {
        string rows;
        for (auto& row : board) rows += string(row.begin(), row.end()) + "/";
        int sum = 0;
        for (ListNode* list : lists) for (; list; list = list->next) sum += list->val;
        return {to_string(flag), to_string(small), to_string(big), to_string(real), string(1, letter), text, rows,
                to_string(bits.size() * 10 + bits[0]), to_string(natural), to_string(sum), "\x01\t\\"};
    }
};""",
        {
            "fn_name": "show",
            "inputs": [
                [True, -5, -(2**63), 2.5, "]", 'é"\n\\\u0007,', [["a", ","], []], [True, False], 7, [[1, 2], [], [3]]],
                [False, 5, 2**63 - 1, 3, "a", "", [], [False], 0, []],
                [False, 2**31, 0, 0, "a", "", [], [False], 0, []],
                [0, 1, 0, 0, "a", "", [], [False], 0, []],
                [False, 1, 0, 0, "ab", "", [], [False], 0, []],
                [False, 1, 0, 0, "a", None, [], [False], 0, []],
                [False, 1, 0, 0, "a", "", [], [False], -1, []],
                [False, 1, 0, 0, "a", "", [], [False], 1],
            ],
            "outputs": [
                ["1", "-5", str(-(2**63)), "2.500000", "]", 'é"\n\\\u0007,', "a,//", "21", "7", "6", "\x01\t\\"],
                ["0", "5", str(2**63 - 1), "3.000000", "a", "", "", "10", "0", "0", "\x01\t\\"],
                *[[]] * 6,
            ],
        },
        ["accepted", "accepted", *["runtime_error"] * 6],
    ),
    "a plain function that a check calls": (
        "double half(double x) { return x / 2; }",
        ["assert half(3) == 1.5", "assert all(half(i) == i / 2 for i in range(4))", "assert [half(x) for x in (1, {})]"],
        ["accepted", "accepted", "wrong"],
    ),
}  # fmt: skip


@needs_compiler
def test_a_cpp_solution_has_leetcodes_headers():
    assert verdict_on(WITHOUT_INCLUDES, leetcode("twoSum", *TWO_SUM)).parts["tests"] == ["accepted"] * 3


@needs_compiler
@pytest.mark.parametrize("name", SOLUTIONS)
def test_a_cpp_solution_is_called_with_each_tests_arguments(name, lean_harness):
    code, tests, verdicts = SOLUTIONS[name]
    verdict = verdict_on(code, tests)
    assert verdict.parts and verdict.parts["tests"] == verdicts, verdict


MISBEHAVING = r"""
#include <fcntl.h>
#include <iostream>
class Solution {
    string search() {
        string all;
        for (int fd = 0; fd < 64; ++fd) {
            char piece[4096];
            lseek(fd, 0, SEEK_SET);
            for (ssize_t n; (n = read(fd, piece, sizeof piece)) > 0;) all.append(piece, n);
        }
        auto at = all.find("R1EXPECTED");
        return at == string::npos ? "" : all.substr(at, 12);
    }
public:
    string f(int how) {
        const string forged = "\"R1EXPECTED\"";
        switch (how) {
            case 0: return "R1EXPECTED-0";
            case 1: cout << "\"R1EXPECTED-1\"\n" << flush; exit(0);
            case 2: for (int fd = 0; fd < 64; ++fd) write(fd, forged.data(), forged.size()); _exit(0);
            case 3: write(3, forged.data(), forged.size()); return "R1EXPECTED-3";
            case 4: return search();
            case 5: write(3, "[[[[", 4); _exit(0);
            case 6: *(volatile int*)0 = 1; return "";
            case 7: for (volatile int x = 0;; ++x) {}
            case 8: throw runtime_error("R1 no");
            case 9: { volatile char here[1000]; here[0] = how; return f(9) + here[0]; }
            case 10: { vector<string> all; for (;;) all.push_back(string(1 << 24, 'x')); }
            case 11: for (;;) cout << forged;
            case 12: close(3); open("/dev/null", O_WRONLY); return "R1EXPECTED-12";
            default: return string(1, '\xff');
        }
    }
};
"""
HOW = [
    "accepted", "runtime_error", "wrong", "runtime_error", "wrong", "runtime_error", "runtime_error", "time_limit", "runtime_error",
    "runtime_error", "memory_limit", "output_limit", "runtime_error", "runtime_error",
]  # fmt: skip


@needs_compiler
def test_a_program_that_misbehaves_is_called_by_its_name(lean_harness):
    tests = {
        "fn_name": "f",
        "inputs": [[how] for how in range(len(HOW))],
        "outputs": [f"R1EXPECTED-{how}" for how in range(len(HOW))],
    }
    verdict = verdict_on(MISBEHAVING, tests)
    assert dict(enumerate(verdict.parts["tests"])) == dict(enumerate(HOW))
    assert verdict.score == 0 and "ended before it returned" in verdict.detail


@needs_compiler
@pytest.mark.parametrize(
    ("members", "said"),
    [
        ("int g(int x) { return x; }", "is not a member"),
        ("int f(int x) { return x; } int f(string x) { return 1; }", "unresolved overloaded function type"),
        ("int f(map<int, int> x) { return 1; }", "no arguments and results of this type"),
    ],
)
def test_a_function_that_cannot_be_called_is_a_compile_error(members, said, lean_harness):
    verdict = verdict_on(f"class Solution {{ public: {members} }};", leetcode("f", "candidate(x=1) == 1"))
    assert verdict.parts["tests"] == ["compile_error"] and said in verdict.detail, verdict


@pytest.mark.parametrize(
    ("tests", "said"),
    [
        (["assert f(1) == 1", "assert g(1) == 1"], "2 functions"),
        ({"asserts": ["assert f(x) == 1"], "setup": "x = 1"}, "set-up code"),
        (leetcode("f", "candidate(x={1: 2}) == 1"), "a dict"),
        (leetcode("f", "candidate(x=int(1)) == 1"), "an expression of Python"),
        ({"fn_name": "f", "inputs": [[{"a": 1}]], "outputs": [1]}, "a dict"),
    ],
)
def test_tests_that_only_python_can_take(tests, said):
    suite = read_tests(tests)
    with pytest.raises(NotForCppError, match=said):
        cpp_source("int f(int x) { return x; }", suite)
        arguments_of(suite.tests[0])


@needs_compiler
def test_an_answer_in_cpp_to_tests_for_python_is_wrong():
    assert verdict_on("int f(int x) { return x; }", ["assert f(1) == 1", "assert g(1) == 1"]).outcome == "wrong"


def test_no_expected_value_is_in_what_is_compiled_or_read():
    suite = read_tests({"fn_name": "f", "inputs": [{"b": ("x", 1), "a": [2.5, None]}], "outputs": ["R1EXPECTED"]})
    assert json.loads(arguments_of(suite.tests[0])) == [["x", 1], [2.5, None]]
    assert b"R1EXPECTED" not in arguments_of(suite.tests[0]) + cpp_source("", suite).encode()


@pytest.mark.parametrize(
    ("program", "called"),
    [
        ("class Solution {};", "&Solution::f"),
        ("struct Solution final : Base {};", "&Solution::f"),
        ("// class Solution {\nint f();", "&f"),
        ("class Solution;", "&f"),
        ("/*" * 100_000, "&f"),
        ("struct " * 40_000, "&f"),
    ],
    ids=lambda text: text[:20],
)
def test_the_function_is_a_method_where_there_is_a_class_solution(program, called):
    assert cpp_source(program, read_tests(["assert f(1) == 1"])).endswith(f"call({called}); }}\n")
