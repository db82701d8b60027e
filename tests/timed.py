"""What a clock measures: metrics in which two runs of one seed need not agree, and what a call costs."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable

TIMES = ("seconds/", "tokens_per_second/", "flops_per_second/", "mfu/", "rollout/idle")


def cpu_seconds(action: Callable[[], object]) -> float:
    """CPU time of one call, without the collector: a full collection of the suite's process takes half a second."""
    collected = gc.isenabled()
    gc.disable()
    try:
        started = time.process_time()
        action()
        return time.process_time() - started
    finally:
        if collected:
            gc.enable()
