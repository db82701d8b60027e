"""Python programs that are judged as a whole: imported names, /dev/stdin, and all that must stay as under `python main.py`."""

from __future__ import annotations

import builtins

import pytest

from megatron_r1.rewards.code.program_names import imported_names
from megatron_r1.rewards.sandbox.supervisor import NO_ISOLATION
from tests.code_answers import judged, needs_sandbox

CASES = {
    "a name of collections": ("q = deque(map(int, input().split()))\nprint(sum(q))", "1 2", "3", 1),
    "names of several modules": ("print(gcd(4, 6), list(accumulate([1, 2])), reduce(lambda a, b: a * b, [2, 3]))", "",
     "2 [1, 3] 6", 1),
    "a module": ("print(math.gcd(4, 6), sys.stdin.read())", "x", "2 x", 1),
    "a module in a function": ("def main():\n    heap = [3, 1]\n    heapq.heapify(heap)\n    print(heap[0])\nmain()", "", "1", 1),
    "a name of typing": ("def f(x: List[int]) -> Optional[int]: return x[0]\nprint(f([1]))", "", "1", 1),
    "a module wins": ("print(datetime.date(2020, 1, 2))", "", "2020-01-02", 1),
    "Python's own wins": ("print(pow(2, 5, 7), abs(-1), open.__name__)", "", "4 1 open", 1),
    "the program's own wins": ("def gcd(a, b): return 42\nprint(gcd(1, 2))", "", "42", 1),
    "the program's own in a function": ("def f():\n    count = 3\n    return count\nprint(f())", "", "3", 1),
    "the program's own import": ("from datetime import datetime\nprint(datetime(2020, 1, 2).year)", "", "2020", 1),
    "no other name": ("print(numpy)", "", "", 0),
    "no name of ours": ("print(R1_NAMES)", "", "", 0),
    "nothing else in the namespace": ("print(sorted(n for n in globals() if not n.startswith('__')))", "", "[]", 1),
    "being the main module": ("import __main__\nX = 1\nif __name__ == '__main__': print(__main__.X, len(sys.argv))", "",
     "1 1", 1),
    "pickling a class": ("import pickle\nclass A: pass\nprint(type(pickle.loads(pickle.dumps(A()))).__name__)", "", "A", 1),
    "a dataclass": (
        "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass A:\n    x: int\nprint(A(1).x)",
                    "", "1", 1),
    "annotations stay off": ("def f(x: no_such_name): pass\nprint(1)", "", "1", 0),
    "/dev/stdin": ("lines = open('/dev/stdin').read().split()\nprint(sum(map(int, lines)))", "1 2", "3", 1),
    "/dev/stdin in binary": ("print(open('/dev/stdin', 'rb').read())", "1", "b'1'", 1),
    "/dev/stdin as a path": ("from pathlib import Path\nprint(Path('/dev/stdin').read_text())", "1", "1", 1),
    "/proc/self/fd/0": ("import io\nprint(io.open('/proc/self/fd/0').read())", "1", "1", 1),
    "descriptor 0": ("print(open(0).read())", "1", "1", 1),
    "a file of its own beside /dev/stdin": (
        "open('/tmp/x', 'w').write('a')\nprint(open('/dev/stdin').read(), open('/tmp/x').read())", "1", "1 a", 1),
    "another file": ("print(open('/etc/passwd').read(), '/dev/stdin')", "1", "1", 0),
    "exit": ("print(1)\nexit()", "", "1", 1),
    "an exit code": ("import sys\nprint(1)\nsys.exit(3)", "", "1", 0),
    "what runs at the end": ("import atexit\natexit.register(print, 2)\nprint(1)", "", "1\n2", 1),
    "an exception": ("print(1)\n1 / 0", "", "1", 0),
    "threads": ("import threading\nthreading.Thread(target=print, args=(1,)).start()", "", "1", 1),
}  # fmt: skip


@needs_sandbox
@pytest.mark.parametrize("name", CASES)
def test_a_program_runs_as_on_the_contests_machine(name):
    code, given, expected, score = CASES[name]
    assert judged(code, {"inputs": [given], "outputs": [expected]}).score == score


@needs_sandbox
def test_a_program_finds_the_names_without_isolation_too():
    tests = {"inputs": ["1 2"], "outputs": ["3"]}
    assert judged("print(sum(deque(map(int, input().split()))))", tests, isolation=NO_ISOLATION).score == 1


@needs_sandbox
def test_a_syntax_error_is_a_compile_error():
    assert judged("print(1", {"inputs": [""], "outputs": ["1"]}).parts["tests"] == ["compile_error"]


def test_no_name_of_pythons_is_replaced():
    names = imported_names()
    assert not set(names) & set(dir(builtins)) and len(names) > 300
    assert (names["deque"], names["datetime"], names["sqrt"], names["stdin"]) == ("collections", "datetime", "math", "sys")
