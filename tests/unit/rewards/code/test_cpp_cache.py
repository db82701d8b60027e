"""Compiled C++ that is kept: safe against other users and untrusted code, whole at any moment, of bounded size."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_r1.rewards.code.cpp_cache import CppCache
from megatron_r1.rewards.code.cpp_compile import _STARTS_WITH_ALL_HEADERS, compile_cpp
from megatron_r1.rewards.code.verdicts import TestResult
from megatron_r1.rewards.sandbox.supervisor import NO_ISOLATION, Program, Sandbox, SandboxLimits, SandboxSettings
from tests.code_answers import needs_cpp
from tests.timed import cpu_seconds

ISOLATED = SandboxSettings()
HELLO = "#include <cstdio>\nint main() { puts(%s); }"
ALL_HEADERS = "// sorted\n#include <iostream>\n#include <bits/stdc++.h>\nint main() { std::puts(%s); }"


@pytest.fixture
def cache() -> Iterator[CppCache]:
    with tempfile.TemporaryDirectory() as folder:  # pytest's own cannot be reached by other users, as the compiler's is
        Path(folder).chmod(0o755)
        yield CppCache.open(1 << 30, folder)


def output_of(executable: bytes) -> bytes:
    with Sandbox(Program("command", executable, executable=True), SandboxLimits(), ISOLATED) as sandbox:
        return sandbox.run(b"").stdout


def test_a_folder_that_others_could_write_is_not_used(tmp_path):
    assert CppCache.open(0, str(tmp_path)) is None
    assert CppCache.open(1, str(tmp_path / "missing")) is None
    folder = CppCache.open(1, str(tmp_path)).folder
    assert folder.stat().st_mode & 0o777 == 0o755
    folder.chmod(0o777)
    assert CppCache.open(1, str(tmp_path)) is None
    folder.rmdir()
    (tmp_path / "elsewhere").mkdir()
    folder.symlink_to(tmp_path / "elsewhere")
    assert CppCache.open(1, str(tmp_path)) is None
    folder.unlink()
    tmp_path.chmod(0o777)  # whoever can rename in it can put another folder into its place
    assert CppCache.open(1, str(tmp_path)) is None
    tmp_path.chmod(0o1777)
    assert CppCache.open(1, str(tmp_path)) is not None


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_another_user_is_not_used(tmp_path):
    folder = CppCache.open(1, str(tmp_path)).folder
    os.chown(folder, 1234, 1234)
    assert CppCache.open(1, str(tmp_path)) is None


def test_a_program_that_is_kept_is_the_same_or_none(cache):
    cache.keep_program("a", b"content")
    assert (cache.program("a"), cache.program("b")) == (b"content", None)
    path = cache.folder / "a.program"
    assert path.stat().st_mode & 0o077 == 0
    for spoilt in (b"", path.read_bytes()[:-1], path.read_bytes() + b"x", b"x" + path.read_bytes()):
        path.write_bytes(spoilt)
        assert cache.program("a") is None
    path.unlink()
    path.symlink_to("/etc/hostname")
    assert cache.program("a") is None


def test_the_folder_keeps_its_size(tmp_path):
    cache = CppCache.open(100_000, str(tmp_path))
    for number in range(30):
        cache.keep_program(str(number), bytes(10_000))
        os.utime(cache.folder / f"{number}.program", (number, number))
        if number % 5 == 0:
            cache.program("0")  # what is used stays
    assert sum(path.stat().st_size for path in cache.folder.iterdir()) <= 100_000
    assert cache.program("0") is not None and cache.program("1") is None and cache.program("29") is not None
    cache.keep_program("large", bytes(50_000))
    assert cache.program("large") is None
    abandoned = cache.folder / "x.part"
    abandoned.write_bytes(b"")
    os.utime(abandoned, (0, 0))
    (cache.folder / "y.part").write_bytes(b"")
    cache.keep_program("30", b"x")
    assert not abandoned.exists() and (cache.folder / "y.part").exists()


def test_a_folder_that_is_gone_or_full_means_only_that_nothing_is_kept(cache):
    folder = cache.folder
    (folder / "lock").mkdir()
    assert cache.header("k", lambda: b"content") is None
    (folder / "lock").rmdir()
    folder.rmdir()
    cache.keep_program("a", b"content")
    assert cache.program("a") is None and cache.header("k", lambda: b"content") is None


def _build(parent: str, started, results) -> None:
    def build() -> bytes:
        time.sleep(0.5)
        return b"content"

    started.wait()
    found = CppCache.open(1 << 20, parent).header("k", build)
    results.put(None if found is None else found.read_bytes())


def test_one_worker_builds_the_headers_and_no_other_waits(tmp_path):
    context = multiprocessing.get_context("fork")
    started, results = context.Barrier(4), context.Queue()
    workers = [context.Process(target=_build, args=(str(tmp_path), started, results)) for _ in range(4)]
    for worker in workers:
        worker.start()
    got = [results.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
    assert got.count(b"content") == 1 and got.count(None) == 3
    cache = CppCache.open(1 << 20, str(tmp_path))
    path = cache.header("k", lambda: pytest.fail("they are built once"))
    assert path.read_bytes() == b"content" and path.stat().st_mode & 0o777 == 0o644
    path.write_bytes(b"cut")  # another length than the name says
    assert cache.header("k", lambda: b"again").read_bytes() == b"again"
    assert cache.header("other", lambda: None) is None


@needs_cpp
def test_a_source_is_compiled_once_and_other_sources_and_standards_are_other_programs(cache):
    one = compile_cpp(HELLO % '"one"', ISOLATED, cache=cache)
    assert output_of(one) == b"one\n"
    (kept,) = cache.folder.glob("*.program")
    before = kept.stat().st_ino
    assert compile_cpp(HELLO % '"one"', ISOLATED, cache=cache) == one and kept.stat().st_ino == before
    assert output_of(compile_cpp(HELLO % '"two"', ISOLATED, cache=cache)) == b"two\n"
    standards = [compile_cpp(HELLO.replace("puts(%s)", 'printf("%ld", __cplusplus)'), ISOLATED, standard=name, cache=cache)
                 for name in ("gnu++17", "gnu++20")]  # fmt: skip
    assert [output_of(program) for program in standards] == [b"201703", b"202002"]
    assert isinstance(compile_cpp("int main() { return x; }", ISOLATED, cache=cache), TestResult)
    assert len(list(cache.folder.glob("*.program"))) == 4  # no error is kept


@needs_cpp
def test_what_is_compiled_beside_a_source_is_part_of_the_program(cache, monkeypatch):
    source = "#include <thread>\nint main() { std::thread([] {}).join(); }"
    assert isinstance(compile_cpp(source, ISOLATED, cache=cache), bytes)
    monkeypatch.setattr("megatron_r1.rewards.code.cpp_compile._THREADS", b"#error another")
    assert compile_cpp(source, ISOLATED, cache=cache).verdict == "compile_error"


@needs_cpp
def test_without_isolation_nothing_is_kept_and_nothing_taken(cache):
    settings = SandboxSettings(NO_ISOLATION)
    assert not isinstance(compile_cpp(HELLO % '"one"', settings, cache=cache), TestResult)
    assert list(cache.folder.iterdir()) == []


@needs_cpp
def test_compiled_headers_give_the_same_program(cache):
    with_headers = compile_cpp(ALL_HEADERS % '"one"', ISOLATED, cache=cache)
    (header,) = cache.folder.glob("*.gch")
    assert header.stat().st_size > 10 << 20
    assert output_of(with_headers) == output_of(compile_cpp(ALL_HEADERS % '"one"', ISOLATED)) == b"one\n"
    error = compile_cpp(ALL_HEADERS % "no_such_name", ISOLATED, cache=cache)
    assert "no_such_name" in error.reason
    # the compiler of a program cannot change them, nor leave anything where they are
    seen = header.read_bytes()
    for attack in ('#include "/header/all.hpp"\n#include "/header/all.hpp.gch"\nint main() {}', 'asm(".incbin \\"/etc/shadow\\"");',
                   '#include <bits/stdc++.h>\n#pragma GCC pch_preprocess "/program/main.cpp"\nint main() {}',
                   f'#include <bits/stdc++.h>\n#include "{header}"\nint main() {{}}'):  # fmt: skip
        compile_cpp(attack, ISOLATED, cache=cache)
    assert header.read_bytes() == seen
    assert {path.suffix for path in cache.folder.iterdir()} <= {".gch", ".program", ""}


@needs_cpp
@pytest.mark.skipif(os.geteuid() != 0, reason="else the compiler runs as the same user")
def test_headers_out_of_the_compilers_reach_are_not_built(tmp_path):
    tmp_path.chmod(0o700)
    cache = CppCache.open(1 << 30, str(tmp_path))
    assert output_of(compile_cpp(ALL_HEADERS % '"one"', ISOLATED, cache=cache)) == b"one\n"
    assert not list(cache.folder.glob("*.gch")) and len(list(cache.folder.glob("*.program"))) == 1


@needs_cpp
def test_a_program_sees_nothing_of_the_cache(cache):
    program = compile_cpp(
        "#include <bits/stdc++.h>\n#include <fcntl.h>\n#include <unistd.h>\nint main() { std::puts(open("
        f'"{cache.folder}/lock", O_RDONLY) < 0 && access("/header", F_OK) && access("{cache.folder.parent}", F_OK)'
        ' ? "none" : "BREACH"); }',
        ISOLATED,
        cache=cache,
    )
    assert output_of(program) == b"none\n"


@pytest.mark.parametrize(
    ("source", "starts"),
    [
        ("#include <bits/stdc++.h>\nint x;", True),
        ("  # include  <bits/stdc++.h>", True),
        ("// a\n/* b\n * c */\n#include <vector>\n#include <sys/time.h> // d\n\n#include <bits/stdc++.h>", True),
        ("#include <vector>\nint main() {}", False),
        ("#define _GLIBCXX_DEBUG\n#include <bits/stdc++.h>", False),
        ("#pragma GCC optimize(\"O3\")\n#include <bits/stdc++.h>", False),
        ("#define int long long\n#include <bits/stdc++.h>", False),
        ("int x;\n#include <bits/stdc++.h>", False),
        ("// \\\n#define x\n#include <bits/stdc++.h>", False),
        ("/* #include <bits/stdc++.h>\n", False),
        ("// #include <bits/stdc++.h>", False),
        ("#include \"mine.h\"\n#include <bits/stdc++.h>", False),
        ("/*" * 100_000, False), ("// \n" * 100_000, False), ("#include <a>\n" * 50_000, False), ("/**/" * 100_000, False),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)  # fmt: skip
def test_the_headers_come_first_only_if_it_makes_no_difference(source, starts):
    seconds, found = cpu_seconds(_STARTS_WITH_ALL_HEADERS.match, source)
    assert seconds < 1 and bool(found) is starts
