"""Ranks that hang: one that is stopped, one that holds Python's lock, one that begins nothing new.

Each is found, and all leave with their stacks.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_r1.config.runtime import HeartbeatConfig
from megatron_r1.runtime import interrupt
from megatron_r1.runtime.heartbeat import ENDED, Heartbeat, clear_signs, read_sign, sign_path
from megatron_r1.runtime.job import OUTCOME
from tests.patience import patient, wait_until

pytestmark = pytest.mark.slow
RANK = """
import re, sys, threading, time
from pathlib import Path
from megatron_r1.config.runtime import HeartbeatConfig
from megatron_r1.runtime.heartbeat import Heartbeat

folder, rank, size, how = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
config = HeartbeatConfig(interval_seconds=0.2, lost_seconds=float(sys.argv[5]), stall_seconds=float(sys.argv[6]))
heartbeat = Heartbeat(folder, config, rank, size)
heartbeat.start()

def wait_for_ever_in_a_collective():
    while how == "busy":
        heartbeat.begin("train", 7, 9)
        time.sleep(0.1)
    if how == "locked":
        heartbeat.begin("train", 7, 9)
        time.sleep(0.5)
        re.match("(a?){40}a{40}", "a" * 40)  # holds the lock for longer than anybody waits
    heartbeat.begin("rollout", 7, 9)
    threading.Event().wait()

wait_for_ever_in_a_collective()
"""


def start_ranks(folder: Path, *hows: str, stall: float = 600.0) -> list[subprocess.Popen[str]]:
    """A process for each rank. The job's folder is the one above theirs."""
    folder.mkdir()
    lost = patient(1.5)
    environment = {**os.environ, "MEGATRON_R1_JOB": str(folder.parent), "SLURMD_NODENAME": "node7"}
    return [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(folder), str(rank), str(len(hows)), how, str(lost), str(patient(stall))],
            env=environment, stderr=subprocess.PIPE, text=True,
        )
        for rank, how in enumerate(hows)
    ]  # fmt: skip


def end(ranks: list[subprocess.Popen[str]]) -> list[str]:
    """Wait for all to leave; what each wrote to stderr."""
    try:
        return [rank.communicate(timeout=patient(60))[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()


def wait_until_all_beat(folder: Path, ranks: list[subprocess.Popen[str]]) -> None:
    def beats(number: int) -> bool:
        assert ranks[number].poll() is None
        sign = read_sign(sign_path(folder, number))
        return sign is not None and sign.step == 7

    wait_until(lambda: all(map(beats, range(len(ranks)))), 60, "sign of every rank", pause=0.05)


@pytest.mark.parametrize("stopped", [0, 2])
def test_a_stopped_rank_is_found_in_time_and_all_write_their_stacks(tmp_path, stopped):
    folder = tmp_path / "health"
    ranks = start_ranks(folder, "busy", "busy", "busy")
    wait_until_all_beat(folder, ranks)
    ranks[stopped].send_signal(signal.SIGSTOP)
    started = time.monotonic()
    outputs = end(ranks)
    assert time.monotonic() - started < patient(15)
    assert [rank.returncode for rank in ranks] == [75] * 3
    abort = json.loads((folder / "abort.json").read_text())
    assert abort["rank"] == stopped and abort["found_by"] == (stopped - 1) % 3
    assert f"rank {stopped} (node node7, process {ranks[stopped].pid}) gave no sign for" in outputs[1]
    assert "in 'train', step 7" in outputs[1]
    for number in range(3):  # the stopped one, too: it was woken for it
        assert "wait_for_ever_in_a_collective" in (folder / f"stacks_rank_{number:05d}.txt").read_text()
    outcome, why = (tmp_path / OUTCOME).read_text().splitlines()
    assert outcome == "stalled" and f"rank {stopped}" in why


def test_a_rank_that_holds_pythons_lock_is_ended_by_a_timer_of_c(tmp_path):
    folder = tmp_path / "health"
    ranks = start_ranks(folder, "busy", "locked")
    wait_until_all_beat(folder, ranks)
    end(ranks)
    assert ranks[0].returncode == 75 and ranks[1].returncode != 0
    assert "wait_for_ever_in_a_collective" in (folder / "stacks_rank_00001.txt").read_text()


def test_a_rank_that_begins_nothing_new_takes_all_with_it(tmp_path):
    folder = tmp_path / "health"
    ranks = start_ranks(folder, "busy", "stuck", stall=1.0)
    outputs = end(ranks)
    assert [rank.returncode for rank in ranks] == [75, 75]
    assert "rank 1" in outputs[0] and "has done nothing new for" in outputs[0] and "in 'rollout', step 7" in outputs[0]


def test_a_rank_that_has_ended_is_not_missed(tmp_path):
    config = HeartbeatConfig(interval_seconds=0.05, lost_seconds=patient(0.3))
    first, second = (Heartbeat(tmp_path, config, rank, 2) for rank in range(2))
    first.start()
    second.start()
    second.begin("train", 3, 10)
    second.end_step({"seconds/train": 1.25})
    second.close()
    second.close()
    time.sleep(3 * config.lost_seconds)  # this process would have left
    sign = read_sign(sign_path(tmp_path, 1))
    assert (sign.activity, sign.step, sign.total, sign.seconds) == (ENDED, 3, 10, {"train": 1.25})
    assert read_sign(sign_path(tmp_path, 0)).beat > sign.beat
    first.close()
    assert not list(tmp_path.glob("stacks_*")), "nothing was written into them"
    clear_signs(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_sign_that_is_half_written_is_none(tmp_path):
    (tmp_path / "rank_00000.json").write_text('{"rank": 0, "wor')
    assert read_sign(sign_path(tmp_path, 0)) is None
    assert read_sign(sign_path(tmp_path, 1)) is None


def test_signals_are_wishes_while_somebody_listens():
    before = signal.getsignal(signal.SIGUSR1), signal.getsignal(signal.SIGTERM)
    interrupt.listen()
    interrupt.listen()
    assert interrupt.stop_asked() is None
    signal.raise_signal(signal.SIGTERM)
    assert interrupt.stop_asked() == "SIGTERM"
    interrupt.unlisten()
    signal.raise_signal(signal.SIGUSR1)
    assert interrupt.forget() == "SIGUSR1"
    assert interrupt.stop_asked() is None
    interrupt.unlisten()
    assert (signal.getsignal(signal.SIGUSR1), signal.getsignal(signal.SIGTERM)) == before
