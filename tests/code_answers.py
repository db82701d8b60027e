"""Responses with a program, and what the code scorer says of them."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from megatron_r1.rewards.code.scorer import CodeScorer
from megatron_r1.rewards.protocol import Verdict
from megatron_r1.rewards.sandbox.probe import probe_sandbox
from megatron_r1.rewards.sandbox.supervisor import SandboxSettings
from tests.patience import patient

PROBE = probe_sandbox(SandboxSettings())
needs_sandbox = pytest.mark.skipif(not PROBE.available, reason=PROBE.reason)
needs_cpp = pytest.mark.skipif(not (PROBE.available and PROBE.compiler), reason=PROBE.reason or "there is no g++")


def answer_with(code: str, language: str = "python") -> str:
    """A response in which the program stands as most models write it."""
    return f"<think>hm</think>\n```{language}\n{code}\n```\nDone."


def judged(code: str, tests: Any, language: str = "python", **settings: Any) -> Verdict:
    """The verdict on a program, with time for a busy machine."""
    return _scorer(**{"wall_seconds": patient(60), **settings}).score(answer_with(code, language), tests)


@cache
def _scorer(**settings: Any) -> CodeScorer:
    return CodeScorer(**settings)
