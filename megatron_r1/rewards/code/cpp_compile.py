"""Compiles C++ inside a sandbox that shows the compiler, the headers and nothing else of the machine."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import replace

from megatron_r1.rewards.code.cpp_cache import CppCache
from megatron_r1.rewards.code.extract import CppStandard
from megatron_r1.rewards.code.verdicts import TestResult, failure_of, printable
from megatron_r1.rewards.sandbox.bubblewrap import can_be_read, find_compiler
from megatron_r1.rewards.sandbox.supervisor import NO_ISOLATION, SOURCE, Program, Sandbox, SandboxLimits, SandboxSettings

COMPILE_LIMITS = SandboxLimits(
    cpu_seconds=20.0, wall_seconds=40.0, memory_bytes=1 << 30, output_bytes=32 << 20, temporary_bytes=128 << 20, threads=16
)
_HEADER_LIMITS = replace(
    COMPILE_LIMITS, cpu_seconds=60.0, wall_seconds=120.0, memory_bytes=2 << 30, output_bytes=320 << 20, temporary_bytes=400 << 20
)
HEADER_SECONDS = _HEADER_LIMITS.wall_seconds  #: that the first program may wait for the headers, once on a machine
_FLAGS = ("-O2", "-w", "-fmax-errors=1", "-fdiagnostics-color=never")
_STOPPED = "the compiler: "  #: before what stopped it, if it found no error
_HEADER = b"#include <bits/stdc++.h>\n"
_HEADER_INSIDE = "/header/all.hpp"
# What may stand before the include of all headers: where only this does, it makes no difference if that include comes first.
# Threads would get as much stack as the program, of which its memory holds one: they get what Linux gives them by default.
_USES_THREADS = re.compile(r"\b(?:thread|jthread|async|pthread_create)\b")
_THREADS_INSIDE = "/program/threads.cpp"
_THREADS = b"""#include <pthread.h>
namespace { __attribute__((constructor)) void r1_stack_of_threads() {
pthread_attr_t all; pthread_attr_init(&all); pthread_attr_setstacksize(&all, 8 << 20); pthread_setattr_default_np(&all); } }
"""
_INCLUDE = r"#[ \t]*include[ \t]*"
_STARTS_WITH_ALL_HEADERS = re.compile(
    rf"(?:\s|//[^\n\\]*\n|/\*(?:[^*]|\*(?!/))*+\*/|{_INCLUDE}<(?!bits/stdc)[\w./+]+>[^\n\\]*\n)*+{_INCLUDE}<bits/stdc\+\+\.h>"
)


def compile_answer(
    source: str, settings: SandboxSettings, standard: CppStandard | None = None, cache: CppCache | None = None
) -> bytes | TestResult:
    """Compile what a response gives: in the standard that it names, else in C++20, or in C++17 if it is none.

    C++20 took words (`concept`) and names of std (`popcount`) that programs of before use for their own.

    Raises:
        SandboxError: see `Sandbox`.
    """
    first = compile_cpp(source, settings, standard=standard or "gnu++20", cache=cache)
    if standard is not None or not isinstance(first, TestResult) or first.reason.startswith(_STOPPED):
        return first
    second = compile_cpp(source, settings, standard="gnu++17", cache=cache)
    return first if isinstance(second, TestResult) else second


def compile_cpp(
    source: str,
    settings: SandboxSettings,
    limits: SandboxLimits = COMPILE_LIMITS,
    standard: CppStandard = "gnu++20",
    cache: CppCache | None = None,
) -> bytes | TestResult:
    """The executable, or the verdict "compile_error" with the first error, whatever stopped the compiler.

    Args:
        cache: has the compiled headers, and the programs that were compiled before. It is not used without isolation, since
            programs could then write it.

    Raises:
        SandboxError: see `Sandbox`.
    """
    compiler = find_compiler()
    flags = (f"-std={standard}", *_FLAGS)
    text = source.encode(errors="replace")
    if settings.isolation == NO_ISOLATION:
        cache = None
    data = {}
    if _USES_THREADS.search(source) and settings.isolation != NO_ISOLATION:
        data[_THREADS_INSIDE] = _THREADS
    key = _key(compiler, flags, text, *data.values())
    kept = cache.program(key) if cache is not None else None
    if kept is not None:
        return kept
    files = {}
    if cache is not None and can_be_read(str(cache.folder)) and _STARTS_WITH_ALL_HEADERS.match(source):
        header = cache.header(_key(compiler, flags, _HEADER), lambda: _compile_header(compiler, flags, settings))
        if header is not None:
            files = {f"{_HEADER_INSIDE}.gch": str(header)}
    include = ("-include", _HEADER_INSIDE) if files else ()
    threads = tuple(data)
    if files:
        data[_HEADER_INSIDE] = _HEADER
    command = (compiler, *flags, *include, "-x", "c++", "-o", "program", SOURCE, *threads)
    program = Program("command", text, compiler=command, collect="program", files=files, data=data)
    with Sandbox(program, limits, settings) as sandbox:
        ending = sandbox.run(b"")
    if ending.exit_code == 0 and ending.result and not ending.overflow:
        if cache is not None:
            cache.keep_program(key, ending.result)
        return ending.result
    errors = [line for line in ending.stderr.splitlines() if b"error:" in line]
    failure = failure_of(ending, limits)
    stopped = f"{_STOPPED}{failure.verdict if failure else 'no output'}"
    return TestResult("compile_error", printable(errors[0]) if errors else stopped)


def _compile_header(compiler: str, flags: tuple[str, ...], settings: SandboxSettings) -> bytes | None:
    """All headers of the standard library, which takes some seconds; None if it fails, e.g. for lack of memory."""
    command = (compiler, *flags, "-x", "c++-header", "-o", "program", SOURCE)
    with Sandbox(Program("command", _HEADER, compiler=command, collect="program"), _HEADER_LIMITS, settings) as sandbox:
        ending = sandbox.run(b"")
    return ending.result if ending.exit_code == 0 and not ending.overflow else None


def _key(compiler: str, flags: tuple[str, ...], *sources: bytes) -> str:
    found = os.stat(compiler)
    identity = repr((compiler, found.st_size, found.st_mtime_ns, flags)).encode()
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in (identity, *sources))).hexdigest()
