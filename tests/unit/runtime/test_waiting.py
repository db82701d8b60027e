"""Ranks without work wait for those that work for hours, as long as these give signs; a rank that hangs is named in time."""

from __future__ import annotations

import datetime
import threading
import time
from collections.abc import Iterator

import pytest
import torch.distributed as dist

from megatron_r1.errors import DeviceError
from megatron_r1.runtime import waiting
from megatron_r1.runtime.waiting import _WaitingPlace
from tests.patience import patient

SILENCE = patient(0.4)


@pytest.fixture
def places() -> Iterator[list[_WaitingPlace]]:
    """Three ranks of one job."""
    store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True, wait_for_workers=False, timeout=datetime.timedelta(seconds=20))
    yield [_WaitingPlace(store, 3, SILENCE) for _ in range(3)]


def wait_in_thread(place: _WaitingPlace, results: list) -> threading.Thread:
    def wait() -> None:
        try:
            place.wait()
            results.append("all are here")
        except DeviceError as error:
            results.append(str(error))

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def test_work_that_is_longer_than_the_limit_is_waited_for_while_it_gives_signs(places, monkeypatch):
    told, results = [], []
    monkeypatch.setattr(waiting, "_LISTENERS", [lambda: told.append(1)])
    for _ in range(2):  # and again: every meeting counts anew
        waiters = [wait_in_thread(place, results) for place in places[1:]]
        until = time.monotonic() + 1.8 * SILENCE
        while time.monotonic() < until:
            places[0].sign()
            time.sleep(SILENCE / 50)
        assert not results
        places[0].wait()
        for waiter in waiters:
            waiter.join(patient(10))
        assert results == ["all are here"] * 2
        results.clear()
    assert told, "the heartbeat of a waiting rank learns that the work goes on"


def test_a_rank_that_gives_no_sign_is_not_waited_for(places):
    results: list[str] = []
    wait_in_thread(places[1], results).join(patient(30))
    assert len(results) == 1 and "2 of 3 ranks still work and gave no sign for" in results[0]


def test_a_rank_alone_waits_for_nobody():
    waiting.wait_for_all()
    waiting.give_sign()
