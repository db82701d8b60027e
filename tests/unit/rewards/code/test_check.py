"""Checks that decide for themselves: exceptions, changes in place, objects of the program, and what cannot be forged."""

from __future__ import annotations

import pytest

from tests.code_answers import judged, needs_sandbox


def check(body, name="f"):
    lines = "".join(f"    {line}\n" for line in body.splitlines())
    return {"check": f"def check(c):\n{lines}", "entry_point": name}


RAISES = check("try:\n    c(-1)\n    assert False\nexcept ValueError as error:\n    assert str(error) == 'neg'\nassert c(1) == 1")
IN_PLACE = check("x = [3, 1, 2]\nc(x)\nassert x == [1, 2, 3]")
STACK = """class Stack:
    def __init__(self): self.items = []
    def push(self, x): self.items.append(x)
    def pop(self): return self.items.pop()
    def __len__(self): return len(self.items)
    def __iter__(self): return iter(self.items)"""
USES_STACK = check(
    "s = c()\ns.push(1)\ns.push([2])\nassert len(s) == 2 and list(s) == [1, [2]] and s.items[1] == [2]\nassert s.pop() == [2]\n"
    "t = c()\nassert len(t) == 0 and s.pop() == 1\ntry:\n    s.pop()\n    assert False\nexcept IndexError:\n    pass",
    "Stack",
)
CASES = {
    "an exception that is expected": ("def f(x):\n    if x < 0: raise ValueError('neg')\n    return x", RAISES, 1),
    "a class of its own below it": ("class E(ValueError): pass\ndef f(x):\n    if x < 0: raise E('neg')\n    return x",
     RAISES, 1),
    "no exception": ("def f(x): return x", RAISES, 0),
    "another exception": ("def f(x):\n    if x < 0: raise KeyError('neg')\n    return x", RAISES, 0),
    "another message": ("def f(x):\n    if x < 0: raise ValueError('no')\n    return x", RAISES, 0),
    "an exception that is not expected": ("def f(x): raise ValueError('neg')", RAISES, 0),
    "the end of the process": ("import os\ndef f(x):\n    if x < 0: os._exit(0)\n    return x", RAISES, 0),
    "SystemExit": ("def f(x):\n    if x < 0: raise SystemExit(0)\n    return x", RAISES, 0),
    "an exception above Exception": ("class E(BaseException): pass\ndef f(x):\n    if x < 0: raise E('neg')\n    return x",
     RAISES, 0),
    "a message that fails": (
        "class E(ValueError):\n    def __str__(self): 1 / 0\ndef f(x):\n    if x < 0: raise E()\n    return x", RAISES, 0),
    "a change in place": ("def f(a): a.sort()", IN_PLACE, 1),
    "no change in place": ("def f(a): sorted(a)", IN_PLACE, 0),
    "a result in place of a change": ("def f(a): return sorted(a)", IN_PLACE, 0),
    "a change of rows": ("def f(m):\n    for row in m: row.reverse()",
                         check("m = [[1, 2], [3, 4]]\nrow = m[0]\nc(m)\nassert m == [[2, 1], [4, 3]] and row == [2, 1]"), 1),
    "a change of a dict": ("def f(d): d['a'] = 1", check("d = {}\nc(d)\nassert d == {'a': 1}"), 1),
    "a change of a set": ("def f(s): s.add(1)", check("s = set()\nc(s)\nassert s == {1}"), 1),
    "a change of a named argument": ("def f(*, a): a.pop()", check("a = [1, 2]\nc(a=a)\nassert a == [1]"), 1),
    "a longer list": ("def f(a): a += [4, 5]", check("a = [1]\nc(a)\nassert a == [1, 4, 5]"), 1),
    "a method": ("class Solution:\n    def add(self, a, b): return a + b", ["assert Solution().add(1, 2) == 3"], 1),
    "a wrong method": ("class Solution:\n    def add(self, a, b): return a - b", ["assert Solution().add(1, 2) == 3"], 0),
    "an object with a state": (STACK, USES_STACK, 1),
    "an object that forgets": (STACK.replace("return self.items.pop()", "return self.items[-1]"), USES_STACK, 0),
    "a generator": ("def f():\n    yield 1\n    yield 2", ["assert list(f()) == [1, 2]", "assert sum(f()) == 3"], 1),
    "a wrong generator": ("def f():\n    yield 1", ["assert list(f()) == [1, 2]"], 0),
    "a generator step by step": ("def f():\n    yield 1\n    yield 2",
     check("g = c()\nassert next(g) == 1\nassert list(g) == [2]"), 1),
    "a generator without end": ("def f():\n    while True: yield 1", ["assert list(f()) == [1]"], 0),
    "the start of a generator without end": ("def f():\n    n = 0\n    while True:\n        yield n\n        n += 1",
                                             check("g = c()\nassert [next(g), next(g)] == [0, 1]"), 1),
    "a function": ("def f(n): return lambda x: x + n", ["assert f(3)(4) == 7"], 1),
    "a wrong function": ("def f(n): return lambda x: x - n", ["assert f(3)(4) == 7"], 0),
    "objects in a list": ("class P:\n    def __init__(self, x): self.x = x\ndef f(): return [P(1), P(2)]",
                          check("assert [p.x for p in c()] == [1, 2] and len(c()) == 2"), 1),
    "text of an object": ("class P:\n    def __str__(self): return 'P'\ndef f(): return P()", ["assert str(f()) == 'P'"], 1),
    "a Fraction": ("from fractions import Fraction\ndef f(): return Fraction(1, 2)",
                   ["assert f() == 0.5", "assert abs(f() - 0.5) < 1e-9"], 1),
    "a wrong Fraction": ("from fractions import Fraction\ndef f(): return Fraction(1, 3)", ["assert f() == 0.5"], 0),
    # what an object or a changed argument must not do
    "equal to everything": ("class E:\n    def __eq__(self, o): return True\ndef f(x): return E()",
                            check("for x in range(3):\n    assert c(x) == x"), 0),
    "unequal to everything": ("class E:\n    def __ne__(self, o): return True\ndef f(x): return E()",
                              check("for x in range(3):\n    assert c(x) != x + 1"), 0),
    "less than everything": (
        "class E:\n    def __lt__(self, o): return True\n    def __sub__(self, o): return self\n"
        + "    def __abs__(self): return self\ndef f(x): return E()",
        check("for x in range(3):\n    assert abs(c(x) - x) < 1e-6"), 0),
    "true of everything": ("class E:\n    def __contains__(self, o): return True\n    def __iter__(self): return iter([])\n"
                           + "def f(x): return E()", check("for x in range(3):\n    assert x in c(x)"), 0),
    "an argument cleared": ("def f(a):\n    a.clear()\n    return 0",
     check("for n in (1, 2):\n    a = [n]\n    assert c(a) == sum(a)"), 0),
    "an argument replaced": ("def f(a):\n    a[:] = [0]\n    return [0]",
                             check("for n in (1, 2):\n    a = [n, 3]\n    got = c(a)\n    assert got == sorted(a)"), 0),
    "an argument cleared by hand": (
        "import os\ndef f(a):\n    os.write(3, b'{\"value\": 0, \"arguments\": [[[]], {\"dict\": []}]}')\n    os._exit(0)",
        check("for n in (1, 2):\n    a = [n]\n    assert c(a) == sum(a)"), 0),
    "an argument cleared by hand, without a result": (
        "import os\ndef f(a):\n    os.write(3, b'{\"value\": null, \"arguments\": [[{\"dict\": []}], {\"dict\": []}]}')\n"
        + "    os._exit(0)",
        check("for n in (1, 2):\n    a = {1: n}\n    assert c(a) == a.get(1)"), 0),
    "an argument cleared, without a result": (
        "def f(a): a.clear()", check("for n in (1, 2):\n    a = {1: n}\n    assert c(a) == a.get(1)"), 0),
    "AssertionError": ("def f(x): raise AssertionError", check("for x in range(3):\n    assert c(x) == x"), 0),
    "an answer written by hand": (
        "import os\ndef f(x):\n    os.write(3, b'{\"value\": true, \"arguments\": [[0], {\"dict\": []}]}')\n"
                                  + "    os._exit(0)", check("for x in range(3):\n    assert c(x) == x + 2"), 0),
    "an answer that is none": ("import os\ndef f(x):\n    os.write(3, b'{\"raised\": 3}')\n    os._exit(0)",
                               check("for x in range(3):\n    assert c(x) == x"), 0),
    "StopIteration in map": ("def f(x): raise StopIteration", check("assert all(map(lambda x: c(x) == x, range(3)))"), 0),
    "StopIteration in zip": ("def f(x): raise StopIteration",
                             check("for a, b in zip(map(c, range(1, 3)), range(3)):\n    assert a == b"), 0),
    "StopIteration of a generator": ("def f(x):\n    yield x", check("g = c(1)\nassert next(g) == 1 and next(g, 7) == 7"), 1),
    "StopIteration by hand": (
        "import os\ndef f(x):\n    os.write(3, b'{\"raised\": [[\"StopIteration\"], \"\"]}')\n    os._exit(0)",
        check("assert all(map(lambda x: c(x) == x, range(3)))"), 0),
    "an answer as deep as can be read": (
        "import os\ndef f(x):\n    deep = b'[' * 985 + b']' * 985\n"
        + "    os.write(3, b'{\"value\": ' + deep + b', \"arguments\": null}')\n    os._exit(0)",
        check("for x in range(3):\n    assert c(x) == x"), 0),
    "a set-up of a megabyte": ("def f(x): return x", {"asserts": ["assert all(f(x) == big[x] for x in range(3))"],
                               "setup": f"big = {list(range(130_000))}"}, 1),
    "a prelude of 300 kB": ("def f(x): return big[x]", {**check("for x in range(3):\n    assert c(x) == x"),
                            "prelude": f"big = {list(range(50_000))}"}, 1),
    "an answer with steps": ("import os\ndef f(x):\n    os.write(3, b'[[\"call\", -1, []]]')\n    os._exit(0)",
                             check("for x in range(3):\n    assert c(x) == x"), 0),
}  # fmt: skip


@needs_sandbox
@pytest.mark.parametrize("name", CASES)
def test_a_check_uses_what_the_program_gives(name):
    code, tests, score = CASES[name]
    verdict = judged(code, tests, cpu_seconds=2)
    assert (verdict.outcome, verdict.score) == ("correct" if score else "wrong", score), verdict


@needs_sandbox
def test_an_exception_that_no_check_expects_has_its_name():
    verdict = judged("def f(x):\n    raise ValueError('neg\\nmore')", check("for x in range(3):\n    assert c(x) == x"))
    assert verdict.parts["tests"] == ["runtime_error"] and "exit code 1: ValueError: neg" in verdict.detail
