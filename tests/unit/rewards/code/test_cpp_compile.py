"""Standards of C++: the one that a tag names, else C++20, and programs that are C++17 only."""

from __future__ import annotations

import pytest

from tests.code_answers import judged, needs_cpp

TESTS = {"inputs": ["3\n1\n2\n"], "outputs": ["1 2 3\n"]}
RANGES = """#include <algorithm>
#include <iostream>
#include <vector>
int main() {
    std::vector<int> all; for (int x; std::cin >> x;) all.push_back(x);
    std::ranges::sort(all); for (int x : all) std::cout << x << ' ';
}"""
MAIN = """{ vector<int> all; for (int x; cin >> x;) all.push_back(x); sort(all.begin(), all.end());
for (int x : all) cout << x << ' '; }"""
STD = "#include <bits/stdc++.h>\nusing namespace std;\n"
CASES = {
    "C++20": (RANGES, "cpp", "accepted"),
    "C++20 that is named": (RANGES, "c++20", "accepted"),
    "C++20 that is called C++17": (RANGES, "c++17", "compile_error"),
    "C++23": (f"{STD}static_assert(__cplusplus > 202002L);\nint main() {MAIN}", "c++23", "accepted"),
    "C++23 that is not named": (f"{STD}static_assert(__cplusplus > 202002L);\nint main() {MAIN}", "cpp", "compile_error"),
    "C++17": (f"{STD}static_assert(__cplusplus == 201703L);\nint main() {MAIN}", "c++17", "accepted"),
    "C++11 runs as C++17": (f"{STD}int main() {MAIN}", "c++11", "accepted"),
    "a word of C++20": (f"{STD}int concept = 1;\nint main() {MAIN}", "cpp", "accepted"),
    "a name of C++20": (f"{STD}int popcount[5];\nint main() {{ popcount[0] = 1; {MAIN[1:]}", "cpp", "accepted"),
    "text of C++17": (f'{STD}const char* text = u8"a";\nint main() {MAIN}', "cpp", "accepted"),
    "a word of C++20 in C++20": (f"{STD}int concept = 1;\nint main() {MAIN}", "c++20", "compile_error"),
    "no C++": (f"{STD}int main() {{ return x; }}", "cpp", "compile_error"),
    "a wrong program": (f"{STD}int main() {MAIN.replace('sort', 'reverse')}", "cpp", "wrong"),
}


@needs_cpp
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("cache", [0, 1024])
def test_standards(name, cache):
    code, tag, verdict = CASES[name]
    found = judged(code, TESTS, tag, cpp_cache_mb=cache, cpu_seconds=4)
    assert found.parts["tests"] == [verdict], found
