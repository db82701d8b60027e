"""Several engines in one job: each prompt is sampled once whatever dies, and an engine on another node is one like any other."""

from __future__ import annotations

import os
import signal
import socket
import threading
from types import SimpleNamespace

import pytest
import torch

from megatron_r1.config.rollout import RolloutConfig
from megatron_r1.errors import ConfigError, EngineLost, RolloutError
from megatron_r1.model.presets import PRESETS
from megatron_r1.rollout.channel import server as rollout_server
from megatron_r1.rollout.channel.announcements import Announcement, announce, find_servers
from megatron_r1.rollout.channel.engine_channel import ASK
from megatron_r1.rollout.channel.reception import Reception, listen_at
from megatron_r1.rollout.channel.remote import ServedEngine
from megatron_r1.rollout.channel.server import serve_trainer
from megatron_r1.rollout.options import engine_options
from megatron_r1.rollout.sync.links import ServerLink
from megatron_r1.rollout.sync.transfer import WeightTransfer
from megatron_r1.weights.boxes import box_shape, volume
from megatron_r1.weights.shard_plan import StoredWeights
from tests.paths import ROOT
from tests.patience import patient
from tests.ranks import run_ranks

pytestmark = pytest.mark.slow
KEY = b"k" * 32

RANKS = """
import sys
import torch, torch.distributed as dist
from megatron_r1.errors import EngineLost, RolloutError
from megatron_r1.rollout.collective import CollectiveEngine
from megatron_r1.runtime import distributed
from megatron_r1.types import Prompt, Rollout, RolloutGroup
from tests.engine_layouts import MemoryEngine

rank = int(sys.argv[1])
distributed._STORE = dist.FileStore(sys.argv[3], 3)
dist.init_process_group("gloo", store=distributed._STORE, rank=rank, world_size=3)
started = ends = 0
deaths = {1: ["load", 2, 0], 2: []}[rank] if rank else []  # what the engines of this rank die in, one after the other

class Weights:  # rank 2 holds them, and has no engine
    def describe(self):
        return "weights"
    def find_holders(self, described):
        return self
    def names(self):
        return ["t"]
    def shape(self, name):
        return (4,)
    def dtype(self, name):
        return torch.float32
    def boxes(self, name):
        return [(((0, 4),), (2,))]
    def read(self, name, box):
        assert rank == 2
        return torch.arange(4.0)

class Engine:
    def __init__(self):
        global started
        started += 1
        self.version, self.asleep = None, False

    def load_weights(self, weights, version, transfer):
        self.asleep = False
        held = MemoryEngine([[("t", ((0, 4),))]])
        transfer.send(weights, held)
        assert held.problems(lambda name: torch.arange(4.0)) == []
        if deaths[:1] == ["load"]:
            deaths.pop(0)
            raise EngineLost("died in load")
        self.version = version
        return version

    def sample(self, prompts, sampling, seed, take, on_group):
        global ends
        ends += 1
        if rank == 0:  # takes what is left when the engine of rank 1 has come to its end
            distributed._STORE.wait([f"end {ends}"])
        groups = {}
        try:
            while True:
                taken = take(0)
                for position in taken.positions:
                    if deaths and len(groups) == deaths[0]:
                        deaths.pop(0)
                        lost = EngineLost("died in generate")
                        lost.finished = groups
                        raise lost
                    what = [seed, position, rank, started]
                    groups[position] = RolloutGroup(prompts[position], [Rollout(what, [0.0] * 4, "", True)], self.version)
                    if on_group:
                        on_group(groups[position])
                if taken.is_last or (rank == 1 and not deaths):
                    return groups
        finally:
            if rank == 1:
                distributed._STORE.set(f"end {ends}", "")

    def sleep(self):
        if deaths[:1] == ["sleep"]:
            deaths.pop(0)
            raise EngineLost("died in sleep")
        self.asleep = True

    def close(self):
        pass

def is_the_same_everywhere(value):
    values = [None] * 3
    dist.all_gather_object(values, value)
    return len(set(values)) == 1

prompts = [Prompt(f"p{i}", "", "", "", (1,)) for i in range(11)]
told = []
engine = CollectiveEngine(Engine if rank in (0, 1) else None, restarts=3, sleeps=True)
assert engine.load_weights(Weights(), 5) == 5
groups = engine.generate(prompts, None, 9, on_group=told.append)
assert [g.prompt.id for g in groups] == [f"p{g.position}" for g in groups]
assert [g.rollouts[0].token_ids[:2].tolist() for g in groups] == [[9, g.position] for g in groups]
assert {g.weights_version for g in groups} <= {5} and {g.owner for g in groups} <= {rank}
assert [id(g) for g in groups] == [id(g) for g in told], "those of this rank's engine, on every rank that has one"
# the engines of rank 1: the first died in load, the second after two groups, with two more taken, the third with one of those taken
# and none sampled; the fourth sampled it
by = [(g.position, *g.rollouts[0].token_ids[2:].tolist()) for g in groups]
assert by == {0: [(at, 0, 1) for at in range(3, 11)], 1: [(0, 1, 2), (1, 1, 2), (2, 1, 4)], 2: []}[rank], by
assert started == {0: 1, 1: 4, 2: 0}[rank], started
# the engine of rank 0 waited for that of rank 1, so it took longer
idle = engine.metrics()["rollout/idle"]
assert 0 < idle < 0.5 and is_the_same_everywhere(idle), idle
deaths += ["sleep"] if rank == 1 else []
engine.sleep()  # one engine dies of it, and another takes its place, with the weights, and sleeps
assert started == {0: 1, 1: 5, 2: 0}[rank] and (rank == 2 or engine._engine.asleep)
assert engine.load_weights(Weights(), 6) == 6 and (rank == 2 or not engine._engine.asleep)

def fails(call, error, message):
    try:
        call()
    except error as caught:
        assert message in str(caught), caught
    else:
        raise AssertionError("no error")

deaths += [2] if rank == 1 else []  # its successor samples what is left of its share, and nobody else does
fixed = CollectiveEngine(Engine if rank in (0, 1) else None, restarts=1, dispatch="fixed")
assert fixed.load_weights(Weights(), 6) == 6
shares = {0: [0, 2, 4, 6, 8, 10], 1: [1, 3, 5, 7, 9], 2: []}
assert [g.position for g in fixed.generate(prompts, None, 9)] == shares[rank]
assert started == {0: 2, 1: 7, 2: 0}[rank], started

deaths += [0] * 9 if rank == 1 else []
fails(lambda: engine.generate(prompts, None, 9), EngineLost, "died in generate")
dist.destroy_process_group()
"""

SERVER = """
import sys, os, time
from multiprocessing.connection import Connection
from megatron_r1.errors import RolloutError
connection = Connection(int(sys.argv[1]))
while True:
    try:
        name, args = connection.recv()
    except EOFError:
        break
    if name == "pid":
        connection.send((True, (os.getpid(), os.environ.get("EXTRA"))))
    elif name == "update_weights":
        connection.send((True, open(args[0]["paths"][0], "rb").read()))
    elif name == "call_workers" and args[0] == "weight_boxes":
        connection.send((True, [[(f"t{i}", ((0, i + 1), (0, 5))) for i in range(9)]]))
    elif name == "parts":
        for part in args:
            connection.send((None, part))
        connection.send((True, len(args)))
    elif name == "sum":
        total = 0
        for _ in range(args[0]):
            connection.send((None, "ask"))
            total += connection.recv()
        connection.send((True, total))
    elif name == "fail":
        connection.send((False, RolloutError("prompt 'p' is too long")))
    elif name == "die":
        os._exit(3)
    elif name == "beat":
        for _ in range(15):
            time.sleep(float(args[0]))
            connection.send((None, None))
        connection.send((True, "done"))
    elif name == "freeze":
        time.sleep(3600)
    else:
        connection.send((True, None))
"""


def test_lost_engines_are_replaced_and_no_group_is_lost_or_doubled(tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    outputs = run_ranks(script, 3, tmp_path / "store", timeout=120)
    assert outputs[1].count("starting another one") == 8 and "starting another one" not in outputs[0] + outputs[2]


SHORT, LONG = patient(0.1), patient(20)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A rollout server in a thread, whose engine is the program above; its announcement."""
    (tmp_path / "toy_engine.py").write_text(SERVER)
    monkeypatch.setattr(rollout_server, "HOST_MODULE", "toy_engine")
    environment = {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    listener = listen_at("127.0.0.1")
    with Reception(listener, KEY) as reception:

        def serve() -> None:
            while True:
                with reception.next_trainer() as connection:
                    serve_trainer(connection, environment, tmp_path / "engine.log")

        threading.Thread(target=serve, daemon=True).start()
        yield Announcement(0, 1, "127.0.0.1", listener.getsockname()[1], KEY.hex(), os.getpid())


def test_an_engine_on_another_node_is_called_like_one_here(server):
    engine = ServedEngine(server, {"EXTRA": "yes"}, timeout=LONG)
    pid, extra = engine.call("pid", timeout=LONG)
    assert pid != os.getpid() and extra == "yes"
    parts = []
    assert engine.call("parts", "a", "b", timeout=LONG, on_part=parts.append) == 2
    assert parts == ["a", "b"]
    replies = iter((1, 20, 300))
    assert engine.call("sum", 3, timeout=LONG, on_part=lambda part: next(replies) if part == ASK else None) == 321
    with pytest.raises(RolloutError, match="too long"):
        engine.call("fail", timeout=LONG)
    assert engine.call("beat", SHORT, timeout=LONG, stall=8 * SHORT) == "done", "signs of life hold off the limit"
    engine.close()
    engine.close()
    with pytest.raises(EngineLost, match="is closed"):
        engine.call("pid", timeout=LONG)
    assert ServedEngine(server, {}, timeout=LONG).call("pid", timeout=LONG)[0] != pid, "each trainer gets an engine of its own"


def test_a_dead_or_silent_engine_on_another_node_is_told_and_the_next_one_is_new(server):
    engine = ServedEngine(server, {}, timeout=LONG)
    with pytest.raises(EngineLost, match="died in die .exit code 3"):
        engine.call("die", timeout=LONG)
    engine.close()
    engine = ServedEngine(server, {}, timeout=LONG)
    with pytest.raises(EngineLost, match="gave no sign for 1 s in freeze"):
        engine.call("freeze", timeout=600, stall=1.0)
    engine.close()
    engine = ServedEngine(server, {}, timeout=LONG)
    pid, _ = engine.call("pid", timeout=LONG)
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(EngineLost, match="gave no sign for"):  # the limit of the whole call has another message
        engine.call("beat", SHORT, timeout=600, stall=patient(1.0))
    engine.close()


def test_weights_come_over_the_connection_bit_by_bit(server):
    engine = ServedEngine(server, {}, timeout=LONG)
    buckets, plans = [], []

    def call(name, *args):
        answer = engine.call(name, *args, timeout=LONG)
        if name == "update_weights":
            buckets.append(answer)
        elif name == "call_workers" and args[0] == "take_plan":
            plans.append(args[1][0])
        return answer

    sent = {f"t{i}": torch.randn(i + 1, 5) for i in range(9)}
    settings = {"bucket_bytes": 4096, "verify_weights": True, "nodes": 1, "is_draft_layer": lambda name: False}
    link = ServerLink(call, SimpleNamespace(**settings))
    WeightTransfer().send(StoredWeights.of_tensors(sent), link)
    link.close()
    received = {}
    for content, pieces in zip(buckets, plans[0], strict=True):
        for piece in pieces:
            size = 4 * volume(piece.box)
            values = torch.frombuffer(bytearray(content[piece.offset : piece.offset + size]), dtype=torch.float32)
            received[f"t{piece.index}"] = values.view(box_shape(piece.box))
    assert received.keys() == sent.keys() and all(torch.equal(received[name], sent[name]) for name in sent)
    engine.close()


def test_who_does_not_know_the_key_is_not_served(server):
    stranger = Announcement(0, 1, server.host, server.port, (b"x" * 32).hex(), 1)
    with pytest.raises(EngineLost, match="did not take the connection"):
        ServedEngine(stranger, {}, timeout=patient(5))
    assert ServedEngine(server, {}, timeout=LONG).call("pid", timeout=LONG)


def test_a_server_that_is_not_there_is_told(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.raises(EngineLost, match=f"127.0.0.1:{port} cannot be reached"):
        ServedEngine(Announcement(0, 1, "127.0.0.1", port, KEY.hex(), 1), {}, timeout=patient(5))


def test_servers_are_waited_for(tmp_path):
    with pytest.raises(
        ConfigError, match="0 of any rollout servers are there after 0 s; start them with megatron-r1 serve-rollouts"
    ):
        find_servers(tmp_path, 0)
    announcements = [Announcement(number, 2, f"node{number}", 1, KEY.hex(), 1) for number in range(2)]
    assert announce(tmp_path, announcements[1]).stat().st_mode & 0o077 == 0, "the key is the owner's alone"
    with pytest.raises(ConfigError, match="1 of 2 rollout servers"):
        find_servers(tmp_path, 0)
    announce(tmp_path, announcements[0])
    assert find_servers(tmp_path, 0) == announcements


def test_weights_travel_through_the_memory_of_a_node_where_trainer_and_engine_share_a_gpu():
    def transfer(device: str, **settings: str) -> str:
        rollout = RolloutConfig(max_response_tokens=8, **settings)
        limits = {"bos_token_id": 0, "eos_token_id": 1, "max_prompt_tokens": 8}
        return engine_options(PRESETS["tiny"], rollout, device=device, dtype="float32", **limits).transfer

    assert transfer("cuda") == transfer("cuda", placement="colocated") == transfer("cpu") == "shm"
    assert transfer("cuda", placement="disaggregated") == "nccl" and transfer("cpu", placement="disaggregated") == "shm"
    with pytest.raises(ConfigError, match="NCCL takes no two processes on one"):
        transfer("cuda", transfer="nccl")
    with pytest.raises(ConfigError, match="needs a CUDA device"):
        transfer("cpu", transfer="nccl", placement="disaggregated")


def test_an_engine_over_nodes_divides_its_devices():
    rollout = RolloutConfig(max_response_tokens=8, tensor_parallel_size=2, nodes_per_engine=4)
    with pytest.raises(ConfigError, match="nodes_per_engine=4 does not divide rollout.tensor_parallel_size=2"):
        engine_options(PRESETS["tiny"], rollout, device="cpu", dtype="float32", bos_token_id=0, eos_token_id=1, max_prompt_tokens=8)
