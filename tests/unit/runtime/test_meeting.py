"""The ranks' meeting store is to be reached through the job's address alone."""

from __future__ import annotations

import datetime
import socket
import threading

import pytest
import torch.distributed as dist

from megatron_r1.errors import DeviceError
from megatron_r1.runtime import distributed, meeting
from megatron_r1.runtime.device import resolve_device
from megatron_r1.runtime.launch import LaunchInfo, free_port
from tests.patience import patient

TIMEOUT = datetime.timedelta(seconds=patient(10))


def launch(rank: int = 0, world: int = 1, address: str = "127.0.0.1", port: int = 0, local: int | None = None) -> LaunchInfo:
    return LaunchInfo(rank, world, rank, world if local is None else local, address, port or free_port(), "slurm")


def reaches(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), timeout=patient(2)).close()
    except OSError:
        return False
    return True


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.3", "localhost"])
def test_it_listens_at_the_jobs_address_alone(address):
    info = launch(address=address)
    store = meeting.open_store(info, TIMEOUT)
    store.set("name", "value")
    assert reaches(address, info.master_port) and not reaches("127.0.0.2", info.master_port)
    assert dist.TCPStore(address, info.master_port, is_master=False, timeout=TIMEOUT).get("name") == b"value"


def test_all_ranks_meet_there():
    port = free_port()
    stores = {}
    ranks = [
        threading.Thread(target=lambda rank=rank: stores.update({rank: meeting.open_store(launch(rank, 3, port=port), TIMEOUT)}))
        for rank in (2, 0, 1)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    stores[0].set("from", "0")
    assert stores[2].get("from") == b"0" and stores[1].add("n", 2) == 2


@pytest.mark.parametrize("address, nodes, why", [("127.0.0.1", 2, "which no other one reaches"), ("192.0.2.7", 1, "no address of")])
def test_where_the_address_is_not_its_own_all_are_listened_at_and_that_is_said(capfd, address, nodes, why):
    info = launch(world=2, address=address, local=2 // nodes)
    assert meeting._listen(info) is None
    said = capfd.readouterr().err
    assert why in said and address in said and len(said.splitlines()) == 1


def test_a_port_that_is_taken_and_an_unknown_name_are_one_line(monkeypatch):
    monkeypatch.setattr(distributed, "_STORE", None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for info in (launch(port=taken.getsockname()[1]), launch(address="no.such.host.invalid")):
            with pytest.raises(DeviceError, match=f"rank 0 cannot join at {info.master_address}:{info.master_port}: ") as caught:
                distributed.join_process_group(info, resolve_device("cpu"))
            assert "\n" not in str(caught.value)


def test_under_torchrun_the_store_is_torchruns(monkeypatch):
    port = free_port()
    torchruns = dist.TCPStore("127.0.0.1", port, is_master=True, timeout=TIMEOUT, wait_for_workers=False)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    meeting.open_store(launch(port=port), TIMEOUT).set("name", "value")
    assert torchruns.get("name") == b"value"
