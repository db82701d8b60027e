"""Jobs that live as long as a comparison: each side computes in processes of its own and is told when its turn is.

A rank reads orders from its standard input and answers on its standard output, one line of JSON each; what it prints goes to
standard error. Between two orders it waits in a read and takes no processor time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from benchmarks.measure import Comparison, Side
from benchmarks.processes import ROOT, CommandFailed
from megatron_r1.errors import R1Error
from megatron_r1.runtime.launch import child_environment, free_port

Answer = dict[str, Any]
#: Does what an order with this name says, given its values.
Handlers = Mapping[str, Callable[..., Answer]]


class SideRanks:
    """The processes of one side, from the parent's view. As a context they end with the block.

    Args:
        name: of the side, for messages.
        command: starts one rank.
        ranks: how many.
    """

    def __init__(self, name: str, command: Sequence[str], ranks: int) -> None:
        self.name = name
        port = str(free_port())
        self._processes: list[subprocess.Popen[str]] = []
        for rank in range(ranks):
            numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
            place = {name: str(number) for name, number in numbers.items()} | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            environment = child_environment({"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **place})
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            self._processes.append(process)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: type[BaseException] | None, _value: object, _trace: TracebackType | None) -> None:
        for process in self._processes:
            assert process.stdin is not None and process.stdout is not None
            if error is not None:
                process.kill()
            process.stdin.close()  # no more orders: the rank ends
        for process in self._processes:
            process.wait()
            process.stdout.close()  # type: ignore[union-attr]

    def order(self, name: str, **values: Any) -> list[Answer]:
        """Have every rank do something; their answers, by rank.

        Raises:
            CommandFailed: a rank ended, or answered with an error.
        """
        for process in self._processes:
            assert process.stdin is not None
            try:
                process.stdin.write(json.dumps({"order": name, "values": values}) + "\n")
                process.stdin.flush()
            except BrokenPipeError:
                continue  # told below
        answers = []
        for rank, process in enumerate(self._processes):
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise CommandFailed(f"rank {rank} of {self.name} ended with code {process.wait()} at the order {name}")
            answer = json.loads(line)
            if "error" in answer:
                raise CommandFailed(f"rank {rank} of {self.name}: {answer['error']}")
            answers.append(answer)
        return answers

    def steps(self, count: int) -> tuple[float, float]:
        """Seconds that so many steps took: by the clock of the slowest rank, and processor time of all ranks."""
        answers = self.order("steps", count=count)
        return max(answer["wall_seconds"] for answer in answers), sum(answer["cpu_seconds"] for answer in answers)


def serve(handlers: Handlers) -> None:
    """A rank's loop: do what is ordered until there are no more orders."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # libraries print
    for line in sys.stdin:
        order = json.loads(line)
        try:
            answer = handlers[order["order"]](**order["values"])
        except R1Error as error:
            answer = {"error": str(error)}
        print(json.dumps(answer), file=answers, flush=True)


def timed_steps(step: Callable[[], object], synchronize: Callable[[], None] = lambda: None) -> Callable[[int], Answer]:
    """The order `steps`: so many in a row, after one that is not timed, since the other side has left the caches to it."""

    def steps(count: int) -> Answer:
        step()
        synchronize()
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(count):
            step()
        synchronize()
        return {"cpu_seconds": time.process_time() - cpu, "wall_seconds": time.perf_counter() - wall}

    return steps


def compare_in_turns(
    workload: str, ours: SideRanks, peer: SideRanks, *, amount: int, repeats: int, turn_seconds: float
) -> Comparison:
    """Let both compute in turn, never both at once. Who begins alternates, see `measure.compare`.

    Args:
        workload: name for the table.
        ours: ready to make steps.
        peer: likewise.
        amount: of work in one step.
        repeats: turns of each.
        turn_seconds: that a turn lasts, about: as many whole steps as fit, at least one.
    """
    counts = {id(side): max(1, round(turn_seconds / side.steps(1)[0])) for side in (ours, peer)}
    result = Comparison(workload, Side(), Side())
    for repetition in range(repeats):
        turns = [(result.ours, ours), (result.peer, peer)]
        for times, side in turns if repetition % 2 == 0 else reversed(turns):
            count = counts[id(side)]
            wall, cpu = side.steps(count)
            times.amounts.append(amount * count)
            times.wall_seconds.append(wall)
            times.own_cpu_seconds.append(cpu)
    return result
