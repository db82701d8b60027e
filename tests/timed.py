"""What a clock measures: metrics in which two runs of one seed need not agree, and what a call costs."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

TIMES = ("seconds/", "tokens_per_second/", "flops_per_second/", "mfu/", "memory/", "rollout/idle")


def cpu_seconds(action: Callable[..., Any], *inputs: object) -> tuple[float, Any]:
    """CPU time of one call, without the collector, which takes half a second for all of a suite, and what the call returns."""
    collected = gc.isenabled()
    gc.disable()
    try:
        started = time.process_time()
        found = action(*inputs)
        return time.process_time() - started, found
    finally:
        if collected:
            gc.enable()
