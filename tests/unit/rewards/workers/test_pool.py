"""The scoring pool against scorers that hang, crash, exit and eat memory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from megatron_r1.errors import RewardError
from megatron_r1.rewards.protocol import Verdict
from megatron_r1.rewards.scorers import ScorerSpec
from megatron_r1.rewards.workers.pool import ScoringPool
from megatron_r1.rewards.workers.process import WorkerLimits
from tests.patience import patient, wait_until

GIB = 1 << 30
TARGET = "tests.odd_scorer:OddScorer"
MIXED = [
    "echo 1",
    "spin",
    "echo 0",
    "segfault",
    "echo 0.5",
    "raise",
    "exit",
    "hard-exit",
    "lie",
    "echo 0.25",
    "allocate 99999999999",
]


ROOMY = WorkerLimits(2 * GIB, GIB)


def pool(workers: int = 1, limit: float | None = None, limits: WorkerLimits = ROOMY, **arguments) -> ScoringPool:
    return ScoringPool(
        {"odd": ScorerSpec(TARGET, limit or patient(2.0), arguments.pop("settings", {}))},
        workers=workers,
        limits=limits,
        **arguments,
    )


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_every_way_to_fail_is_its_own_outcome_and_a_dead_worker_is_replaced():
    limit = float(round(patient(2.0)))
    with pool(limit=limit) as scoring:
        first = scoring.worker_pids()
        verdicts = list(scoring.stream(("odd", text, "8") for text in MIXED))
        assert [(v.score, v.outcome) for v in verdicts] == [
            (1.0, "correct"), (None, "timeout"), (0.0, "wrong"), (None, "error"), (0.5, "correct"), (None, "error"),
            (None, "error"),
            (None, "error"), (None, "error"), (0.25, "correct"), (None, "error"),
        ]  # fmt: skip
        details = [v.detail for v in verdicts]
        assert details[0] == "'8'" and details[1] == f"not scored within {limit:g} s"
        assert "SIGSEGV" in details[3] and "ValueError: first line" in details[5] and "\n" not in details[5]
        assert "SystemExit" in details[6] and "exit code 0" in details[7] and "MemoryError" in details[10]
        assert scoring.replaced == {"timeout": 1, "crash": 3}
        wait_until(lambda: not any(map(alive, first)), 10, "end of the replaced workers")
        last = scoring.worker_pids()
    assert not any(map(alive, last)), "close leaves no worker"


@pytest.mark.slow
def test_results_and_their_order_do_not_depend_on_the_number_of_workers():
    texts = MIXED + [f"echo {n / 64}" for n in range(64)]
    seen, limit = [], float(round(patient(2.0)))
    for workers in (1, 3):
        with pool(workers, limit) as scoring:
            seen.append([(v.score, v.outcome, v.detail) for v in scoring.stream(("odd", text, n) for n, text in enumerate(texts))])
    assert seen[0] == seen[1]


def test_a_worker_that_is_slow_to_end_is_not_said_to_be_killed():
    with pool() as scoring:
        assert scoring.submit("odd", "leave").result().detail == "the scoring worker died (exit code 9)"


def test_workers_share_the_work(tmp_path):
    with pool(2, limit=patient(60)) as scoring:
        verdicts = list(scoring.stream(("odd", f"meet {tmp_path}", None) for _ in range(2)))
    assert [verdict.outcome for verdict in verdicts] == ["correct"] * 2 and len({v.parts["pid"] for v in verdicts}) == 2


def test_what_the_prompt_holds_of_a_response_is_set_before_it():
    with ScoringPool({"odd": ScorerSpec(TARGET, patient(2.0), opening="echo 0")}, workers=1, limits=ROOMY) as scoring:
        assert scoring.submit("odd", ".25").result().score == 0.25


def test_time_is_counted_from_the_start_of_the_work():
    limit = patient(1.0)
    with pool(limit=limit) as scoring:
        futures = [scoring.submit("odd", f"sleep {0.3 * limit}") for _ in range(5)]
        assert [f.result().outcome for f in futures] == ["correct"] * 5, "the last one waited for longer than the limit"


def test_submit_returns_at_once_and_waits_at_the_bound(tmp_path):
    with pool(limit=600.0, max_pending=4) as scoring:
        futures = [scoring.submit("odd", f"wait {tmp_path / 'go'}") for _ in range(4)]
        fifth = threading.Thread(target=scoring.submit, args=("odd", "echo 1"))
        fifth.start()
        fifth.join(0.3)
        assert fifth.is_alive() and not any(f.done() for f in futures)
        (tmp_path / "go").touch()
        fifth.join(patient(60))
        assert not fifth.is_alive() and futures[0].done()


def test_a_worker_that_grew_is_replaced_without_losing_its_verdict():
    with pool(limits=WorkerLimits(2 * GIB, 150 << 20)) as scoring:
        first = scoring.worker_pids()
        verdicts = list(scoring.stream(("odd", text, None) for text in ["keep 200000000", "echo 1", "echo 0"]))
        assert [v.score for v in verdicts] == [1.0, 1.0, 0.0]
        assert scoring.replaced == {"memory": 1} and scoring.worker_pids() != first


def test_a_worker_killed_while_idle_costs_no_response():
    with pool() as scoring:
        assert scoring.submit("odd", "echo 1").result().score == 1.0
        os.kill(scoring.worker_pids()[0], signal.SIGKILL)
        assert scoring.submit("odd", "echo 0.5").result().score == 0.5


def test_large_and_odd_text_arrives_whole():
    with pool() as scoring:
        verdict = scoring.submit("odd", "echo 1", {"half a surrogate": "\ud800", "long": "x" * 5_000_000}).result()
        assert verdict.score == 1.0 and "\\ud800" in verdict.detail


def test_what_a_worker_started_ends_with_it(tmp_path):
    log = tmp_path / "scoring.log"
    with pool(limit=patient(0.5), log=log) as scoring:
        assert scoring.submit("odd", "child").result().outcome == "timeout"
    child = int(log.read_text())
    wait_until(lambda: not alive(child), 10, "end of what a worker started")


PARENT = """
import os, sys, time
from megatron_r1.rewards.workers.pool import ScoringPool
from megatron_r1.rewards.scorers import ScorerSpec
from megatron_r1.rewards.workers.process import WorkerLimits

scoring = ScoringPool({"odd": ScorerSpec("tests.odd_scorer:OddScorer", 600.0)}, workers=2, limits=WorkerLimits(1 << 31, 1 << 30))
futures = [scoring.submit("odd", "spin") for _ in range(4)]
print(*scoring.worker_pids(), flush=True)
time.sleep(600)
"""


def test_no_worker_outlives_a_killed_parent():
    """Also one that is busy in C, where neither the end of the socket nor a thread would be noticed."""
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    time.sleep(0.3)
    assert len(pids) == 2 and all(map(alive, pids))
    parent.kill()
    parent.wait()
    wait_until(lambda: not any(map(alive, pids)), 10, "end of the workers")
    parent.stdout.close()


SUSPENDED = (
    PARENT.replace("600.0", "float(sys.argv[1])")
    .replace("workers=2", "workers=1")
    .replace('"spin"', 'f"sleep {2 / 3 * float(sys.argv[1])}"')
    .replace("time.sleep(600)", "print(*(future.result().outcome for future in futures))")
)


@pytest.mark.slow
def test_time_in_which_the_job_is_suspended_does_not_count():
    limit = patient(1.5)
    parent = subprocess.Popen([sys.executable, "-c", SUSPENDED, str(limit)], stdout=subprocess.PIPE, text=True)
    pids = [parent.pid, int(parent.stdout.readline())]
    time.sleep(0.3)
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(limit + 1)
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
    assert parent.communicate(timeout=patient(60))[0].split() == ["correct"] * 4


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"refuses": True}, "the scorer tests.odd_scorer:OddScorer cannot be built: ValueError: no such setting"),
        ({"exits": True}, "scoring workers end while starting (exit code 7)"),
    ],
)
def test_a_scorer_that_cannot_be_built_is_told_at_the_start(settings, says):
    with pytest.raises(RewardError) as caught:
        pool(settings=settings)
    assert str(caught.value) == says
    assert not [t for t in threading.enumerate() if t.name == "scoring"]


def test_a_scorer_that_cannot_work_here_ends_the_pool_and_one_that_has_worked_does_not():
    with pool() as scoring:
        assert [v.outcome for v in scoring.stream(("odd", text, None) for text in ("echo 1", "refuse"))] == ["correct", "error"]
        assert scoring.submit("odd", "echo 1").result().score == 1.0
    with pool() as scoring:
        first, second = scoring.submit("odd", "refuse"), scoring.submit("odd", f"sleep {patient(9)}")
        assert first.result().detail == "there is no sandbox here"
        with pytest.raises(RewardError, match="there is no sandbox here"):
            second.result()


def test_a_closed_pool_says_so():
    scoring = pool()
    late = scoring.submit("odd", "sleep 5")
    scoring.close()
    scoring.close()
    for future in (late, scoring.submit("odd", "echo 1")):
        with pytest.raises(RewardError, match="closed before this response was scored"):
            future.result(timeout=patient(5))
    with pytest.raises(RewardError, match="no scorer 'even' in this pool; it has odd"):
        scoring.submit("even", "x")


def test_a_worker_starts_without_torch():
    modules = ("workers.main", "code.scorer", "math.scorer", "language.scorer", "rules.format", "rules.choice", "custom")
    imports = ", ".join(f"megatron_r1.rewards.{module}" for module in modules)
    code = f"import sys, {imports}; print({{'torch', 'pydantic'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=patient(60))
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize(("score", "outcome"), [(0.0, "timeout"), (None, "wrong"), (1.0, "fine"), (float("nan"), "correct")])
def test_a_verdict_that_hides_a_failure_cannot_be_made(score, outcome):
    with pytest.raises(ValueError, match="outcome"):
        Verdict(score, outcome)
