"""What the doctor says of vLLM's model runner."""

from __future__ import annotations

import subprocess
from types import SimpleNamespace

import pytest

from megatron_r1.rollout.vllm import runner


@pytest.mark.parametrize(
    ("asked", "has_triton", "says"),
    [
        (None, True, "V2 (Triton is there): seeded requests are drawn in one kernel"),
        (None, False, "V1 (Triton is missing): seeded requests are drawn one by one in Python, slow"),
        (False, True, "V1 (VLLM_USE_V2_MODEL_RUNNER=0): seeded"),
        (True, False, "V2 (VLLM_USE_V2_MODEL_RUNNER=1): seeded"),
    ],
)
def test_the_runner_and_why_it_matters(asked, has_triton, says):
    assert runner.describe_runner(asked, has_triton).startswith(says)


@pytest.mark.parametrize(
    ("code", "out", "err", "says"),
    [(0, "INFO loading\nmodel runner: V2 (x)\n", "", None), (1, "", "Traceback\nImportError: no\n", "ImportError: no"),
     (-11, "", "", "exit code -11"), (0, "INFO loading\n", "", "exit code 0")],
)  # fmt: skip
def test_a_vllm_that_does_not_load_is_told_in_its_own_words(monkeypatch, code, out, err, says):
    done = SimpleNamespace(returncode=code, stdout=out, stderr=err)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    check = runner.runner_check()
    if says is None:
        assert check.run() == "V2 (x)"
    else:
        with pytest.raises(RuntimeError, match=says):
            check.run()
