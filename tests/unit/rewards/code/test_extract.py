"""Which block of a response is its program."""

from __future__ import annotations

import time

import pytest

from megatron_r1.rewards.code.extract import Wanted, find_code

READS = Wanted(reads_input=True)
PROGRAM = "n = int(input())\nprint(n + 1)\n"
F = Wanted(function="f")
DEFINES_F = "def f(x):\n    return x\n"


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("```python\na\n```\ntext\n```python\nb\n```", ("b\n", "python")),
        ("<think>\n```python\na\n```\n</think> no code", None),
        ("```python\na\n```\n<think>never ends", None),
        ("```python\na\n", None),
        ("```cpp\nint x;\n```\n```text\noutput\n```", ("int x;\n", "cpp")),
        ("```\na\n```", ("a\n", "python")),
        ("  ```C++\n  x\n  ```", ("  x\n", "cpp")),
        ("print(1)", None),
        ("```python\n" + "a" * 300_000 + "\n```", None),
        # the fence on the line of a tag or of words
        ("<answer>\n```python\na\n```</answer>", ("a\n", "python")),
        ("<answer>```python\na\n```\n</answer>", ("a\n", "python")),
        ("```python\na\n``` </answer>", ("a\n", "python")),
        ("Code: ```python\na\n```", ("a\n", "python")),
        ("The program:```py\na\n``` That is all.", ("a\n", "python")),
        ("```python\na\n```. It works.", ("a\n", "python")),
        ("```python\na\nb```", ("a\nb\n", "python")),
        ("```python\na\nb```</answer>", ("a\nb\n", "python")),
        ("Use ```a``` and then\n```python\nb\n```", ("b\n", "python")),
        ("the fence ``` begins a block\na\n```", None),
        ("They write it after ```\n```python\na\n```", ("a\n", "python")),
        # longer fences and tildes; only the same kind, at least as long, ends a block
        ("````python\ns = '''\n```\n'''\n````", ("s = '''\n```\n'''\n", "python")),
        ("```python\na\n`````", ("a\n", "python")),
        ("~~~python\na\n~~~", ("a\n", "python")),
        ("~~~~py\n~~~\n~~~~", ("~~~\n", "python")),
        ("~~~python\na\n```", None),
        ("```python\na\n~~~", None),
        ("```python\n'''\n```python\n'''\n```", ("'''\n```python\n'''\n", "python")),
        # in a list
        ("1. First\n   ```python\n   if 1:\n       a\n   ```", ("if 1:\n    a\n", "python")),
        ("\t```python\n\tif 1:\n\t\ta\n\t```", ("if 1:\n\ta\n", "python")),
        ("   ```python\nif 1:\n    a\n   ```", ("if 1:\n    a\n", "python")),
        # tags
        ("```py3\na\n```", ("a\n", "python")),
        ("```Python3.11\na\n```", ("a\n", "python")),
        ("```pypy3\na\n```", ("a\n", "python")),
        ('```python title="a.py"\na\n```', ("a\n", "python")),
        ("```python:main.py\na\n```", ("a\n", "python")),
        ("```{.python}\na\n```", ("a\n", "python")),
        ("```python-3.10\na\n```", ("a\n", "python")),
        ("```c++17\na\n```", ("a\n", "cpp")),
        ("```cpp-17\na\n```", ("a\n", "cpp")),
        ("```C++20\na\n```", ("a\n", "cpp")),
        ("```cpp11\na\n```", ("a\n", "cpp")),
        ("```python-repl\n>>> a\n```", None),
        ("```pycon\n>>> a\n```", None),
        ("```c\nint x;\n```", None),
        ("```c++x\nint x;\n```", None),
        ("```java\na\n```", None),
        # lines end in several ways, and a text may hold what is elsewhere an end of line
        ("```python\r\na\r\n```\r\n", ("a\n", "python")),
        ("```python\ns = '\u2028\x0c'\n```", ("s = '\u2028\x0c'\n", "python")),
    ],
)
def test_which_block_is_taken(response, expected):
    code = find_code(response, "python")
    assert (code and (code.text, code.language)) == expected


@pytest.mark.parametrize(
    ("blocks", "wanted", "taken"),
    [
        # the sample output after the program
        ([("python", PROGRAM), ("", "6\n")], READS, 0),
        ([("", PROGRAM), ("", "6\n")], READS, 0),
        ([("cpp", "int main() { std::cin >> n; }\n"), ("", "6\n")], READS, 0),
        # a fragment or an example after the program
        ([("python", PROGRAM), ("python", "ans = n + 1\n")], READS, 0),
        ([("python", DEFINES_F), ("python", "print(f(3))\n")], F, 0),
        ([("python", DEFINES_F), ("python", "assert f(3) == 3\n")], F, 0),
        ([("python", "class Solution:\n    def f(self): pass\n"), ("python", "Solution().f()\n")], F, 0),
        ([("cpp", "int f(int x) { return x; }\n"), ("cpp", "int main() { return f(3); }\n")], F, 0),
        ([("python", "f = lambda x: x\n"), ("python", "f(3)\n")], F, 0),
        # the last of several answers
        ([("python", PROGRAM), ("python", f"# better\n{PROGRAM}")], READS, 1),
        ([("python", DEFINES_F), ("python", f"# better\n{DEFINES_F}")], F, 1),
        ([("python", PROGRAM), ("cpp", "int main() { scanf(s); }\n")], READS, 1),
        ([("", "3\n"), ("python", PROGRAM)], READS, 1),
        ([("", PROGRAM), ("python", f"# better\n{PROGRAM}")], READS, 1),
        # a block without a tag counts if none with one can be the answer
        ([("", DEFINES_F), ("python", "print(f(3))\n")], F, 0),
        ([("text", "x\n"), ("", PROGRAM)], READS, 1),
        # no block fits: the last one with a tag
        ([("python", "print(1)\n"), ("python", "print(2)\n")], READS, 1),
        ([("python", "print(1)\n"), ("", "2\n")], READS, 0),
        ([("python", "print(1)\n"), ("python", "print(2)\n")], Wanted(), 1),
    ],
)
def test_a_block_that_can_be_the_answer_comes_first(blocks, wanted, taken):
    response = "\nThen:\n".join(f"```{tag}\n{text}```" for tag, text in blocks)
    assert find_code(response, "python", wanted).text == blocks[taken][1]


@pytest.mark.parametrize(
    ("tag", "standard"), [("cpp", None), ("c++", None), ("c++11", 17), ("c++17", 17), ("cpp20", 20), ("c++2b", 23)]
)
def test_a_tag_names_the_standard(tag, standard):
    assert find_code(f"```{tag}\nint x;\n```", "python").standard == (standard and f"gnu++{standard}")


@pytest.mark.parametrize(
    "text", ["`" * 300_000, "~~~ " * 75_000, "```\n" * 75_000, "```python\n" + "f " * 120_000 + "\n```",
     "```python\n" + "f=" * 120_000
             + "\n```", "```cpp\n" + "f (" * 80_000 + "\n```", "```python\n" + " " * 250_000 + "\n```",
              "```cpp\n" + " " * 250_000 + "\n```",
             "```python\n" + "import " * 35_000 + "\n```", "```cpp\n" + "\n" * 250_000 + "```",
              "```cpp\n" + "a\n" * 120_000 + "```",
             "<```" * 60_000]
)  # fmt: skip
def test_the_search_takes_linear_time(text):
    start = time.process_time()
    find_code(text, "python", F)
    assert time.process_time() - start < 2
